"""Lanczos: an operator and a start vector become a small tridiagonal matrix."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchlr.inner_products import norm
from batchlr.krylov.krylov_basis import BasisForm, choose_form
from batchlr.krylov.lanczos_process import LanczosProcess, Subspace
from batchlr.krylov.wanted_pairs import Criterion, JudgedPairs, WantedPairs, least_basis
from batchlr.krylov.wanted_pairs import Which as Which
from batchlr.operators import LinearOperator
from batchlr.operators.base import BatchedOperator

MAX_STEPS = 200
"""Default limit of `top_eigenpairs` (assumed: the basis then takes 200 P numbers)."""

_RESTART_STEPS = 5
"""Steps in a fresh Krylov space before its eigenvalues are believed (assumed)."""

_LEAST_AGE = 3
"""Steps in a first Krylov space before an error that rests on a gap is believed (assumed)."""

_A_BLOCK_S_VECTORS = 12
"""Vectors of a basis for each batch's product held beside it (assumed: a tenth of its memory)."""


@dataclass(frozen=True)
class Tridiagonal:
    """The ``T`` of ``A Q' = Q' T``, which holds up to the last column; ``Q`` has the basis in rows.

    After a breakdown (the start vector lies in an invariant subspace) ``m`` is the dimension of
    that subspace, smaller than asked for, and the relation is exact.
    """

    diagonal: Tensor  # (m,) float64, on the operator's device
    off_diagonal: Tensor  # (m - 1,) float64, positive
    # (m, P) orthonormal rows, the first the normalised start; (0, P) if not kept
    basis: Tensor = field(repr=False)
    residual: Tensor  # () float64, the off-diagonal entry that would follow; 0 after a breakdown

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values ``(m,)``, ascending, and the eigenvectors of ``T`` ``(m, m)`` in columns."""
        matrix = torch.diag(self.diagonal)
        matrix = matrix + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs at the ends of a spectrum, in descending order."""

    values: Tensor  # (k,) float64; (2k,) for which="both"
    vectors: Tensor = field(repr=False)  # (P, k) orthonormal columns; (P, 0) if not asked for
    residuals: Tensor  # (k,) norm of A v - value v
    bounds: Tensor  # (k,) certified: an eigenvalue lies within it; at most the residual
    errors: Tensor  # (k,) residual^2 / gap, no less than rounding: an estimate, at most the bound
    num_products: int
    converged: bool
    subspace: Subspace | None = field(default=None, repr=False)  # the whole Krylov space, if asked

    def __str__(self) -> str:
        end = "converged" if self.converged else "not converged"
        lines = [
            f"{value:>11.4g}  within {bound:.2g}, error about {error:.2g}"
            for value, bound, error in zip(self.values, self.bounds, self.errors, strict=True)
        ]
        words = f"{len(lines)} eigenvalues of {len(self.vectors)}, {self.num_products} products"
        return "\n".join([f"{words}, {end}", *lines])


def lanczos(
    operator: LinearOperator,
    num_steps: int,
    *,
    start: Tensor | None = None,
    basis: BasisForm = "auto",
    basis_budget: int | None = None,
    keep_basis: bool = True,
    generator: torch.Generator | None = None,
) -> Tridiagonal:
    """Tridiagonal form of ``operator`` on the Krylov space of ``start``, by ``num_steps`` products.

    What the recurrence knows of a new vector is taken off first; what rounding has left along all
    previous ones takes a sweep of classical Gram-Schmidt, ``2 m P`` memory-bound operations in
    place. On the CPU two long vectors in a row are swept where overlaps of 3e-5 are to be expected
    in float32 (partial reorthogonalisation, Simon 1984), at 40 to 65 % of the steps on networks;
    they stay near 1e-5 (measured, docs/benchmarks.md), the tridiagonal matrix as accurate as the
    products. Short vectors, and those on accelerators, are all swept twice (enough, Giraud et al.
    2005), for then the recurrence's float64 scalars stay there: nothing is synchronised until the
    end. The basis is freed on return unless it is kept, and on any error.

    Args:
        operator: a symmetric matrix.
        num_steps: between 1 and P; the basis takes ``num_steps * P`` numbers.
        start: ``(P,)``; by default Gaussian, drawn with ``generator``.
        basis: where the Krylov vectors are: on the ``"device"``, there in ``"half"`` the bits, or
            in the memory of the ``"cpu"``. ``"auto"`` is the first that fits. Half precision
            costs up to 2e-4 of the largest eigenvalue (measured, docs/log.md).
        basis_budget: bytes they may take; by default what is free.
        keep_basis: return them, on the device and in full precision.
        generator: for the default start; without one the seed is 0.

    Raises:
        ValueError: ``num_steps``, ``start``, ``basis`` or ``basis_budget`` is illegal.
        BasisMemoryError: a MemoryError, before any product: the basis does not fit.
        ArithmeticError: a product is not finite.
    """
    size = operator.shape[0]
    if not 1 <= num_steps <= size:
        msg = f"num_steps must lie in [1, {size}], got {num_steps}"
        raise ValueError(msg)
    start = first_vector(operator, start, default_generator(generator))
    form, _ = choose_form(
        basis, size, num_steps, dtype=operator.dtype, device=operator.device, budget=basis_budget
    )
    process = LanczosProcess(operator, num_steps, start, form=form, at_once=True)
    for _ in range(num_steps):
        process.advance()
    process.settle()
    matrix = process.matrix
    kept = process.basis.tensor() if keep_basis else start.new_empty(0, size)
    return Tridiagonal(
        matrix.diagonal().clone(), matrix.diagonal(1).clone(), kept, process.residual.clone()
    )


def top_eigenpairs(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    criterion: Criterion = "bound",
    settle: Which | None = None,
    max_steps: int | None = None,
    max_basis: int | None = None,
    basis: BasisForm = "auto",
    basis_budget: int | None = None,
    start: Tensor | None = None,
    with_vectors: bool = True,
    with_subspace: bool = False,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The ``k`` largest or smallest eigenvalues (or ``k`` at both ends), with error bounds.

    Lanczos runs until every wanted pair is within ``tol`` times the largest magnitude in the
    spectrum seen. Bounds are certified up to rounding (of vectors at half precision, 3e-5 of the
    largest magnitude; measured): some eigenvalue lies within each. They are
    what the Krylov space says at best, 9 to 40 % below the residual (`certified_bounds`). Errors
    are ``residual^2 / gap`` (Kato-Temple), the gap being to the neighbouring Ritz value and its
    residual; they hold if no eigenvalue in between has gone unseen, and are estimates for that
    reason. A Krylov space holds one vector of each eigenspace:
    further copies of a multiple eigenvalue are found only if the space is exhausted and Lanczos
    starts again in its complement.

    When memory for ``max_steps`` vectors is short (``max_basis``, ``basis_budget``, or what is
    free), a full basis restarts from its best Ritz vectors (thick restart, Wu & Simon 2000).

    Args:
        operator: a symmetric matrix.
        k: pairs wanted at each end.
        which: the end: algebraically largest, smallest, or both.
        tol: relative accuracy at which to stop.
        criterion: what ``tol`` judges: the certified ``"bound"``; the ``"residual"``, which is that
            of the vectors, for up to four products more; or the ``"error"``, which takes 10-25 %
            fewer products than that for an eigenvalue that stands out and none fewer at the edge of
            a bulk (measured, docs/log.md). It needs at least three.
        settle: stop once the pairs of this end are that good, by default all wanted ones.
            ``"largest"`` is judged relative to the largest eigenvalue, for negative curvature may
            be many times stronger, and goes on while that is not positive.
        max_steps: products at most, but for as many pairs as are wanted; by default
            ``min(P, 200)``.
        max_basis: vectors held at most, at least ``2 k + 8`` (twice ``2 k`` for both ends).
        basis: where they are, see `lanczos`.
        basis_budget: bytes they may take; by default what is free.
        start: ``(P,)``, a guess: the gradient saves some products, the last top eigenvector most.
        with_vectors: False leaves the vectors out, for their memory.
        with_subspace: also return each batch's own matrix on the Krylov space. It takes no product,
            ``m P`` flops a batch and step, and an operator of batches.
        generator: for the start, where none is given.

    Raises:
        ValueError: an argument is illegal.
        BasisMemoryError: a MemoryError, before any product: not even a restarting basis fits.
        ArithmeticError: a product is not finite.
    """
    size = operator.shape[0]
    wanted = WantedPairs(k, which, tol, criterion, settle)
    wanted.check_size(size)
    steps = min(size, MAX_STEPS if max_steps is None else max_steps)
    if steps < wanted.count:
        msg = f"max_steps must be at least the {wanted.count} pairs asked for, got {steps}"
        raise ValueError(msg)
    if with_subspace and not isinstance(operator, BatchedOperator):
        msg = f"with_subspace needs an operator of batches, got {type(operator).__name__}"
        raise TypeError(msg)
    least = least_basis(wanted.count, steps)
    if max_basis is not None and max_basis < least:
        msg = f"max_basis must be at least {least} for {wanted.count} pairs, got {max_basis}"
        raise ValueError(msg)
    form, capacity = choose_form(
        basis,
        size,
        steps if max_basis is None else min(steps, max_basis),
        dtype=operator.dtype,
        device=operator.device,
        budget=basis_budget,
        least=least,
    )
    generator = default_generator(generator)
    process = LanczosProcess(
        operator,
        capacity,
        first_vector(operator, start, generator),
        form=form,
        by_batch=with_subspace,
        block=max(1, min(8, capacity // _A_BLOCK_S_VECTORS)),
    )
    judged = _run(process, wanted, steps, generator)
    return Eigenpairs(
        values=judged.values,
        vectors=process.basis.combine(judged.coefficients[:, : None if with_vectors else 0]),
        residuals=judged.residuals,
        bounds=judged.bounds,
        errors=judged.errors,
        num_products=process.num_products,
        converged=judged.converged,
        subspace=process.subspace() if with_subspace else None,
    )


def _run(
    process: LanczosProcess, wanted: WantedPairs, steps: int, generator: torch.Generator
) -> JudgedPairs:
    """Let ``process`` grow until the pairs are good enough, or ``steps`` products are made.

    A basis that is full restarts from its best vectors. One that has closed upon itself starts
    again in its complement, with a random vector: there may be further copies of an eigenvalue.
    """
    operator, capacity = process.operator, process.capacity
    judged = None
    trusted_from = _LEAST_AGE if wanted.criterion == "error" else 0  # products
    while judged is None or process.num_products < steps:  # dropped rows may leave too few pairs
        if process.count == capacity:
            process.restart(wanted.kept(capacity))
        process.advance()
        last = process.num_products >= steps
        if not (last or _due(process.num_products, operator.device) or process.count == capacity):
            continue
        broke_down = process.settle()
        if process.count >= wanted.count:
            judged = wanted.judge(process)
            if judged.converged and process.num_products >= trusted_from and not broke_down:
                break
        if broke_down and process.count < process.size and (judged is None or not last):
            if process.count == capacity:
                process.restart(wanted.kept(capacity))
            process.start_again(gaussian(operator, generator))
            trusted_from = process.num_products + _RESTART_STEPS
    return judged


def _due(count: int, device: torch.device) -> bool:
    """Whether to look at convergence: on an accelerator each look waits for the device."""
    if device.type == "cpu":
        return count <= 64 or count % 4 == 0
    return count <= 4 or count % (2 if count <= 32 else 4) == 0


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
    length = norm(start.flatten())
    if start.ndim != 1 or not (length > 0 and length.isfinite()):
        msg = (
            f"start must be a finite, non-zero vector ({operator.shape[0]},), got shape "
            f"{tuple(start.shape)} with norm {float(length):.3g}"
        )
        raise ValueError(msg)
    return start / length
