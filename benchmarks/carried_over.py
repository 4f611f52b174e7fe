"""A rate tuned at batch 16, carried over to 64 and 256 by every rule, beside one tuned there.

And beside `auto`, which knows no rate at all: a controller measures it.

Digits, micro-batches of 16 throughout, so that batch norm is the same function at every batch size;
a cosine without warm-up; as many epochs for all but AdaScale, which ends when it has made good the
small batch's steps. The rate at 16 and the one tuned at each size are the best of a grid by seed 0;
seeds 1 to 3 judge. Finished runs are kept and skipped.

    python benchmarks/carried_over.py
    python benchmarks/carried_over.py --models mlp
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import batchlr
from batchlr.scaling_rules import rescale_adam
from batchlr.training.models.preresnet import PreResNet

RESULTS = Path(__file__).parent / "results" / "carried_over.jsonl"
MICRO, SIZES, EPOCHS, TEST = 16, (64, 256), 12, 360
RATES = {
    "sgd": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "adam": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
RULES = {
    "sgd": ("unchanged", "sqrt", "linear", "AdaScale", "auto"),
    "adam": ("unchanged", "sqrt", "linear", "BatchInvariantAdam", "auto"),
}
CHOOSES, JUDGES = 0, (1, 2, 3)


def network(name):
    if name == "mlp":
        layers = [nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(64, 10))
    return PreResNet(depth=8, block="basic", width=0.5, num_classes=10, in_channels=1)


def data(seed):
    """Inputs and labels ``(N, 1, 8, 8)`` and ``(N,)``, for training and for the test."""
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inputs = (pixels.float() / 16 - 0.3).reshape(-1, 1, 8, 8)
    parts = rows[TEST:], rows[:TEST]
    return [(inputs[part], labels[part]) for part in parts]


def algorithm(cell, parameters):
    """The optimizer, whose peak rate is the cell's carried over by its rule."""
    ratio, rate = cell["batch"] / MICRO, cell["rate"]
    if cell["rule"] == "BatchInvariantAdam":
        return batchlr.BatchInvariantAdam(parameters, lr=rate)
    if cell["optimizer"] == "adam":
        if cell["rule"] == "sqrt":
            found = rescale_adam(rate, MICRO, cell["batch"])
            return torch.optim.Adam(parameters, found.lr, betas=found.betas, eps=found.eps)
        return torch.optim.Adam(parameters, rate * (ratio if cell["rule"] == "linear" else 1))
    factor = {"linear": ratio, "sqrt": math.sqrt(ratio)}.get(cell["rule"], 1)
    return torch.optim.SGD(parameters, rate * factor, momentum=0.9)


def sample(inputs, labels, cell, generator):
    """Micro-batches to measure on: half a batch's samples, or 64."""
    rows = torch.randperm(len(labels), generator=generator)[: max(64, cell["batch"] // 2)]
    return [(inputs[part], labels[part]) for part in rows.split(MICRO)]


def run(cell):
    """Train one cell: it with its accuracy in percent, its steps and the epochs they took."""
    torch.manual_seed(cell["seed"])
    model = network(cell["model"])
    (inputs, labels), (unseen, answers) = data(cell["seed"])
    per_step = cell["batch"] // MICRO
    base_steps = EPOCHS * (len(labels) // MICRO)
    optimizer = algorithm(cell, model.parameters())
    scaled = cell["rule"] == "AdaScale"
    length = base_steps if scaled else base_steps // per_step
    peak = optimizer.param_groups[0]["lr"]
    scheduler = batchlr.BatchAwareLR(optimizer, peak, lambda o: CosineAnnealingLR(o, length))
    adascale = batchlr.AdaScale(scheduler, MICRO, total_steps=length) if scaled else None
    loss_fn = batchlr.supervised(nn.CrossEntropyLoss())
    controller = None
    if cell["rule"] == "auto":
        controller = batchlr.CurvatureController(
            scheduler,
            loss_fn,
            total_steps=length,
            batch_size=cell["batch"],
            dataset_size=len(labels),
            generator=torch.Generator().manual_seed(cell["seed"]),
        )
    groups = batchlr.GroupGradients(model.parameters())
    order, generator, steps = [], torch.Generator().manual_seed(cell["seed"]), 0
    while (adascale.progress if adascale else steps) < length:
        if controller:
            controller.maybe_update(model, lambda: sample(inputs, labels, cell, generator))
        optimizer.zero_grad()
        losses = []
        for _ in range(per_step):
            if not order:
                order = list(torch.randperm(len(labels), generator=generator).split(MICRO))
                order = [rows for rows in order if len(rows) == MICRO]
            rows = order.pop()
            loss = loss_fn(model, (inputs[rows], labels[rows]))
            (loss / per_step).backward()
            losses.append(loss.detach())
            if adascale:
                groups.add()
            elif cell["rule"] == "BatchInvariantAdam":
                optimizer.accumulate()
        if adascale:
            adascale.observe(groups.scatter(cell["batch"]))
        optimizer.step()
        (adascale or scheduler).step()
        if controller:
            controller.observe(torch.stack(losses).mean())
        steps += 1
    with torch.no_grad():
        right = (model.eval()(unseen).argmax(1) == answers).double().mean().item()
    epochs = EPOCHS * steps * per_step / base_steps
    return cell | {"accuracy": 100 * right, "steps": steps, "epochs": round(epochs, 2)}


def key(cell):
    return tuple(
        str(cell[name]) for name in ("model", "optimizer", "batch", "rule", "rate", "seed")
    )


class Runs:
    """Those of the results file, and any other on demand."""

    def __init__(self):
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        self.rows = {key(row): row for row in map(json.loads, lines)}

    def get(self, cell):
        if key(cell) not in self.rows:
            self.rows[key(cell)] = row = run(cell)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*key(row), f"{row['accuracy']:.1f} %", flush=True)
        return self.rows[key(cell)]

    def tuned(self, place):
        """The best rate of the grid by the seed that chooses, the lower one of equals."""
        found = [
            self.get(place | {"rule": "unchanged", "rate": rate, "seed": CHOOSES})
            for rate in RATES[place["optimizer"]]
        ]
        return max(found, key=lambda row: row["accuracy"])["rate"]

    def judged(self, place, rule, rate):
        rows = [self.get(place | {"rule": rule, "rate": rate, "seed": seed}) for seed in JUDGES]
        accuracies = [row["accuracy"] for row in rows]
        error = statistics.stdev(accuracies) / math.sqrt(len(rows))
        steps = round(statistics.mean(row["steps"] for row in rows))
        return f"{statistics.mean(accuracies):.1f} ({error:.1f})", steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "preresnet"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, lines = Runs(), []
    for model, optimizer in itertools.product(options.models, RATES):
        place = {"model": model, "optimizer": optimizer}
        rate = runs.tuned(place | {"batch": MICRO})
        there, steps = runs.judged(place | {"batch": MICRO}, "unchanged", rate)
        lines.append(f"| {model} | {optimizer} | {MICRO} | tuned | {rate:g} | {there} | {steps} |")
        for batch, rule in itertools.product(SIZES, ("tuned", *RULES[optimizer])):
            here = place | {"batch": batch}
            own = runs.tuned(here) if rule == "tuned" else rate
            found, steps = runs.judged(here, "unchanged" if rule == "tuned" else rule, own)
            lines.append(
                f"| {model} | {optimizer} | {batch} | {rule} | {own:g} | {found} | {steps} |"
            )
    print("\n| model | optimizer | batch | rule | rate given | accuracy (s.e.) | steps |")
    print("|---|---|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
