"""How batch gradients fluctuate: the mean and variance of each coordinate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.operators import PreconditionedOperator
from batchlr.operators.base import BatchedOperator
from batchlr.operators.curvature_matrix import CurvatureMatrix


@dataclass(frozen=True)
class GradientMoments:
    """Per-coordinate moments of per-sample gradients; unit: gradient squared."""

    mean_square: Tensor  # (P,) square of the mean gradient, unbiased: may be negative
    variance: Tensor  # (P,) per-sample variance

    def second_moment(self, effective_batch_size: float, *, centred: bool = False) -> Tensor:
        """``E g_B^2`` ``(P,)`` of a batch, ``b = B / (1 - B/N)``: what Adam's ``v`` tends to.

        ``centred`` leaves out the mean gradient, as RMSprop does if ``centered``.
        """
        noise = self.variance / effective_batch_size
        return noise if centred else (self.mean_square + noise).clamp(min=0)

    def part(self, coordinates: slice) -> "GradientMoments":
        """Those of some coordinates; no copy."""
        return GradientMoments(self.mean_square[coordinates], self.variance[coordinates])


def gradient_moments(
    operator: CurvatureMatrix,
    *,
    dataset_size: int | None = None,
    only: Sequence[int] | None = None,
) -> GradientMoments:
    """Moments from the batches of ``operator``, at no product; one gradient each if not recorded.

    For disjoint batches drawn without replacement both are unbiased, the variance with divisor
    ``N - 1``.

    Args:
        operator: of at least two batches; those of weight zero tell nothing.
        dataset_size: ``N``, what batches are drawn from; by default the samples given are all, and
            their mean gradient has no noise.
        only: numbers of the batches to use; by default all.

    Raises:
        ValueError: there is only one batch.
    """
    chosen = range(len(operator.weights)) if only is None else only
    wanted = [number for number in chosen if operator.weights[number] > 0]
    samples = [operator.weights[number] for number in wanted]
    count = len(samples) if only is None else len(chosen)  # of some a single one may have weight
    if count < 2 or not samples:
        count = min(count, len(samples))
        msg = f"the noise of the gradient needs at least two disjoint batches, got {count}"
        raise ValueError(msg)
    total, seen = sum(samples), 0.0
    mean = variance = torch.zeros(())
    for number, gradient in enumerate(operator.batch_gradients()):
        if number not in wanted:
            continue
        weight = operator.weights[number]
        if seen == 0:
            mean, variance = torch.zeros_like(gradient), torch.zeros_like(gradient)
        seen += weight  # one pass (Welford 1962), for all gradients at a time take K P numbers
        deviation = gradient - mean
        mean.add_(deviation, alpha=weight / seen)
        variance.addcmul_(deviation, gradient - mean, value=weight / max(1, len(samples) - 1))
    sampling = 0.0 if dataset_size is None else 1 / total - 1 / dataset_size
    return GradientMoments(mean**2 - variance * sampling, variance)


def rarely_moved(operator: CurvatureMatrix, *, share: float) -> Tensor:
    """Which coordinates ``(P,)`` seem to get a gradient from fewer than ``share`` of the samples.

    Told from how many batches' gradients are exactly zero there, as behind a rectified unit that
    is off, or a token that is not in the text: a sample that moves nothing leaves no trace in its
    batch, and a batch of ``n`` is without trace ``(1 - share)^n`` of the time. What every batch
    moves is not rare. At no product; one gradient each if not recorded.

    Args:
        operator: of batches of any size; those of weight zero tell nothing.
        share: in [0, 1).
    """
    moved = torch.zeros(operator.shape[0], dtype=torch.int32, device=operator.device)
    expected, batches = 0.0, 0
    parts = zip(operator.weights, operator.samples, operator.batch_gradients(), strict=True)
    for weight, count, gradient in parts:
        if weight == 0:
            continue
        moved += gradient != 0
        expected += 1 - (1 - share) ** count
        batches += 1
    return moved <= min(int(expected), batches - 1)


def mean_gradient(operator: BatchedOperator) -> Tensor:
    """Gradient ``(P,)`` of the mean loss over the operator's batches, in its coordinates.

    Raises:
        TypeError: the operator is not a model's.
    """
    if isinstance(operator, PreconditionedOperator):
        return operator.scale * mean_gradient(operator.operator)
    if not isinstance(operator, CurvatureMatrix):
        msg = f"only a model's curvature matrix has a gradient, got {type(operator).__name__}"
        raise TypeError(msg)
    total = sum(operator.weights)
    mean = None
    for weight, gradient in zip(operator.weights, operator.batch_gradients(), strict=True):
        part = gradient * (weight / total)
        mean = part if mean is None else mean.add_(part)
    assert mean is not None
    return mean
