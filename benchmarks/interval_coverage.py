"""How often the 90 % interval of a rate, measured on 256 samples, holds the exact limit.

The problem is the tanh network of `stable_rate.py` (910 weights) on the digits; the exact
mean-square limit is that script's, from the per-sample matrices of all 1,280 samples in every
direction. The Gauss-Newton matrix is measured again and again on random samples, without looking
at the others. Finished repetitions are kept in the results file and skipped.

    python benchmarks/interval_coverage.py              # 200 repetitions at three points
    python benchmarks/interval_coverage.py --table
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from stable_rate import SAMPLES, Problem, Quadratic, mean_square_limit

from batchlr import measure_curvature

RESULTS = Path(__file__).resolve().parent / "results" / "interval_coverage.jsonl"
MATRIX = "ggn"
CASES = [
    (optimizer, momentum, batch_size)
    for optimizer, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adam", 0.9))
    for batch_size in (8, 64, 512)
]


def exact(problem):
    """The limit of every case."""
    limits = []
    for optimizer, momentum, batch_size in CASES:
        adam = optimizer == "adam"
        quadratic = Quadratic(problem, batch_size, problem.scale(batch_size, adam))
        limits.append(mean_square_limit(quadratic, momentum, adam))
    return limits


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


def run(steps, options, finished):
    """Append the exact limits and each repetition to the results as soon as it is there."""

    def keep(repetition, found):
        line = {"steps": steps, "repetition": repetition, "bounds": found}
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    problem = Problem("mlp", "digits", steps)
    if (steps, None) not in finished:
        keep(None, [(limit, limit, limit) for limit in exact(problem)])
    for repetition in range(options.repetitions):
        if (steps, repetition) not in finished:
            generator = torch.Generator().manual_seed(1000 + repetition)
            rows = torch.randperm(SAMPLES, generator=generator)[: options.samples]
            keep(repetition, bounds(measure(problem, rows, options.batch, repetition)))


def table(lines):
    """Markdown: where the intervals lie and how often they hold the reference."""
    print("| training | optimizer | momentum | B | exact | median | interval | holds |")
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
