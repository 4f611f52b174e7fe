"""How often the 90 % interval of a rate holds the value that all samples give.

The Gauss-Newton matrix of a small network on the digits is measured again and again on random
samples of the training set; the reference is the same law on all of it, in batches of one sample:
then neither the mean nor the noise is an estimate. (In batches of 4 the reference itself was up to
8 % off by chance.) Finished repetitions are kept in the results file and skipped.

    python benchmarks/interval_coverage.py              # 200 repetitions at three points: an hour
    python benchmarks/interval_coverage.py --table
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from batchlr import measure_curvature, supervised
from batchlr.training.data import load_data
from batchlr.training.models import build_model

RESULTS = Path(__file__).resolve().parent / "results" / "interval_coverage.jsonl"
MATRIX = "ggn"
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
        matrix=MATRIX, tol=1e-2, max_products=30, num_small_batches=0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def bounds(report):
    """``low, value, high`` of every case."""
    found = [report.max_lr(b, optimizer=o, momentum=m) for o, m, b in CASES]
    return [(bound.low, bound.value, bound.high) for bound in found]


def run(steps, options, finished):
    """Append the reference and each repetition to the results as soon as it is there."""

    def keep(repetition, found):
        line = {"steps": steps, "repetition": repetition, "bounds": found}
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    model, x, y = problem(steps)
    if (steps, None) not in finished:
        every = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        keep(None, bounds(measure(model, x, y, every, 1, 0)))
    for repetition in range(options.repetitions):
        if (steps, repetition) not in finished:
            generator = torch.Generator().manual_seed(1000 + repetition)
            rows = torch.randperm(len(x), generator=generator)[: options.samples]
            keep(repetition, bounds(measure(model, x, y, rows, options.batch, repetition)))


def table(lines):
    """Markdown: where the intervals lie and how often they hold the reference."""
    print("| training | optimizer | momentum | B | reference | median | interval | holds |")
    print("|---" * 8 + "|")
    total = []
    for steps in sorted({line["steps"] for line in lines}):
        here = [line for line in lines if line["steps"] == steps]
        truths = next(line["bounds"] for line in here if line["repetition"] is None)
        found = np.array([line["bounds"] for line in here if line["repetition"] is not None])
        for index, (optimizer, momentum, size) in enumerate(CASES):
            truth = truths[index][1]
            low, value, high = found[:, index].T / truth
            holds = ((low <= 1) & (high >= 1)).mean()
            total.append(holds)
            print(
                f"| {steps} steps | {optimizer} | {momentum} | {size} | {truth:.3g} | "
                f"{np.median(value):.2f} ({np.quantile(value, 0.05):.2f} .. "
                f"{np.quantile(value, 0.95):.2f}) | {np.median(high / low):.2f}-fold | "
                f"{holds:.0%} (above {(low > 1).mean():.0%}, below {(high < 1).mean():.0%}) |"
            )
        print(f"<!-- {steps} steps: {len(found)} repetitions -->")
    inside = np.mean([0.85 <= holds <= 0.95 for holds in total])
    print(f"\nmean {np.mean(total):.0%}, {inside:.0%} of the rows within 85-95 %")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, action="append", help="of training before; all three")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()

    def read():
        return [json.loads(line) for line in options.out.read_text().splitlines()]

    if not options.table:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
        finished = {(line["steps"], line["repetition"]) for line in read()}
        for steps in options.steps or (0, 40, 400):
            run(steps, options, finished)
    table(read())


if __name__ == "__main__":
    main()
