"""The largest eigenvalue along a training run: products spent and true error of each update.

Each run trains a small network on digits and updates a `CurvatureTracker` on the Hessian at the
weights of the day. The truth is scipy's eigsh on the same matrix in double precision, at every
``--check-every``-th update; all updates count for products.

    python benchmarks/tracking.py --runs mlp-gd cnn-fresh --updates 200 --check-every 4

Runs: gd is full-batch descent on the samples measured, sgd measures a fixed set, fresh measures
four new batches at each update, eos is descent at a rate that the curvature rises to (the edge of
stability), every20 is fresh with 20 steps between updates. The share of the time is that of the
updates in all of training, CPU time.
"""

import argparse
import copy
import statistics
import time

import scipy.sparse.linalg
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlr import CurvatureTracker, HessianOperator, supervised

RUNS = {  # mode, learning rate, steps between updates
    "gd": ("gd", 0.1, 1),
    "sgd": ("sgd", 0.1, 1),
    "fresh": ("fresh", 0.1, 1),
    "eos": ("gd", 0.3, 1),
    "every20": ("fresh", 0.1, 20),
}
BATCHES = 4


def mlp():
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


MODELS = {"mlp": (mlp, 64), "cnn": (cnn, 64)}  # and the samples of a batch


def digits():
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(raw.images, dtype=torch.float32)[order].unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(raw.target)[order]


def truth(model, batches, loss_fn, guess):
    """Largest eigenvalue in double precision."""
    pairs = [(x.double(), y) for x, y in batches]
    operator = HessianOperator(copy.deepcopy(model).double(), loss_fn, pairs)
    start = guess.double().numpy()
    values = scipy.sparse.linalg.eigsh(
        operator.to_scipy(), k=1, which="LA", tol=1e-4, v0=start, return_eigenvectors=False
    )
    return float(values[0])


def follow(name, updates, check_every, **options):
    kind, mode = name.split("-")
    mode, lr, interval = RUNS[mode]
    build, size = MODELS[kind]
    x, y = digits()
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(1)
    loss_fn = supervised(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    tracker = CurvatureTracker(**options)
    fixed = torch.arange(BATCHES * size).chunk(BATCHES)
    errors, products, beyond, fell_back, tracking, training = [], [], 0, 0, 0.0, 0.0
    for step in range(updates * interval):
        order = torch.randperm(len(x), generator=generator)
        parts = order[: BATCHES * size].chunk(BATCHES) if mode == "fresh" else fixed
        if step % interval == 0:
            batches = [(x[part], y[part]) for part in parts]
            began = time.process_time()
            update = tracker.update(HessianOperator(model, loss_fn, batches))
            tracking += time.process_time() - began
            products.append(update.num_products)
            fell_back += update.fell_back
            if (step // interval) % check_every == 0:
                exact = truth(model, batches, loss_fn, update.largest.vector)
                error = abs(update.largest.value - exact)
                errors.append(error / abs(exact))
                beyond += error > update.largest.error + 1e-3 * abs(exact)
        rows = torch.cat(list(fixed)) if mode == "gd" else order[:size]
        began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        training += time.process_time() - began
    mean = sum(products) / len(products)
    print(
        f"| {name} | {mean:.2f} | {sum(products[1:]) / (len(products) - 1):.2f} "
        f"| {max(products[1:])} | {100 * fell_back / len(products):.0f} % "
        f"| {100 * sum(errors) / len(errors):.2f} % | {100 * statistics.median(errors):.2f} % "
        f"| {100 * max(errors):.0f} % | {100 * beyond / len(errors):.0f} % "
        f"| {100 * tracking / (tracking + training):.0f} % |",
        flush=True,
    )
    return mean, sum(errors) / len(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{model}-{run}" for model in MODELS for run in RUNS]
    parser.add_argument("--runs", nargs="+", choices=names, default=names)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--check-every", type=int, default=4)
    parser.add_argument("--tol", type=float, default=None)
    arguments = parser.parse_args()
    options = {} if arguments.tol is None else {"tol": arguments.tol}
    print(
        "| run | products an update | the same, warm | most | longer runs | mean error | median "
        "| largest | above its estimate | share of the time |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    figures = [
        follow(name, arguments.updates, arguments.check_every, **options) for name in arguments.runs
    ]
    products, errors = zip(*figures, strict=True)
    print(
        f"\nmean over runs: {statistics.mean(products):.2f} products, "
        f"error {100 * statistics.mean(errors):.2f} %"
    )


if __name__ == "__main__":
    main()
