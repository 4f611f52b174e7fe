"""How many samples go through the network at a time: in training, and to measure curvature."""

from batchlr.policies import POLICIES
from batchlr.sampling import disjoint_sizes, samples_while_training
from batchlr.training.config import TrainConfig
from batchlr.training.data import ImageData
from batchlr.training.distributed import Processes


def micro_size(config: TrainConfig, world_size: int = 1, batch_size: int | None = None) -> int:
    """Samples in one forward pass of one process; ``batch_size`` is by default the configured.

    A batch that has grown takes no more at a time than the first one, which is known to fit.
    """
    first, micro = config.batch.global_size // world_size, config.batch.micro_size
    share = (batch_size or config.batch.global_size) // world_size
    return min(first if micro == "auto" else micro, share)


def measurement_sizes(config: TrainConfig, data: ImageData, world_size: int = 1) -> tuple[int, int]:
    """Size and number of the batches of one measurement.

    They are as large as one forward pass of training, for the sake of train-mode normalisation,
    but at least four fit into ``curvature.samples``. The paper's policies, which ask for no noise,
    take all samples as one batch.
    """
    return _sizes(config, data, world_size, config.curvature.samples)


def tracking_sizes(
    config: TrainConfig, data: ImageData, world_size: int = 1, batch_size: int | None = None
) -> tuple[int, int]:
    """As `measurement_sizes`, while training: no more samples than half a batch, or 64, has.

    The batch is that of ``batch_size``, by default the configured one.
    """
    if config.curvature.policy in POLICIES:
        return measurement_sizes(config, data, world_size)
    batch = batch_size or config.batch.global_size
    samples = samples_while_training(config.curvature.samples, batch)
    return _sizes(config, data, world_size, samples, batch_size)


def check_sharing(config: TrainConfig, data: ImageData, processes: Processes) -> None:
    """Refuse a batch that cannot be shared by the processes in equal passes.

    Raises:
        ValueError: it cannot, or there are fewer test images than sharding processes.
    """
    size, world, micro = config.batch.global_size, processes.world_size, config.batch.micro_size
    if processes.shards and len(data.test) < world:
        msg = (
            f"dist.strategy fsdp needs a test image in each of its {world} processes, {data.name} "
            f"has {len(data.test)}: use ddp, or fewer processes"
        )
        raise ValueError(msg)
    share = max(1, size // world)
    unit = world if micro == "auto" else world * min(micro, share)
    if size % unit:
        parts = "" if micro == "auto" else f" in equal micro-batches of {min(micro, share)}"
        lower = max(unit, size // unit * unit)
        msg = (
            f"batch.global_size {size} cannot be shared by {world} processes{parts}; the nearest "
            f"shareable sizes are {lower} and {lower + unit}"
        )
        raise ValueError(msg)


def _sizes(
    config: TrainConfig,
    data: ImageData,
    world_size: int,
    samples: int,
    batch_size: int | None = None,
) -> tuple[int, int]:
    """Size and number of batches that have ``samples`` together, or what the data set has."""
    samples = min(samples, len(data.train))
    if config.curvature.policy in POLICIES:
        return samples, 1
    return disjoint_sizes(samples, micro_size(config, world_size, batch_size))
