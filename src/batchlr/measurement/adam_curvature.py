"""The curvature Adam sees, ``D^-1/2 H D^-1/2``, at any batch size."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from batchlr.measured import Measured
from batchlr.measurement.projected_curvature import ProjectedCurvature, jackknife_groups


@dataclass(frozen=True)
class AdamCurvature:
    """Extremes of ``D^-1/2 H D^-1/2``, ``D = sqrt(v) + eps``; unit: 1 / learning rate.

    ``D`` is what Adam, or RMSprop, divides by.

    ``D`` depends on the batch size through the gradient noise in ``v``. ``metrics`` are
    ``D(B)/D(batch_size)`` on the axes of ``projected``, times what the top direction owes to having
    been chosen where ``D`` came out small (`selection_bias`; 1 when tracking). The curvature at
    another batch size is that of the same matrices in this metric (Rayleigh-Ritz, from below).
    """

    largest: Measured
    parallel: Measured
    orthogonal: Measured
    batch_size: int  # at which D was measured
    beta1: float  # Adam's, or RMSprop's momentum
    decoupled_decay: float  # AdamW's weight decay
    converged: bool
    source: Literal["state", "gradients"]  # of v: the optimizer's state, or batch gradients
    batch_sizes: tuple[float, ...]  # (G,) ascending, the last that of the data set, N
    projected: ProjectedCurvature = field(repr=False)
    metrics: npt.NDArray[np.float64] = field(compare=False, repr=False)  # (G, m, m)
    optimism: tuple[float, ...]  # (G,) the factor of `selection_bias` that ``metrics`` hold
    optimizer: Literal["adam", "rmsprop"] = "adam"  # whose v it is
    # (G, groups, m, m), the same without each group of batches in turn; None if not measured
    metrics_without: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @property
    def total(self) -> float:
        """``r1 + c1`` of the preconditioned matrix."""
        return self.parallel + self.orthogonal

    def stretch_at(self, batch_size: float) -> float:
        """``D(B)/D(batch_size)`` along the top eigenvector, its Rayleigh quotient."""
        return float(self._at(self.metrics, batch_size)[0, 0])

    def optimism_at(self, batch_size: float) -> float:
        """The factor in ``metrics`` at ``batch_size``; between those known, by its logarithm."""
        return float(np.interp(math.log(batch_size), np.log(self.batch_sizes), self.optimism))

    def projected_at(self, batch_size: float) -> ProjectedCurvature:
        """The matrices under the preconditioner of another batch size."""
        return self.projected.in_metric(self._at(self.metrics, batch_size))

    def without_groups_at(self, batch_size: float, population: float) -> list[ProjectedCurvature]:
        """The same, each group of batches left out of matrices and preconditioner in turn."""
        if self.metrics_without is None:
            metric = self._at(self.metrics, batch_size)
            metrics = [metric] * len(jackknife_groups(len(self.projected.samples)))
        else:
            metrics = list(self._at(self.metrics_without, batch_size))
        return self.projected.leaving_out(population, metrics)

    def _at(self, table: npt.NDArray[np.float64], batch_size: float) -> npt.NDArray[np.float64]:
        """``table``, interpolated in what noise a batch has: ``(1/B - 1/N)^1/2``.

        Exact for gradients all noise, or all signal.
        """
        sizes = np.array(self.batch_sizes)
        roots = np.sqrt(np.maximum(1 / sizes - 1 / sizes[-1], 0))
        root = max(1 / batch_size - 1 / sizes[-1], 0.0) ** 0.5
        position = float(np.interp(-root, -roots, range(len(roots))))
        below = min(int(position), len(self.batch_sizes) - 2)
        share = position - below
        metric: npt.NDArray[np.float64] = (1 - share) * table[below] + share * table[below + 1]
        return metric
