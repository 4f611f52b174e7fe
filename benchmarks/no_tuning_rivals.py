"""What else spares the search for a rate, on the cells of `no_tuning.py` and from its own package.

Rate finders (torch-lr-finder, Lightning) suggest a peak, and a normal run of ours follows at it;
`rule` does the same with the best rate of batch 64, carried over by the linear rule (SGD) or the
square-root rule (Adam). The optimizers (Prodigy, D-Adaptation, Schedule-Free, MoMo) train in a
small loop here, on the network, the batches and the test of that run. Each is used as its own
documentation recommends, with the grid's weight decay. `fixed` is the grid's best rate in the same
small loop: it shows that the loop trains as ours does, and what a step without a rival costs.
Lightning is there twice: from 2.5.3 on it suggests where the loss falls most per unit of rate, and
not per step of the search, which is in dispute (its issue 21141). The older one needs an
environment of its own, with `lightning==2.5.2`.

Finished cells are kept in the results file and skipped. `rule`, `fixed` and the table need the
rows of the grid, from one or more results files of `no_tuning.py`.

    python benchmarks/no_tuning_rivals.py --models mlp --tasks digits --batches 1024
    python benchmarks/no_tuning_rivals.py --table
    python benchmarks/no_tuning_rivals.py --table --rivals momo --seeds 4 5 6   # no choice
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from no_tuning import (
    CHOOSES,
    EPOCHS,
    MODELS,
    RATES,
    TASKS,
    accuracy,
    configuration,
    key,
    load,
    run,
)
from no_tuning import RESULTS as GRID
from packaging.specifiers import SpecifierSet
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from batchlr.scaling_rules import rescale_lr
from batchlr.training.config.variants import SGDOptions
from batchlr.training.data import train_batches
from batchlr.training.evaluation import evaluate
from batchlr.training.experiment import build_experiment
from batchlr.training.shapes import shape_factory

RESULTS = Path(__file__).parent / "results" / "no_tuning_rivals.jsonl"
TUNED_BATCH = 64
DIVERGED = 1e3  # as in batchlr.training.loop
NORM_BATCHES = 50  # of the re-estimation that Schedule-Free's documentation shows
PACKAGES = {
    "torch_lr_finder": "torch-lr-finder",
    "lightning": "lightning",
    "prodigyopt": "prodigyopt",
    "dadaptation": "dadaptation",
    "schedulefree": "schedulefree",
    "momo": "momo-opt",
}


class Batches:
    """The training batches as a loader: each pass is the next epoch of the run's order."""

    def __init__(self, experiment):
        self.experiment, self.epoch = experiment, 0

    def __len__(self):
        return self.experiment.steps_per_epoch

    def __iter__(self):
        config = self.experiment.config
        epoch, self.epoch = self.epoch, self.epoch + 1
        size = config.batch.global_size
        return train_batches(self.experiment.data, batch_size=size, seed=config.seed, epoch=epoch)


# ------------------------------------------------------------------------------ rate finders


def range_test(config):
    """torch-lr-finder as its README shows: from 1e-7 to 100 in 100 steps, steepest descent."""
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    experiment = build_experiment(config)
    optimizer = plain(config, experiment.model.parameters(), rate=1e-7)
    finder = LRFinder(experiment.model, optimizer, nn.CrossEntropyLoss(), device="cpu")
    finder.range_test(TrainDataLoaderIter(Batches(experiment)), end_lr=100, num_iter=100)
    figure, axes = plt.subplots()
    try:
        return finder.plot(ax=axes)[1]
    except RuntimeError:  # stopped too early for a suggestion
        return None
    finally:
        plt.close(figure)


def tuner(config):
    """Lightning's `Tuner.lr_find` with its defaults: 1e-8 to 1 in 100 steps.

    The trainer's `max_epochs` stays at its default: the length of our run would cut the search
    short where an epoch has few batches.
    """
    import lightning

    experiment = build_experiment(config)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.lr = experiment.model, 1e-3

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return plain(config, self.parameters(), rate=self.lr)

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        search = lightning.pytorch.tuner.Tuner(trainer)
        return search.lr_find(Module(), train_dataloaders=Batches(experiment)).suggestion()


def plain(config, parameters, rate):
    """The optimizer of the configuration."""
    options = config.optim
    if isinstance(options, SGDOptions):
        momentum, decay = options.momentum, options.weight_decay
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay)
    betas, decay = options.betas, options.weight_decay
    return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=options.eps, weight_decay=decay)


def run_at_found(find, cell, grid):
    """A run at the rate that the finder suggests, or a failure if it suggests none."""
    config = configuration(**cell, rate=1.0)
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        rate = find(config)
    seconds = time.process_time() - began
    if rate is None or not 0 < rate < math.inf:
        return cell | {
            "test_accuracy": None,
            "diverged": False,
            "failure": f"no suggestion ({rate})",
            "finder_seconds": seconds,
            "cpu_seconds": seconds,
        }
    row = run(cell | {"rate": float(rate)})
    return row | {"finder_seconds": seconds, "cpu_seconds": row["cpu_seconds"] + seconds}


# ------------------------------------------------------------------------------ optimizers


def prodigy(config, parameters, steps, rate):
    """Rate 1 and a cosine over all steps, without warm-up, which its README warns of."""
    from prodigyopt import Prodigy

    optimizer = Prodigy(parameters, lr=1.0, weight_decay=config.optim.weight_decay)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)


def d_adaptation(config, parameters, steps, rate):
    """Rate 1 and the schedule one would use anyway: the grid's."""
    from dadaptation import DAdaptAdam, DAdaptSGD

    options, decay = config.optim, config.optim.weight_decay
    if isinstance(options, SGDOptions):
        optimizer = DAdaptSGD(parameters, lr=1.0, momentum=options.momentum, weight_decay=decay)
    else:
        optimizer = DAdaptAdam(parameters, lr=1.0, weight_decay=decay)
    return optimizer, shape_factory(config.schedule, steps)(optimizer)


def schedule_free(config, parameters, steps, rate):
    """Its default rates (SGD 1.0, AdamW 0.0025); the warm-up it recommends is as long as ours."""
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    kind = SGDScheduleFree if isinstance(config.optim, SGDOptions) else AdamWScheduleFree
    warmup = round(config.schedule.warmup * steps)
    decay = config.optim.weight_decay
    return kind(parameters, warmup_steps=warmup, weight_decay=decay), None


def momo(config, parameters, steps, rate):
    """Its default rates (SGD 1, Adam 0.01), constant, and 0 as the loss's lower bound."""
    from momo import Momo, MomoAdam

    kind = Momo if isinstance(config.optim, SGDOptions) else MomoAdam
    return kind(parameters, weight_decay=config.optim.weight_decay), None


def fixed(config, parameters, steps, rate):
    """The configured optimizer at ``rate`` under the grid's schedule."""
    optimizer = plain(config, parameters, rate)
    return optimizer, shape_factory(config.schedule, steps)(optimizer)


def run_here(make, cell, grid):
    """A run of one rival's optimizer, or at the grid's best rate."""
    rate = None
    if make is fixed:
        best = best_rate(grid, cell, cell["batch"])
        if best is None:
            return None
        rate = float(best)
    began = time.process_time()
    experiment = build_experiment(configuration(**cell, rate=1.0))
    with contextlib.redirect_stdout(io.StringIO()):
        losses, peak = fit(experiment, make, rate)
    result = evaluate(experiment)
    ok = sound(losses[-1], losses[0]) and math.isfinite(result.loss)
    return cell | {
        "test_accuracy": result.accuracy if ok else None,
        "test_loss": result.loss if ok else None,
        "steps": len(losses),
        "peak_lr": peak,
        "diverged": not ok,
        "final_loss": float(np.mean(losses[-max(1, len(losses) // 20) :])) if ok else None,
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def fit(experiment, make, rate):
    """Losses of all steps, or until the loss is lost; and the largest rate used."""
    config, model = experiment.config, experiment.model
    total_steps = experiment.steps_per_epoch * config.train.epochs
    optimizer, scheduler = make(config, list(model.parameters()), total_steps, rate)
    batches, losses, peak = Batches(experiment), [], 0.0
    schedule_free = hasattr(optimizer, "eval")
    model.train()
    if schedule_free:
        optimizer.train()
    for batch in itertools.chain.from_iterable(batches for _ in range(config.train.epochs)):

        def closure(batch=batch):
            optimizer.zero_grad(set_to_none=True)
            loss = experiment.loss_fn(model, batch)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
        group = optimizer.param_groups[0]
        peak = max(peak, float(group["lr"] * group.get("d", 1.0)))
        if scheduler is not None:
            scheduler.step()
        if not sound(losses[-1], losses[0]):
            break
    if schedule_free:
        optimizer.eval()
        re_estimate(model, batches)
    return losses, peak


def sound(loss, first):
    return math.isfinite(loss) and loss <= DIVERGED * max(first, 1.0)


def re_estimate(model, batches):
    """Batch statistics at the averaged weights, as Schedule-Free asks for before a test."""
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    with torch.no_grad():
        for images, _ in itertools.islice(endless, NORM_BATCHES):
            model(images)


# ------------------------------------------------------------------------------ rule, best of grid


def run_rule(cell, grid):
    """A run at the best rate of batch 64, scaled; None where the grid is not there."""
    best = best_rate(grid, cell, TUNED_BATCH)
    if best is None:
        return None
    rule = "linear" if cell["optimizer"] == "sgd" else "sqrt"
    return run(cell | {"rate": rescale_lr(float(best), TUNED_BATCH, cell["batch"], rule=rule)})


def scores(grid, cell, batch):
    """Rate -> (mean accuracy, -mean loss), of the rates with most seeds, if all have one."""
    place = {"task": cell["task"], "model": cell["model"], "optimizer": cell["optimizer"]}
    known = {}
    for rate in RATES[cell["optimizer"]]:
        keys = [key(place | {"batch": batch, "rate": rate, "seed": seed}) for seed in range(10)]
        known[rate] = [grid[name] for name in keys if name in grid]
        if not known[rate]:
            return None
    most, found = max(map(len, known.values())), {}
    for rate, rows in known.items():
        if len(rows) == most:
            losses = [np.inf if row["test_loss"] is None else row["test_loss"] for row in rows]
            found[rate] = (np.mean([accuracy(row) for row in rows]), -np.mean(losses))
    return found


def best_rate(grid, cell, batch):
    found = scores(grid, cell, batch)
    return None if found is None else max(found, key=found.get)


# ------------------------------------------------------------------------------ the rivals


@dataclass(frozen=True)
class Rival:
    run: Callable  # of a cell and the grid's rows; None where it has nothing to run
    package: str | None = None  # the module it needs
    optimizers: tuple[str, ...] = ("sgd", "adam")
    versions: str = ""  # of the package that count as this rival


RIVALS = {
    "fixed": Rival(partial(run_here, fixed)),
    "rule": Rival(run_rule),
    "torch-lr-finder": Rival(partial(run_at_found, range_test), "torch_lr_finder"),
    "lightning": Rival(partial(run_at_found, tuner), "lightning", versions=">=2.5.3"),
    "lightning-2.5.2": Rival(partial(run_at_found, tuner), "lightning", versions="<2.5.3"),
    "prodigy": Rival(partial(run_here, prodigy), "prodigyopt", ("adam",)),
    "d-adaptation": Rival(partial(run_here, d_adaptation), "dadaptation"),
    "schedule-free": Rival(partial(run_here, schedule_free), "schedulefree"),
    "momo": Rival(partial(run_here, momo), "momo"),
}


OPTIONAL = {"rule", "lightning-2.5.2"}  # for the table: no runs at batch 64; old


def installed(rival):
    if rival.package is None:
        return True
    name = PACKAGES[rival.package]
    try:
        importlib.import_module(rival.package)
    except ImportError as error:
        print(f"{name} is left out ({error}): pip install '{name}', or '.[bench]' for all")
        return False
    version = importlib.metadata.version(name)
    if SpecifierSet(rival.versions).contains(version):
        return True
    print(f"{name}{rival.versions} is left out: this is version {version}")
    return False


# ------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Outcome:
    """One way to a rate in one cell; accuracies are means over its seeds, in points."""

    place: tuple  # task, model, optimizer, batch
    difference: float  # to the best rate of the grid; nan if no seed had a rate
    auto: float  # the same of `auto`, with the same seeds
    cost: float  # CPU time over that of a fixed run made the same way; nan if cut short
    diverged: int  # seeds
    failed: int  # seeds without a rate


def table(rows, grid, rivals, seeds):
    """Markdown for each optimizer, over the cells that the grid and all its rivals have."""
    groups = {}
    for row in rows.values():
        if row["seed"] not in seeds:
            continue
        place = (row["task"], row["model"], row["optimizer"], row["batch"])
        groups.setdefault(place, {}).setdefault(row["rival"], []).append(row)
    for optimizer in RATES:
        names = [name for name in rivals if optimizer in RIVALS[name].optimizers]
        needed = set(names) - OPTIONAL
        places = [
            place
            for place, runs in groups.items()
            if place[2] == optimizer
            and needed <= runs.keys()
            and best_rate(grid, cell_of(place), place[3]) is not None
        ]
        measured = [place for place in places if autos(grid, place, seeds)]
        for chosen, words in ((measured, "with"), (set(places) - set(measured), "without")):
            if chosen:
                print(f"\n{optimizer}, {len(chosen)} cells {words} runs of `auto`\n")
                part(names, {place: groups[place] for place in sorted(chosen)}, grid, seeds)


def part(names, groups, grid, seeds):
    columns = "rival, cells, - best, median, auto - best, worst cell, 5 below, diverged, no rate"
    print("| " + columns.replace(", ", " | ") + " | CPU |\n" + "|---" * 10 + "|")
    for name in [*names, "auto"]:
        outcomes = []
        for place, runs in groups.items():
            some = runs.get(name, []) if name != "auto" else autos(grid, place, seeds)
            if some:
                outcomes.append(outcome(place, some, runs, grid))
        if outcomes:
            print("| " + " | ".join([name, *summary(outcomes)]) + " |")


def outcome(place, rows, runs, grid):
    found = [row for row in rows if not row.get("failure")]
    seeds = [row["seed"] for row in found]
    same = autos(grid, place, seeds)
    best = best_of(grid, place, seeds)
    return Outcome(
        place,
        difference=np.mean([accuracy(row) for row in found]) - best if found else np.nan,
        auto=np.mean([accuracy(row) for row in same]) - best if same else np.nan,
        cost=np.median([cost(row, runs) for row in rows]),
        diverged=sum(row["diverged"] for row in rows),
        failed=len(rows) - len(found),
    )


def summary(outcomes):
    known = [one for one in outcomes if np.isfinite(one.difference)]
    differences = np.array([one.difference for one in known] or [np.nan])
    worst = min(known, key=lambda one: one.difference, default=None)
    where = (
        worst and f"{worst.difference:+.1f} ({worst.place[0]} {worst.place[1]} {worst.place[3]})"
    )
    auto = np.mean([one.auto for one in known] or [np.nan])
    costs = [one.cost for one in outcomes if np.isfinite(one.cost)]
    return [
        str(len(known)),
        f"{np.mean(differences):+.2f}",
        f"{np.median(differences):+.2f}",
        f"{auto:+.2f}" if np.isfinite(auto) else "",
        where or "",
        str(np.sum(differences < -5)),
        str(sum(one.diverged for one in outcomes)),
        str(sum(one.failed for one in outcomes)),
        f"{np.median(costs):.2f}" if costs else "",
    ]


def cost(row, runs):
    """CPU time over that of a fixed run made the same way; nan for a run that was cut short."""
    if row["diverged"] or row.get("failure"):
        return np.nan
    if "finder_seconds" in row:  # beside the run that followed it
        return row["cpu_seconds"] / (row["cpu_seconds"] - row["finder_seconds"])
    if row.get("rate") == "auto":  # beside itself without its measurements
        return 1 / (1 - row["overhead"])
    if row["rival"] == "rule":  # it is a fixed run
        return 1.0
    beside = [other["cpu_seconds"] for other in runs.get("fixed", [])]
    return row["cpu_seconds"] / np.median(beside) if beside else np.nan


def best_of(grid, place, seeds):
    """Accuracy of the grid's best rate, with those of these seeds that it has."""
    cell = cell_of(place) | {"rate": best_rate(grid, cell_of(place), place[3])}
    keys = [key(cell | {"seed": seed}) for seed in seeds]
    return np.mean([accuracy(grid[name]) for name in keys if name in grid] or [np.nan])


def autos(grid, place, seeds):
    keys = [key(cell_of(place) | {"rate": "auto", "seed": seed}) for seed in seeds]
    return [grid[name] for name in keys if name in grid]


def cell_of(place):
    return dict(zip(("task", "model", "optimizer", "batch"), place, strict=True))


# ------------------------------------------------------------------------------ the script


def name_of(row):
    return key(row | {"rate": row["rival"]})


def read(path):
    if not path.exists():
        return {}
    return {name_of(row): row for row in map(json.loads, path.read_text().splitlines())}


def warm_up():
    """One run that is thrown away: the first in a process takes twice the time."""
    cell = {"task": "digits", "model": "mlp", "optimizer": "sgd", "batch": 1024, "seed": 0}
    fit(build_experiment(configuration(**cell, rate=0.1)), fixed, 0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--grid", type=Path, nargs="+", default=[GRID])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=list(RATES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[CHOOSES])
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = read(options.out)
    grid = {name: row for path in options.grid for name, row in load(path).items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = [] if options.table else [n for n in options.rivals if installed(RIVALS[n])]
    for library in ("lightning.pytorch", "lightning.fabric"):  # after its import, which sets them
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if names:
        warm_up()
    places = itertools.product(
        options.tasks, options.models, options.optimizers, options.batches, options.seeds
    )
    for (task, model, optimizer, batch, seed), name in itertools.product(places, names):
        cell = {"task": task, "model": model, "optimizer": optimizer, "batch": batch, "seed": seed}
        label = name_of(cell | {"rival": name})
        if label in rows or optimizer not in RIVALS[name].optimizers:
            continue
        if name == "rule" and batch == TUNED_BATCH:
            continue  # the grid's best itself
        row = RIVALS[name].run(cell, grid)
        if row is None:
            print(*label, "has to wait for the rows of the grid", flush=True)
            continue
        rows[label] = row | {"rival": name}
        with options.out.open("a") as file:
            file.write(json.dumps(rows[label]) + "\n")
        words = row.get("failure") or f"{accuracy(row):.1f} %"
        print(*label, words, f"{row['cpu_seconds']:.1f} s", flush=True)
    asked = {name: row for name, row in rows.items() if row["model"] in options.models}
    table(asked, grid, options.rivals, options.seeds)


if __name__ == "__main__":
    main()
