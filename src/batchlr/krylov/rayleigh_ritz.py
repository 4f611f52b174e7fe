"""Rayleigh-Ritz: a matrix seen on a small space that grows by one product at a time."""

from typing import final

import torch
from torch import Tensor

from batchlr.inner_products import norm
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.krylov.lanczos_process import Subspace
from batchlr.operators import LinearOperator
from batchlr.operators.base import BatchedOperator

_NOTHING_NEW = 1e-4  # assumed: a direction of which less than this lies outside is rounding

_MOSTLY_NEW = 0.7  # of which more lies outside, one sweep suffices (Daniel et al. 1976)

_ROUNDING = 1e-3  # assumed: beyond it a unit vector is none

_FIRST_ROWS = 4  # assumed: a warm search ends within; so few keep to memory already touched


@final
class RitzSpace:
    """Orthonormal vectors, their images under a matrix, and the matrix on their span.

    Because the images are kept, any vector may join, the residual of any Ritz vector is known at no
    product, and a restart loses none. Memory is ``2 capacity P`` numbers, and ``K keep_products P``
    for the products of ``K`` batches if they are asked for. Scalars are float64 on the CPU: one
    transfer of ``m`` numbers a product.

    Args:
        operator: a symmetric matrix.
        capacity: vectors held at most; a full space restarts from half of them.
        by_batch: also see each batch's own matrix on the space; needs a `BatchedOperator`.
        keep_products: the batches' products with the first so many vectors are held whole.
    """

    def __init__(
        self,
        operator: LinearOperator,
        capacity: int,
        *,
        by_batch: bool = False,
        keep_products: int = 0,
    ) -> None:
        self.operator = operator
        self.capacity = min(capacity, operator.shape[0])
        self.size = 0
        self.num_products = 0
        self._vectors = torch.empty(
            min(_FIRST_ROWS, self.capacity),
            operator.shape[0],
            dtype=operator.dtype,
            device=operator.device,
        )
        self._images = torch.empty_like(self._vectors)
        self._gram = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self._start = torch.zeros(
            self.capacity, dtype=torch.float64
        )  # the first vector on the rows
        self._first: Tensor | None = None  # itself, once a restart has cut it
        self._by_batch = by_batch and isinstance(operator, BatchedOperator)
        self._keep_products = keep_products
        self._products: list[Tensor] = []  # (K, P) each, of the first vectors; no restart yet
        self._whole = keep_products > 0
        count = len(operator.samples) if isinstance(operator, BatchedOperator) else 0
        self._projections = torch.zeros(
            count if self._by_batch else 0, self.capacity, self.capacity, dtype=torch.float64
        )

    def extend(self, direction: Tensor, *, end: str = "largest") -> bool:
        """Let ``direction`` ``(P,)`` join, at one product; False if it lies in the space already.

        A full space is first cut down to the half of its Ritz vectors nearest to ``end`` of the
        spectrum, or to both (``"both"``).
        """
        if self.size == self.capacity:
            if self.capacity == self.operator.shape[0]:
                return False
            self._restart(end)
        m = self.size
        if m == len(self._vectors):
            self._vectors, self._images = self._roomier(self._vectors), self._roomier(self._images)
        if not self._add_direction(direction, self._vectors[m]):
            return False
        self._images[m] = self._multiply(self._vectors[m])
        entries = (self._vectors[: m + 1] @ self._images[m]).double().cpu()
        if not bool(entries.isfinite().all()):
            msg = (
                "the operator's products are not finite: the model or its loss has overflowed at "
                "these weights; check the loss on the same batches"
            )
            raise ArithmeticError(msg)
        self._gram[m, : m + 1] = entries
        self._gram[: m + 1, m] = entries
        if self.num_products == 0:
            self._start[0] = 1.0
        elif self._first is not None:
            self._start[m] = torch.dot(self._first, self._vectors[m]).double().cpu()
        self.size += 1
        self.num_products += 1
        return True

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values ``(m,)``, descending, and coefficients of their vectors ``(m, m)``."""
        m = self.size
        values, coefficients = torch.linalg.eigh(self._gram[:m, :m])
        return values.flip(0), coefficients.flip(1)

    def vector(self, coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The vector ``(P,)`` with coefficients ``(m,)``; a block ``(P, k)`` for ``(m, k)``."""
        return torch.matmul(self._vectors[: self.size].T, coefficients.to(self._vectors), out=out)

    def rows(self, coefficients: Tensor) -> Tensor:
        """The vectors ``(k, P)`` with coefficients ``(m, k)``."""
        return coefficients.T.to(self._vectors) @ self._vectors[: self.size]

    def image(self, coefficients: Tensor) -> Tensor:
        """``A`` times `vector`."""
        return self._images[: self.size].T @ coefficients.to(self._vectors)

    def residual(self, value: float, coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
        """``A v - value v`` ``(P,)`` of the vector ``v`` with coefficients ``(m,)``."""
        m, shares = self.size, coefficients.to(self._vectors)
        images = torch.mv(self._images[:m].T, shares, out=out)
        return images.addmv_(self._vectors[:m].T, shares, alpha=-value)

    def overlaps(self, coefficients: Tensor) -> Tensor:
        """Squared overlaps ``(k,)`` of the vectors ``(m, k)`` with the first vector."""
        return (self._start[: self.size] @ coefficients).square()

    def matrices(self, coefficients: Tensor) -> Tensor:
        """Each batch's matrix ``(K, k, k)`` on the vectors with coefficients ``(m, k)``."""
        m = self.size
        return coefficients.T @ self._projections[:, :m, :m] @ coefficients

    def subspace(self) -> Subspace:
        """Each batch's own matrix on the Ritz vectors, and these; needs ``by_batch``."""
        values, coefficients = self.ritz()
        return Subspace(
            values=values,
            weights=self.overlaps(coefficients),
            matrices=self.matrices(coefficients),
            basis=KrylovBasis.of(self.rows(coefficients)),
        )

    def batch_products(self, coefficients: Tensor) -> Tensor | None:
        """Each batch's product ``(K, P)`` with `vector`, if all the batches' products are held."""
        if not self._whole or len(self._products) != self.size:
            return None
        shares = coefficients.to(self._vectors)
        total = torch.zeros_like(self._products[0])
        for share, product in zip(shares, self._products, strict=True):
            total.addcmul_(product, share)
        return total

    def _roomier(self, rows: Tensor) -> Tensor:
        """The same rows where twice as many fit."""
        roomier = rows.new_empty(min(2 * len(rows), self.capacity), rows.shape[1])
        roomier[: len(rows)] = rows
        return roomier

    def _add_direction(self, direction: Tensor, out: Tensor) -> bool:
        """The unit vector along what is new in ``direction``, or False if there is nothing."""
        rows = self._vectors[: self.size]
        length = norm(direction)
        torch.div(direction, length.to(direction.dtype), out=out)
        if len(rows) == 0:
            return bool((norm(out) - 1).abs() < _ROUNDING)  # it may have over- or underflowed
        for _ in range(2):
            out.addmv_(rows.T, rows @ out, alpha=-1)
            left = float(torch.linalg.vector_norm(out))
            if not left > _NOTHING_NEW:  # also where the norm is not a number
                return False
            out /= left
            if left > _MOSTLY_NEW:
                break
        return True

    def _multiply(self, vector: Tensor) -> Tensor:
        if not self._by_batch:
            return self.operator @ vector
        assert isinstance(self.operator, BatchedOperator)
        m, weights = self.size, self.operator.weights
        self._whole = self._whole and self.num_products < self._keep_products
        total = torch.zeros_like(vector)
        held = []
        rows = self._vectors[: m + 1]
        entries = []
        for weight, product in zip(weights, self.operator.batch_products(vector), strict=True):
            total.add_(product, alpha=weight / sum(weights))
            entries.append(rows @ product)
            if self._whole:
                held.append(product)
        projected = torch.stack(entries).double().cpu()
        self._projections[:, m, : m + 1] = projected
        self._projections[:, : m + 1, m] = projected
        if self._whole:
            self._products.append(torch.stack(held))
        else:
            self._products.clear()
        return total

    def _restart(self, end: str) -> None:
        values, coefficients = self.ritz()
        m, keep = self.size, max(1, self.capacity // 2)
        chosen = list(range(keep))
        if end == "smallest":
            chosen = list(range(m - keep, m))
        elif end == "both":
            chosen = [*range(keep - keep // 2), *range(m - keep // 2, m)]
        turn = coefficients[:, chosen]
        if self._first is None:
            self._first = self._vectors[0].clone()
        self._vectors[:keep] = turn.T.to(self._vectors) @ self._vectors[:m]
        self._images[:keep] = turn.T.to(self._vectors) @ self._images[:m]
        self._gram.zero_()
        self._gram[:keep, :keep] = torch.diag(values[chosen])
        if self._by_batch:
            self._projections[:, :keep, :keep] = turn.T @ self._projections[:, :m, :m] @ turn
        self._start[:keep] = self._start[:m] @ turn
        self._products.clear()
        self._whole = False
        self.size = keep
