"""Laws of a batch's largest eigenvalue beside the mean over sampled batches.

Exact digits problems: every law predicts from one measurement of all samples in batches of 16;
the truth is the mean over 50 random batches of each size.

    python benchmarks/edge_laws.py
"""

import argparse

import numpy as np
import torch

from batchlr import HessianOperator, edge_laws, measure_curvature, supervised, top_eigenpairs
from batchlr.training.data import load_data
from batchlr.training.models import build_model

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
PROBLEMS = {  # hidden layers, steps of training
    "logistic, start": ([], 0),
    "logistic, trained": ([], 1500),
    "network, start": ([16], 0),
    "network, 150 steps": ([16], 150),
    "network, 1500 steps": ([16], 1500),
}
LOSS = supervised(torch.nn.CrossEntropyLoss())


def problem(hidden, steps):
    torch.manual_seed(0)
    data = load_data("digits", seed=0, image_size=8)
    every = torch.arange(len(data.train))
    x, y = next(iter(data.train.batches([every], device=torch.device("cpu"))))
    model = build_model("mlp", num_classes=10, in_channels=1, image_size=8, hidden=hidden).double()
    x = x.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:32]
        optimizer.zero_grad()
        LOSS(model, (x[rows], y[rows])).backward()
        optimizer.step()
    return model, x, y


def sampled(model, x, y, size, count, generator):
    """Largest eigenvalues of ``count`` random batches."""
    values = []
    for _ in range(count):
        rows = torch.randperm(len(x), generator=generator)[:size]
        operator = HessianOperator(model, LOSS, [(x[rows], y[rows])])
        values.append(float(top_eigenpairs(operator, tol=3e-3, max_steps=60).values[0]))
    return np.array(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=50)
    count = parser.parse_args().batches
    above, below = {}, {}
    for name, (hidden, steps) in PROBLEMS.items():
        model, x, y = problem(hidden, steps)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        batches = [(x[part], y[part]) for part in rows.split(16)]
        report = measure_curvature(model, LOSS, batches, optimizer="sgd")
        generator = torch.Generator().manual_seed(3)
        truth = {size: sampled(model, x, y, size, count, generator) for size in SIZES}
        print(
            f"\n{name}: lambda_1 {report.largest:.3g}, kappa {report.kappa:.3g}, critical batch "
            f"size {report.critical_batch_size:.3g}, {report.num_products} products. Error in "
            "percent (of the truth itself in the last row):\n"
        )
        print("| law | " + " | ".join(f"B={size}" for size in SIZES) + " |")
        print("|---" * (1 + len(SIZES)) + "|")
        for law in edge_laws(report, SIZES[0]):
            errors = []
            for size in SIZES:
                prediction = edge_laws(report, size)[law].largest
                error = prediction / truth[size].mean() - 1
                errors.append(error)
                store = above if size >= report.critical_batch_size else below
                store.setdefault(law, []).append(error)
            print(f"| {law} | " + " | ".join(f"{100 * error:+.0f}" for error in errors) + " |")
        scatter = [truth[s].std() / truth[s].mean() / np.sqrt(count) for s in SIZES]
        print("| (truth) | " + " | ".join(f"{100 * s:.0f}" for s in scatter) + " |", flush=True)
    print("\n| law | B >= B*: median, worst error | B < B*: median, worst error |\n|---|---|---|")
    for law in above:
        cells = []
        for errors in (above[law], below.get(law, [])):
            size = np.abs(errors)
            cells.append(f"{np.median(size):.1%}, {size.max():.0%}" if len(size) else "")
        print(f"| {law} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
