"""Carry settings tuned at one batch size over to another.

These rules know only batch sizes and need no measurement; each holds in its own regime, stated
with it. A batch is what one optimizer update sees, all devices and micro-batches together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from batchlr.argument_ranges import require_non_negative, require_positive


def rescale_lr(
    lr: float,
    old: float,
    new: float,
    *,
    rule: Literal["linear", "sqrt", "saturating", "none"] = "linear",
    critical_batch_size: float | None = None,
) -> float:
    """Learning rate for batch size ``new``, given the one used at ``old``.

    ================  ===========================  ==============================================
    rule              rate proportional to         holds for
    ================  ===========================  ==============================================
    ``"linear"``      ``B``                        SGD, far below the critical batch size (Goyal
                                                   et al. 2017)
    ``"sqrt"``        ``sqrt(B)``                  Adam with little damping, same regime (see
                                                   `rescale_adam`)
    ``"saturating"``  ``1 / (1 + critical / B)``   SGD at any size: linear below the critical batch
                                                   size, flat above (Granziol, Zohren & Roberts
                                                   2022; McCandlish et al. 2018)
    ``"none"``        1                            far above the critical batch size
    ================  ===========================  ==============================================

    Args:
        lr: Rate at the old batch size.
        old: Old batch size.
        new: New batch size.
        rule: One of the table.
        critical_batch_size: Where the linear regime ends and the rate is half its limit; for, and
            only for, ``"saturating"``. Momentum ``m`` multiplies it by ``(1 + m) / (1 - m)``; a
            finite training set enters through ``1/b = 1/B - 1/N`` in place of ``1/B``.

    Raises:
        ValueError: A size or rate is not positive, the rule is unknown, or the critical batch size
            is missing, superfluous or negative.

    >>> rescale_lr(0.1, old=128, new=512)
    0.4
    >>> rescale_lr(0.1, old=128, new=512, rule="sqrt")
    0.2
    >>> rescale_lr(0.5, old=128, new=384, rule="saturating", critical_batch_size=128)
    0.75
    """
    require_positive(lr=lr, old=old, new=new)
    critical = _critical(rule, critical_batch_size)
    ratio = new / old
    factors = {
        "linear": ratio,
        "sqrt": math.sqrt(ratio),
        "saturating": (1.0 + critical / old) / (1.0 + critical / new),
        "none": 1.0,
    }
    if rule not in factors:
        message = f"rule must be one of {', '.join(map(repr, factors))}, got {rule!r}"
        raise ValueError(message)
    return lr * factors[rule]


@dataclass(frozen=True)
class AdamSettings:
    """Adam's settings that depend on the batch size."""

    lr: float
    betas: tuple[float, float]  # decay rates of the gradient and of its square, in [0, 1)
    eps: float  # added to the root of the second moment


def rescale_adam(
    lr: float,
    old: float,
    new: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamSettings:
    """Adam's settings at batch size ``new``: the square-root rule of Malladi et al. (2022).

    With ``ratio = new / old``: ``lr sqrt(ratio)``, ``beta^ratio`` and ``eps / sqrt(ratio)``. The
    averages then forget at the same rate per sample, and ``eps`` follows the root of the second
    moment. The paper's linear form ``1 - beta -> ratio (1 - beta)`` agrees to first order, but
    turns a decay rate negative as soon as ``ratio (1 - beta) > 1``.

    Assumes gradients dominated by noise at *both* batch sizes. Where signal dominates, Adam's
    steps keep their length and equal progress per sample would take the linear rule.

    Args:
        lr: Rate at the old batch size.
        old: Old batch size.
        new: New batch size.
        betas: Decay rates at the old batch size, each in [0, 1).
        eps: Denominator constant at the old batch size.

    Raises:
        ValueError: A size or rate is not positive, a decay rate is outside [0, 1), or ``eps`` is
            negative.

    >>> rescale_adam(1e-3, old=256, new=1024, betas=(0.5, 0.5), eps=1e-8)
    AdamSettings(lr=0.002, betas=(0.0625, 0.0625), eps=5e-09)
    """
    require_positive(lr=lr, old=old, new=new)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        message = f"betas must lie in [0, 1), got {betas}"
        raise ValueError(message)
    require_non_negative(eps=eps)
    ratio = new / old
    beta1, beta2 = betas
    root = math.sqrt(ratio)
    return AdamSettings(lr=lr * root, betas=(beta1**ratio, beta2**ratio), eps=eps / root)


@dataclass(frozen=True)
class BatchStage:
    """A stretch of training at one batch size."""

    batch_size: int
    lr_factor: float  # of the first rate


def batch_growth_for_decay(
    lr_factors: Sequence[float], batch_size: int, *, max_batch_size: int, multiple_of: int = 1
) -> list[BatchStage]:
    """Grow the batch where a schedule would lower the rate (Smith et al. 2018, arXiv 1711.00489).

    The noise of SGD goes as rate over batch size, so halving the one is doubling the other, in half
    as many steps an epoch. From ``max_batch_size`` on the rate falls as the schedule says; the
    ratio of rate to batch size is the schedule's throughout, sizes being rounded down and rates
    made to fit. Factors above 1 (warm-up) leave the batch as it is. Count stages in epochs or
    samples, for steps change their meaning, and keep batches well below the data (a tenth of them
    at most, in the paper).

    Args:
        lr_factors: what the schedule multiplies the first rate by, a stage each (an epoch, say).
        batch_size: of the schedule.
        max_batch_size: never exceeded.
        multiple_of: every batch size is.

    Raises:
        ValueError: a factor is not positive, or sizes do not fit together.

    >>> for stage in batch_growth_for_decay([1.0, 0.2, 0.04], 128, max_batch_size=1024):
    ...     print(stage)
    BatchStage(batch_size=128, lr_factor=1.0)
    BatchStage(batch_size=640, lr_factor=1.0)
    BatchStage(batch_size=1024, lr_factor=0.32)
    """
    require_positive(batch_size=batch_size, multiple_of=multiple_of)
    if batch_size % multiple_of or max_batch_size < batch_size:
        message = (
            f"batch_size {batch_size} must be a multiple of {multiple_of} and not above "
            f"max_batch_size {max_batch_size}"
        )
        raise ValueError(message)
    stages = []
    for factor in lr_factors:
        require_positive(lr_factor=factor)
        wanted = min(max_batch_size, batch_size / min(factor, 1.0))
        # A hair's breadth, lest 128 / 0.2 be 639.
        size = max(batch_size, int(wanted / multiple_of + 1e-9) * multiple_of)
        stages.append(BatchStage(size, factor * size / batch_size))
    return stages


def _critical(rule: str, critical_batch_size: float | None) -> float:
    """Critical batch size for ``"saturating"``, 0 for the rules that do not know it."""
    if (critical_batch_size is None) == (rule == "saturating"):
        message = (
            "critical_batch_size belongs to rule='saturating' and to no other, "
            f"got critical_batch_size={critical_batch_size} with rule={rule!r}"
        )
        raise ValueError(message)
    if critical_batch_size is None:
        return 0.0
    if not 0.0 <= critical_batch_size < math.inf:
        message = (
            f"critical_batch_size must be finite and at least 0, got {critical_batch_size}: "
            "without a critical batch size in reach use rule='linear'"
        )
        raise ValueError(message)
    return critical_batch_size
