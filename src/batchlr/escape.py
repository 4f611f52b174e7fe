"""How long SGD takes to leave a minimum, as models of its noise have it.

To first order in ``lr lambda_1`` SGD follows ``dw = -grad L dt + sqrt(lr / b) S^(1/2) dW`` in time
``t = lr x steps``, ``S`` the covariance of per-sample gradients (this view of batch size: Dai & Zhu
2018, arXiv:1812.00542). What noise looks like decides which sharpness keeps a minimum: the models
here disagree on it, and each says what it assumes. None holds near the edge of stability.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from batchlr.argument_ranges import require_fraction, require_positive


@final
@dataclass(frozen=True)
class SgdNoise:
    """What a setting of SGD makes of gradient noise, in three units."""

    lr: float
    batch_size: float
    dataset_size: float = math.inf  # sampling without replacement: 1/b = 1/B - 1/N
    momentum: float = 0.0  # of heavy ball, which acts as a rate lr / (1 - momentum)

    def __post_init__(self) -> None:
        require_positive(lr=self.lr, batch_size=self.batch_size)
        if not self.batch_size < self.dataset_size:
            message = (
                f"batch_size must be below dataset_size = {self.dataset_size}, got "
                f"{self.batch_size}: a batch of everything has no noise"
            )
            raise ValueError(message)
        require_fraction(momentum=self.momentum)

    @property
    def time_per_step(self) -> float:
        """``lr / (1 - m)``, in the unit of inverse curvature."""
        return self.lr / (1.0 - self.momentum)

    @property
    def ratio(self) -> float:
        """Learning rate to batch size, ``lr / ((1 - m) b)``."""
        return self.time_per_step * (1.0 / self.batch_size - 1.0 / self.dataset_size)

    @property
    def smith(self) -> float:
        """``N`` times the ratio, ``lr (N/B - 1) / (1 - m)`` (Smith et al. 2018, arXiv 1711.00489).

        Raises:
            ValueError: the setting does not know the size of the data set.

        >>> round(SgdNoise(lr=0.1, batch_size=128, dataset_size=50_000, momentum=0.9).smith, 3)
        389.625
        """
        if math.isinf(self.dataset_size):
            message = "Smith's noise scale counts samples: give SgdNoise a dataset_size"
            raise ValueError(message)
        return self.dataset_size * self.ratio

    def temperature(self, variance: float) -> float:
        """``T = ratio x variance / 2``, in the unit of the loss: weights are dense as exp(-L / T).

        Args:
            variance: ``v'Sv`` of one sample's gradient along a unit vector, alike in all directions
                where a temperature is more than a name.

        Raises:
            ValueError: ``variance`` is not positive.
        """
        require_positive(variance=variance)
        return self.ratio * variance / 2.0


class EscapeModel(ABC):
    """A law of the mean time to leave a minimum over a saddle."""

    assumes: ClassVar[str]

    @abstractmethod
    def log_time(self, noise: SgdNoise) -> float:
        """Log of the mean escape time, up to a constant that no setting of SGD moves."""


@final
@dataclass(frozen=True)
class IsotropicEscape(EscapeModel):
    """Kramers' ``exp(barrier / T)``: the loss to climb decides, curvature does not."""

    barrier: float  # loss at the saddle less that at the minimum
    variance: float  # of one sample's gradient along any unit vector

    assumes = "noise alike in all directions and everywhere, a barrier of many temperatures"

    def __post_init__(self) -> None:
        require_positive(barrier=self.barrier, variance=self.variance)

    def log_time(self, noise: SgdNoise) -> float:
        """``barrier / T``."""
        return self.barrier / noise.temperature(self.variance)


@final
@dataclass(frozen=True)
class CurvatureShapedEscape(EscapeModel):
    """``exp((2 barrier / ratio) (s / minimum + (1 - s) / |saddle|))`` (Xie et al. 2021).

    arXiv:2002.03495, with the prefactor ``2 pi / |saddle|``. That prefactor belongs to noise read
    at the end of each small step (isothermal); read at its beginning, as SGD does, it is ``2 pi /
    minimum`` (this library's derivation, checked by quadrature). Settings of SGD move neither.
    """

    barrier: float
    minimum: float  # curvature along the way out, at the minimum
    saddle: float  # the same at the saddle, negative
    share: float = 0.5  # assumed: s, of the barrier that lies where curvature is the minimum's

    assumes = "S = H along the way out, constant about the minimum and about the saddle"

    def __post_init__(self) -> None:
        require_positive(barrier=self.barrier, minimum=self.minimum)
        if not self.saddle < 0.0 < self.share < 1.0:
            message = (
                "saddle must be negative and share lie in (0, 1), got "
                f"saddle={self.saddle} and share={self.share}"
            )
            raise ValueError(message)

    def log_time(self, noise: SgdNoise) -> float:
        """``barrier`` over the temperatures ``ratio x curvature / 2`` of both parts of the way."""
        resistance = self.share / self.minimum - (1.0 - self.share) / self.saddle
        return 2.0 * self.barrier / noise.ratio * resistance


@final
@dataclass(frozen=True)
class LogBarrierEscape(EscapeModel):
    """``(L_saddle / L_minimum)^(1 / (ratio h) + 1 - n/2)`` (Mori et al. 2022, arXiv:2105.09557).

    Noise that grows with the loss makes the *logarithm* of the loss the barrier. For ``n = 1`` this
    library derived it anew; the whole time is then ``2 pi / sqrt(h |saddle|)`` times ``k / (k +
    1/2)`` times that, with ``k = 1 / (ratio h)``. For more directions it is cited, and such a
    factor, close to 1 where the law holds, is not known.
    """

    loss_minimum: float
    loss_saddle: float
    curvature: float  # h, of the outlying eigenvalues at the minimum
    num_outliers: int = 1  # n

    assumes = "squared error: S = 2 L H, with n outlying eigenvalues about h all along the way"

    def __post_init__(self) -> None:
        require_positive(loss_minimum=self.loss_minimum, curvature=self.curvature)
        if not self.loss_saddle > self.loss_minimum or self.num_outliers < 1:
            message = (
                f"loss_saddle must be above loss_minimum = {self.loss_minimum} and num_outliers "
                f"at least 1, got {self.loss_saddle} and {self.num_outliers}"
            )
            raise ValueError(message)

    def log_time(self, noise: SgdNoise) -> float:
        """The exponent times the log-barrier; for ``n = 1`` with ``k / (k + 1/2)``."""
        steepness = 1.0 / (noise.ratio * self.curvature)
        exponent = steepness + 1.0 - self.num_outliers / 2.0
        log_time = exponent * math.log(self.loss_saddle / self.loss_minimum)
        if self.num_outliers == 1:
            log_time -= math.log1p(0.5 / steepness)
        return log_time


def log_escape_ratio(model: EscapeModel, one: SgdNoise, other: SgdNoise) -> float:
    """Log of how many times more *steps* an escape takes under ``one`` than under ``other``.

    It compares settings at the same minimum, so that prefactors which they share cancel. The
    exponent of an escape is large and what goes into it known badly: read its sign and its order.

    >>> model = IsotropicEscape(barrier=0.25, variance=1.0)
    >>> slow, fast = SgdNoise(lr=0.01, batch_size=4), SgdNoise(lr=0.02, batch_size=4)
    >>> round(log_escape_ratio(model, slow, fast), 3)  # 2 x 0.25 x (400 - 200) + log 2
    100.693
    """
    times = model.log_time(one) - model.log_time(other)
    return times + math.log(other.time_per_step / one.time_per_step)


def log_escape_steps(
    noise: SgdNoise,
    variance: float,
    barrier: float,
    *,
    minimum: Sequence[float],
    saddle: Sequence[float],
) -> float:
    """Log of the mean number of steps out of a minimum over a saddle (Eyring-Kramers).

    ``(2 pi / |lambda_s|) sqrt(|det H_s| / det H_m) exp(barrier / T)`` over the time of a step, with
    ``lambda_s`` the saddle's negative eigenvalue. Exact as ``T`` goes to 0; at a barrier of 2.5,
    5 and 8 temperatures the exact time of a double well is 22, 11 and 5 % longer. The noise is that
    of `IsotropicEscape`, which networks do not have. Experimental.

    Args:
        noise: the setting of SGD.
        variance: of one sample's gradient along any unit vector.
        barrier: loss at the saddle less that at the minimum, both of the mean loss.
        minimum: *all* eigenvalues at the minimum, positive: a few leading ones do not determine a
            ratio of determinants, and a flat direction has none.
        saddle: all eigenvalues at the saddle, exactly one negative, the others positive.

    Raises:
        ValueError: an argument is out of range, or the eigenvalues are not those of a minimum and
            a saddle of one space.

    >>> well = SgdNoise(lr=0.1, batch_size=1)
    >>> steps = log_escape_steps(well, 1.0, 0.25, minimum=[2.0], saddle=[-1.0])
    >>> round(0.1 * math.exp(steps), 4)  # in time
    659.3823
    """
    down = [value for value in saddle if value < 0.0]
    spectra = [*minimum, *map(abs, saddle)]
    if (
        len(minimum) != len(saddle)
        or len(down) != 1
        or not all(0.0 < value < math.inf for value in spectra)
        or min(minimum) <= 0.0
    ):
        message = (
            "minimum must be all positive eigenvalues and saddle as many, one of them negative and "
            f"none zero, got {len(minimum)} with a least one of {min(minimum, default=math.nan)} "
            f"and {len(saddle)} with {len(down)} negative: with flat directions or a few leading "
            "eigenvalues only settings can be compared, by log_escape_ratio"
        )
        raise ValueError(message)
    require_positive(barrier=barrier)
    prefactor = math.log(2.0 * math.pi / -down[0])
    prefactor += 0.5 * math.fsum(math.log(abs(value)) for value in saddle)
    prefactor -= 0.5 * math.fsum(math.log(value) for value in minimum)
    return prefactor + barrier / noise.temperature(variance) - math.log(noise.time_per_step)
