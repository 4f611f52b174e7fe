"""Adam's best rate as a function of the batch size, by the surge law: up, a peak, and down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from batchlr.argument_ranges import require_positive


@final
@dataclass(frozen=True)
class SurgeLaw:
    """``lr(B) = 2 max_lr / (sqrt(peak/B) + sqrt(B/peak))`` (Li et al. 2024, arXiv 2405.14578).

    The rate at which a step of Adam, read as the sign of the gradient, lowers the loss most. It
    rises as the square root of the batch size, is largest at ``peak``, and falls as symmetrically:
    the coordinates' signs become sure, all at once, and the step they make together curves more.
    What is best is not what is stable: `CurvatureReport.max_lr` has the limit, measured.

    The law holds where the noise of a coordinate exceeds its mean, ``B`` below some
    ``pi std^2 / (2 mean^2)``; beyond, it falls too far (`sign_descent_lr` does not).
    """

    max_lr: float  # at ``peak``
    peak_batch_size: float

    def __post_init__(self) -> None:
        require_positive(max_lr=self.max_lr, peak_batch_size=self.peak_batch_size)

    def lr(self, batch_size: float) -> float:
        """The best rate at a batch size.

        Raises:
            ValueError: ``batch_size`` is not positive.

        >>> law = SurgeLaw(max_lr=0.01, peak_batch_size=1024)
        >>> round(law.lr(256), 6), law.lr(1024), round(law.lr(4096), 6)
        (0.008, 0.01, 0.008)
        """
        require_positive(batch_size=batch_size)
        root = math.sqrt(batch_size / self.peak_batch_size)
        return 2 * self.max_lr / (root + 1 / root)

    def exponent(self, batch_size: float) -> float:
        """``d ln lr / d ln B``: from 1/2 through 0 at the peak to -1/2.

        >>> SurgeLaw(max_lr=0.01, peak_batch_size=1024).exponent(1024)
        0.0
        """
        require_positive(batch_size=batch_size)
        ratio = batch_size / self.peak_batch_size
        return (1 - ratio) / (1 + ratio) / 2


def fit_surge_law(batch_sizes: Sequence[float], rates: Sequence[float]) -> SurgeLaw:
    """The law nearest to the best rates found at two or more batch sizes.

    Least squares of the relative error of ``1 / lr = a / sqrt(B) + c sqrt(B)``, which is linear in
    ``a = sqrt(peak) / (2 max_lr)`` and ``c = 1 / (2 max_lr sqrt(peak))``.

    Args:
        batch_sizes: two different ones at least.
        rates: the best one at each.

    Raises:
        ValueError: lengths differ, a number is not positive, there is one batch size only, or the
            rates rise as a square root or faster, or fall as its inverse or faster, so that no peak
            fits.

    >>> law = SurgeLaw(max_lr=0.01, peak_batch_size=1024)
    >>> found = fit_surge_law([64, 512, 4096], [law.lr(size) for size in (64, 512, 4096)])
    >>> round(found.max_lr, 9), round(found.peak_batch_size, 3)
    (0.01, 1024.0)
    """
    if len(batch_sizes) != len(rates):
        message = f"got {len(batch_sizes)} batch sizes and {len(rates)} rates"
        raise ValueError(message)
    for size, rate in zip(batch_sizes, rates, strict=True):
        require_positive(batch_size=size, rate=rate)
    if len(set(batch_sizes)) < 2:
        message = f"a peak needs rates at two or more batch sizes, got {sorted(set(batch_sizes))}"
        raise ValueError(message)
    # Rows u a + v c = 1, solved by their normal equations.
    us = [rate / math.sqrt(size) for size, rate in zip(batch_sizes, rates, strict=True)]
    vs = [rate * math.sqrt(size) for size, rate in zip(batch_sizes, rates, strict=True)]
    uu, vv, uv = _dot(us, us), _dot(vs, vs), _dot(us, vs)
    determinant = uu * vv - uv**2
    rising = (vv * sum(us) - uv * sum(vs)) / determinant
    falling = (uu * sum(vs) - uv * sum(us)) / determinant
    # Of the rates' inverses one part rises and one falls; one that is rounding is none.
    least = 1e-9 / len(rates)
    if rising * sum(us) <= least or falling * sum(vs) <= least:
        rises = falling * sum(vs) <= least
        way = "rise as a square root or faster" if rises else "fall as its inverse or faster"
        message = f"the rates {list(rates)} {way}: no peak fits, take them as they are"
        raise ValueError(message)
    return SurgeLaw(max_lr=1 / (2 * math.sqrt(rising * falling)), peak_batch_size=rising / falling)


def surge_law_of_moments(
    means: Sequence[float], stds: Sequence[float], hessian: Sequence[Sequence[float]]
) -> SurgeLaw:
    """The law of a loss whose gradient and Hessian are known, to first order in ``mean / std``.

    ``peak = pi tr H / (2 sum_{i != j} r_i r_j H_ij)`` with ``r = mean / std``, and ``max_lr =
    sqrt(peak / (2 pi)) sum_i r_i mean_i / tr H``.

    Args:
        means: of the gradient's coordinates ``(P,)``.
        stds: of a single sample's ``(P,)``.
        hessian: ``(P, P)``.

    Raises:
        ValueError: a standard deviation is not positive, or the curvature that sure signs add up,
            or the trace, is not: then there is no peak, and rates rise as the square root.

    >>> law = surge_law_of_moments([0.1, 0.1], [1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]])
    >>> round(law.peak_batch_size, 3)
    314.159
    """
    for std in stds:
        require_positive(std=std)
    ratios = [mean / std for mean, std in zip(means, stds, strict=True)]
    trace = sum(row[i] for i, row in enumerate(hessian))
    together = _quadratic(hessian, ratios) - sum(
        row[i] * ratios[i] ** 2 for i, row in enumerate(hessian)
    )
    if trace <= 0 or together <= 0:
        message = (
            f"trace {trace:.3g} and curvature between coordinates {together:.3g} must be positive: "
            "without, there is no peak, and rates rise as the square root of the batch size"
        )
        raise ValueError(message)
    peak = math.pi * trace / (2 * together)
    return SurgeLaw(math.sqrt(peak / (2 * math.pi)) * _dot(ratios, means) / trace, peak)


def sign_descent_lr(
    batch_size: float,
    means: Sequence[float],
    stds: Sequence[float],
    hessian: Sequence[Sequence[float]],
) -> float:
    """The best rate of steps along the signs of Gaussian gradients, at any batch size, exactly.

    With ``E_i = erf(sqrt(B/2) mean_i / std_i)``, the sign's mean: ``sum_i E_i mean_i / (sum_i (1 -
    E_i^2) H_ii + E' H E)``. For ``B`` to infinity the step along ``sign(mean)``.

    Args:
        batch_size: ``B``, samples a step.
        means: of the gradient's coordinates ``(P,)``.
        stds: of a single sample's ``(P,)``.
        hessian: ``(P, P)``.

    Raises:
        ValueError: a standard deviation or the batch size is not positive, or no step is best, for
            the expected curvature along the signs is not.

    >>> round(sign_descent_lr(1e9, [0.1, -0.1], [1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]]), 6)
    0.1
    """
    require_positive(batch_size=batch_size)
    for std in stds:
        require_positive(std=std)
    signs = [
        math.erf(math.sqrt(batch_size / 2) * mean / std)
        for mean, std in zip(means, stds, strict=True)
    ]
    unsure = sum((1 - sign**2) * hessian[i][i] for i, sign in enumerate(signs))
    curvature = unsure + _quadratic(hessian, signs)
    if curvature <= 0:
        message = f"the expected curvature along the signs is {curvature:.3g}: no step is best"
        raise ValueError(message)
    return _dot(signs, means) / curvature


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def _quadratic(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> float:
    return _dot(vector, [_dot(row, vector) for row in matrix])
