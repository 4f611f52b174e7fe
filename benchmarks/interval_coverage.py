"""How often the 90 % interval of a rate, measured on 256 samples, holds the exact limit.

The problem is the tanh network of `stable_rate.py` (910 weights) on the digits; the exact
mean-square limits are those in its results, from the per-sample matrices of all 1,280 samples in
every direction. The Gauss-Newton matrix is measured again and again on random samples, without
looking at the others. Finished repetitions are kept in the results file and skipped.

    python benchmarks/stable_rate.py --only mlp-digits  # unless its results are there
    python benchmarks/interval_coverage.py              # 200 repetitions at two points
    python benchmarks/interval_coverage.py --table
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from stable_rate import POINTS, SAMPLES, Problem
from stable_rate import RESULTS as LIMITS
from stable_rate import read as read_limits

from batchlr import measure_curvature

RESULTS = Path(__file__).resolve().parent / "results" / "interval_coverage.jsonl"
MATRIX = "ggn"
CASES = [
    (optimizer, momentum, batch_size)
    for optimizer, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adam", 0.9))
    for batch_size in (4, 16, 64, 256)
]


def exact(point):
    """The limit of every case."""
    known = {
        (row["optimizer"], row["momentum"], row["batch"]): row["mean_square"]
        for row in read_limits(LIMITS)
        if (row["problem"], row["point"]) == ("mlp-digits", point)
    }
    return [known[case] for case in CASES]


def measure(problem, rows, batch_size, seed):
    batches = [(problem.x[part], problem.y[part]) for part in rows.split(batch_size)]
    return measure_curvature(
        problem.model, problem.loss_fn, batches, dataset_size=SAMPLES,
        matrix=MATRIX, tol=1e-2, max_products=30, num_small_batches=0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def bounds(report):
    """``low, value, high`` of every case."""
    found = [report.max_lr(b, optimizer=o, momentum=m) for o, m, b in CASES]
    return [(bound.low, bound.value, bound.high) for bound in found]


def run(point, options, finished):
    """Append each repetition to the results as soon as it is there."""
    problem = Problem("mlp", "digits", POINTS[point])
    for repetition in range(options.repetitions):
        if (point, repetition) in finished:
            continue
        generator = torch.Generator().manual_seed(1000 + repetition)
        rows = torch.randperm(SAMPLES, generator=generator)[: options.samples]
        found = bounds(measure(problem, rows, options.batch, repetition))
        line = {"point": point, "repetition": repetition, "bounds": found}
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def table(lines):
    """Markdown: where the intervals lie and how often they hold the limit."""
    print("| point | optimizer | momentum | B | exact | median | interval | holds |")
    print("|---" * 8 + "|")
    total = []
    for point in POINTS:
        here = [line["bounds"] for line in lines if line["point"] == point]
        if not here:
            continue
        for index, truth in enumerate(exact(point)):
            optimizer, momentum, size = CASES[index]
            found = np.array([bounds[index] for bounds in here if bounds[index]])
            if not len(found):
                continue
            low, value, high = found.T / truth
            holds = ((low <= 1) & (high >= 1)).mean()
            total.append(holds)
            print(
                f"| {point} | {optimizer} | {momentum} | {size} | {truth:.3g} | "
                f"{np.median(value):.2f} ({np.quantile(value, 0.05):.2f} .. "
                f"{np.quantile(value, 0.95):.2f}) | {np.median(high / low):.2f}-fold | "
                f"{holds:.0%} of {len(found)} (above {(low > 1).mean():.0%}, "
                f"below {(high < 1).mean():.0%}) |"
            )
    inside = np.mean([0.85 <= holds <= 0.95 for holds in total])
    print(f"\nmean {np.mean(total):.0%}, {inside:.0%} of the rows within 85-95 %")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--point", action="append", choices=POINTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()

    def read():
        """The last line of each repetition; null stands for a case that is to be measured again."""
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
        return list({(line["point"], line["repetition"]): line for line in lines}.values())

    if not options.table:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
        finished = {(line["point"], line["repetition"]) for line in read() if all(line["bounds"])}
        for point in options.point or POINTS:
            run(point, options, finished)
    table(read())


if __name__ == "__main__":
    main()
