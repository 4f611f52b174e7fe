"""The curvature of every batch, seen on the few directions that matter."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from batchlr.mean_square import CurvatureSpread, Dynamics, mean_square_limit
from batchlr.measured import Measured

Array = npt.NDArray[np.float64]
End = Literal["largest", "smallest"]

_FLOOR = 0.005  # measured: below it, relative to the top, directions change no limit by 2 %
_LEAST = 1e-10  # assumed: 1/b of the largest data set; an edge next to zero asks for less
_DRAWS = 400  # assumed: resampled batches; their mean is then good to a twentieth of their spread


class RateEstimate(NamedTuple):
    """A largest stable rate and what it depends on."""

    lr: float
    error: float  # relative standard error
    noiseless: float  # the limit without batch noise
    exponent: float  # d ln(lr) / d ln(b), b the effective batch size


@final
@dataclass(frozen=True, eq=False)
class ProjectedCurvature:
    """Matrices of disjoint batches on ``m`` orthonormal axes, the Ritz vectors of their mean.

    From how they differ follows what any batch size does to the top of the spectrum and to the
    stability of SGD, in all these directions together. What leaves the axes is known for the two
    extreme ones only, as a variance.
    """

    values: Array  # (m,) descending Ritz values, diagonal of the mean
    matrices: Array  # (K, m, m)
    samples: tuple[int, ...]  # of each batch
    leak_largest: Measured  # per-sample variance of H_i v_1 outside the axes; unit: curvature^2
    leak_smallest: Measured  # the same of v_m; NaN if not measured

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProjectedCurvature) and (
            np.array_equal(self.values, other.values)
            and np.array_equal(self.matrices, other.matrices)
            and self.samples == other.samples
            and str(self.leak_largest) == str(other.leak_largest)
            and str(self.leak_smallest) == str(other.leak_smallest)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    @cached_property
    def deviations(self) -> Array:
        """``D_k`` ``(K, m, m)`` whose ``sum_k D_k (x) D_k`` is one sample's covariance.

        One-way analysis of variance: unbiased for the variance with divisor ``N - 1``.
        """
        counts = np.array(self.samples, dtype=np.float64)
        mean = np.einsum("k,kij->ij", counts / counts.sum(), self.matrices)
        roots = np.sqrt(counts / (len(counts) - 1))
        result: Array = roots[:, None, None] * (self.matrices - mean)
        return result

    def second_order(self, end: End = "largest") -> float:
        """``kappa`` in ``E lambda_1(H_B) = lambda_1 + kappa / b``, each axis at its gap.

        Eigenvalues within one percent of the edge count as its own and do not repel it.
        """
        index = 0 if end == "largest" else -1
        edge = float(self.values[index])
        sign = 1.0 if end == "largest" else -1.0
        if sign * edge <= 0:
            return 0.0
        variances = (self.deviations[:, index] ** 2).sum(0)
        gaps = sign * (edge - self.values)
        apart = gaps > 0.01 * abs(edge)
        leak = self.leak_largest if end == "largest" else self.leak_smallest
        outside = float(leak) / abs(edge) if math.isfinite(leak) else 0.0
        return sign * (float((variances[apart] / gaps[apart]).sum()) + outside)

    def edge_at(
        self, inverse: float, end: End = "largest", *, quantile: float | None = None
    ) -> Measured:
        """How far batch noise moves an extreme eigenvalue outwards, on average over batches.

        The deviations of the measured batches are resampled, scaled to the variance of the batch
        size asked for and added to the mean; what leaves the axes is added to second order. Unlike
        the second order alone this holds where noise outgrows the gaps between eigenvalues, and it
        keeps the skew of the batches measured.

        Args:
            inverse: ``1/b = 1/B - 1/N``.
            end: of the spectrum.
            quantile: of the distribution over batches (its distance may have either sign); the
                mean if None.

        Returns:
            The distance, at least 0 for the mean and growing with ``inverse``, and the error of
            resampling and of the leak.
        """
        edge = abs(float(self.values[0 if end == "largest" else -1]))
        if inverse <= 0 or edge == 0:
            return Measured(0.0, 0.0)
        if quantile is None:
            shift, error = self._mean_shift(inverse, end)
        else:
            moved, _ = self._moved(inverse, end)
            shift, error = float(np.quantile(moved, quantile)), 0.0
            error = float(moved.std()) / math.sqrt(len(moved))
        leak = self.leak_largest if end == "largest" else self.leak_smallest
        if math.isfinite(leak):
            shift += leak * inverse / edge
        if math.isfinite(leak.stderr):
            error = math.hypot(error, leak.stderr * inverse / edge)
        return Measured(shift, error)

    def _mean_shift(self, inverse: float, end: End) -> tuple[float, float]:
        """Mean distance within the axes and its error, from a table: smooth and monotone."""
        noise, shifts, errors = self._table(end)
        if inverse <= noise[0]:  # where the second order is exact
            return float(shifts[0] * inverse / noise[0]), float(errors[0] * inverse / noise[0])
        at = math.log(inverse)
        shift = np.exp(np.interp(at, np.log(noise), np.log(np.maximum(shifts, 1e-300))))
        return float(shift), float(np.interp(at, np.log(noise), errors))

    @cached_property
    def _tables(self) -> dict[str, tuple[Array, Array, Array]]:
        return {}

    def _table(self, end: End) -> tuple[Array, Array, Array]:
        """``1/b`` ascending to 1, mean distances there, and their errors."""
        if end not in self._tables:
            index = 0 if end == "largest" else -1
            edge = abs(float(self.values[index]))
            reach = float((self.deviations[:, index] ** 2).sum())
            small = min(1.0, max(1e-4 * edge**2 / reach, _LEAST)) if reach > 0 else 1.0
            noise = np.exp(np.linspace(math.log(small), 0.0, 2 + int(-math.log2(small))))
            rows = [self._moved(inverse, end) for inverse in noise]
            means = np.array([float((moved - first).mean()) for moved, first in rows])
            errors = [float((moved - first).std()) / math.sqrt(_DRAWS) for moved, first in rows]
            shifts = np.maximum.accumulate(np.maximum(means, 0.0))
            self._tables[end] = (noise, shifts, np.array(errors))
        return self._tables[end]

    def _moved(self, inverse: float, end: End) -> tuple[Array, Array]:
        """Distances ``(draws,)`` of resampled edges, and their first order, whose mean is 0."""
        index, sign = (0, 1.0) if end == "largest" else (-1, -1.0)
        drawn = self._resample(inverse)
        edges = np.linalg.eigvalsh(np.diag(self.values) + drawn)[:, -1 if index == 0 else 0]
        return sign * (edges - self.values[index]), sign * drawn[:, index, index]

    def _resample(self, inverse: float) -> Array:
        """Fluctuations ``(draws, m, m)`` of batches with ``b = 1 / inverse`` samples."""
        count = len(self.samples)
        terms = max(1, round(1 / (inverse * np.mean(self.samples))))
        generator = np.random.default_rng(0)
        weights = generator.multinomial(terms, np.full(count, 1 / count), size=_DRAWS)
        scale = math.sqrt(inverse * count / terms)  # a draw's terms have their sum's covariance
        drawn = np.tensordot(weights.astype(np.float64), self.deviations, (1, 0))
        result: Array = scale * (drawn - drawn.mean(0))
        return result

    def mean_square(
        self, dynamics: Dynamics, inverse: float, *, largest: float, sampling: float
    ) -> RateEstimate:
        """The largest rate at which the second moment contracts, with its sampling error.

        Directions that curve less than half a percent of the top count as outside: noise sends
        energy there and back, but they need not be followed one by one.

        Args:
            dynamics: of the optimizer.
            inverse: ``1/b = 1/B - 1/N``.
            largest: the top eigenvalue of the mean over the whole data set.
            sampling: ``1/n - 1/N``, what the mean over the ``n`` samples measured has of one
                sample's variance.

        Raises:
            ValueError: there is no positive curvature.
        """
        values = self.values.copy()
        values[0] = largest
        kept = values > _FLOOR * max(largest, 0.0)
        deviations = self.deviations[:, kept][:, :, kept]
        across = float((self.deviations[:, 0, ~kept] ** 2).sum()) + float(self.leak_largest)
        leak = across * inverse / largest if largest > 0 else 0.0
        limit = mean_square_limit(
            dynamics, CurvatureSpread(values[kept], deviations, scale=inverse, leak=leak)
        )
        count = len(self.samples)
        if math.isinf(limit.steepness):
            feed_error, exponent = 0.0, 0.0
        else:
            spread = float(limit.by_deviation.std(ddof=1)) * count / math.sqrt(count)
            spread *= math.sqrt(count) / math.sqrt(count - 1) if count > 2 else 1.0
            leaked = leak * dynamics.flat_response(limit.lr)
            relative = self.leak_largest.stderr / self.leak_largest if self.leak_largest > 0 else 0
            least = math.sqrt(2 / (count - 1)) * limit.by_deviation.sum() if count == 2 else 0.0
            feed_error = math.hypot(max(spread, least), leaked * relative) / limit.steepness
            exponent = 1 / limit.steepness
        diagonals = np.einsum("kii->ki", deviations)
        mean_error = math.sqrt(sampling * float(((diagonals @ limit.by_curvature) ** 2).sum()))
        return RateEstimate(limit.lr, math.hypot(feed_error, mean_error), limit.noiseless, exponent)

    def in_metric(self, metric: Array) -> "ProjectedCurvature":
        """The same matrices where length is measured by ``metric`` ``(m, m)`` on the axes.

        For another preconditioner ``D'``: ``metric = V' D^-1/2 D' D^-1/2 V``. The leaks are
        scaled by the metric at their own axis.
        """
        factors, rotation = np.linalg.eigh(metric)
        whitened = rotation / np.sqrt(factors)  # W' metric W = 1
        values, turned = np.linalg.eigh(whitened.T @ np.diag(self.values) @ whitened)
        axes = whitened @ turned[:, ::-1]
        top = float(metric[0, 0]) ** 2
        return ProjectedCurvature(
            values=values[::-1].copy(),
            matrices=axes.T @ self.matrices @ axes,
            samples=self.samples,
            leak_largest=Measured(self.leak_largest / top, self.leak_largest.stderr / top),
            leak_smallest=self.leak_smallest,
        )
