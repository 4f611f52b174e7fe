"""Lanczos: an operator and a start vector become a small tridiagonal matrix."""

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, final

import torch
from torch import Tensor

from batchlr.operators import LinearOperator
from batchlr.operators.base import BatchedOperator

Which = Literal["largest", "smallest", "both"]
_ENDS = ("largest", "smallest")

MAX_STEPS = 200
"""Default limit of `top_eigenpairs` (assumed: the basis then takes 200 P numbers)."""

_RESTART_STEPS = 5
"""Steps in a fresh Krylov space before its eigenvalues are believed (assumed)."""

_BLOCK = 8
"""Products of batches held at a time (assumed: P numbers each)."""


@dataclass(frozen=True)
class Tridiagonal:
    """``A Q' = Q' T`` up to the last column, with ``T`` tridiagonal and the rows of ``Q`` basis.

    After a breakdown (the start vector lies in an invariant subspace) ``m`` is the dimension of
    that subspace, smaller than asked for, and the relation is exact.
    """

    diagonal: Tensor  # (m,) float64, on the operator's device
    off_diagonal: Tensor  # (m - 1,) float64, positive
    basis: Tensor  # (m, P) orthonormal rows, the first is the normalised start
    residual: Tensor  # () float64, the off-diagonal entry that would follow; 0 after a breakdown

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values ``(m,)``, ascending, and the eigenvectors of ``T`` ``(m, m)`` in columns."""
        matrix = torch.diag(self.diagonal)
        matrix = matrix + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors

    def until_breakdown(self) -> "Tridiagonal":
        """The part up to the first vanishing off-diagonal entry, if there is one."""
        off_diagonal = torch.cat([self.off_diagonal, self.residual.reshape(1)])
        zeros = (off_diagonal == 0).nonzero()
        m = int(zeros[0]) + 1 if zeros.numel() else off_diagonal.numel()
        return Tridiagonal(
            self.diagonal[:m], self.off_diagonal[: m - 1], self.basis[:m], off_diagonal[m - 1]
        )


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs at the ends of a spectrum, in descending order."""

    values: Tensor  # (k,) float64; (2k,) for which="both"
    vectors: Tensor  # (P, k) orthonormal columns
    residuals: Tensor  # (k,) norm of A v - value v: an eigenvalue lies within it of the value
    num_products: int
    converged: bool
    subspace: "Subspace | None" = None  # the whole Krylov space, if asked for


@dataclass(frozen=True)
class Subspace:
    """The matrices of all batches, seen on one Krylov space of their mean.

    Its axes are the Ritz vectors, so that the weighted mean of the matrices is ``diag(values)`` up
    to rounding.
    """

    values: Tensor  # (m,) float64, descending Ritz values
    weights: Tensor  # (m,) float64, squared overlaps of the Ritz vectors with the start; sum to 1
    matrices: Tensor  # (K, m, m) float64, one a batch
    axes: Tensor  # (P, m) Ritz vectors


def lanczos(
    operator: LinearOperator,
    num_steps: int,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tridiagonal:
    """Tridiagonal form of ``operator`` on the Krylov space of ``start``, by ``num_steps`` products.

    Every new vector is orthogonalised twice against all previous ones (classical Gram-Schmidt;
    twice is enough, Giraud et al. 2005), in ``2 m P`` memory-bound flops a step. The recurrence's
    scalars are float64 and stay on the device: nothing is synchronised until the end.

    Args:
        operator: a symmetric matrix.
        num_steps: between 1 and P; the basis takes ``num_steps * P`` numbers.
        start: ``(P,)``; by default Gaussian, drawn with ``generator``.
        generator: for the default start; without one the seed is 0.

    Raises:
        ValueError: ``num_steps`` or ``start`` is illegal.
        ArithmeticError: a product is not finite.
    """
    size = operator.shape[0]
    if not 1 <= num_steps <= size:
        msg = f"num_steps must lie in [1, {size}], got {num_steps}"
        raise ValueError(msg)
    start = first_vector(operator, start, default_generator(generator))
    process = _Process(operator, num_steps, start)
    for _ in range(num_steps):
        process.advance()
    return process.tridiagonal().until_breakdown()


def top_eigenpairs(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    settle: Which | None = None,
    max_steps: int | None = None,
    start: Tensor | None = None,
    with_subspace: bool = False,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The ``k`` largest or smallest eigenvalues (or ``k`` at both ends), with error bounds.

    Lanczos runs until every wanted pair's residual is at most ``tol`` times the largest magnitude
    in the spectrum seen. The residuals are Lanczos' own bounds, exact up to rounding; an
    eigenvalue's error is of the order of its residual squared over the gap to its neighbours.
    A Krylov space holds one vector of each eigenspace: further copies of a multiple eigenvalue
    are found only if the space is exhausted and Lanczos starts again in its complement.

    Args:
        operator: a symmetric matrix.
        k: pairs wanted at each end.
        which: the end: algebraically largest, smallest, or both.
        tol: relative residual at which to stop.
        settle: stop once the pairs of this end are that good; by default all wanted ones.
        max_steps: products at most; by default ``min(P, 200)``.
        start: ``(P,)``, a guess: the last top eigenvector saves most of the products.
        with_subspace: also return each batch's own matrix on the Krylov space. It takes no product,
            ``m P`` flops a batch and step, and an operator of batches.
        generator: for the start, where none is given.

    Raises:
        ValueError: an argument is illegal.
        ArithmeticError: a product is not finite.
    """
    size = operator.shape[0]
    wanted = 2 * k if which == "both" else k
    if which not in (*_ENDS, "both"):
        msg = f"which must be 'largest', 'smallest' or 'both', got {which!r}"
        raise ValueError(msg)
    if settle is not None and settle != which and (which != "both" or settle not in _ENDS):
        msg = f"settle must be an end that is wanted ({which}), got {settle!r}"
        raise ValueError(msg)
    if k < 1 or wanted > size:
        msg = f"k = {k} pairs ({which}) are not to be had from a ({size}, {size}) matrix"
        raise ValueError(msg)
    if not 0 < tol < 1:
        msg = f"tol must lie in (0, 1), got {tol}"
        raise ValueError(msg)
    steps = min(size, MAX_STEPS if max_steps is None else max_steps)
    if steps < wanted:
        msg = f"max_steps must be at least the {wanted} pairs asked for, got {max_steps}"
        raise ValueError(msg)
    if with_subspace and not isinstance(operator, BatchedOperator):
        msg = f"with_subspace needs an operator of batches, got {type(operator).__name__}"
        raise TypeError(msg)
    generator = default_generator(generator)
    process = _Process(
        operator, steps, first_vector(operator, start, generator), by_batch=with_subspace
    )
    pairs = None
    trusted_from = 0  # the step from which the current Krylov space is old enough
    while process.count < steps:
        process.advance()
        broke_down = process.broke_down()
        # Later steps gain less, so their convergence is tested more rarely.
        due = process.count <= 32 or process.count % 4 == 0 or process.count == steps
        if process.count >= wanted and (due or broke_down):
            pairs = _ritz_pairs(process, k, which, settle or which, tol)
            if pairs.converged and process.count >= trusted_from and not broke_down:
                break
        if broke_down and process.count < steps:
            process.start_again(gaussian(operator, generator))
            trusted_from = process.count + _RESTART_STEPS
    assert pairs is not None
    return replace(pairs, subspace=process.subspace()) if with_subspace else pairs


def _ritz_pairs(process: "_Process", k: int, which: Which, settle: Which, tol: float) -> Eigenpairs:
    tridiagonal = process.tridiagonal()
    values, vectors = tridiagonal.eigh()
    scale = values.abs().max()
    residuals = tridiagonal.residual * vectors[-1].abs()
    m = values.numel()
    top = list(range(m - 1, m - 1 - k, -1))
    bottom = list(range(k - 1, -1, -1))
    chosen = {"largest": top, "smallest": bottom, "both": top + bottom}[which]
    ritz = tridiagonal.basis.T @ vectors[:, chosen].to(tridiagonal.basis.dtype)
    # Residuals below rounding are rounding: claim no more than the arithmetic can give.
    rounding = torch.finfo(process.basis.dtype).eps * scale
    residuals = residuals[chosen].clamp(min=rounding)
    judged = residuals
    if which == "both" and settle != "both":
        judged = residuals[:k] if settle == "largest" else residuals[k:]
    return Eigenpairs(
        values=values[chosen],
        vectors=ritz,
        residuals=residuals,
        num_products=process.count,
        converged=bool((judged <= tol * scale).all()) or process.count == process.size,
    )


@final
class _Process:
    """The Lanczos recurrence, one product a step."""

    def __init__(
        self, operator: LinearOperator, num_steps: int, start: Tensor, *, by_batch: bool = False
    ) -> None:
        self.operator = operator
        self.size = operator.shape[0]
        self.count = 0
        self.basis = torch.empty(num_steps, self.size, dtype=operator.dtype, device=operator.device)
        self.diagonal = torch.zeros(num_steps, dtype=torch.float64, device=operator.device)
        self.off_diagonal = torch.zeros_like(self.diagonal)
        self.scale = torch.zeros((), dtype=torch.float64, device=operator.device)
        self.next = start
        self.projections: Tensor | None = None  # (K, m, m), upper triangles
        if by_batch and isinstance(operator, BatchedOperator):
            count = len(operator.samples)
            self.projections = self.diagonal.new_zeros(count, num_steps, num_steps)

    def advance(self) -> None:
        """One product. After a breakdown the next vector is zero, and so is all that follows."""
        j = self.count
        self.basis[j] = self.next
        w = self._product()
        self.diagonal[j] = torch.dot(w.double(), self.next.double())
        norm_before = w.double().norm()
        w = self._orthogonalise(w, j + 1)
        length = w.double().norm()
        # The size of A, as seen so far: what counts as zero must not depend on the units of A.
        self.scale = torch.maximum(self.scale, norm_before)
        # The cap is for float32: the bulk of a large network can be that thin beside its outliers.
        rounding = min(10 * torch.finfo(w.dtype).eps * math.sqrt(self.size), 1e-6)
        length = torch.where(length > rounding * self.scale, length, torch.zeros_like(length))
        self.off_diagonal[j] = length
        self.next = torch.where(length > 0, w / length.to(w.dtype), torch.zeros_like(w))
        self.count += 1

    def _product(self) -> Tensor:
        """``A next``; on the way each batch's part of it is projected on the basis so far."""
        if self.projections is None or not isinstance(self.operator, BatchedOperator):
            return self.operator @ self.next
        j = self.count
        shares = self.operator.weights
        total = torch.zeros_like(self.next)
        products = self.operator.batch_products(self.next)
        for first in range(0, len(shares), _BLOCK):
            block = torch.stack(list(islice(products, _BLOCK)))  # (block, P)
            last = first + len(block)
            weights = block.new_tensor(shares[first:last]) / sum(shares)
            total += weights @ block
            self.projections[first:last, : j + 1, j] = (block @ self.basis[: j + 1].T).double()
        return total

    def subspace(self) -> Subspace:
        """What the batches' products said on the way; needs ``by_batch``."""
        assert self.projections is not None
        tridiagonal = self.tridiagonal()
        values, vectors = tridiagonal.eigh()
        values, vectors = values.flip(0), vectors.flip(1)
        m = len(values)
        upper = self.projections[:, :m, :m]
        matrices = upper + upper.triu(1).transpose(1, 2)
        return Subspace(
            values=values,
            weights=vectors[0].square(),
            matrices=vectors.T @ matrices @ vectors,
            axes=tridiagonal.basis.T @ vectors.to(self.basis.dtype),
        )

    def _orthogonalise(self, vector: Tensor, count: int) -> Tensor:
        basis = self.basis[:count]
        for _ in range(2):
            vector = vector - basis.T @ (basis @ vector)
        return vector

    def start_again(self, vector: Tensor) -> None:
        """Go on in the complement of the invariant subspace found (the entry between stays 0)."""
        for _ in range(2):
            vector = self._orthogonalise(vector / vector.norm(), self.count)
        self.next = vector / vector.norm()

    def broke_down(self) -> bool:
        """Whether the last step closed an invariant subspace."""
        return bool(self.off_diagonal[self.count - 1] == 0)

    def tridiagonal(self) -> Tridiagonal:
        """The steps made so far; raises ArithmeticError if a product was not finite."""
        m = self.count
        if not bool(self.diagonal[:m].isfinite().all() & self.off_diagonal[:m].isfinite().all()):
            msg = (
                "the operator's products are not finite: the model or its loss has overflowed at "
                "these weights; check the loss on the same batches"
            )
            raise ArithmeticError(msg)
        return Tridiagonal(
            self.diagonal[:m],
            self.off_diagonal[: m - 1],
            self.basis[:m],
            self.off_diagonal[m - 1],
        )


def default_generator(generator: torch.Generator | None) -> torch.Generator:
    """``generator``, or one seeded with 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def gaussian(operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """A Gaussian vector ``(P,)`` fit for ``operator``: its direction is uniform on the sphere."""
    vector = torch.randn(
        operator.shape[0], generator=generator, dtype=operator.dtype, device=generator.device
    )
    return vector.to(operator.device)


def first_vector(
    operator: LinearOperator, start: Tensor | None, generator: torch.Generator
) -> Tensor:
    """``start`` normalised, or a random direction.

    Raises:
        ValueError: ``start`` has the wrong shape, dtype or device, is zero or is not finite.
    """
    if start is None:
        start = gaussian(operator, generator)
    operator.check(start)
    norm = start.double().norm()
    if start.ndim != 1 or not (norm > 0 and norm.isfinite()):
        msg = (
            f"start must be a finite, non-zero vector ({operator.shape[0]},), got shape "
            f"{tuple(start.shape)} with norm {float(norm):.3g}"
        )
        raise ValueError(msg)
    unit: Tensor = start.double() / norm
    return unit.to(operator.dtype)
