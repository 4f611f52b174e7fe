"""Traces from random probes, with what is known of the spectrum taken off first."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.argument_ranges import require_count
from batchlr.inner_products import dot
from batchlr.lanczos import default_generator, gaussian
from batchlr.measured import Measured
from batchlr.operators import LinearOperator


@dataclass(frozen=True)
class TraceEstimate:
    """``tr A`` and ``tr A^2`` with standard errors over the probes."""

    trace: Measured
    square: Measured  # tr A^2, the squared Frobenius norm
    num_probes: int
    num_deflated: int  # directions whose part is exact
    num_products: int


def estimate_trace(
    operator: LinearOperator,
    *,
    num_probes: int,
    vectors: Tensor | None = None,
    values: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """Deflated Hutchinson estimates of ``tr A`` and ``tr A^2``, at one product a probe.

    ``tr A = tr Q'AQ + tr (I - QQ') A (I - QQ')``: the first part is exact, Gaussian-sphere probes
    see the second only (Hutch++, Meyer et al. 2021, with eigenvectors in place of a sketch). What
    outliers would add to the variance, ``2 sum lambda_j^2``, is gone. For ``tr A^2`` the parts are
    ``2 |A Q|^2 - |Q'AQ|^2`` and the squared norm of ``(I - QQ') A`` on the probes.

    Args:
        operator: a symmetric matrix.
        num_probes: random vectors; below eight the standard error itself is a rough guess.
        vectors: ``(P, k)`` orthonormal, best the Ritz vectors of the largest magnitudes
            (`Eigenpairs.vectors`, the ``axes`` of a `Subspace`). They need not be converged.
        values: ``(k,)`` the Ritz values of converged ``vectors``: then ``A Q = Q diag(values)`` is
            taken as known. Without them ``k`` products find ``A Q``.
        generator: for the probes; without one the seed is 0.

    Returns:
        Both traces. With a single probe the errors are NaN; with ``P`` vectors they are zero.

    Raises:
        ValueError: ``num_probes`` < 1, or ``vectors`` or ``values`` do not fit.
        ArithmeticError: a product is not finite.
    """
    require_count(num_probes=num_probes)
    generator = default_generator(generator)
    before = operator.num_products
    size = operator.shape[0]
    basis = _check_vectors(operator, vectors, values)
    k = basis.shape[1]
    known, known_square = _known(operator, basis, values)
    rest = size - k
    if rest == 0:
        spent = operator.num_products - before
        return TraceEstimate(Measured(known, 0.0), Measured(known_square, 0.0), 0, k, spent)
    firsts, seconds = [], []
    for _ in range(num_probes):
        probe = gaussian(operator, generator)
        probe -= basis @ (basis.T @ probe)
        probe -= basis @ (basis.T @ probe)
        probe *= math.sqrt(rest) / probe.norm()
        product = operator @ probe
        firsts.append(dot(probe, product))
        product = product - basis @ (basis.T @ product)
        seconds.append(dot(product, product))
    first, second = torch.stack(firsts), torch.stack(seconds)
    if not bool((first.isfinite() & second.isfinite()).all()):
        msg = "the operator's products are not finite; check the loss on the same batches"
        raise ArithmeticError(msg)
    return TraceEstimate(
        trace=_mean(first, known),
        square=_mean(second, known_square),
        num_probes=num_probes,
        num_deflated=k,
        num_products=operator.num_products - before,
    )


def _known(operator: LinearOperator, basis: Tensor, values: Tensor | None) -> tuple[float, float]:
    """``tr Q'AQ`` and ``2 |AQ|^2 - |Q'AQ|^2``."""
    if values is not None:
        exact = values.double()
        return float(exact.sum()), float(exact.square().sum())
    if basis.shape[1] == 0:
        return 0.0, 0.0
    image = torch.stack([operator @ column.contiguous() for column in basis.T], 1)
    inner = (basis.T @ image).double()
    if not bool(inner.isfinite().all()):
        msg = "the operator's products are not finite; check the loss on the same batches"
        raise ArithmeticError(msg)
    square = 2 * image.double().square().sum() - inner.square().sum()
    return float(inner.trace()), float(square)


def _check_vectors(
    operator: LinearOperator, vectors: Tensor | None, values: Tensor | None
) -> Tensor:
    if vectors is None:
        if values is not None:
            msg = "values belong to vectors, got values alone"
            raise ValueError(msg)
        return torch.zeros(operator.shape[0], 0, dtype=operator.dtype, device=operator.device)
    operator.check(vectors)
    if vectors.ndim != 2 or vectors.shape[1] > operator.shape[0]:
        msg = f"vectors must be a block ({operator.shape[0]}, k), got {tuple(vectors.shape)}"
        raise ValueError(msg)
    if values is not None and values.shape != vectors.shape[1:]:
        msg = f"values must be ({vectors.shape[1]},), got {tuple(values.shape)}"
        raise ValueError(msg)
    gram = vectors.T @ vectors
    if not bool(((gram - torch.eye(len(gram)).to(gram)).abs() <= 1e-3).all()):
        msg = "vectors must be orthonormal; take them through torch.linalg.qr"
        raise ValueError(msg)
    return vectors


def _mean(terms: Tensor, known: float) -> Measured:
    count = len(terms)
    error = float(terms.std()) / math.sqrt(count) if count > 1 else math.nan
    return Measured(known + float(terms.mean()), error)
