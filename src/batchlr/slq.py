"""Stochastic Lanczos quadrature: an operator becomes its spectral measure."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from batchlr.argument_ranges import require_count, require_positive
from batchlr.krylov.krylov_basis import BasisForm
from batchlr.lanczos import Tridiagonal, default_generator, gaussian, lanczos
from batchlr.measured import Measured
from batchlr.operators import LinearOperator

_FEW = 10.0  # assumed: a node that stands for at most so many eigenvalues is an outlier
_RELIABLE = 0.3  # assumed: relative error of a weight that may be used as a number
_APART = 0.1  # measured (docs/log.md): residual over gap of a node that is one eigenvalue
_Rule = tuple[Tensor, Tensor, Tensor]  # nodes, weights and residuals of one probe

_ONE_PROBE = math.sqrt(2)  # relative standard deviation of an isolated eigenvalue's weight


@dataclass(frozen=True)
class Outlier:
    """An isolated node: its place is good from one probe on, its weight is not."""

    value: Measured  # mean over probes and its standard error
    weight: Measured  # share of the spectrum, an eigenvalue being 1/P
    reliable: bool  # whether the weight's error is below 30 %, which takes about 22 probes


@dataclass(frozen=True)
class SpectralMeasure:
    """A discrete measure close to ``(1/P) sum_j delta(x - lambda_j)``.

    Bulk weights settle with one probe; the weight of an isolated eigenvalue does not (its relative
    standard deviation over probes is ``sqrt(2)``), so moments of spiked matrices need several.
    """

    nodes: Tensor = field(repr=False)  # (n,) float64 Ritz values of all probes
    weights: Tensor = field(repr=False)  # (n,) float64 Gauss weights, their sum is 1
    probes: Tensor = field(repr=False)  # (n,) int64, the probe each node belongs to
    num_products: int
    size: int | None = None  # P
    residuals: Tensor | None = field(default=None, repr=False)  # (n,) of the Ritz vectors

    def __str__(self) -> str:
        size = "" if self.size is None else f" of {self.size} eigenvalues"
        return (
            f"spectrum{size}: from {float(self.nodes.min()):.4g} to {float(self.nodes.max()):.4g}, "
            f"mean {Measured(self.mean, self.mean_stderr)}, mean square "
            f"{Measured(self.second_moment, self.second_moment_stderr)}; {len(self.nodes)} nodes "
            f"of {self.num_probes} probes, {self.num_products} products"
        )

    @property
    def num_probes(self) -> int:
        """Number of random vectors."""
        return int(self.probes.max()) + 1

    @property
    def mean(self) -> float:
        """``tr A / P``."""
        return float(self._moments(1).mean())

    @property
    def second_moment(self) -> float:
        """``tr A^2 / P``."""
        return float(self._moments(2).mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` over probes; NaN for a single one."""
        return _standard_error(self._moments(1))

    @property
    def second_moment_stderr(self) -> float:
        """Standard error of `second_moment` over probes; NaN for a single one."""
        return _standard_error(self._moments(2))

    def density(self, grid: Tensor, bandwidth: float) -> Tensor:
        """Density at ``grid`` ``(g,)``: Gaussians of standard deviation ``bandwidth`` at the nodes.

        Broadening adds ``bandwidth**2`` to the second moment.
        """
        return self._densities(grid, bandwidth).mean(0)

    def density_stderr(self, grid: Tensor, bandwidth: float) -> Tensor:
        """Standard error of `density` over probes ``(g,)``; NaN for a single one."""
        densities = self._densities(grid, bandwidth)
        if len(densities) < 2:
            return torch.full_like(densities[0], math.nan)
        return densities.std(0) / math.sqrt(len(densities))

    def outliers(self, end: Literal["largest", "smallest"] = "largest") -> tuple[Outlier, ...]:
        """Isolated eigenvalues at one end, outermost first, with the errors of their weights.

        Nodes are matched from probe to probe by their order from the end, up to the first that
        stands for more than ten eigenvalues on average. A weight's relative error is at least the
        ``sqrt(2 / num_probes)`` of a Gaussian probe, so that one probe has an error too, and few
        that agree by chance claim no more.

        Raises:
            ValueError: ``end`` is unknown, or the measure does not know P.
        """
        if end not in ("largest", "smallest"):
            msg = f"end must be 'largest' or 'smallest', got {end!r}"
            raise ValueError(msg)
        if self.size is None:
            msg = "outliers need to know P: give the measure its size"
            raise ValueError(msg)
        probes = []
        for probe in range(self.num_probes):
            chosen = self.probes == probe
            order = self.nodes[chosen].argsort(descending=end == "largest")
            shares = self.num_probes * self.weights[chosen][order]
            probes.append((self.nodes[chosen][order], shares))
        found = []
        for rank in range(min(len(nodes) for nodes, _ in probes)):
            values = torch.stack([nodes[rank] for nodes, _ in probes])
            shares = torch.stack([weights[rank] for _, weights in probes])
            weight = float(shares.mean())
            if weight * self.size > _FEW:
                break
            relative = _ONE_PROBE / math.sqrt(self.num_probes)
            scatter = _standard_error(shares)
            error = max(relative * weight, 0.0 if math.isnan(scatter) else scatter)
            found.append(
                Outlier(
                    value=Measured(float(values.mean()), _standard_error(values)),
                    weight=Measured(weight, error),
                    reliable=error <= _RELIABLE * weight,
                )
            )
        return tuple(found)

    def settled(self) -> "SpectralMeasure":
        """The measure with weight ``1/P`` on every node that is one eigenvalue; at no product.

        A node is, if its Ritz vector has converged to a tenth of the distance to the nearest other
        node and its weight is at most that of ten eigenvalues. What a probe happens to give such
        a node scatters by ``sqrt(2)``; the others share what is left in proportion. Wasserstein's
        distance from exact spectra falls by 4 to 40 % (docs/benchmarks.md). Moments of a probe are
        no longer exact. An eigenvalue of small multiplicity looks like a single one and is
        weighted too low.

        Raises:
            ValueError: the measure does not know P or its residuals.
        """
        if self.size is None or self.residuals is None:
            msg = "settled weights need to know P and residuals: give the measure size, residuals"
            raise ValueError(msg)
        weights = self.weights.clone()
        for probe in range(self.num_probes):
            chosen = self.probes == probe
            shares = _settled_weights(
                self.nodes[chosen],
                self.num_probes * self.weights[chosen],
                self.residuals[chosen],
                self.size,
            )
            weights[chosen] = shares / self.num_probes
        return replace(self, weights=weights)

    def _densities(self, grid: Tensor, bandwidth: float) -> Tensor:
        require_positive(bandwidth=bandwidth)
        distance = (grid.to(self.nodes).unsqueeze(0) - self.nodes.unsqueeze(1)) / bandwidth
        kernel = torch.exp(-0.5 * distance**2) / (bandwidth * math.sqrt(2 * math.pi))
        return self._per_probe(self.weights.unsqueeze(1) * kernel)  # (num_probes, g)

    def _moments(self, power: int) -> Tensor:
        return self._per_probe((self.weights * self.nodes**power).unsqueeze(1))[:, 0]

    def _per_probe(self, terms: Tensor) -> Tensor:
        sums = torch.zeros(self.num_probes, terms.shape[1], dtype=terms.dtype, device=terms.device)
        return self.num_probes * sums.index_add_(0, self.probes, terms)


def stochastic_lanczos_quadrature(
    operator: LinearOperator,
    *,
    num_steps: int,
    num_probes: int,
    fixed_node: float | None = None,
    basis: BasisForm = "auto",
    basis_budget: int | None = None,
    generator: torch.Generator | None = None,
) -> SpectralMeasure:
    """Spectral measure from ``num_probes * num_steps`` products (Ubaru, Chen & Saad 2017).

    Moments up to ``2 num_steps - 1`` of each probe are exact. A breakdown ends a probe early. The
    basis of one probe is in memory at a time, ``num_steps P`` numbers in the form chosen.

    A network's spectrum has most of its weight at zero. With ``fixed_node=0.0`` one node more lies
    there, at no product (Gauss-Radau), and Wasserstein's distance from exact spectra falls by 2 to
    15 %, by 6 to 46 % with `SpectralMeasure.settled` (docs/benchmarks.md). It is
    given up where it lies beyond what Lanczos has seen of the spectrum. Another node that it sends
    there is left out, or, where that one's weight is more than one eigenvalue's, it is given up,
    too.

    Args:
        operator: a symmetric matrix.
        num_steps: Lanczos steps of each probe.
        num_probes: random vectors.
        fixed_node: where one node more has to lie; by default nowhere.
        basis: where the Krylov vectors are, see `lanczos`.
        basis_budget: bytes they may take; by default what is free.
        generator: for the probes; without one the seed is 0.

    Raises:
        ValueError: ``num_steps`` not in [1, P] or ``num_probes`` < 1, or an illegal ``basis``.
        BasisMemoryError: a MemoryError, before any product: the basis does not fit.
        ArithmeticError: a product is not finite.
    """
    require_count(num_probes=num_probes)
    generator = default_generator(generator)
    before = operator.num_products
    nodes, weights, probes, residuals = [], [], [], []
    for probe in range(num_probes):
        start = gaussian(operator, generator)
        tridiagonal = lanczos(
            operator,
            num_steps,
            start=start,
            basis=basis,
            basis_budget=basis_budget,
            keep_basis=False,
        )
        values, shares, norms = _gauss_rule(tridiagonal)
        if fixed_node is not None:
            values, shares, norms = _radau_rule(tridiagonal, fixed_node)
        nodes.append(values)
        weights.append(shares / num_probes)
        probes.append(torch.full_like(values, probe, dtype=torch.int64))
        residuals.append(norms)
    return SpectralMeasure(
        torch.cat(nodes),
        torch.cat(weights),
        torch.cat(probes),
        operator.num_products - before,
        operator.shape[0],
        torch.cat(residuals),
    )


def _gauss_rule(tridiagonal: Tridiagonal) -> _Rule:
    values, vectors = tridiagonal.eigh()
    return values, vectors[0].square(), tridiagonal.residual * vectors[-1].abs()


def _radau_rule(tridiagonal: Tridiagonal, node: float) -> _Rule:
    """The rule with a node at ``node``: one row more, its diagonal chosen so (Golub 1973).

    A residual is that of the vector within the Krylov space, of which all but the last entry of
    ``A v - theta v`` cancels.
    """
    values, vectors = tridiagonal.eigh()
    gauss = _gauss_rule(tridiagonal)
    low, high = values[0] - gauss[2][0], values[-1] + gauss[2][-1]
    beta, distances = tridiagonal.residual, values - node
    rounding = torch.finfo(values.dtype).eps * values.abs().max()
    if bool(beta <= rounding) or bool(distances.abs().min() <= rounding):
        return gauss  # exact, or there already
    if not bool(low <= node) or not bool(node <= high):
        return gauss  # a definite matrix has no eigenvalue at zero
    last = node + beta.square() * (vectors[-1].square() / distances).sum()
    values, vectors = Tridiagonal(
        torch.cat([tridiagonal.diagonal, last[None]]),
        torch.cat([tridiagonal.off_diagonal, beta[None]]),
        tridiagonal.basis,
        beta,
    ).eigh()
    within = vectors[:-1].norm(dim=0).clamp(min=float(rounding))
    residuals = beta * torch.hypot(vectors[-1], vectors[-2]) / within
    seen = (values >= low) & (values <= high)
    weights = vectors[0].square()
    kept = weights[seen].sum()
    if bool(1 - kept > 1 / tridiagonal.basis.shape[1]):
        return gauss
    return values[seen], weights[seen] / kept, residuals[seen]


def _settled_weights(nodes: Tensor, weights: Tensor, residuals: Tensor, size: int) -> Tensor:
    """Weights ``(m,)`` of one probe, ``1/P`` where a node is one eigenvalue."""
    distances = (nodes.unsqueeze(0) - nodes.unsqueeze(1)).abs().fill_diagonal_(math.inf)
    single = (residuals <= _APART * distances.amin(1)) & (weights * size <= _FEW)
    rest = weights[~single].sum()
    if rest == 0:
        return weights
    left = 1 - int(single.sum()) / size
    return torch.where(single, 1 / size, weights * (left / rest))


def _standard_error(samples: Tensor) -> float:
    if samples.numel() < 2:
        return math.nan
    return float(samples.std()) / math.sqrt(samples.numel())
