"""Many noisy measurements of a rate become one steady estimate."""

import math
from dataclasses import asdict, dataclass
from typing import Any, final

_DRIFT = 0.7  # assumed: standard deviation of ln(rate) as the run grows older by a factor e
_FLOOR, _CEILING = 0.05, 1.0  # assumed: relative errors below and above these are not believed


@final
@dataclass
class RateFilter:
    """A Kalman filter of the logarithm of a rate that drifts as training goes on.

    Early in a run, and after long pauses, new measurements count for almost all; dense ones are
    averaged, by their errors. It takes the place of a dead band: noise moves the estimate little,
    a real change moves it within a few measurements.
    """

    log_rate: float = math.nan
    variance: float = math.inf  # of log_rate; infinite before the first measurement
    step: int = 0  # of the last measurement

    @property
    def rate(self) -> float:
        """The estimate; NaN before the first measurement."""
        return math.exp(self.log_rate)

    @property
    def known(self) -> bool:
        """Whether there is an estimate that the next measurement is weighed against."""
        return math.isfinite(self.variance)

    @property
    def doubt(self) -> float:
        """Standard error of `log_rate`; 0 while there is no estimate to doubt."""
        return self.variance**0.5 if self.known else 0.0

    def update(self, step: int, rate: float, error: float) -> float:
        """The estimate after a measurement before ``step``.

        Args:
            step: steps made before it.
            rate: measured, positive.
            error: its relative standard error.
        """
        noise = min(max(error, _FLOOR), _CEILING) ** 2
        if not self.known:
            self.log_rate, self.variance = math.log(rate), noise
        else:
            prior = self.variance + _DRIFT**2 * math.log((step + 1) / (self.step + 1))
            gain = prior / (prior + noise)
            self.log_rate += gain * (math.log(rate) - self.log_rate)
            self.variance = gain * noise
        self.step = step
        return self.rate

    def forget(self) -> None:
        """Believe the next measurement as if it were the first."""
        self.variance = math.inf

    def scale(self, factor: float) -> None:
        """Carry the estimate over to a setting whose rates are ``factor`` times as large."""
        self.log_rate += math.log(factor)

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state_dict.items():
            setattr(self, name, value)
