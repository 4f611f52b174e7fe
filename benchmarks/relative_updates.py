"""How far single steps change the layers, at the best fixed rate and at the next higher one.

For the cells of `no_tuning.py`, from its results: the largest sum over layers of
``|W' - W| / |W|`` in a step (`RelativeUpdate`), and what the run lost against the best fixed rate.
Changes beyond ln 2, where a layer's output can be of another sign (Bernstein et al. 2020), are
bold. Rests on the first seed.

    python benchmarks/relative_updates.py --models vgg mlp
"""

import argparse
import itertools
import math

import no_tuning
import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from batchlr.on_the_fly.relative_update import RelativeUpdate


class Meter:
    """The largest change of a step of the network that trains."""

    def __init__(self):
        self.update, self.model, self.largest = RelativeUpdate(), None, []
        register_module_forward_pre_hook(self.see)
        register_optimizer_step_pre_hook(lambda *_: self.update.take(self.model))
        register_optimizer_step_post_hook(
            lambda *_: self.largest.append(float(self.update.measure(self.model)))
        )

    def see(self, module, _):
        """The first module that runs contains all others."""
        self.model = self.model or module

    def run(self, cell):
        """Its accuracy in percent and the largest change."""
        self.model, self.largest = None, []
        row = no_tuning.run(cell)
        return no_tuning.accuracy(row), float(np.nanmax(self.largest))


def best_rate(rows, cell):
    """Where the grid is done: its best rate, by the most seeds that any rate has."""
    runs = {
        rate: [
            no_tuning.accuracy(rows[key])
            for seed in range(4)
            if (key := no_tuning.key(cell | {"rate": rate, "seed": seed})) in rows
        ]
        for rate in no_tuning.RATES[cell["optimizer"]]
    }
    most = max(map(len, runs.values()))
    return max((r for r in runs if len(runs[r]) == most), key=lambda r: np.mean(runs[r] or [0.0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(no_tuning.MODELS))
    parser.add_argument("--tasks", nargs="+", default=["digits"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, meter = no_tuning.load(no_tuning.RESULTS), Meter()
    print("| model | optimizer | batch | rate | largest change | accuracy - best |")
    print("|---|---|---|---|---|---|")
    for model, task, optimizer, batch in itertools.product(
        options.models, options.tasks, no_tuning.RATES, no_tuning.EPOCHS
    ):
        cell = {"task": task, "model": model, "optimizer": optimizer, "batch": batch, "seed": 0}
        rates = no_tuning.RATES[optimizer]
        first = rates.index(best_rate(rows, cell))
        best = None
        for rate in rates[first : first + 2]:
            accuracy, change = meter.run(cell | {"rate": rate})
            best = accuracy if best is None else best
            mark = "**" if change > math.log(2) else ""
            print(
                f"| {model} | {optimizer} | {batch} | {rate:g} | {mark}{change:.2f}{mark} | "
                f"{accuracy - best:+.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
