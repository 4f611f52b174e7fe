"""`lr: auto` against tuned rates: every network, batch size and optimizer with one setting.

A cell is a task, a network, an optimizer and a batch size. Its grid is seven fixed peak rates, a
factor of about three apart, under the same cosine with warm-up and for the same epochs: one seed
each, which chooses the best two, then three more for those. What chose does not judge: the best of
the grid is the better of the two over these three, and the seeds by which rules of `auto` were
chosen are not among them, though four of their runs were looked at (docs/log.md). `auto` runs with
the same seeds and no option of its own. Finished runs are kept in the results file and skipped, so
the script may be stopped and started at will, and any part run alone.

    python benchmarks/no_tuning.py --models mlp --batches 64
    python benchmarks/no_tuning.py --table
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from batchlr.training.config import TrainConfig
from batchlr.training.loop import DivergedError, train

RESULTS = Path(__file__).parent / "results" / "no_tuning.jsonl"
TASKS = {
    "digits": {"name": "digits"},
    "synthetic": {"name": "synthetic", "num_samples": 1437, "num_test_samples": 1000,
                  "channels": 1, "noise": 2.5},
}  # fmt: skip
MODELS = {  # options, image size
    "mlp": ({"name": "mlp", "hidden": [64, 64]}, 8),
    "vgg": ({"name": "vgg", "depth": 11, "width": 0.0625, "batch_norm": False}, 32),
    "vgg_bn": ({"name": "vgg", "depth": 11, "width": 0.0625, "batch_norm": True}, 32),
    "preresnet": ({"name": "preresnet", "depth": 8, "block": "basic"}, 8),
    "wrn": ({"name": "wide_resnet", "depth": 10, "widen_factor": 1}, 8),
}
CHOOSES = 0  # the seed of the whole grid
JUDGES = (4, 5, 6)  # 1 to 3 and 7 to 13 chose among the rules of `auto`
EPOCHS = {16: 8, 64: 12, 256: 24, 1024: 60}
RATES = {
    "sgd": (0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2.0),
    "adam": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}


def configuration(task, model, optimizer, batch, rate, seed):
    options, image_size = MODELS[model]
    return TrainConfig.model_validate(
        {
            "name": "no_tuning",
            "seed": seed,
            "data": TASKS[task] | {"image_size": image_size},
            "model": options,
            "optim": {"name": optimizer, "lr": rate, "weight_decay": 5e-4 * (optimizer == "sgd")},
            "batch": {"global_size": batch},
            "train": {"epochs": EPOCHS[batch]},
            "log": {"progress": False},
            "checkpoint": {"every_epochs": 0},
        }
    )


def run(cell, curvature=None):
    """One run in this process; its cell with the summary."""
    config = configuration(**cell)
    if curvature:
        config = TrainConfig.model_validate(config.model_dump() | {"curvature": curvature})
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "run"
        with contextlib.suppress(DivergedError):
            train(config, out)
        summary = json.loads((out / "summary.json").read_text())
        losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [entry["loss"] for entry in losses[-max(1, len(losses) // 20) :]]
    kept = ("test_accuracy", "test_loss", "steps", "peak_lr", "diverged", "curvature_products")
    share = summary["curvature_seconds"] / max(summary["wall_seconds"], 1e-9)
    return cell | {name: summary[name] for name in kept} | {
        "final_loss": None if summary["diverged"] else float(np.mean([x or np.nan for x in last])),
        "overhead": share,
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def key(cell):
    return tuple(
        str(cell[name]) for name in ("task", "model", "optimizer", "batch", "rate", "seed")
    )


def load(path):
    if not path.exists():
        return {}
    return {key(row): row for row in map(json.loads, path.read_text().splitlines())}


def accuracy(row):
    return 100 * (row["test_accuracy"] or 0.0)


def wanted(place, rows, judges):
    """The next runs of a cell: the grid, `auto`, then further seeds of the best two."""
    task, model, optimizer, batch = place
    cell = {"task": task, "model": model, "optimizer": optimizer, "batch": batch}
    for rate in RATES[optimizer]:
        yield cell | {"rate": rate, "seed": CHOOSES}
    for seed in (CHOOSES, *judges):
        yield cell | {"rate": "auto", "seed": seed}
    first = [rows.get(key(cell | {"rate": rate, "seed": CHOOSES})) for rate in RATES[optimizer]]
    if None not in first:
        best = sorted(first, key=lambda row: (accuracy(row), -(row["test_loss"] or np.inf)))[-2:]
        for row, seed in itertools.product(best, judges):
            yield cell | {"rate": row["rate"], "seed": seed}


def judged(runs, judges):
    """The runs that count: those of the judges, or the first where there are none."""
    judging = [row for row in runs if row["seed"] in judges]
    return judging or [row for row in runs if row["seed"] == CHOOSES]


def mean(accuracies):
    """Over the seeds, whose keys they are."""
    return float(np.mean(list(accuracies.values())))


def table(rows, judges, chosen_first=False):
    """Markdown: accuracy of auto and of each fixed rate, and the distance to the best.

    With ``chosen_first`` to the one that the choosing seed alone has as the best.
    """
    names = "task, model, optimizer, batch, auto, peak, grid (rates ascending), auto - best"
    names += ", 2 s.e., measuring"
    print("| " + names.replace(", ", " | ") + " |\n" + "|---" * 10 + "|")
    groups, found = {}, []
    for row in rows.values():
        place = (row["task"], row["model"], row["optimizer"], int(row["batch"]))
        groups.setdefault(place, {}).setdefault(str(row["rate"]), []).append(row)
    for place, runs in sorted(groups.items()):
        grid = [runs.get(str(rate)) for rate in RATES[place[2]]]
        if None in grid or "auto" not in runs:
            continue
        fixed = [{row["seed"]: accuracy(row) for row in judged(some, judges)} for some in grid]
        first = [next(accuracy(row) for row in some if row["seed"] == CHOOSES) for some in grid]
        autos = judged(runs["auto"], judges)
        auto = {row["seed"]: accuracy(row) for row in autos}
        judging = [some for some in fixed if some.keys() & set(judges)] or fixed
        most = max(map(len, judging))
        told = [(first[fixed.index(some)] if chosen_first else mean(some)) for some in judging]
        pairs = zip(told, judging, strict=True)
        _, best = max((pair for pair in pairs if len(pair[1]) == most), key=lambda pair: pair[0])
        pairs = [auto[seed] - best[seed] for seed in auto.keys() & best.keys()]
        if not pairs:
            print("| " + " | ".join(map(str, place)) + " | no seed in common |")
            continue
        error = 2 * np.std(pairs, ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
        found.append((place, np.mean(pairs), error, autos))
        columns = [
            *map(str, place),
            f"{mean(auto):.1f}",
            f"{found[-1][3][0]['peak_lr']:.2g}",
            " ".join(f"{mean(some):.1f}" for some in fixed),
            f"{found[-1][1]:+.1f}",
            f"{error:.1f}",
            f"{np.mean([row['overhead'] for row in found[-1][3]]):.0%}",
        ]
        print("| " + " | ".join(columns) + " |")
    summary(found)


def summary(found):
    """Markdown: a line a task and network."""
    names = "task, model, cells, mean of auto - best, worst, within 0.3 or 2 s.e., diverged runs"
    print("\n| " + names.replace(", ", " | ") + " |\n" + "|---" * 7 + "|")
    kinds = sorted({place[:2] for place, *_ in found})
    for kind in [*kinds, None]:
        cells = [cell for cell in found if kind in (None, cell[0][:2])]
        if not cells:
            continue
        differences = [difference for _, difference, _, _ in cells]
        close = sum(difference >= -max(0.3, error) - 1e-9 for _, difference, error, _ in cells)
        diverged = sum(row["diverged"] for *_, auto in cells for row in auto)
        columns = [
            *(kind or ("all", "all")),
            len(cells),
            f"{np.mean(differences):+.2f}",
            f"{min(differences):+.1f}",
            close,
            diverged,
        ]
        print("| " + " | ".join(map(str, columns)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=list(RATES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--judges", nargs="*", type=int, default=JUDGES, help="seeds")
    parser.add_argument("--only", choices=("auto", "fixed"))
    parser.add_argument("--policy", help="of `auto`, if not the default; asks for an --out")
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    parser.add_argument(
        "--chosen-first", action="store_true", help="the best rate is chosen by the first seed"
    )
    options = parser.parse_args()
    if options.policy and options.out == RESULTS:
        parser.error("--policy needs an --out of its own: the results are of the default policy")
    curvature = {"policy": options.policy} if options.policy else None
    torch.set_num_threads(1)
    rows = load(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    places = itertools.product(options.tasks, options.models, options.optimizers, options.batches)
    for place in [] if options.table else places:
        for cell in wanted(place, rows, options.judges):
            kind = "auto" if cell["rate"] == "auto" else "fixed"
            if key(cell) in rows or options.only not in (None, kind):
                continue
            row = run(cell, curvature if kind == "auto" else None)
            rows[key(row)] = row
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*key(row), f"{accuracy(row):.1f} %", f"{row['cpu_seconds']:.1f} s", flush=True)
    table(rows, options.judges, options.chosen_first)


if __name__ == "__main__":
    main()
