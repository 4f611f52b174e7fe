"""How fast the peak of a schedule follows the limit measured."""

import math
from dataclasses import dataclass
from typing import final

_SURE = 0.25  # assumed: share of two limits in a row that a peak may rise to at once


@final
@dataclass(frozen=True)
class PeakBounds:
    """A peak that comes to a share of the limit in bounded steps.

    Args:
        safety: share of the limit that is aimed at, in (0, 1].
        start: share of that at the first measurement, in (0, 1]; curvature rises most in the first
            steps (measured against 1: docs/log.md).
        growth: largest factor a measurement, above 1 (measured: 3 overshoots), beyond the error of
            the limit before; a peak further below two limits in a row may rise to a quarter of the
            lower one, or to ``start`` of it if that is less.
        drop: smallest factor a measurement, in [0, 1). A rate that falls at once with every rise of
            the curvature lets it rise further (measured: it starved a VGG, docs/log.md).

    Raises:
        ValueError: an argument is out of range.
    """

    safety: float = 1.0
    start: float = 0.25
    growth: float = 1.5
    drop: float = 0.5

    def __post_init__(self) -> None:
        for name in ("safety", "start"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                msg = f"{name} must lie in (0, 1], got {share}"
                raise ValueError(msg)
        if not self.growth > 1:
            msg = f"growth must be above 1, got {self.growth}"
            raise ValueError(msg)
        if not 0 <= self.drop < 1:
            msg = f"drop must lie in [0, 1), got {self.drop}; 0 is no bound"
            raise ValueError(msg)

    def peak(
        self,
        limit: float,
        last: float | None,
        doubt: float = 0.0,
        before: float | None = None,
        *,
        confirmed: bool = False,
    ) -> float:
        """The next peak.

        Args:
            limit: on the rate, positive.
            last: the peak before; None at the first measurement.
            doubt: standard error of the logarithm of the limit that ``last`` came from.
            before: the limit that ``last`` came from, if it is known.
            confirmed: rise no further than to the lower of the two limits.
        """
        aim = self.safety * limit
        if last is None:
            return self.start * aim
        highest = self.growth * math.exp(doubt) * last
        if before is not None:
            both = min(aim, self.safety * before)
            highest = max(highest, min(_SURE, self.start) * both)
            if confirmed:
                aim = min(aim, max(last, both))
        return min(max(aim, self.drop * last), highest)
