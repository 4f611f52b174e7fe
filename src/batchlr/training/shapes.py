"""The shape of the learning rate over a run, as a share of its peak."""

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from batchlr.schedulers import ShapeFactory
from batchlr.training.config.variants import (
    ConstantOptions,
    CosineOptions,
    LinearTailOptions,
    ScheduleOptions,
)


def shape_factory(options: ScheduleOptions, total_steps: int) -> ShapeFactory:
    """A torch scheduler of the configured shape, for `BatchAwareLR`."""
    share = _share(options, total_steps)
    return lambda optimizer: LambdaLR(optimizer, share)


def _share(options: ScheduleOptions, total_steps: int) -> Callable[[int], float]:
    """Share of the peak at each step: a linear warm-up, then the named decay."""
    warmup = round(options.warmup * total_steps)
    decay = _decay(options)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)  # the first step moves, the first after it has all
        return decay(step, warmup, total_steps)

    return share


def _decay(options: ScheduleOptions) -> Callable[[int, int, int], float]:
    if isinstance(options, ConstantOptions):
        return lambda step, warmup, total: 1.0
    if isinstance(options, CosineOptions):

        def cosine(step: int, warmup: int, total: int) -> float:
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            return options.final + (1 - options.final) * (1 + math.cos(math.pi * progress)) / 2

        return cosine
    if isinstance(options, LinearTailOptions):

        def linear_tail(step: int, warmup: int, total: int) -> float:
            progress = (step / total - options.hold) / (options.end - options.hold)
            return 1 + (options.final - 1) * min(1.0, max(0.0, progress))

        return linear_tail
    milestones, factor = options.milestones, options.factor
    return lambda step, warmup, total: factor ** sum(step >= m * total for m in milestones)
