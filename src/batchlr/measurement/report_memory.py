"""How a report keeps to a budget of memory: what goes where, and how many samples run at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from batchlr.krylov.wanted_pairs import least_basis
from batchlr.measurement.curvature_point import make_operator
from batchlr.measurement.memory_plan import MemoryBudgetError, MemoryShare, divide
from batchlr.measurement.outlying_directions import COUNT
from batchlr.operators.batch_weight import batch_weight
from batchlr.operators.batches import count_samples, take
from batchlr.operators.curvature_matrix import (
    CurvatureMatrix,
    NormMode,
)
from batchlr.operators.isolation import couples_samples
from batchlr.operators.supervised import LossFunction

_FEWEST = 8  # assumed: samples run together, below which a product takes much longer
_SAME = 1e-3  # assumed: relative difference of losses that is rounding


def share_of(
    budget: int,
    cut_to: Callable[[int | None], CurvatureMatrix],
    micro_batches: Sequence[int | None],
    *,
    num_eigenpairs: int,
    max_products: int,
    small_batch_products: int,
    with_adam: bool,
    definite: bool,
) -> tuple[MemoryShare, int | None]:
    """What `divide` makes of ``budget``, and the last of ``micro_batches`` that fits into it.

    Args:
        budget: in bytes.
        cut_to: the matrix whose samples are run so many at a time, graphs kept. One graph of each
            size tried is recorded, that of the first which does not fit among them.
        micro_batches: ascending; None is a whole batch.
        num_eigenpairs: at each end.
        max_products: of one search.
        small_batch_products: of the largest eigenvalue of a small batch; 0 if there is none.
        with_adam: see `divide`.
        definite: whether the space is widened by `outlying_directions`.

    Raises:
        MemoryBudgetError: a MemoryError: not even the first fits.
    """
    found = None
    for size in micro_batches:
        operator = cut_to(size)
        params = operator.shape[0]
        wanted = 2 * max(1, min(num_eigenpairs, params // 2))
        most = min(params, max(max_products, wanted))
        least = least_basis(wanted, most) + (COUNT if definite else 0)
        if small_batch_products:
            least = max(least, least_basis(1, min(params, small_batch_products)))
        try:
            share = divide(
                budget,
                size=params,
                dtype=operator.dtype,
                device=operator.device,
                graph=operator.largest_graph(),
                num_graphs=operator.num_graphs,
                least=least,
                most=max(least, most),
                with_adam=with_adam,
                copies=3 if definite else 1,
            )
        except MemoryBudgetError:
            if found is None:
                raise
            break
        found = share, size
    assert found is not None
    return found


def possible_micro_batches(
    model: nn.Module, loss_fn: LossFunction, batches: Sequence[Any], norm_mode: NormMode
) -> list[int | None]:
    """Sizes to cut batches to for memory, ascending by doubling; None, the last, is not to.

    Only where samples run apart have the mean loss that they have together. That is tried on four:
    batch norm in train mode, losses over pairs and dropout leave batches whole.
    """
    largest = max(batches, key=count_samples)
    if couples_samples(model, norm_mode):
        return [None]
    try:
        four = take(largest, slice(0, 4))
    except TypeError:
        return [None]
    if count_samples(four) < 4 or batch_weight(loss_fn, four) == 0:
        return [None]
    together, apart = (
        float(
            make_operator(
                "hessian", model, loss_fn, [four], norm_mode, {"micro_batch": size}
            ).loss()
        )
        for size in (4, 2)
    )
    if not math.isclose(together, apart, rel_tol=_SAME):
        return [None]
    doublings = max(0, math.ceil(math.log2(count_samples(largest) / _FEWEST)))
    return [*(_FEWEST << number for number in range(doublings)), None]
