"""A batch that grows, as configured, and the groups in which its gradient's noise is read."""

import itertools
import math

from batchlr.batch_size import AdaptiveBatchSize
from batchlr.training.config import TrainConfig
from batchlr.training.data import ImageData
from batchlr.training.distributed import Processes
from batchlr.training.pass_sizes import micro_size


def adaptive_batch_size(
    config: TrainConfig, data: ImageData, processes: Processes
) -> AdaptiveBatchSize | None:
    """What chooses the batch sizes of the run; None if all are the same.

    Raises:
        ValueError: the batch cannot be split into groups, or its bound exceeds the data or leaves
            no room to grow.
    """
    options = config.batch.adaptive
    if options is None:
        return None
    _check_groups(config, processes)
    if options.max_size > len(data.train):
        msg = (
            f"batch.adaptive.max_size {options.max_size} is larger than the {len(data.train)} "
            f"samples of {data.name}"
        )
        raise ValueError(msg)
    first = config.batch.global_size
    unit = processes.world_size * micro_size(config, processes.world_size)
    if first < options.max_size < first + unit:
        msg = (
            f"batch.adaptive.max_size {options.max_size} leaves no room to grow: sizes are "
            f"multiples of {unit}, so the next after {first} is {first + unit}; allow that, or set "
            "a smaller batch.micro_size"
        )
        raise ValueError(msg)
    return AdaptiveBatchSize(
        first,
        max_batch_size=options.max_size,
        dataset_size=len(data.train),
        tolerance=options.tolerance,
        debias=options.debias,
        max_growth=math.inf if options.max_growth is None else options.max_growth,
        interval=options.test_every,
        smoothing=options.smoothing,
        multiple_of=unit,
    )


def group_size(config: TrainConfig, processes: Processes, batch_size: int) -> int:
    """Samples of one of the groups whose gradients are compared to read the noise.

    Groups are micro-batches, or if these are too few equal parts of them; a process makes one
    forward pass of each. Every size that `adaptive_batch_size` chooses can be grouped, for the
    first can, and all others are its multiples.
    """
    most = micro_size(config, processes.world_size, batch_size)
    size = _fitting_size(config, processes, batch_size, most)
    assert size is not None
    return size


def _fitting_size(
    config: TrainConfig, processes: Processes, batch_size: int, most: int
) -> int | None:
    """Samples of a group where passes are of ``most`` samples at most; None if no size fits.

    Groups are of equal size, and of at least two samples, for one alone has no batch statistics,
    unless ``most`` is 1. There are two or more over all processes, and of such numbers the nearest
    to ``batch.adaptive.groups``. Of sharded weights nobody has a gradient of its own: every group
    is of all processes.
    """
    options = config.batch.adaptive
    assert options is not None
    apart = 1 if processes.shards else processes.world_size  # groups made at the same time
    share = batch_size // processes.world_size
    largest = min(most, share * apart // 2)
    sizes = [size for size in range(min(2, most), largest + 1) if share % size == 0]
    wanted = options.groups / apart
    return max(sizes, key=lambda size: (-abs(share // size - wanted), size), default=None)


def _check_groups(config: TrainConfig, processes: Processes) -> None:
    """Raise ValueError, naming sizes that can, unless the first batch can be read in groups."""
    size, world = config.batch.global_size, processes.world_size
    automatic, micro = config.batch.micro_size == "auto", micro_size(config, world)

    def fits(total: int) -> bool:
        most = total // world if automatic else micro
        return _fitting_size(config, processes, total, most) is not None

    if fits(size):
        return
    unit = world if automatic else world * micro
    below = next((total for total in range(size - unit, 0, -unit) if fits(total)), None)
    above = next(total for total in itertools.count(size + unit, unit) if fits(total))
    nearest = f"{above}" if below is None else f"{below} and {above}"
    msg = (
        f"batch.global_size {size} cannot be split into two or more equal groups of two or more "
        f"samples, between which batch.adaptive reads the noise; the nearest that can: {nearest}"
    )
    raise ValueError(msg)
