"""What a limit says about the peak of a schedule that has left its peak behind."""

import math
from dataclasses import asdict, dataclass
from typing import Any, final

_ROUNDING = 1e-6  # assumed: a rate that rises by less does not


@final
@dataclass
class FallingShape:
    """Keeps a peak from falling with the shape, as long as that only falls.

    Curvature grows until the rate applied is its limit (the edge of stability, Cohen et al. 2021,
    arXiv 2103.00065). Under a shape that falls, a limit between that rate and the peak has come
    down with the rate: taken for the peak's, it would let the rate fall twice. There only a limit
    below the rate applied lowers the peak, to where the rate is the limit (shares of the peak are
    meant as shares of their crest, 1 as a rule). It says nothing of what
    a rate that rises again will find, so that for good behind the first rise every limit counts
    (measured, both: docs/log.md).
    """

    crest: float = 0.0  # largest share of the peak so far
    share: float = 0.0  # of the peak that the next step applies
    risen: bool = False  # after it had fallen
    limit: float = math.nan  # of the peak, as last said

    def see(self, share: float) -> bool:
        """Take note of the share of the peak that the next step applies.

        Returns:
            Whether it rises for the first time after it had fallen.
        """
        rises = not self.risen and self.share * (1 + _ROUNDING) < min(share, self.crest)
        self.risen = self.risen or rises
        self.share, self.crest = share, max(self.crest, share)
        return rises

    def limit_of_peak(self, limit: float) -> float:
        """What a limit says about the peak.

        Args:
            limit: on the rate, as filtered.
        """
        falls = 0 < self.share < self.crest and not self.risen
        if falls and not math.isnan(self.limit):
            limit = sorted((limit, self.limit, limit * self.crest / self.share))[1]
        self.limit = limit
        return limit

    def scale(self, factor: float) -> None:
        """Carry the limit over to a setting whose rates are ``factor`` times as large."""
        self.limit *= factor

    def forget(self) -> None:
        """The next limit counts as it is."""
        self.limit = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state_dict.items():
            setattr(self, name, value)
