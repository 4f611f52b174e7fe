"""How a measurement of curvature divides the memory it may take."""

from dataclasses import dataclass

import torch

from batchlr.krylov.krylov_basis import BasisForm, basis_bytes, readable

_VECTORS = 9
"""Vectors beside a basis: the gradient, two of the recurrence, a batch's product in pieces and
whole, their sum, one held for the basis, and two of the check of symmetry (counted)."""

_ADAM_VECTORS = 8
"""More of them where Adam's metric is measured (counted)."""

_HELD = 3
"""Products of batches that find room where the recurrence had its vectors (counted)."""

_WORKING = 2.0
"""What recording a graph and a product on it take, in sizes of the graph (measured on
PreResNet-20)."""

_ENOUGH = 40
"""Vectors beyond which a larger basis is worth less than another graph kept (measured: searches
for both ends take 15 to 40, docs/benchmarks.md)."""


class MemoryBudgetError(MemoryError):
    """A measurement does not fit: says what it takes, what it may take, and the ways out.

    Attributes:
        needed: bytes that would do.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class MemoryShare:
    """What basis and graphs may take of a budget; None is what is free."""

    basis: BasisForm = "auto"
    basis_bytes: int | None = None
    graph_bytes: int | None = None
    held_products: int | None = None  # of batches, at a time

    def holds(self, num_batches: int) -> bool:
        """Whether so many batches' products may be held at a time."""
        return self.held_products is None or num_batches <= self.held_products


UNLIMITED = MemoryShare()


def divide(
    budget: int,
    *,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    graph: int,
    num_graphs: int,
    least: int,
    most: int,
    with_adam: bool = False,
    copies: int = 1,
) -> MemoryShare:
    """Shares of ``budget``: first what a search cannot do without, then half of the rest each.

    What is left when all graphs are kept goes to more vectors and to products held.

    Vectors that do not fit on an accelerator go to the CPU's memory, which the budget is not about;
    on a CPU they are held at half precision.

    Args:
        budget: bytes on ``device`` beyond what is there.
        size: ``P``.
        dtype: of vectors.
        device: of vectors.
        graph: bytes of the largest graph that is differentiated at a time.
        num_graphs: how many could be kept.
        least: vectors a search needs at least.
        most: vectors it has use for.
        with_adam: whether Adam's metric is measured, too.
        copies: of the basis in memory at a time.

    Raises:
        ValueError: ``budget`` is no number of bytes.
        MemoryBudgetError: a MemoryError: even so it does not fit.
    """
    if not isinstance(budget, int) or budget < 0:
        msg = f"memory_budget must be a whole number of bytes, at least 0, got {budget!r}"
        raise ValueError(msg)
    each = size * dtype.itemsize
    vectors = (_VECTORS + (_ADAM_VECTORS if with_adam else 0)) * each
    working = round(_WORKING * graph)
    left = budget - vectors - working
    forms: list[tuple[BasisForm, int]] = [("device", copies * each)]
    if device.type != "cpu" and copies == 1:
        forms.append(("cpu", 0))
    elif copies == 1:
        forms.append(("half", basis_bytes(size, 1, dtype, "half")))
    for form, one in forms:
        rest = left - least * one
        if rest < 0:
            continue
        extra = min(rest // 2, max(0, min(most, _ENOUGH) - least) * one)
        spare = max(0, rest - extra - num_graphs * graph)
        more = min(spare // 2, max(0, most - least) * one - extra)
        extra, spare = extra + more, spare - more
        return MemoryShare(
            form,
            (least * one + extra) // copies if one else None,
            rest - extra,
            _HELD + spare // each,
        )
    form, one = forms[-1]
    needed = vectors + working + least * one
    msg = (
        f"memory_budget={readable(budget)} does not hold a measurement, which takes "
        f"{readable(needed)}: a basis of {least} vectors "
        f"{readable(least * one)}, vectors beside it {readable(vectors)}, the graph of one batch "
        f"and what a product on it takes {readable(working)}. Ways out: a larger budget, smaller "
        "batches or micro_batch, num_eigenpairs=1, one optimizer"
    )
    raise MemoryBudgetError(msg, needed)
