"""What measuring costs a run of 2,000 steps, in gradients and in CPU time.

Networks of 32x32 images at batch 128. The first steps, with most of the measurements, are run; the
others fall where `Cadence` plans them and are taken to cost what the last one did.

    python benchmarks/overhead.py --models VGG-11 --steps 26
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from batchlr.controller import CurvatureController
from batchlr.on_the_fly.cadence import Cadence
from batchlr.training.config import TrainConfig
from batchlr.training.loop import _Run, train

EPOCHS = 182  # of 11 steps
MODELS = {
    "VGG-11": {"name": "vgg", "depth": 11, "width": 0.5, "batch_norm": False},
    "VGG-11-BN": {"name": "vgg", "depth": 11, "width": 0.5, "batch_norm": True},
    "PreResNet-20": {"name": "preresnet", "depth": 20, "block": "basic"},
}


@contextlib.contextmanager
def timed(kind, name):
    """CPU seconds of every call of a method made inside, with what it returned."""
    method, calls = getattr(kind, name), []

    def timed_method(*arguments):
        began = time.process_time()
        result = method(*arguments)
        calls.append((time.process_time() - began, result))
        return result

    setattr(kind, name, timed_method)
    try:
        yield calls
    finally:
        setattr(kind, name, method)


def run(model, optimizer, steps):
    """The measurements of the first ``steps``: lines, CPU seconds; and CPU seconds of one step."""
    config = TrainConfig.model_validate(
        {
            "name": "overhead",
            "data": {"name": "digits", "image_size": 32},
            "model": MODELS[model],
            "optim": {"name": optimizer, "lr": "auto"},
            "batch": {"global_size": 128},
            "train": {"epochs": EPOCHS, "max_steps": steps},
            "log": {"progress": False},
            "checkpoint": {"every_epochs": 0},
        }
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        timed(CurvatureController, "maybe_update") as updates,
        timed(_Run, "update_weights") as made,
    ):
        out = Path(folder) / "run"
        train(config, out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken = [seconds for seconds, update in updates if update is not None]
    step = statistics.median(seconds for seconds, _ in made)
    return [line for line in lines if "overhead" in line], taken, step


def planned(spent):
    """All measurements of the run: steps and costs in gradients; ``spent`` on the first ones."""
    cadence = Cadence(11 * EPOCHS)
    made = []
    for step in range(11 * EPOCHS):
        if cadence.due(step):
            cost = spent[len(made)] if len(made) < len(spent) else spent[-1]
            cadence.measured(step, cost, change=0.0)
            made.append((step, cost))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"])
    parser.add_argument("--steps", type=int, default=26)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("model", "optimizer", "products", "measurements", "gradients", "share", "of the time")
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for model in options.models:
        for optimizer in options.optimizers:
            measured, taken, step = run(model, optimizer, options.steps)
            totals = [line["overhead"] * (line["step"] + 1) for line in measured]
            spent = [after - before for before, after in itertools.pairwise([0.0, *totals])]
            whole = planned(spent)
            gradients = sum(cost for _, cost in whole)
            seconds = gradients * sum(taken) / totals[-1]
            columns = [
                model,
                optimizer,
                " ".join(str(line["products"]) for line in measured),
                len(whole),
                f"{gradients:.0f}",
                f"{gradients / (11 * EPOCHS):.1%}",
                f"{seconds / (step * 11 * EPOCHS):.1%}",
            ]
            print("| " + " | ".join(map(str, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()
