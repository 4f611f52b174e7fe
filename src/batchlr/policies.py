"""Learning rate and momentum from a few Ritz values, as the paper's public code has them.

The on-the-fly learners of Granziol, Zohren & Roberts (2022) turn one short Lanczos run into a
step size. They are kept as published, defects included, so that the experiments can be rerun; none
is the default, and ``batchlr`` itself applies the mean-square limit of `max_sgd_lr`.

Common to all, and known to be wrong with all:

- they work with magnitudes: negative curvature, which limits no rate, counts like positive, and at
  a random initialisation it is the largest;
- neither the batch size trained with nor batch noise enters, while the few samples measured on
  (32 in most published runs) inflate the largest value.

Ritz values have the unit of curvature; ``weights`` are the squared first components of the
tridiagonal matrix's eigenvectors, which sum to 1.
"""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

from batchlr.learning_rates import StepSize, heavy_ball

Policy = Callable[[Sequence[float], Sequence[float]], StepSize]
PolicyName = Literal["paper_sgd", "paper_momentum", "paper_momentum_as_published", "paper_nesterov"]

_HEAVY = 0.5  # cited: a Ritz value that carries more than this share counts as the near-zero bulk


def paper_sgd(ritz_values: Sequence[float], weights: Sequence[float]) -> StepSize:
    """``lr = 2 / (L + mu)`` without momentum: the published learner "SSGD".

    ``L`` is the largest magnitude and ``mu`` the median one. It is the best fixed rate of gradient
    descent on a quadratic whose curvatures lie in [mu, L] (Polyak 1964); the median of Ritz values
    is no lower end of the spectrum, for Lanczos places them at both ends first. The published
    script breaks off behind this line, an undefined momentum being saved; 0 is what it implies.
    Of an even number of values the median here is the mean of the middle two (assumed: the
    published logs do not show which). Not the default.

    Raises:
        ValueError: there are no Ritz values, a number is not finite, or weights do not fit.
        ArithmeticError: all Ritz values are 0.

    >>> paper_sgd([-3.0, 1.0, 0.5], [0.1, 0.2, 0.7])
    StepSize(lr=0.5, momentum=0.0)
    """
    sizes = _magnitudes(ritz_values, weights)
    return StepSize(lr=2.0 / (_largest(sizes) + median(sizes)), momentum=0.0)


def paper_momentum(ritz_values: Sequence[float], weights: Sequence[float]) -> StepSize:
    """`heavy_ball` of the largest and the smallest non-trivial magnitude: "SSGDM" as intended.

    ``mu`` is the smallest magnitude once Ritz values have been deleted, heaviest first, while the
    heaviest left weighs more than 0.5: that removes the near-zero bulk where it is narrow enough
    to be one Ritz value. Where it is wider nothing is deleted, and rate and momentum are those of
    a tiny ``mu``. The published code has another denominator (`paper_momentum_as_published`). Not
    the default.

    Raises:
        ValueError: there are no Ritz values, a number is not finite, or weights do not fit.
        ArithmeticError: ``mu`` is 0, or the deletion leaves nothing.

    >>> paper_momentum([9.0, -1.0, 0.001], [0.1, 0.2, 0.7])
    StepSize(lr=0.25, momentum=0.25)
    """
    return heavy_ball(*_extremes(ritz_values, weights))


def paper_momentum_as_published(ritz_values: Sequence[float], weights: Sequence[float]) -> StepSize:
    """`paper_momentum` with the defect of the published code: "SSGDM".

    Its momentum is ``((sqrt(L) - sqrt(mu)) / (sqrt(L) + mu))^2``: the denominator has ``mu`` where
    Polyak's has ``sqrt(mu)``, a sum of unlike units, so that the momentum depends on the scale of
    the loss: too large for ``mu < 1``, too small above. Not the default.

    Raises:
        ValueError: there are no Ritz values, a number is not finite, or weights do not fit.
        ArithmeticError: ``mu`` is 0, or the deletion leaves nothing.

    >>> paper_momentum_as_published([16.0, 4.0, 0.001], [0.1, 0.2, 0.7]).momentum
    0.0625
    """
    largest, smallest = _extremes(ritz_values, weights)
    root = math.sqrt(largest)
    momentum = ((root - math.sqrt(smallest)) / (root + smallest)) ** 2
    return StepSize(lr=heavy_ball(largest, smallest).lr, momentum=momentum)


def paper_nesterov(ritz_values: Sequence[float], weights: Sequence[float]) -> StepSize:
    """``lr = sqrt(mu / L)``, ``momentum = (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu))``: "SSGDMN".

    The learner of all published logs, whose rates and momenta it gives to 2.3e-6. The rate is
    dimensionless: it does not scale with curvature, and ``lr / (1 - momentum)`` is
    ``(1 + sqrt(mu / L)) / 2``, always between 0.5 and 1. Against the limit
    ``2 (1 + momentum) / L`` it came out 6 to 16 times too large at the logged initialisations and
    0.25 to 3.5 times later on: training moved the curvature to the rate, not the rate to the
    curvature. ``mu`` is that of `paper_momentum`, with its flaw. Not the default.

    Raises:
        ValueError: there are no Ritz values, a number is not finite, or weights do not fit.
        ArithmeticError: ``mu`` is 0, or the deletion leaves nothing.

    >>> round(paper_nesterov([9.0, -1.0, 0.001], [0.1, 0.2, 0.7]).momentum, 9)
    0.5
    """
    largest, smallest = _extremes(ritz_values, weights)
    ratio = math.sqrt(smallest / largest)
    return StepSize(lr=ratio, momentum=(1.0 - ratio) / (1.0 + ratio))


POLICIES: dict[PolicyName, Policy] = {
    "paper_sgd": paper_sgd,
    "paper_momentum": paper_momentum,
    "paper_momentum_as_published": paper_momentum_as_published,
    "paper_nesterov": paper_nesterov,
}
"""The published policies by name."""


def _extremes(ritz_values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """``L`` and the "smallest non-trivial" ``mu``."""
    sizes = _magnitudes(ritz_values, weights)
    by_weight = sorted(zip(weights, sizes, strict=True), reverse=True)
    light = [size for weight, size in by_weight if weight <= _HEAVY]
    if not light:
        msg = (
            f"no Ritz value is left once those heavier than {_HEAVY} are deleted, the weights are "
            f"{list(weights)}: take more Lanczos steps"
        )
        raise ArithmeticError(msg)
    largest, smallest = _largest(sizes), min(light)
    if smallest == 0.0:
        msg = (
            "mu, the smallest Ritz value left, is 0: there is no curvature to take a rate from; "
            "keep the present rate or measure on other samples"
        )
        raise ArithmeticError(msg)
    return largest, smallest


def _largest(sizes: Sequence[float]) -> float:
    largest = max(sizes)
    if largest == 0.0:
        msg = "all Ritz values are 0: no curvature limits the rate"
        raise ArithmeticError(msg)
    return largest


def _magnitudes(ritz_values: Sequence[float], weights: Sequence[float]) -> list[float]:
    if not ritz_values:
        msg = "there are no Ritz values: pass those of at least one Lanczos step"
        raise ValueError(msg)
    if len(weights) != len(ritz_values):
        msg = (
            f"each Ritz value has one weight, got {len(ritz_values)} values, {len(weights)} weights"
        )
        raise ValueError(msg)
    if not all(map(math.isfinite, ritz_values)):
        msg = f"Ritz values must be finite, got {list(ritz_values)}"
        raise ValueError(msg)
    if not all(0.0 <= weight <= 1.0 + 1e-6 for weight in weights):
        msg = f"weights must lie in [0, 1], got {list(weights)}"
        raise ValueError(msg)
    return [abs(value) for value in ritz_values]
