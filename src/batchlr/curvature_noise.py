"""How a batch's curvature fluctuates around the mean, along one direction."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.inner_products import dot
from batchlr.measured import Measured
from batchlr.operators.base import BatchedOperator

Projector = Callable[[Tensor], Tensor]
"""Inner products ``(k,)`` of a vector ``(P,)`` with ``k`` others."""

_GAUSSIAN = math.sqrt(2)  # relative standard deviation of the square of a Gaussian number


@dataclass(frozen=True)
class CurvatureNoise:
    """Per-sample variances of the curvature's products; unit: curvature squared."""

    parallel: Measured  # r1: along the top eigenvector v1, of v1' H_i v1
    orthogonal: Measured  # c1: of the rest of H_i v1
    random_direction: Measured  # P sigma^2 of the spiked Wigner model; NaN if not measured

    @property
    def total(self) -> float:
        """``r1 + c1``, what the mean-square limit of the learning rate needs."""
        return self.parallel + self.orthogonal


@dataclass(frozen=True)
class DirectionalNoise:
    """Per-sample variances of ``H_i v`` for a unit vector ``v``; unit: curvature squared.

    A batch of ``B`` out of ``N`` samples has these over ``b = B / (1 - B/N)``. Along the top
    eigenvector they decide stability. Along a random direction ``total`` is ``P sigma^2`` of the
    spiked Wigner model, which in networks is tens to hundreds of times smaller.
    """

    parallel: Measured  # r1: variance of v' H_i v
    orthogonal: Measured  # c1: variance of the part of H_i v orthogonal to v
    others: Tensor  # (k,) float64, variance of u_j' H_i v for the further directions u_j
    outside: Measured  # variance of what is orthogonal to v and to all u_j

    @property
    def total(self) -> float:
        """``E_i |(H_i - H) v|^2``."""
        return self.parallel + self.orthogonal


def directional_noise(
    operator: BatchedOperator,
    vector: Tensor,
    *,
    others: Tensor | Projector | None = None,
    hold: bool = True,
) -> DirectionalNoise:
    """Variances of ``H_i v`` over samples, from how the batches' products differ; one product.

    For disjoint batches drawn without replacement from ``N`` samples the estimate is unbiased for
    the variance with divisor ``N - 1``, whatever the sizes of the batches (one-way analysis of
    variance). Two batches of ``n`` give ``n/2 |(H_1 - H_2) v|^2``.

    Standard errors come from the scatter of the batches' terms. That of ``parallel`` is at least
    the one for Gaussian batch means, ``sqrt(2 / (K - 1))`` of it, for a few terms may agree by
    chance; so is that of ``orthogonal`` for two batches, whose terms always agree.

    Args:
        operator: of at least two batches; those of weight zero tell nothing.
        vector: ``(P,)`` of unit norm.
        others: ``(P, k)`` orthonormal, orthogonal to ``vector``; or what gives a vector's inner
            products with them.
        hold: hold the ``K`` batches' products, ``K P`` numbers; else they are made a second time,
            at one more product.

    Raises:
        ValueError: there is only one batch, or ``vector`` is not of unit norm.
    """
    check_batch_count(operator.weights)
    if abs(float(vector.double().norm()) - 1) > 1e-3:
        msg = f"vector must have unit norm, got {float(vector.norm()):.6g}"
        raise ValueError(msg)
    if not hold:
        mean = operator @ vector
        products = operator.batch_products(vector)
        return _noise(products, mean, operator.weights, vector, others)
    held = list(operator.batch_products(vector))
    return noise_of_products(held, operator.weights, vector, others=others)


def noise_of_products(
    products: Sequence[Tensor] | Tensor,
    weights: Sequence[float],
    vector: Tensor,
    *,
    others: Tensor | Projector | None = None,
) -> DirectionalNoise:
    """`directional_noise` from the products ``H_k v`` ``(K, P)`` of batches of these ``weights``.

    Args:
        products: of at least two batches; they are not changed.
        weights: of the batches, in samples (`BatchedOperator.weights`).
        vector: ``v`` ``(P,)`` of unit norm.
        others: see `directional_noise`.

    Raises:
        ValueError: there is only one batch.
    """
    check_batch_count(weights)
    total = sum(weights)
    mean = torch.zeros_like(vector)
    for product, weight in zip(products, weights, strict=True):
        mean.add_(product, alpha=weight / total)
    return _noise(products, mean, weights, vector, others)


def check_batch_count(weights: Sequence[float]) -> None:
    """Raise ValueError unless at least two batches of these ``weights`` have any."""
    count = sum(weight > 0 for weight in weights)
    if count < 2:
        none = len(weights) - count
        rest = f" (and {none} of weight zero: are all their targets ignored?)" if none else ""
        msg = f"the noise of the curvature needs at least two disjoint batches, got {count}{rest}"
        raise ValueError(msg)


def _noise(
    products: Iterable[Tensor],
    mean: Tensor,
    weights: Sequence[float],
    vector: Tensor,
    others: Tensor | Projector | None,
) -> DirectionalNoise:
    """Of products that come one at a time, whose ``mean`` is known."""
    project = others.T.matmul if isinstance(others, Tensor) else others
    parallels, totals, across = [], [], []
    for product, weight in zip(products, weights, strict=True):
        if weight == 0:
            continue
        deviation = product - mean
        parallels.append(dot(deviation, vector).square())
        totals.append(dot(deviation, deviation))
        if project is not None:
            across.append(project(deviation).double().square())
        del product, deviation  # the next may be made only now
    told = [weight for weight in weights if weight > 0]
    count = len(told)
    samples = torch.tensor(told, dtype=torch.float64, device=vector.device)
    parallel, total = torch.stack(parallels), torch.stack(totals)
    crossed = torch.stack(across) if across else samples.new_zeros(count, 0)  # (K, k)
    least = _GAUSSIAN if count == 2 else 0.0
    orthogonal = (total - parallel).clamp(min=0)
    outside = (orthogonal - crossed.sum(1)).clamp(min=0)
    return DirectionalNoise(
        parallel=_variance(samples * parallel, least=_GAUSSIAN),
        orthogonal=_variance(samples * orthogonal, least=least),
        others=samples @ crossed / (count - 1),
        outside=_variance(samples * outside, least=least),
    )


def _variance(terms: Tensor, *, least: float) -> Measured:
    """Per-sample variance from the batches' terms ``n_k (deviation)^2`` ``(K,)``.

    Its relative standard error is at least ``least / sqrt(K - 1)``.
    """
    count = len(terms)
    variance = float(terms.sum()) / (count - 1)
    scatter = float(terms.std()) * math.sqrt(count) / (count - 1)
    return Measured(variance, max(scatter, least * variance / math.sqrt(count - 1)))
