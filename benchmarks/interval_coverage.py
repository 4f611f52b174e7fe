"""How often the 90 % interval of a rate holds the value that all samples give.

A small network on the digits is measured again and again on random samples of the training set;
the reference is the same law on all of it, in batches of 4.

    python benchmarks/interval_coverage.py --repetitions 200
"""

import argparse

import numpy as np
import torch

from batchlr import measure_curvature, supervised
from batchlr.training.data import load_data
from batchlr.training.models import build_model

CASES = [
    (optimizer, momentum, batch_size)
    for optimizer, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adam", 0.9))
    for batch_size in (8, 64, 512)
]


def problem(steps):
    """The digits, and a tanh network after ``steps`` steps of training."""
    torch.manual_seed(0)
    data = load_data("digits", seed=0, image_size=8)
    x, y = next(
        iter(data.train.batches([torch.arange(len(data.train))], device=torch.device("cpu")))
    )
    model = build_model("mlp", num_classes=10, in_channels=1, image_size=8, hidden=[24])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:32]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model, x, y


def measure(model, x, y, rows, batch_size, seed):
    batches = [(x[part], y[part]) for part in rows.split(batch_size) if len(part) == batch_size]
    return measure_curvature(
        model, supervised(torch.nn.CrossEntropyLoss()), batches, dataset_size=len(x),
        tol=1e-2, max_products=30, tracking=False, num_small_batches=0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    print("| training | optimizer | momentum | B | reference | median | interval | holds |")
    print("|---" * 8 + "|")
    total = []
    for steps in (0, 40, 400):
        model, x, y = problem(steps)
        generator = torch.Generator().manual_seed(2)
        whole = measure(model, x, y, torch.randperm(len(x), generator=generator), 4, 0)
        rows = {case: [] for case in CASES}
        for seed in range(options.repetitions):
            chosen = torch.randperm(len(x), generator=generator)[: options.samples]
            report = measure(model, x, y, chosen, options.batch, seed)
            for optimizer, momentum, size in CASES:
                bound = report.max_lr(size, optimizer=optimizer, momentum=momentum)
                rows[optimizer, momentum, size].append((bound.low, bound.value, bound.high))
        for (optimizer, momentum, size), found in rows.items():
            truth = whole.max_lr(size, optimizer=optimizer, momentum=momentum).value
            low, value, high = np.array(found).T / truth
            holds = ((low <= 1) & (high >= 1)).mean()
            total.append(holds)
            print(
                f"| {steps} steps | {optimizer} | {momentum} | {size} | {truth:.3g} | "
                f"{np.median(value):.2f} ({np.quantile(value, 0.05):.2f} .. "
                f"{np.quantile(value, 0.95):.2f}) | {np.median(high / low):.2f}-fold | "
                f"{holds:.0%} |",
                flush=True,
            )
    inside = np.mean([0.85 <= holds <= 0.95 for holds in total])
    print(f"\nmean {np.mean(total):.0%}, {inside:.0%} of the rows within 85-95 %")


if __name__ == "__main__":
    main()
