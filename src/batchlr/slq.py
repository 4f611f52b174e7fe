"""Stochastic Lanczos quadrature: an operator becomes its spectral measure."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from batchlr.krylov_basis import BasisForm
from batchlr.lanczos import default_generator, gaussian, lanczos
from batchlr.measured import Measured
from batchlr.operators import LinearOperator

_FEW = 10.0  # assumed: a node that stands for at most so many eigenvalues is an outlier
_RELIABLE = 0.3  # assumed: relative error of a weight that may be used as a number
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

    nodes: Tensor  # (n,) float64 Ritz values of all probes
    weights: Tensor  # (n,) float64 Gauss weights, their sum is 1
    probes: Tensor  # (n,) int64, the probe each node belongs to
    num_products: int
    size: int | None = None  # P

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

    def _densities(self, grid: Tensor, bandwidth: float) -> Tensor:
        if not bandwidth > 0:
            msg = f"bandwidth must be positive, got {bandwidth}"
            raise ValueError(msg)
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
    basis: BasisForm = "auto",
    basis_budget: int | None = None,
    generator: torch.Generator | None = None,
) -> SpectralMeasure:
    """Spectral measure from ``num_probes * num_steps`` products (Ubaru, Chen & Saad 2017).

    Moments up to ``2 num_steps - 1`` of each probe are exact. A breakdown ends a probe early. The
    basis of one probe is in memory at a time, ``num_steps P`` numbers in the form chosen.

    Args:
        operator: a symmetric matrix.
        num_steps: Lanczos steps of each probe.
        num_probes: random vectors.
        basis: where the Krylov vectors are, see `lanczos`.
        basis_budget: bytes they may take; by default what is free.
        generator: for the probes; without one the seed is 0.

    Raises:
        ValueError: ``num_steps`` not in [1, P] or ``num_probes`` < 1, or an illegal ``basis``.
        BasisMemoryError: a MemoryError, before any product: the basis does not fit.
        ArithmeticError: a product is not finite.
    """
    if num_probes < 1:
        msg = f"num_probes must be at least 1, got {num_probes}"
        raise ValueError(msg)
    generator = default_generator(generator)
    before = operator.num_products
    nodes, weights, probes = [], [], []
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
        values, vectors = tridiagonal.eigh()
        nodes.append(values)
        weights.append(vectors[0] ** 2 / num_probes)
        probes.append(torch.full_like(values, probe, dtype=torch.int64))
    return SpectralMeasure(
        torch.cat(nodes),
        torch.cat(weights),
        torch.cat(probes),
        operator.num_products - before,
        operator.shape[0],
    )


def _standard_error(samples: Tensor) -> float:
    if samples.numel() < 2:
        return math.nan
    return float(samples.std()) / math.sqrt(samples.numel())
