"""`lr: auto` against a grid of fixed rates, on the demo configurations.

For each network, optimizer and batch size: one run with the rate measured, and one for each fixed
rate, a factor 3 apart, under the same schedule and seed. Finished cells are kept in the results
file and skipped, so the script may be stopped and started at will.

    python benchmarks/digits_grid.py --jobs 2 --out benchmarks/results/digits_grid.jsonl
    python benchmarks/digits_grid.py --table
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "digits_grid.jsonl"
MODELS = ("vgg", "wrn", "preresnet")
BATCHES = (16, 64, 512)
RATES = {
    "sgd": (0.0011, 0.0033, 0.01, 0.03, 0.09),
    "adam": (0.00011, 0.00033, 0.001, 0.003, 0.009),
}


def cells(models, optimizers, batches, seeds):
    """Every run of the comparison: auto first, then the grid."""
    for model, optimizer, batch, seed in itertools.product(models, optimizers, batches, seeds):
        for rate in ("auto", *RATES[optimizer]):
            yield {
                "model": model,
                "optimizer": optimizer,
                "batch": batch,
                "rate": rate,
                "seed": seed,
            }


def run(cell, extra):
    """Train one cell in a process of its own; returns the cell with its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "batchlr", "train",
            str(ROOT / "configs" / "demo" / f"digits_{cell['model']}.yaml"),
            f"optim.name={cell['optimizer']}", f"optim.lr={cell['rate']}",
            f"batch.global_size={cell['batch']}", f"seed={cell['seed']}",
            "checkpoint.every_epochs=0", *extra, "--out", str(Path(folder) / "run"),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        summary = Path(folder) / "run" / "summary.json"
        if not summary.exists():
            msg = f"{cell}: exit {done.returncode}\n{done.stderr}"
            raise SystemExit(msg)
        return cell | {"exit": done.returncode} | json.loads(summary.read_text())


def key(cell):
    return tuple(str(cell[k]) for k in ("model", "optimizer", "batch", "rate", "seed"))


def load(path):
    if not path.exists():
        return {}
    return {key(row): row for row in map(json.loads, path.read_text().splitlines())}


def table(rows):
    """Markdown: accuracy of auto and of each fixed rate, and the distance to the best."""
    groups = {}
    for row in rows.values():
        place = (row["model"], row["optimizer"], int(row["batch"]))
        groups.setdefault(place, {}).setdefault(str(row["rate"]), []).append(row)
    print(
        "| model | optimizer | batch | auto | last peak | grid (rates ascending) "
        "| auto - best | time measuring |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (model, optimizer, batch), runs in sorted(groups.items()):

        def accuracy(rate, runs=runs):
            values = [r["test_accuracy"] or 0.0 for r in runs.get(str(rate), [])]
            return sum(values) / len(values) if values else None

        auto = accuracy("auto")
        grid = [accuracy(rate) for rate in RATES[optimizer]]
        if auto is None or None in grid:
            continue
        first = runs["auto"][0]
        share = first["curvature_seconds"] / first["wall_seconds"]
        print(
            f"| {model} | {optimizer} | {batch} | {100 * auto:.1f} | {first['peak_lr']:.2g} | "
            + " ".join(f"{100 * value:.1f}" for value in grid)
            + f" | {100 * (auto - max(grid)):+.1f} | {100 * share:.0f} % |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=("sgd", "adam"))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--only", choices=("auto", "fixed"), help="run only these cells")
    parser.add_argument("--set", nargs="*", default=(), help="further overrides a.b=c of each run")
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    rows = load(options.out)
    wanted = [
        cell
        for cell in cells(options.models, options.optimizers, options.batches, options.seeds)
        if key(cell) not in rows
        and (options.only is None or (cell["rate"] == "auto") == (options.only == "auto"))
    ]
    if not options.table:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.jobs) as pool, options.out.open("a") as file:
            for row in pool.map(lambda cell: run(cell, options.set), wanted):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows[key(row)] = row
                print(
                    *key(row),
                    f"accuracy {row['test_accuracy']}",
                    f"{row['wall_seconds']:.0f} s",
                    flush=True,
                )
    table(rows)


if __name__ == "__main__":
    main()
