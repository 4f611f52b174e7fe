"""The ranges that arguments must lie in; a message says which one, what is legal, what was given.

Each check takes arguments by name. NaN lies in no range. A check whose message can say more, such
as a way out, is made where the argument is.

>>> require_positive(lr=0.1, batch_size=0)
Traceback (most recent call last):
ValueError: batch_size must be positive and finite, got 0
"""

import math
from collections.abc import Callable, Mapping


def require_finite(**values: float) -> None:
    """Raise ValueError unless all are finite."""
    _require(values, math.isfinite, "be finite")


def require_non_negative(**values: float) -> None:
    """Raise ValueError unless all lie in [0, infinity)."""
    _require(values, lambda value: 0 <= value < math.inf, "be finite and at least 0")


def require_positive(**values: float) -> None:
    """Raise ValueError unless all lie in (0, infinity)."""
    _require(values, lambda value: 0 < value < math.inf, "be positive and finite")


def require_fraction(**values: float) -> None:
    """Raise ValueError unless all lie in [0, 1), as a momentum does."""
    _require(values, lambda value: 0 <= value < 1, "lie in [0, 1)")


def require_inner_fraction(**values: float) -> None:
    """Raise ValueError unless all lie in (0, 1), as a relative tolerance does."""
    _require(values, lambda value: 0 < value < 1, "lie in (0, 1)")


def require_count(**values: float) -> None:
    """Raise ValueError unless all are at least 1."""
    _require(values, lambda value: value >= 1, "be at least 1")


def _require(values: Mapping[str, float], legal: Callable[[float], bool], words: str) -> None:
    for name, value in values.items():
        if not legal(value):
            message = f"{name} must {words}, got {value}"
            raise ValueError(message)
