"""Training samples to measure curvature on, drawn beside a loop that has its own."""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils.data import IterableDataset

from batchlr.sampling import disjoint_sizes, samples_while_training

MOST_SAMPLES = 256  # assumed: of one measurement, as the trainer's curvature.samples


@final
@dataclass(frozen=True)
class TrainingSamples:
    """Draws fresh, disjoint batches of a map-style data set, as it gives its samples.

    No more samples than half a batch of training has, or 64 if that is more, in at least four
    batches of at most one forward pass: as the trainer does (docs/on_the_fly.md).
    """

    dataset: Any  # with a length, indexed by numbers
    collate: Callable[[list[Any]], Any]  # makes a batch of a list of samples
    batch_size: int  # of one optimizer step
    pass_size: int  # of one forward pass of one process
    most: int = MOST_SAMPLES  # samples of one measurement

    def __call__(self, generator: torch.Generator) -> list[Any]:
        """The batches of one measurement."""
        rows = torch.randperm(len(self.dataset), generator=generator)
        samples = min(samples_while_training(self.most, self.batch_size), len(rows))
        size, count = disjoint_sizes(samples, self.pass_size)
        parts = rows[: count * size].view(count, size)
        return [self.collate([self.dataset[row] for row in part]) for part in parts.tolist()]


def num_samples(dataset: Any) -> int | None:
    """How many there are to choose from; None where they can only be waited for."""
    waited_for = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    return None if waited_for or not isinstance(dataset, Sized) else len(dataset)
