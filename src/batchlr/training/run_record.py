"""What a run writes down of itself: the parts of a step's line, and the summary."""

import math
from typing import Any

from batchlr.batch_size import BatchSizeTest
from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.training.experiment import Experiment
from batchlr.training.resumption import Progress


def measured_entry(update: CurvatureUpdate | None) -> dict[str, Any]:
    """What a measurement adds to its step's line in ``metrics.jsonl``."""
    if update is None:
        return {}
    bound = update.bound
    return {
        "largest_eigenvalue": update.largest_eigenvalue,
        "smallest_eigenvalue": update.smallest_eigenvalue,
        "max_lr": math.nan if bound is None else bound.value,
        "max_lr_low": math.nan if bound is None else bound.low,
        "max_lr_high": math.nan if bound is None else bound.high,
        "regime": None if bound is None else bound.regime,
        "optimizer": None if bound is None else bound.optimizer,
        "reasons": None if bound is None else bound.reasons,
        "peak_lr": update.peak,
        "products": update.num_products,
        "measurement_seconds": update.seconds,
        "overhead": update.overhead,
        "failure": update.failure,
    }


def tested_entry(test: BatchSizeTest | None) -> dict[str, Any]:
    """What a test of the batch size adds to its step's line."""
    if test is None:
        return {}
    return {
        "norm_test": test.smallest_tolerance,
        "noise_scale": test.noise_scale,
        "next_batch_size": test.next_batch_size,
    }


def run_summary(
    experiment: Experiment, progress: Progress, *, diverged: bool, failure: str | None = None
) -> dict[str, Any]:
    """The content of ``summary.json``: how the run ended, and what it took.

    Args:
        experiment: as it is at the end.
        progress: likewise.
        diverged: then the last evaluation does not count: it is of another network.
        failure: what went wrong, in words.
    """
    controller = experiment.controller
    nothing = {"test_accuracy": math.nan, "test_loss": math.nan, "train_loss": math.nan}
    return {
        **nothing,
        **({} if diverged else progress.result),
        "steps": progress.step,
        "samples": progress.trained,
        "batch_size": experiment.batch_size,
        "epochs": progress.epoch,
        "wall_seconds": progress.wall_seconds,
        "curvature_seconds": 0.0 if controller is None else controller.seconds,
        "curvature_products": 0 if controller is None else controller.num_products,
        "final_lr": progress.last_lr,
        "peak_lr": experiment.scheduler.peak,
        "diverged": diverged,
        "failure": failure,
        "events": progress.events,
    }
