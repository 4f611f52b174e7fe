"""A largest stable rate with its interval."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Rule = Literal["mean-square", "top-direction", "paper"]

_WIDEST = 50.0  # assumed: half an interval in the logarithm; nothing is known, nothing overflows


class Rate(NamedTuple):
    """A rule's rate, and what its `LRBound` is made of."""

    value: float
    error: float  # relative standard error
    exponent: float  # d ln value / d ln B
    noise_share: float  # of what limits the rate
    ends: tuple[float, float] | None = None  # from which the interval reaches; value if None


@dataclass(frozen=True)
class LRBound:
    """The largest stable learning rate at one batch size.

    ``float(bound)`` is its value.
    """

    value: float
    low: float  # 90 % interval from the sampling errors of curvature and noise
    high: float
    exponent: float  # d ln value / d ln B: 1 is linear scaling, 1/2 the square root, 0 saturation
    regime: Literal["noise", "transition", "curvature"]  # what limits the rate
    reliable: bool
    reasons: tuple[str, ...]  # why not reliable; empty if it is
    batch_size: int
    optimizer: str
    momentum: float  # SGD's or RMSprop's, or Adam's beta1
    rule: Rule

    def __float__(self) -> float:
        return self.value

    @staticmethod
    def of(
        rate: Rate,
        *,
        freedom: int,
        reasons: tuple[str, ...],
        batch_size: int,
        optimizer: str,
        momentum: float,
        rule: Rule,
    ) -> "LRBound":
        """``rate`` with the 90 % interval of Student's t, in the logarithm.

        Args:
            rate: of the rule.
            freedom: degrees of freedom of its error, at least 1.
            reasons: why it is not reliable.
            batch_size: asked for.
            optimizer: asked for.
            momentum: asked for.
            rule: asked for.
        """
        low, high = (rate.value, rate.value) if rate.ends is None else rate.ends
        margin = math.exp(min(_student_95(freedom) * rate.error, _WIDEST))
        return LRBound(
            value=rate.value,
            low=low / margin,
            high=high * margin,
            exponent=rate.exponent,
            regime=_regime(rate.noise_share),
            reliable=not reasons,
            reasons=reasons,
            batch_size=batch_size,
            optimizer=optimizer,
            momentum=momentum,
            rule=rule,
        )


def _regime(noise_share: float) -> Literal["noise", "transition", "curvature"]:
    if noise_share > 2 / 3:
        return "noise"
    return "curvature" if noise_share < 1 / 3 else "transition"


def _student_95(freedom: int) -> float:
    """95 % quantile of Student's t; 12 % low at 1 degree of freedom, 0.3 % at 3.

    Errors estimated from few batches are uncertain themselves. Abramowitz & Stegun 26.7.5.
    """
    z, n = 1.6448536, freedom  # the normal quantile
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
