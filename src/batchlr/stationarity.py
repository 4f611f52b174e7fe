"""Whether SGD has settled at its rate: what noise feeds in against what the gradient takes out."""

import math
from collections.abc import Sequence
from itertools import pairwise

from batchlr.argument_ranges import require_fraction, require_positive
from batchlr.measured import Measured, ratio_of_means

_BLOCKS = 20  # assumed: as many stretches give an error bar good to 16 %


def fluctuation_dissipation(
    inward: Sequence[float], squares: Sequence[float], *, lr: float, momentum: float = 0.0
) -> Measured:
    """``2 <w'g> / ((1 + m) lr <|v|^2>)``, which is 1 where training is stationary (Yaida 2019).

    Exact at any rate, on any loss, for SGD as torch makes it (``v <- m v + g``, ``w <- w - lr v``):
    if the mean of ``|w|^2`` stands still, what gradients take out of it is what steps put in.
    Above 1 the weights shrink, below 1 they grow, as they do while training gets somewhere.

    Recorded at every step the sums telescope: without momentum the ratio is 1 plus ``|w_0|^2 -
    |w_T|^2`` over the sum of squared steps, and settles like 1/T. The error, that of means over 20
    stretches, is then sqrt(20) times too large; it is right for records of every tenth step, say.

    Args:
        inward: ``w'g`` of each step, ``g`` the batch's gradient at ``w``, coupled weight decay
            included. Subtract a fixed point from ``w`` if you like: the identity holds for any, and
            far from the weights' origin it has less noise.
        squares: ``|v|^2`` of each step, its momentum buffer's; without momentum ``|g|^2``.
        lr: the constant rate of all these steps.
        momentum: ``m``, without dampening or Nesterov.

    Raises:
        ValueError: the records are of different lengths or of fewer than 40 steps, no step moved
            anything, ``lr`` is not positive or ``momentum`` is outside [0, 1).
    """
    if len(inward) != len(squares) or len(squares) < 2 * _BLOCKS:
        message = (
            f"both records must be of the same steps, at least {2 * _BLOCKS}, got {len(inward)} "
            f"and {len(squares)}"
        )
        raise ValueError(message)
    require_positive(lr=lr)
    require_fraction(momentum=momentum)
    if not math.fsum(squares) > 0.0:
        message = "squares must not all be zero: nothing moved, which says nothing of the rate"
        raise ValueError(message)
    ratio = ratio_of_means(_sums(inward), _sums(squares))
    factor = 2.0 / ((1.0 + momentum) * lr)
    return Measured(factor * ratio, factor * ratio.stderr)


def _sums(record: Sequence[float]) -> list[float]:
    ends = [len(record) * block // _BLOCKS for block in range(_BLOCKS + 1)]
    return [math.fsum(record[a:b]) for a, b in pairwise(ends)]
