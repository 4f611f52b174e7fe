"""The edges of the curvature that momentum is to even out: outliers of a spectrum, not its bulk."""

import math
from collections.abc import Sequence

from batchlr.argument_ranges import require_non_negative

_WIDTHS = 3.0  # assumed: standard deviations of its mass that the bulk reaches to


def usable_edges(
    values: Sequence[float], weights: Sequence[float], *, floor: float = 0.0
) -> tuple[float, float]:
    """Largest curvature, and the smallest positive one that stands out of the bulk.

    The bulk is what lies within three standard deviations of the mean of its own mass: values
    beyond are taken out and mean and deviation formed anew, until none is left to take. What
    carries the mass decides, and not the weight of any single Ritz value, which falls as the bulk
    is resolved. Negative curvature limits no rate and is not asked for. If nothing stands out both
    edges are the largest value, so that Polyak's momentum is zero.

    Args:
        values: eigenvalues, or Ritz values of a Lanczos run from a random vector, in any order.
        weights: their shares in the spectrum, summing to 1.
        floor: least lower edge; weight decay curves every direction by as much.

    Returns:
        ``(largest, smallest)``, both positive.

    Raises:
        ValueError: there are no values, a number is not finite, weights do not fit, or ``floor`` is
            negative.
        ArithmeticError: no value is positive.

    >>> usable_edges([-0.02, 0.0, 0.02, 1.0, 9.0], [0.2, 0.5, 0.2, 0.05, 0.05])
    (9.0, 1.0)
    """
    _check(values, weights, floor)
    largest = max(values)
    if largest <= 0:
        msg = f"no value is positive, the largest is {largest}: nothing limits the rate"
        raise ArithmeticError(msg)
    upper = _upper_edge(values, weights)
    outside = [value for value in values if value > upper and value > 0]
    smallest = min(outside, default=largest)
    return largest, min(largest, max(smallest, floor))


def _upper_edge(values: Sequence[float], weights: Sequence[float]) -> float:
    """Where the bulk ends."""
    bulk = list(zip(values, weights, strict=True))
    while True:
        mass = math.fsum(weight for _, weight in bulk)
        mean = math.fsum(weight * value for value, weight in bulk) / mass
        variance = math.fsum(weight * (value - mean) ** 2 for value, weight in bulk) / mass
        reach = _WIDTHS * math.sqrt(variance)
        kept = [(value, weight) for value, weight in bulk if abs(value - mean) <= reach]
        if len(kept) == len(bulk) or not kept:  # rounding may leave a single value outside
            return mean + reach
        bulk = kept


def _check(values: Sequence[float], weights: Sequence[float], floor: float) -> None:
    if not values:
        msg = "there are no values: pass those of at least one Lanczos step"
        raise ValueError(msg)
    if len(weights) != len(values):
        msg = f"each value has one weight, got {len(values)} values, {len(weights)} weights"
        raise ValueError(msg)
    if not all(map(math.isfinite, (*values, *weights))):
        msg = f"values and weights must be finite, got {list(values)} and {list(weights)}"
        raise ValueError(msg)
    if min(weights) < 0 or sum(weights) == 0:
        msg = f"weights must not be negative, nor all zero, got {list(weights)}"
        raise ValueError(msg)
    require_non_negative(floor=floor)
