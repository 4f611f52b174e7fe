"""Averages of the iterates as learning rates: which rate without averaging is as quiet.

Along an eigenvector of curvature ``h`` SGD at a constant rate is itself an average: with
``a = lr h`` it makes ``(1 - a) w + a c`` of the weight ``w``, ``c`` being the batch's own minimum.
If batches are drawn afresh, iterates ``k`` updates apart have covariance ``V(a) (1 - a)^k``, and
any average of them has a variance that some smaller rate has by itself: its effective rate.
Variances are in units of that of the batch minima.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

from batchlr.argument_ranges import require_count, require_fraction

_ROUNDING = 1e-9  # assumed: what sums of weights and steps of a schedule may be off by


def stationary_variance(step: float) -> float:
    """``V(a) = a / (2 - a)`` of SGD's iterates at ``step = a = lr h``.

    Raises:
        ValueError: ``step`` is outside (0, 2), where nothing is stationary.

    >>> stationary_variance(1.0)
    1.0
    """
    if not 0.0 < step < 2.0:
        message = (
            f"step must lie in (0, 2), got {step}: it is learning rate times curvature, and SGD "
            "settles nowhere else"
        )
        raise ValueError(message)
    return step / (2.0 - step)


class Averaging(ABC):
    """An average of iterates, each of a model's updates leading to one."""

    @abstractmethod
    def variance(self, step: float) -> float:
        """Stationary variance of the average at ``step = lr h``, in (0, 2)."""

    @abstractmethod
    def weights(self, num_updates: int) -> list[float]:
        """Weights of the iterates 0 to ``num_updates``, oldest first; their sum is 1."""


@final
@dataclass(frozen=True)
class ExponentialAverage(Averaging):
    """``mean <- decay mean + (1 - decay) w`` after each update (EMA, Polyak averaging).

    In torch `torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn(decay)``. For small
    steps ``1/lr' = 1/lr + h / (1 - decay)``, like resistors in parallel: where
    ``1 / (1 - decay)`` is far above ``1 / (lr h)``, the horizon of the average is the rate.
    """

    decay: float

    def __post_init__(self) -> None:
        require_fraction(decay=self.decay)

    def variance(self, step: float) -> float:
        """See `Averaging.variance`."""
        kept = self.decay * (1.0 - step)
        ratio = (1.0 - self.decay) / (1.0 + self.decay) * (1.0 + kept) / (1.0 - kept)
        return stationary_variance(step) * ratio

    def weights(self, num_updates: int) -> list[float]:
        """See `Averaging.weights`; what is older than the first iterate counts for it."""
        _require_updates(num_updates, 0)
        recent = [(1.0 - self.decay) * self.decay**age for age in range(num_updates)]
        return [self.decay**num_updates, *reversed(recent)]


@final
@dataclass(frozen=True)
class UniformAverage(Averaging):
    """The mean of the last ``count`` of iterates ``spacing`` updates apart (SWA).

    Izmailov et al. (2018); in torch `torch.optim.swa_utils.AveragedModel` as it is. Next to one
    another they make ``lr' = 2 / (count h)``, for small steps and large counts. Far apart they make
    ``lr / count`` for small steps, in every direction alike; two of them, for any step, ``2 lr / (4
    - lr h)`` (Sandler et al. 2023, arXiv:2301.02312). Far is some ``4.6 / (lr h)`` updates in the
    flattest direction that counts.
    """

    count: int
    spacing: int = 1

    def __post_init__(self) -> None:
        require_count(count=self.count, spacing=self.spacing)

    def variance(self, step: float) -> float:
        """See `Averaging.variance`."""
        kept = (1.0 - step) ** self.spacing  # correlation of neighbours
        # A term for each distance: in closed form they cancel where steps are small.
        pairs = math.fsum((1.0 - lag / self.count) * kept**lag for lag in range(1, self.count))
        return stationary_variance(step) / self.count * (1.0 + 2.0 * pairs)

    def weights(self, num_updates: int) -> list[float]:
        """See `Averaging.weights`."""
        _require_updates(num_updates, (self.count - 1) * self.spacing)
        weights = [0.0] * (num_updates + 1)
        for number in range(self.count):
            weights[num_updates - number * self.spacing] = 1.0 / self.count
        return weights


def effective_lr(lr: float, curvature: float, averaging: Averaging) -> float:
    """Rate whose iterates scatter along a direction as averaged ones do at rate ``lr``.

    ``lr' h = 2 v / (1 + v)`` with ``v`` the variance of the average (this library's derivation;
    that averages stand for rates is Sandler et al. 2023). It is about where training has settled at
    a constant rate, on a quadratic. It differs from direction to direction: an EMA quiets steep
    ones and leaves flat ones, ``lr h`` far below ``1 - decay``, as they are. What it says of a
    network: docs/averaging_and_probes.md.

    Args:
        lr: of SGD. With momentum ``m``: ``lr / (1 - m)``, right to first order in ``lr curvature``.
        curvature: of the mean loss along the direction, an eigenvalue as in
            `CurvatureReport.largest`; unit: 1 / ``lr``.
        averaging: which iterates the average is over.

    Raises:
        ValueError: ``lr curvature`` is outside (0, 2).

    >>> round(effective_lr(0.2, 1.0, UniformAverage(2, spacing=1000)), 7)
    0.1052632
    >>> round(effective_lr(0.2, 1.0, ExponentialAverage(decay=0.9)), 7)
    0.0693548
    """
    variance = averaging.variance(lr * curvature)
    return 2.0 * variance / (1.0 + variance) / curvature


def schedule_from_weights(weights: Sequence[float]) -> list[float]:
    """Factors on the rate of each update with which the last iterate would be the average.

    The average is ``w_0 + sum_j f_j u_j`` with ``u_j`` the updates as they were made, by whatever
    optimizer, and ``f_j`` the sum of the weights of all iterates from ``j`` on. An exact identity,
    of a replay: a run that has these rates from the start meets other gradients.

    Args:
        weights: of the iterates 0 to T, oldest first.

    Returns:
        T factors, from 1 downwards: an EMA's end in an exponential decay, uniform weights are a
        linear one, those of two iterates a single halving.

    Raises:
        ValueError: a weight is negative, or their sum is not 1.

    >>> schedule_from_weights(UniformAverage(4).weights(num_updates=4))
    [1.0, 0.75, 0.5, 0.25]
    """
    total = math.fsum(weights)
    if not abs(total - 1.0) <= _ROUNDING or min(weights) < 0.0:
        message = (
            f"weights must be at least 0 and sum to 1, got a least one of "
            f"{min(weights, default=0.0)} and a sum of {total}"
        )
        raise ValueError(message)
    return list(accumulate(reversed(weights[1:])))[::-1]


def weights_from_schedule(schedule: Sequence[float]) -> list[float]:
    """Weights of the iterates whose average replays a decay: the inverse of the above.

    So a run at a constant rate gives, without another one, what each decay would make of its
    updates. That merging checkpoints stands for a decay so: WSM (arXiv:2507.17634).

    Args:
        schedule: factors on the rate of T updates, from 1 or less downwards to 0 or more.

    Returns:
        T + 1 weights, of the iterates before the first update and after each; their sum is 1.

    Raises:
        ValueError: the schedule is empty, rises, or leaves [0, 1].

    >>> weights_from_schedule([1.0, 0.75, 0.5, 0.25])
    [0.0, 0.25, 0.25, 0.25, 0.25]
    """
    steps = [before - after for before, after in pairwise([1.0, *schedule, 0.0])]
    if not schedule or not min(steps) >= -_ROUNDING:
        message = (
            "schedule must not be empty, begin at 1 or less, never rise and end at 0 or more, got "
            f"{list(schedule)}: an average replays no update more than once"
        )
        raise ValueError(message)
    return [max(0.0, step) for step in steps]


def _require_updates(num_updates: int, least: int) -> None:
    if num_updates < least:
        message = f"num_updates must be at least {least} for this average, got {num_updates}"
        raise ValueError(message)
