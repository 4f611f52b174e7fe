"""How many samples a curvature measurement needs: a rule, or the smallest that is good enough."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.argument_ranges import require_inner_fraction
from batchlr.lanczos import top_eigenpairs
from batchlr.measured import Measured
from batchlr.operators.base import BatchedOperator

_FIRST = 4  # assumed: batches below which the scatter between them says nothing
_SHARE = 0.5  # assumed: of the tolerance, what the eigensolver may use
_CAUTION = 1.2  # assumed: more samples than the scatter asks for, for it is itself estimated
_FEWEST = 64  # assumed: samples of a measurement while training, where half a batch has fewer
_DISJOINT = 4  # batches that a measurement of curvature noise should have


def samples_while_training(most: int, batch_size: int) -> int:
    """No more than half a batch of ``batch_size``, or 64 if that is more; ``most`` at most.

    Half as many cost half as much and train as well (measured: docs/log.md).
    """
    return min(most, max(batch_size // 2, _FEWEST))


def disjoint_sizes(samples: int, pass_size: int) -> tuple[int, int]:
    """Size and number of the batches: at least four, of at most ``pass_size``.

    >>> disjoint_sizes(256, 32), disjoint_sizes(256, 128), disjoint_sizes(3, 32)
    ((32, 8), (64, 4), (1, 3))
    """
    size = max(1, min(pass_size, samples // _DISJOINT))
    return size, max(1, samples // size)


@dataclass(frozen=True)
class SampledEdge:
    """The largest eigenvalue of a subsample that was grown until it was large enough."""

    largest: Measured  # of the subsample, with the sampling error and the eigensolver's
    sampling_error: float  # standard error for the batches not used
    num_batches: int  # used
    num_samples: int
    num_products: float  # in products of one batch, the unit that does not depend on the subsample
    converged: bool  # the last search reached its half of the tolerance
    vector: Tensor  # (P,) its eigenvector
    history: tuple[tuple[int, float, float], ...]  # batches, value, relative sampling error


def sampled_edge(
    make_operator: Callable[[int], BatchedOperator],
    num_batches: int,
    *,
    tol: float = 0.05,
    max_steps: int = 30,
    start: Tensor | None = None,
) -> SampledEdge:
    """Largest eigenvalue from the fewest batches whose sampling error is below ``tol``.

    It starts from four batches. Their scatter ``v' H_k v`` along the top eigenvector, which the
    Lanczos run yields at no product, gives the standard error of the subsample's eigenvalue against
    that of all batches (first order, so without the upward shift of small samples), and with it the
    number of batches that would do: ``error^2 ~ 1/n - 1/N``. The next search is warm.

    Args:
        make_operator: of the first ``n`` of a fixed list of disjoint batches, alike in size.
        num_batches: how many there are.
        tol: standard error asked for, relative to the eigenvalue.
        max_steps: products of one search.
        start: ``(P,)`` for the first search.

    Raises:
        ValueError: an argument is illegal.
        ArithmeticError: a product is not finite.
    """
    if num_batches < 2:
        msg = f"sampling needs at least two batches, got {num_batches}"
        raise ValueError(msg)
    require_inner_fraction(tol=tol)
    count, spent, history = min(_FIRST, num_batches), 0.0, []
    while True:
        operator = make_operator(count)
        if len(operator.samples) != count:
            msg = f"make_operator({count}) gave {len(operator.samples)} batches"
            raise ValueError(msg)
        pairs = top_eigenpairs(
            operator,
            tol=_SHARE * tol,
            criterion="error",
            max_steps=min(max_steps, operator.shape[0]),
            start=start,
            with_subspace=True,
        )
        spent += pairs.num_products * count
        space, value = pairs.subspace, float(pairs.values[0])
        assert space is not None
        along = space.matrices[:, 0, 0]  # v' H_k v of each batch
        scatter = float(along.std())
        error = scatter * math.sqrt(max(1 / count - 1 / num_batches, 0.0))
        relative = error / abs(value) if value != 0 else math.inf
        history.append((count, value, relative))
        start = pairs.vectors[:, 0].contiguous()
        if relative <= tol or count == num_batches:
            break
        share = tol * value / scatter if scatter > 0 else 0.0  # none: all that was seen is zero
        asked = share**2 + 1 / num_batches
        count = min(num_batches, max(count + 1, math.ceil(_CAUTION / asked)))
    total = math.hypot(error, float(pairs.errors[0]))
    return SampledEdge(
        largest=Measured(value, total),
        sampling_error=error,
        num_batches=count,
        num_samples=sum(operator.samples),
        num_products=spent,
        converged=pairs.converged,
        vector=start,
        history=tuple(history),
    )


def nested_edges(
    operator: BatchedOperator, sizes: Sequence[int], *, max_steps: int = 20, tol: float = 0.02
) -> dict[int, Measured]:
    """Mean largest eigenvalue of unions of batches, from one run's products.

    The products of parts give those of their unions: each batch's matrix on the Krylov space of
    the mean, averaged over ``n`` batches in a row, has the largest eigenvalue of that union within
    the space, and so a lower bound. The bound is close where the union's top vector lies in the
    space, which holds for many batches and less for few.

    Args:
        operator: of disjoint batches, alike in size; those of weight zero are left out.
        sizes: batches in a union; the groups of a size are disjoint.
        max_steps: products.
        tol: relative bound of the largest eigenvalue at which the run stops.

    Returns:
        For each size the mean over the groups and its standard error (NaN for a single group).

    Raises:
        ValueError: a size is not in ``[1, K]``.
        ArithmeticError: a product is not finite.
    """
    count = sum(weight > 0 for weight in operator.weights)
    for size in sizes:
        if not 1 <= size <= count:
            msg = f"sizes must lie in [1, {count}], the batches there are, got {size}"
            raise ValueError(msg)
    pairs = top_eigenpairs(
        operator, tol=tol, max_steps=min(max_steps, operator.shape[0]), with_subspace=True
    )
    assert pairs.subspace is not None
    matrices = pairs.subspace.matrices
    weights = torch.tensor(operator.weights, dtype=matrices.dtype, device=matrices.device)
    matrices, weights = matrices[weights > 0], weights[weights > 0]
    result = {}
    for size in sizes:
        edges = []
        for first in range(0, count - size + 1, size):
            part = slice(first, first + size)
            shares = weights[part] / weights[part].sum()
            mean = torch.einsum("k,kij->ij", shares, matrices[part])
            edges.append(torch.linalg.eigvalsh(mean)[-1])
        values = torch.stack(edges)
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        result[size] = Measured(float(values.mean()), error)
    return result
