"""Batches in a reproducible order: for training from any point on, for testing, for measuring."""

# ruff: noqa: PT028 - test_batches is no test

from collections.abc import Iterator

import torch

from batchlr.argument_ranges import require_count
from batchlr.training.data.images import Batch, ImageData
from batchlr.training.data.randomness import EpochKey, permutation


def batches_per_epoch(data: ImageData, *, batch_size: int, drop_last: bool = True) -> int:
    """Number of training batches in one epoch.

    Raises:
        ValueError: The batch is not between 1 and the number of training samples.
    """
    num_samples = len(data.train)
    require_count(batch_size=batch_size)
    if batch_size > num_samples:
        msg = f"batch_size {batch_size} is larger than the {num_samples} samples of {data.name}"
        raise ValueError(msg)
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def train_batches(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_sample: int = 0,
    device: torch.device | str = "cpu",
    drop_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Shuffled and augmented batches of one epoch, from sample ``start_sample`` on.

    Order and augmentation depend on ``(seed, epoch)`` only: starting late, other workers or another
    number of processes change nothing in the batches that follow.

    Args:
        data: The data set.
        batch_size: Samples of one batch, over all processes.
        seed: Seed of the run.
        epoch: Number of the pass over the data.
        start_sample: Number of samples of the epoch to skip, of whatever batches; all of them
            leaves an empty iterator.
        device: Where the batches are delivered.
        drop_last: Whether to leave out a last, smaller batch.
        rank: Number of this process; it receives the ``rank``-th part of each batch.
        world_size: Number of processes that share each batch.

    Raises:
        ValueError: A size is illegal, or the processes cannot share the batches equally.
    """
    batches_per_epoch(data, batch_size=batch_size)
    if not 0 <= start_sample <= len(data.train):
        msg = f"start_sample must lie in [0, {len(data.train)}], got {start_sample}"
        raise ValueError(msg)
    left = len(data.train) - start_sample
    num_batches = left // batch_size if drop_last else -(-left // batch_size)
    _check_rank(rank, world_size)
    if batch_size % world_size or (world_size > 1 and not drop_last):
        msg = (
            f"{world_size} processes share batches equally only if batch_size is a multiple and "
            f"drop_last is true, got batch_size {batch_size}, drop_last {drop_last}"
        )
        raise ValueError(msg)
    key = EpochKey(seed, epoch)
    order = permutation(len(data.train), key)[start_sample:]
    index_batches = torch.split(order, batch_size)[:num_batches]
    shards = [indices.chunk(world_size)[rank] for indices in index_batches]
    return data.train.batches(shards, augmented_for=key, device=torch.device(device))


def test_batches(
    data: ImageData,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The test set in order, unaugmented, in batches whose sizes differ by one at most.

    All processes that receive samples receive equally many batches, for networks that are sharded
    over them run in step; with a ``batch_size`` of 1 the last one of some may be empty.

    Args:
        data: The data set.
        batch_size: Largest number of samples in a batch of this process.
        device: Where the batches are delivered.
        rank: Number of this process; it receives every ``world_size``-th sample from ``rank`` on,
            so that each sample is seen by exactly one process.
        world_size: Number of processes.

    Raises:
        ValueError: A size is illegal.
    """
    require_count(batch_size=batch_size)
    _check_rank(rank, world_size)
    own = torch.arange(len(data.test))[rank::world_size]
    largest_share = -(-len(data.test) // world_size)
    num_batches = -(-largest_share // batch_size)
    index_batches = torch.tensor_split(own, num_batches) if len(own) else ()
    return data.test.batches(index_batches, device=torch.device(device))


test_batches.__test__ = False  # type: ignore[attr-defined]  # else pytest takes it for a test


def measurement_batches(
    data: ImageData,
    *,
    batch_size: int,
    num_batches: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Disjoint random batches of training data, unaugmented: a fixed sample to measure on.

    Args:
        data: The data set.
        batch_size: Samples of one batch.
        num_batches: Number of batches.
        generator: Draws the samples; it is advanced.
        device: Where the batches are delivered.

    Raises:
        ValueError: A size is below 1, or there are too few training samples.
    """
    require_count(batch_size=batch_size, num_batches=num_batches)
    num_samples = len(data.train)
    if batch_size * num_batches > num_samples:
        msg = (
            f"{num_batches} disjoint batches of {batch_size} need {batch_size * num_batches} "
            f"training samples, {data.name} has {num_samples}"
        )
        raise ValueError(msg)
    order = torch.randperm(num_samples, generator=generator, device=generator.device).cpu()
    index_batches = torch.split(order[: batch_size * num_batches], batch_size)
    return list(data.train.batches(index_batches, device=torch.device(device)))


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        msg = f"rank must lie in [0, world_size), got rank {rank} of {world_size}"
        raise ValueError(msg)
