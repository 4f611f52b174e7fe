"""The Lanczos recurrence, one product a step, with thick restarts."""

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from batchlr.inner_products import dot, norm
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.krylov.orthogonality import OrthogonalityWatch
from batchlr.operators import LinearOperator
from batchlr.operators.base import BatchedOperator

_LARGE = 1 << 16
"""Numbers from which the estimate of orthogonality costs less than a sweep (measured: 0.14 ms)."""

_MUCH = 0.1
"""Share of what is left that a sweep may take off before another follows (assumed: it passes a
tenth of the overlaps of earlier vectors on)."""


@dataclass(frozen=True)
class Subspace:
    """The matrices of all batches, seen on one Krylov space of their mean.

    Its axes are the Ritz vectors, so that the weighted mean of the matrices is ``diag(values)`` up
    to rounding.
    """

    values: Tensor  # (m,) float64, descending Ritz values
    weights: Tensor  # (m,) float64, squared overlaps of the Ritz vectors with the start; sum to 1
    matrices: Tensor = field(repr=False)  # (K, m, m) float64, one a batch
    basis: KrylovBasis = field(repr=False)  # of the Ritz vectors

    @property
    def axes(self) -> Tensor:
        """Ritz vectors ``(P, m)``, on the device and in full precision."""
        return self.basis.tensor().T


@final
class LanczosProcess:
    """``A Q' = Q' T + residual next e_m'``, growing by a product a step.

    ``T`` is tridiagonal until the first restart. Scalars are float64 and, like the products, stay
    on the device; `settle` is where the host waits for them.

    Args:
        operator: ``A``.
        capacity: rows of ``Q``, and of ``T``, at most.
        start: ``(P,)`` of unit norm.
        form: of the basis, see `KrylovBasis`.
        by_batch: also project each batch's matrix; needs a `BatchedOperator`.
        at_once: allocate the basis as one block.
        block: products of batches held at a time, ``P`` numbers each (assumed).
    """

    def __init__(
        self,
        operator: LinearOperator,
        capacity: int,
        start: Tensor,
        *,
        form: Literal["device", "half", "cpu"] = "device",
        by_batch: bool = False,
        at_once: bool = False,
        block: int = 8,
    ) -> None:
        self._block = block
        self.operator = operator
        self.size = operator.shape[0]
        self.capacity = capacity
        self.num_products = 0
        self.basis = KrylovBasis(
            self.size,
            capacity,
            form=form,
            dtype=operator.dtype,
            device=operator.device,
            at_once=at_once,
        )
        self.next = start  # up to `_factor`, until it is in the basis
        self._factor: Tensor | None = None
        self.residual = torch.zeros((), dtype=torch.float64, device=operator.device)
        self._entries = self.residual.new_zeros(capacity, capacity)
        self._couplings = self.residual.new_zeros(capacity)  # of `next` with the rows so far
        self._overlaps = self.residual.new_zeros(capacity)  # of the rows with the start
        self._overlaps[0] = 1.0
        self._scale = self.residual.new_zeros(())
        self._first = 0  # row at which the current Krylov sequence began
        self._watch: OrthogonalityWatch | None = None
        on_cpu = operator.device.type == "cpu"
        if on_cpu and self.size >= _LARGE and form != "half":  # whose rounding is not the type's
            self._watch = OrthogonalityWatch(capacity, operator.dtype)
        self._projections: Tensor | None = None  # (K, m, m), upper triangles
        if by_batch and isinstance(operator, BatchedOperator):
            self._projections = self._entries.new_zeros(len(operator.samples), capacity, capacity)

    @property
    def count(self) -> int:
        """Rows of ``Q``."""
        return self.basis.count

    @property
    def matrix(self) -> Tensor:
        """``T`` ``(m, m)`` float64."""
        return self._entries[: self.count, : self.count]

    def advance(self) -> None:
        """One product. After a breakdown the next vector is zero, and so is all that follows."""
        j = self.count
        self._entries[j, :j] = self._entries[:j, j] = self._couplings[:j]
        self.next = self.basis.append(self.next, self._factor)
        w = self._product()
        self.num_products += 1
        self._entries[j, j] = dot(w, self.next)
        length = self._orthogonalise_(w)
        # The size of A, as seen so far: what counts as zero must not depend on the units of A.
        column = torch.linalg.vector_norm(self._entries[: j + 1, j])
        self._scale = torch.maximum(self._scale, torch.hypot(column, length))
        # The cap is for float32: the bulk of a large network can be that thin beside its outliers.
        rounding = min(10 * torch.finfo(w.dtype).eps * math.sqrt(self.size), 1e-6)
        alive = length > rounding * self._scale
        length = torch.where(alive, length, torch.zeros_like(length))
        self._factor = torch.where(alive, 1 / length, torch.zeros_like(length)).to(w.dtype)
        self.next = w
        self._couplings.zero_()
        self._couplings[j] = length
        # A product that is not finite must not pass for a breakdown.
        self.residual = torch.where(self._entries[j, j].isfinite(), length, self._entries[j, j])

    def _orthogonalise_(self, w: Tensor) -> Tensor:
        """Make the product with the last vector the next one, up to its length, which it returns.

        First what ``T`` knows of it is taken off. What rounding has left along all the vectors
        takes a sweep over the basis: of long vectors on the CPU where the watch asks for it, else
        always, and a second one lest the host must wait.
        """
        j = self.count - 1
        # After a restart the first new vector has a part along every row, later ones along two.
        since = max(0, j - 1) if j > self._first else 0
        known = self._entries[since : j + 1, j]
        if self._watch is None:
            self.basis.orthogonalise_(w, known=known)
            return norm(w)
        self.basis.orthogonalise_(w, known=known, sweeps=0)
        length = norm(w)
        if not self._watch.due(self.matrix, length):
            return length
        found = self.basis.orthogonalise_(w, sweeps=1)
        left = norm(w)
        if bool(found.norm() > _MUCH * left):
            self.basis.orthogonalise_(w, sweeps=1)
            left = norm(w)
        self._watch.swept(found / length)
        return left

    def settle(self) -> bool:
        """Wait for the steps made; whether they closed an invariant subspace.

        Rows made after that are dropped.

        Raises:
            ArithmeticError: a product was not finite.
        """
        matrix, residual = self.matrix.cpu(), self.residual.cpu()
        if not bool(matrix.isfinite().all() & residual.isfinite()):
            msg = (
                "the operator's products are not finite: the model or its loss has overflowed at "
                "these weights; check the loss on the same batches"
            )
            raise ArithmeticError(msg)
        for row, entry in enumerate(matrix.diagonal(1).tolist()):
            if entry == 0 and row >= self._first:
                self.basis.truncate(row + 1)
                self.residual = torch.zeros_like(self.residual)
                return True
        return bool(residual == 0)

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values ``(m,)``, ascending, and the eigenvectors of ``T`` ``(m, m)`` in columns."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    def start_again(self, vector: Tensor) -> None:
        """Go on in the complement of the invariant subspace found (the entry between stays 0)."""
        for _ in range(2):
            vector = vector / norm(vector).to(vector.dtype)
            self.basis.orthogonalise_(vector)
        self.next, self._factor = vector, 1 / norm(vector).to(vector.dtype)
        self._couplings.zero_()
        self._first = self.count
        if self._watch is not None:
            self._watch.fresh(self.count)

    def restart(self, kept: dict[str, int]) -> None:
        """Cut the space to so many Ritz vectors at each end (thick restart, Wu & Simon 2000)."""
        values, vectors = self.eigh()
        m = self.count
        top = kept.get("largest", 0)
        chosen = [*range(kept.get("smallest", 0)), *range(m - top, m)]
        turn, k = vectors[:, chosen], len(chosen)
        self.basis.keep(turn)
        couplings = self.residual * turn[-1]
        self._couplings.zero_()
        self._couplings[:k] = couplings
        self._overlaps[:k] = self._overlaps[:m] @ turn
        self._overlaps[k:] = 0
        self._entries.zero_()
        self._entries[:k, :k] = torch.diag(values[chosen])
        if self._projections is not None:
            self._projections[:, :k, :k] = turn.T @ self._symmetric(m) @ turn
        self._first = k
        if self._watch is not None:
            self._watch.turned(turn)

    def subspace(self) -> Subspace:
        """What the batches' products said on the way; needs ``by_batch``.

        It ends the process, whose basis becomes the axes. After a restart the weights are those of
        what is left of the start, its part along the vectors kept, and sum to less than 1.
        """
        values, vectors = self.eigh()
        values, vectors = values.flip(0), vectors.flip(1)
        m = len(values)
        self.basis.keep(vectors)  # in place: a second basis would double the memory of all
        return Subspace(
            values=values,
            weights=(self._overlaps[:m] @ vectors).square(),
            matrices=vectors.T @ self._symmetric(m) @ vectors,
            basis=self.basis,
        )

    def _symmetric(self, m: int) -> Tensor:
        assert self._projections is not None
        upper = self._projections[:, :m, :m]
        return upper.triu() + upper.triu(1).transpose(1, 2)

    def _product(self) -> Tensor:
        """``A next``; on the way each batch's part of it is projected on the basis so far."""
        if self._projections is None or not isinstance(self.operator, BatchedOperator):
            product: Tensor = self.operator @ self.next
            basis = self.next.untyped_storage().data_ptr()  # which an identity returns
            return product.clone() if product.untyped_storage().data_ptr() == basis else product
        j = self.count - 1
        shares = self.operator.weights
        total = torch.zeros_like(self.next)
        products = self.operator.batch_products(self.next)
        width = min(self._block, len(shares))
        held = self.next.new_empty(width, self.size)
        for first in range(0, len(shares), width):
            last = min(first + width, len(shares))
            block = held[: last - first]
            for row in block:
                row.copy_(next(products))
            weights = block.new_tensor(shares[first:last]) / sum(shares)
            total.addmv_(block.T, weights)
            self._projections[first:last, : j + 1, j] = self.basis.project(block.T).T
        return total
