"""A number that knows its standard error."""

import math
from collections.abc import Sequence
from typing import final


@final
class Measured(float):
    """A float with the standard error of its measurement, in the same unit.

    It computes and formats like any float, and `str` shows the error; errors are not propagated.

    >>> curvature = Measured(12.5, stderr=0.5)
    >>> 2 / curvature
    0.16
    >>> curvature.stderr
    0.5
    """

    stderr: float

    def __new__(cls, value: float, stderr: float = math.nan) -> "Measured":
        """The number ``value``, carrying ``stderr``."""
        number = super().__new__(cls, value)
        number.stderr = float(stderr)
        return number

    def __str__(self) -> str:
        return f"{float(self):.4g} +- {self.stderr:.2g}"


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> Measured:
    """``sum numerators / sum denominators`` of paired draws, its error by the delta method.

    The ratio is biased by O(1/n); of a single pair the error is NaN.

    >>> ratio_of_means([1.0, 3.0], [2.0, 2.0])
    1.0
    """
    count, total = len(numerators), math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    pairs = zip(numerators, denominators, strict=True)
    squares = math.fsum((above - ratio * below) ** 2 for above, below in pairs)
    variance = squares * count / (count - 1) if count > 1 else math.nan
    return Measured(ratio, math.sqrt(variance) / abs(total))
