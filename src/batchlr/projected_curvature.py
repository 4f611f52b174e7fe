"""The curvature of every batch, seen on the few directions that matter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from batchlr.mean_square import CurvatureSpread, Dynamics, Limit, mean_square_limit
from batchlr.measured import Measured

Array = npt.NDArray[np.float64]
End = Literal["largest", "smallest"]

MAX_GROUPS = 8
"""Groups of batches left out in turn for a rate's error (assumed)."""

_FLOOR = 0.005  # assumed, relative to the top; those below moved limits by some 3 %
_LEAST = 1e-10  # assumed: 1/b of the largest data set; an edge next to zero asks for less
_MIN_GROUPS = 4  # assumed: with fewer batches the jackknife says too little
_MIN_CORRECTED = 16  # measured (docs/log.md): with 8 batches the correction overshoots
_MOST_BIAS = 0.5  # assumed: a larger correction, in the logarithm, is not to be believed
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
    samples: tuple[float, ...]  # of each batch
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
        return _deviations(self.matrices, np.array(self.samples))

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
            shift = float(np.quantile(moved, quantile))
            error = float(moved.std()) / math.sqrt(min(len(moved), len(self.samples)))
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
        self,
        dynamics: Dynamics,
        inverse: float,
        *,
        largest: float,
        population: float,
        with_error: bool = True,
    ) -> RateEstimate:
        """The largest rate at which the second moment contracts, with its sampling error.

        Directions that curve less than half a percent of the top count as outside: noise sends
        energy there and back, but they need not be followed one by one.

        Args:
            dynamics: of the optimizer.
            inverse: ``1/b = 1/B - 1/N``.
            largest: the top eigenvalue of the mean over the whole data set.
            population: ``N``, the samples that batches are drawn from.
            with_error: False saves the resampling behind the error and the correction for bias.

        Raises:
            ValueError: there is no positive curvature.
        """
        values = self.values.copy()
        values[0] = largest
        kept = values > _FLOOR * max(largest, 0.0)
        across = float((self.deviations[:, 0, ~kept] ** 2).sum()) + self.leak_largest
        leak = across * inverse / largest if largest > 0 else 0.0

        def limit_of(deviations: Array, near: float | None = None) -> Limit:
            inside = deviations[:, kept][:, :, kept]
            spread = CurvatureSpread(values[kept], inside, scale=inverse, leak=leak)
            return mean_square_limit(dynamics, spread, near=near)

        limit = limit_of(self.deviations)
        count = len(self.samples)
        # Batches of one sample, and all of them: then the noise is known, not estimated.
        doubt = max(0.0, 1 - count / population)
        if not with_error or math.isinf(limit.steepness):
            error = (
                math.nan if not with_error else self._mean_error(limit, values, kept, population)
            )
            return RateEstimate(limit.lr, error, limit.noiseless, 1 / limit.steepness)
        if count >= _MIN_GROUPS:
            bias, noise_error = self._jackknife(limit_of, limit.lr) if doubt > 0 else (0.0, 0.0)
            if count < _MIN_CORRECTED:
                bias = 0.0
        else:
            shares = limit.by_deviation
            least = math.sqrt(2 / (count - 1)) * float(shares.sum())
            scatter = float(shares.std(ddof=1)) * math.sqrt(count)
            bias, noise_error = 0.0, max(scatter, least) / limit.steepness
        relative = self.leak_largest.stderr / self.leak_largest if self.leak_largest > 0 else 0
        leaked = leak * dynamics.flat_response(limit.lr) * relative / limit.steepness
        error = math.hypot(
            math.sqrt(doubt) * math.hypot(noise_error, leaked),
            self._mean_error(limit, values, kept, population),
        )
        lr = min(limit.lr * math.exp(-doubt * bias), limit.noiseless)
        return RateEstimate(lr, error, limit.noiseless, 1 / limit.steepness)

    def _jackknife(
        self, limit_of: Callable[[Array, float], Limit], lr: float
    ) -> tuple[float, float]:
        """Bias and standard error of ``ln lr`` from how few batches the noise is known.

        Groups of batches are left out in turn (Efron & Tibshirani 1993, chapter 11); the bias is
        that of a largest eigenvalue, which noise in the map only raises.
        """
        count = len(self.samples)
        groups = np.array_split(np.arange(count), min(count, MAX_GROUPS))
        counts = np.array(self.samples)
        logs = []
        for group in groups:
            rest = np.setdiff1d(np.arange(count), group)
            deviations = _deviations(self.matrices[rest], counts[rest])
            logs.append(math.log(limit_of(deviations, lr).lr / lr))
        mean, size = sum(logs) / len(logs), len(logs)
        variance = (size - 1) / size * sum((value - mean) ** 2 for value in logs)
        bias = (size - 1) * mean
        return max(-_MOST_BIAS, min(bias, _MOST_BIAS)), math.sqrt(variance)

    def _mean_error(
        self, limit: Limit, values: Array, kept: npt.NDArray[np.bool_], population: float
    ) -> float:
        """Error of ``ln lr`` because the mean is over a sample, direction by direction.

        An eigenvalue within its error of zero counts for no more than itself: the first order
        says nothing beyond.
        """
        sampling = max(1 / sum(self.samples) - 1 / population, 0.0)
        diagonals = np.einsum("kii->ki", self.deviations)[:, kept]
        spreads = np.sqrt(sampling * (diagonals**2).sum(0))
        limits = values[kept] / np.maximum(spreads, 1e-300)
        slopes = limit.by_curvature * np.minimum(1.0, limits)
        return math.sqrt(sampling * float(((diagonals @ slopes) ** 2).sum()))

    def in_metric(self, metric: Array) -> "ProjectedCurvature":
        """The same matrices where length is measured by ``metric`` ``(m, m)`` on the axes.

        For another preconditioner ``D'``: ``metric = V' D^-1/2 D' D^-1/2 V``. The leak of the
        top axis is scaled by the metric there, that of the lowest is not.
        """
        values, axes = _diagonalise(self.values, metric)
        top = float(metric[0, 0]) ** 2
        return ProjectedCurvature(
            values=values,
            matrices=axes.T @ self.matrices @ axes,
            samples=self.samples,
            leak_largest=Measured(self.leak_largest / top, self.leak_largest.stderr / top),
            leak_smallest=self.leak_smallest,
        )


def _deviations(matrices: Array, samples: Array) -> Array:
    """See `ProjectedCurvature.deviations`."""
    counts = samples.astype(np.float64)
    mean = np.einsum("k,kij->ij", counts / counts.sum(), matrices)
    roots = np.sqrt(counts / (len(counts) - 1))
    result: Array = roots[:, None, None] * (matrices - mean)
    return result


def _diagonalise(values: Array, metric: Array) -> tuple[Array, Array]:
    """Descending eigenvalues of ``diag(values)`` in ``metric``, and axes ``A' metric A = 1``."""
    factors, rotation = np.linalg.eigh(metric)
    whitened = rotation / np.sqrt(factors)
    found, turned = np.linalg.eigh(whitened.T @ np.diag(values) @ whitened)
    return found[::-1].copy(), whitened @ turned[:, ::-1]


def selection_bias(values: Array, metrics: Sequence[Array]) -> tuple[float, float]:
    """By how much a top eigenvalue is too large because its metric was estimated, and the error.

    The top direction is the one where the metric came out too small by chance. Two estimates from
    halves of the data show how much: the eigenvalue found with one, judged by the other. What the
    halves have in excess, the whole has half of, in the logarithm.

    Args:
        values: ``(m,)`` of the matrix, diagonal on the axes, the largest positive.
        metrics: two ``(m, m)``, or none if nothing is known.

    Returns:
        The factor, at least 1, and its standard error in the logarithm.
    """
    if len(metrics) != 2 or not values.max() > 0:
        return 1.0, 0.0
    logs = []
    for here, there in (metrics, metrics[::-1]):
        if np.linalg.eigvalsh(here)[0] <= 0:
            return 1.0, 0.0
        found, axes = _diagonalise(values, here)
        axis = axes[:, 0]
        judged = float(axis @ (values * axis)) / float(axis @ there @ axis)
        logs.append(math.log(found[0] / judged))
    optimism = max(0.0, sum(logs) / 2) / 2
    return math.exp(optimism), max(optimism, abs(logs[0] - logs[1]) / 4)
