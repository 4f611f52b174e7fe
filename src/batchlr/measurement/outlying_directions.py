"""Directions of single batches that a Krylov space of their mean does not see."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.krylov.lanczos_process import Subspace
from batchlr.operators.base import BatchedOperator

COUNT = 8
"""Directions added to a space, one a batch (measured, docs/log.md: 16 moved a limit by 3 %)."""

_DEPENDENT = 1e-3
"""Length outside the other axes from which on a direction is one of its own (assumed)."""


@dataclass(frozen=True)
class WidenedSubspace:
    """A space with the outlying directions in it, and what noise sends out of it."""

    subspace: Subspace
    # (m,) float64, per-sample variance of H_i a_j outside the space, as far as a_j lies in what was
    # added; terms between axes are left out, so that only the sum over axes is exact
    leaks: Tensor
    # (m,) float64, the curvature of each axis that lies in the directions that were there before
    before: Tensor


def widened(
    subspace: Subspace,
    matrix: BatchedOperator,
    gradients: Iterable[Tensor],
    *,
    count: int = COUNT,
) -> WidenedSubspace:
    """``subspace`` with a direction of each of the batches that reach farthest out of it.

    A sample that is not learnt yet, or learnt by heart, curves along a direction of its own. In the
    mean over ``n`` samples it is one ``n``-th as strong, so that Lanczos does not find it among the
    bulk; in a batch of ``B`` it is a ``B``-th, and limits the rate there. The direction is one
    power step from the batch's gradient. One product, and one for each direction added; while it
    runs three spaces are in memory. Of the weights of the space only the sum stays right.

    Args:
        subspace: of ``matrix``.
        matrix: of two or more batches.
        gradients: ``(P,)`` of each batch, in the coordinates of ``matrix``.
        count: directions to add at most.
    """
    axes, old = subspace.axes, subspace.basis.count
    count = min(count, matrix.shape[0] - old)
    added = _directions(matrix, gradients, axes, count) if count else axes[:, :0]
    new = added.shape[1]
    shares = torch.tensor(matrix.weights, dtype=torch.float64, device=axes.device)
    shares = shares / shares.sum()
    matrices = subspace.matrices.new_zeros(len(shares), old + new, old + new)
    matrices[:, :old, :old] = subspace.matrices
    whole = torch.cat([axes, added], 1)
    spread = torch.zeros(new, dtype=torch.float64, device=axes.device)
    for j in range(new):
        mean = torch.zeros_like(added[:, j])
        for k, product in enumerate(matrix.batch_products(added[:, j].contiguous())):
            matrices[k, :, old + j] = (whole.T @ product).double()
            mean += product * shares[k].to(product.dtype)
            spread[j] += shares[k] * product.double().square().sum()
        spread[j] -= mean.double().square().sum()
    across = matrices[:, :old, old:]
    matrices[:, old:, :old] = across.transpose(1, 2)
    corner = matrices[:, old:, old:]
    matrices[:, old:, old:] = (corner + corner.transpose(1, 2)) / 2
    average = torch.einsum("k,kij->ij", shares, matrices)
    within = torch.einsum("k,kij->j", shares, (matrices - average)[:, :, old:].square())
    per_sample = sum(matrix.weights) / (len(shares) - 1)
    outside = per_sample * (spread - within).clamp(min=0)
    values, turn = torch.linalg.eigh(average)
    values, turn = values.flip(0), turn.flip(1)
    squares = turn.square()
    curvature = average.diagonal()[:old].clamp(min=0)
    return WidenedSubspace(
        subspace=Subspace(
            values=values,
            weights=turn[:old].square().T @ subspace.weights,
            matrices=turn.T @ matrices @ turn,
            basis=KrylovBasis.of(turn.T.to(whole.dtype) @ whole.T),
        ),
        leaks=outside @ squares[old:],
        before=curvature @ squares[:old],
    )


def _directions(
    matrix: BatchedOperator, gradients: Iterable[Tensor], axes: Tensor, count: int
) -> Tensor:
    """``(P, count)`` orthonormal and orthogonal to ``axes``; fewer if they depend on one another.

    Of the batches whose matrices send their own unit gradients farthest out of ``axes``, the larger
    batches before the smaller.
    """
    units = (torch.nn.functional.normalize(gradient, dim=0) for gradient in gradients)
    found: list[tuple[float, Tensor]] = []
    for weight, product in zip(matrix.weights, matrix.batch_products(units), strict=True):
        outside = product - axes @ (axes.T @ product)
        length = float(outside.norm())
        if length > _DEPENDENT * float(product.norm()):
            found.append((weight * length, outside / length))
        found = sorted(found, key=lambda pair: -pair[0])[:count]
    kept: list[Tensor] = []
    for _, unit in found:
        others = torch.cat([axes, *(other.unsqueeze(1) for other in kept)], 1)
        for _ in range(2):
            unit = unit - others @ (others.T @ unit)
        length = float(unit.norm())
        if length > _DEPENDENT:
            kept.append(unit / length)
    return torch.stack(kept, 1) if kept else axes[:, :0]
