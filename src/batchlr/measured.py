"""A number that knows its standard error."""

import math
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
