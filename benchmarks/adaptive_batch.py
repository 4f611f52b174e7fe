"""Batches that grow against fixed ones, small, medium and large, at equal epochs, on the digits.

The question is whether a run that starts small and grows keeps the accuracy of small batches at
some of the steps of large ones. Fixed rates are each size's own, the best of a grid by one seed,
judged by the others; the adaptive run has the rate of its first size, as published, or lets it
follow by a rule; with `lr: auto` every run measures its own.

    python benchmarks/adaptive_batch.py
    python benchmarks/adaptive_batch.py --models mlp
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from batchlr.training.config import load_config
from batchlr.training.loop import _Run, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "adaptive_batch.jsonl"
TASK = """
data: {name: digits, image_size: 8}
optim: {name: sgd, lr: auto, momentum: 0.9, weight_decay: 5.0e-4}
train: {epochs: 20}
log: {progress: false}
checkpoint: {every_epochs: 0}
"""
MODELS = {
    "mlp": "model={name: mlp, hidden: [64, 64]}",
    "preresnet": "model={name: preresnet, depth: 8, block: basic, width: 0.5}",
}
SMALL, MEDIUM, LARGE = 16, 80, 512  # the one between makes about as many steps as a growing one
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
GROWING = f"adaptive: {{max_size: {LARGE}}}"
PUBLISHED = (
    f"adaptive: {{max_size: {LARGE}, tolerance: 0.5, debias: false, max_growth: null, "
    "test_every: 1, observe_every: 1, smoothing: 0}"
)
CHOOSES, JUDGES = (0,), (1, 2, 3)
KINDS = {
    "small": f"batch={{global_size: {SMALL}}}",
    "medium": f"batch={{global_size: {MEDIUM}}}",
    "large": f"batch={{global_size: {LARGE}}}",
    "adaptive": f"batch={{global_size: {SMALL}, {GROWING}}}",
    "adaptive, linear": f"batch={{global_size: {SMALL}, {GROWING[:-1]}, rate: linear}}}}",
    "adaptive, sqrt": f"batch={{global_size: {SMALL}, {GROWING[:-1]}, rate: sqrt}}}}",
    "as published": f"batch={{global_size: {SMALL}, {PUBLISHED}}}",
}
FIXED = ("small", "medium", "large")  # have rates of their own; all others the small one's


def key(cell):
    return tuple(str(cell[name]) for name in ("model", "kind", "rate", "seed"))


def load():
    if not RESULTS.exists():
        return {}
    return {key(row): row for row in map(json.loads, RESULTS.read_text().splitlines())}


def run(cell):
    """Train one cell; returns it with what the comparison needs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.yaml"
        path.write_text(TASK)
        overrides = [MODELS[cell["model"]], KINDS[cell["kind"]]]
        overrides += [f"optim.lr={cell['rate']}", f"seed={cell['seed']}"]
        try:
            summary = train(load_config(path, overrides).config, Path(folder) / "run")
        except ArithmeticError:
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    names = ("test_accuracy", "test_loss", "steps", "samples", "batch_size", "diverged")
    return cell | {name: summary[name] for name in names}


def get(rows, cell):
    if key(cell) not in rows:
        rows[key(cell)] = row = run(cell)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return rows[key(cell)]


def best_rate(rows, model, kind):
    """Of the grid, by the seed that chooses; ties go to the lower loss."""

    def score(rate):
        found = [
            get(rows, {"model": model, "kind": kind, "rate": rate, "seed": seed})
            for seed in CHOOSES
        ]
        if any(row["diverged"] for row in found):
            return (-math.inf, -math.inf)
        accuracy = statistics.mean(row["test_accuracy"] for row in found)
        return (accuracy, -statistics.mean(row["test_loss"] for row in found))

    return max(RATES, key=score)


def cells(rows, models):
    """Model, kind, rate and rows of the judging seeds."""
    for model in models:
        rates = {kind: best_rate(rows, model, kind) for kind in FIXED}
        for kind in KINDS:
            for rate in (rates[kind if kind in FIXED else "small"], "auto"):
                if rate == "auto" and kind in ("adaptive, linear", "adaptive, sqrt"):
                    continue
                cell = {"model": model, "kind": kind, "rate": rate}
                yield model, kind, rate, [get(rows, cell | {"seed": seed}) for seed in JUDGES]


def table(rows, models):
    print("| model | batches | rate | accuracy | s.d. | steps | gradients | last batch |")
    print("|---|---|---|---|---|---|---|---|")
    for model, kind, rate, found in cells(rows, models):
        accuracies = [100 * (row["test_accuracy"] or 0.0) for row in found]
        mean = {name: statistics.mean(row[name] for row in found) for name in found[0] if name in (
            "steps", "samples", "batch_size")}  # fmt: skip
        print(
            f"| {model} | {kind} | {rate} | {statistics.mean(accuracies):.1f} | "
            f"{statistics.stdev(accuracies):.1f} | {mean['steps']:.0f} | {mean['samples']:.0f} | "
            f"{mean['batch_size']:.0f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    _Run.draw = lambda self: None
    table(load(), options.models)


if __name__ == "__main__":
    main()
