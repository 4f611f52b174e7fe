"""How long a run is, and where in it we are, when its batches may grow on the way."""

import math
from typing import final

from batchlr.training.experiment import Experiment
from batchlr.training.resumption import Progress


@final
class RunLength:
    """Steps and epochs of a run, made and left.

    An epoch is one pass over the training set, whatever became of the batch: samples that are no
    whole batch at its end are left out. So the number of steps changes with the batch size, the
    number of epochs does not.

    Args:
        experiment: what is run, at its present batch size.
        progress: how far it is.
    """

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self._experiment = experiment
        self._progress = progress
        self._options = experiment.config.train

    @property
    def total_steps(self) -> int:
        """Those made and those that all epochs have left at the present batch size."""
        progress, size, whole = self._progress, self._experiment.batch_size, self._samples
        epochs = self._options.epochs - progress.epoch
        if epochs < 1:
            return progress.step
        return progress.step + (whole - progress.samples) // size + (epochs - 1) * (whole // size)

    @property
    def last_step(self) -> int:
        """The number of steps after which the run ends, if its batches grow no more."""
        limit = self._options.max_steps
        return self.total_steps if limit is None else min(self.total_steps, limit)

    @property
    def epoch_is_over(self) -> bool:
        """Whether what is left of the epoch is no whole batch."""
        return self._progress.samples + self._experiment.batch_size > self._samples

    @property
    def is_over(self) -> bool:
        """Whether all steps are made."""
        limit = math.inf if self._options.max_steps is None else self._options.max_steps
        return self._progress.epoch >= self._options.epochs or self._progress.step >= limit

    @property
    def schedule_step(self) -> int:
        """Where the shape of the rate is.

        It goes by steps of the batch size that the run began with, so that it ends with the last
        epoch whatever became of the batch.
        """
        whole = self._experiment.steps_per_epoch
        steps = self._progress.samples // self._experiment.config.batch.global_size
        return self._progress.epoch * whole + (whole if self.epoch_is_over else steps)

    @property
    def _samples(self) -> int:
        return len(self._experiment.data.train)
