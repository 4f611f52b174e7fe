"""Stochastic Lanczos quadrature: an operator becomes its spectral measure."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.lanczos import default_generator, gaussian, lanczos
from batchlr.operators import LinearOperator


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
    generator: torch.Generator | None = None,
) -> SpectralMeasure:
    """Spectral measure from ``num_probes * num_steps`` products (Ubaru, Chen & Saad 2017).

    Moments up to ``2 num_steps - 1`` of each probe are exact. A breakdown ends a probe early.

    Raises:
        ValueError: ``num_steps`` not in [1, P] or ``num_probes`` < 1.
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
        values, vectors = lanczos(operator, num_steps, start=start).eigh()
        nodes.append(values)
        weights.append(vectors[0] ** 2 / num_probes)
        probes.append(torch.full_like(values, probe, dtype=torch.int64))
    return SpectralMeasure(
        torch.cat(nodes), torch.cat(weights), torch.cat(probes), operator.num_products - before
    )


def _standard_error(samples: Tensor) -> float:
    if samples.numel() < 2:
        return math.nan
    return float(samples.std()) / math.sqrt(samples.numel())
