"""How far the gradients in a batch lie apart, in a few numbers: what batch sizes are chosen by.

``g_i`` is the gradient of sample ``i``, ``g`` their mean over the batch's ``B`` samples, ``G`` the
mean over all data. From ``J`` gradients of equal groups of ``m = B / J`` samples, with products
``K_ij = g_i . g_j`` and ``p_j = g_j . g``:

=====================  =============================================  ============================
`trace`                ``m (sum_j |g_j|^2 - J |g|^2) / (J - 1)``      unbiased for ``tr Cov(g_i)``
`along`                ``m (sum_j p_j^2 - J |g|^4) / (J - 1)``        variance of ``g_i . g``
`across`               ``m (tr K - sum_j p_j^2 / |g|^2) / (J - 1)``   the rest, orthogonal to ``g``
=====================  =============================================  ============================

``trace = along / |g|^2 + across`` exactly. At ``m = 1`` these are per-sample statistics. From few
groups they are as unbiased but noisier: the relative standard deviation of ``trace`` is about
``sqrt(2 / ((J - 1) d))``, with ``d`` the number of directions the noise spreads over (Gaussian
case, derived). Groups of two or more stand for single samples only as long as the samples of a
group do not interact: under train-mode batch norm a group's size is part of the function.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from batchlr.argument_ranges import require_count


@final
@dataclass(frozen=True)
class GradientScatter:
    """Norm and noise of one batch's gradient; unit: gradient squared, ``along`` to the fourth."""

    batch_size: int  # samples the gradient is a mean over
    square_norm: float  # |g|^2
    trace: float  # tr Cov(g_i) of single samples, unbiased
    along: float | None = None  # Var(g_i . g); None where only norms were known
    across: float | None = None  # variance of g_i orthogonal to g
    dataset_size: int | None = None  # drawn from without replacement; None is unbounded

    @property
    def inverse_size(self) -> float:
        """``1/b = 1/B - 1/N``; the variance of ``g`` is ``trace / b``, none at ``B = N``."""
        unseen = 0.0 if self.dataset_size is None else 1 / self.dataset_size
        return max(0.0, 1 / self.batch_size - unseen)

    @property
    def mean_square(self) -> float:
        """``|G|^2 = |g|^2 - trace / b``, unbiased; zero or negative where noise dominates."""
        return self.square_norm - self.trace * self.inverse_size

    @property
    def noise_dominated(self) -> bool:
        """Whether the batch shows no gradient beyond its noise."""
        return self.mean_square <= 0

    @property
    def noise_scale(self) -> float:
        """``B_simple = tr Cov / |G|^2`` (McCandlish et al. 2018); infinite if noise dominates.

        The ratio of two noisy numbers: smooth the two, not it (`AdaptiveBatchSize` does).
        """
        return math.inf if self.noise_dominated else self.trace / self.mean_square

    @property
    def is_usable(self) -> bool:
        """Whether there is a gradient, and every figure is finite."""
        figures = (self.square_norm, self.trace, self.along or 0.0, self.across or 0.0)
        return self.square_norm > 0 and all(map(math.isfinite, figures))


def scatter_of_gradients(
    gradients: Sequence[Tensor], *, group_size: int = 1, dataset_size: int | None = None
) -> GradientScatter:
    """Norm and noise of a batch's gradient, from gradients of its parts: their Gram matrix.

    Args:
        gradients: one tensor ``(J, ...)`` a parameter, as of `sample_gradients`.
        group_size: ``m``, samples that each of the ``J`` is a mean over.
        dataset_size: what they were drawn from without replacement.

    Raises:
        ValueError: there are fewer than two gradients, or ``group_size`` is below 1.

    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> scatter = scatter_of_gradients([rows])
    >>> scatter.square_norm, scatter.trace, scatter.along, scatter.across
    (1.0, 2.0, 0.0, 2.0)
    """
    _check_groups(len(gradients[0]) if gradients else 0)
    require_count(group_size=group_size)
    flat = [tensor.detach().flatten(1).double() for tensor in gradients]
    gram = torch.stack([rows @ rows.T for rows in flat]).sum(0)  # (J, J)
    count = len(gram)
    squares = float(gram.trace())
    square_norm = float(gram.sum()) / count**2
    with_mean = gram.sum(1) / count  # (J,) p_j
    products = float(with_mean.square().sum())
    scale = group_size / (count - 1)
    return GradientScatter(
        batch_size=count * group_size,
        square_norm=square_norm,
        trace=scale * max(0.0, squares - count * square_norm),
        along=scale * max(0.0, products - count * square_norm**2),
        across=scale * max(0.0, squares - products / square_norm) if square_norm > 0 else None,
        dataset_size=dataset_size,
    )


def scatter_of_norms(
    sum_of_squares: float,
    square_norm: float,
    *,
    num_groups: int,
    batch_size: int,
    dataset_size: int | None = None,
) -> GradientScatter:
    """Norm and trace from ``sum_j |g_j|^2`` and ``|g|^2``: of groups whose gradients are gone.

    Args:
        sum_of_squares: over the groups, micro-batches or processes, of equal size.
        square_norm: of the mean of their gradients.
        num_groups: ``J``.
        batch_size: samples of all groups together.
        dataset_size: what they were drawn from without replacement.

    Raises:
        ValueError: there are fewer than two groups.
    """
    _check_groups(num_groups)
    between = max(0.0, sum_of_squares - num_groups * square_norm)  # less than 0 by rounding only
    trace = batch_size / num_groups * between / (num_groups - 1)
    return GradientScatter(batch_size, square_norm, trace, dataset_size=dataset_size)


def pooled_scatter(parts: Sequence[GradientScatter], square_norm: float) -> GradientScatter:
    """Norm and trace of a batch from the per-sample ones of its parts: exactly the whole's.

    The mean of the parts' traces alone would leave out what lies between them, and adding the
    between-part variance of the means counts it too often: by ``1 + (J - 1) / (J m)``.

    Args:
        parts: of ``m`` samples each.
        square_norm: of the whole batch's gradient.

    Raises:
        ValueError: there are fewer than two parts, or their sizes differ.
    """
    _check_groups(len(parts))
    sizes = {part.batch_size for part in parts}
    if len(sizes) > 1:
        msg = f"parts must be of one size, got {sorted(sizes)}"
        raise ValueError(msg)
    size, count = sizes.pop(), len(parts)
    within = (size - 1) * sum(part.trace for part in parts) if size > 1 else 0.0
    between = size * max(0.0, sum(part.square_norm for part in parts) - count * square_norm)
    total = count * size
    trace = (within + between) / (total - 1)
    return GradientScatter(total, square_norm, trace, dataset_size=parts[0].dataset_size)


def _check_groups(count: int) -> None:
    if count < 2:
        msg = (
            f"the noise of a gradient needs at least two groups of samples, got {count}: split the "
            "batch into micro-batches"
        )
        raise ValueError(msg)
