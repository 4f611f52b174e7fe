"""How batch gradients fluctuate: the mean and variance of each coordinate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.operators.curvature_matrix import CurvatureMatrix


@dataclass(frozen=True)
class GradientMoments:
    """Per-coordinate moments of per-sample gradients; unit: gradient squared."""

    mean_square: Tensor  # (P,) square of the mean gradient, unbiased, may be slightly negative
    variance: Tensor  # (P,) per-sample variance

    def second_moment(self, effective_batch_size: float) -> Tensor:
        """``E g_B^2`` ``(P,)`` of a batch, ``b = B / (1 - B/N)``: what Adam's ``v`` tends to."""
        return (self.mean_square + self.variance / effective_batch_size).clamp(min=0)


def gradient_moments(operator: CurvatureMatrix) -> GradientMoments:
    """Moments from the batches of ``operator``, at no product; one gradient each if not recorded.

    Raises:
        ValueError: there is only one batch.
    """
    samples = operator.samples
    if len(samples) < 2:
        msg = "the noise of the gradient needs at least two disjoint batches, got 1"
        raise ValueError(msg)
    total = sum(samples)
    gradients = torch.stack(list(operator.batch_gradients()))  # (K, P)
    sizes = torch.tensor(samples, dtype=gradients.dtype, device=gradients.device)
    mean = (sizes / total) @ gradients
    variance = sizes @ (gradients - mean) ** 2 / (len(samples) - 1)
    return GradientMoments(mean**2 - variance / total, variance)
