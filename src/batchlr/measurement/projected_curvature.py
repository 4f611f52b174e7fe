"""The curvature of every batch, seen on the few directions that matter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from batchlr.argument_ranges import require_inner_fraction
from batchlr.mean_square import (
    CurvatureSpread,
    Dynamics,
    Limit,
    mean_square_limit,
    mean_square_lr,
)
from batchlr.measured import Measured
from batchlr.measurement.metric import diagonalise
from batchlr.measurement.resampled_edges import End, ResampledEdges

Array = npt.NDArray[np.float64]
MAX_GROUPS = 8
"""Groups of batches left out in turn for a rate's error (assumed)."""

MIN_GROUPS = 4
"""Batches from which on the jackknife is used (assumed: with fewer it says too little)."""

_FLOOR = 0.005  # assumed, relative to the top; those below moved limits by some 3 %
_MIN_CORRECTED = 16  # measured (docs/log.md): with 8 batches the correction overshoots
_LEAST_TOP = 0.25  # assumed: share of the top eigenvalue left without any group
_MOST_BIAS = 0.5  # assumed: a larger one, in the logarithm, is not to be believed
_MOST_OWED = 0.5  # assumed: share of an eigenvalue owed to the sample; beyond, nothing is known


def jackknife_groups(count: int) -> list[npt.NDArray[np.int_]]:
    """Numbers of the batches to leave out together, ``MAX_GROUPS`` groups at most."""
    return np.array_split(np.arange(count), min(count, MAX_GROUPS))


class RateEstimate(NamedTuple):
    """A largest stable rate and what it depends on."""

    lr: float
    error: float  # relative standard error
    noiseless: float  # the limit without batch noise
    exponent: float  # d ln(lr) / d ln(b), b the effective batch size
    ends: tuple[float, float]  # lr before and after the largest correction: an interval's ends


@final
@dataclass(frozen=True, eq=False)
class ProjectedCurvature:
    """Matrices of disjoint batches on ``m`` orthonormal axes, the Ritz vectors of their mean.

    From how they differ follows what any batch size does to the top of the spectrum and to the
    stability of SGD, in all these directions together. What leaves the axes is known as a variance,
    for the two extreme ones and for directions added to a Krylov space (`outlying_directions`);
    of the others it is taken to be in proportion to their curvature.
    """

    values: Array  # (m,) descending Ritz values, diagonal of the mean
    matrices: Array = field(repr=False)  # (K, m, m)
    samples: tuple[float, ...] = field(repr=False)  # of each batch
    leak_largest: Measured  # per-sample variance of H_i v_1 outside the axes; unit: curvature^2
    leak_smallest: Measured  # the same of v_m; NaN if not measured
    leaks: Array | None = field(
        default=None, repr=False
    )  # (m,) the same of every axis; None: as of v_1, by curvature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProjectedCurvature) and (
            np.array_equal(self.values, other.values)
            and np.array_equal(self.matrices, other.matrices)
            and self.samples == other.samples
            and str(self.leak_largest) == str(other.leak_largest)
            and str(self.leak_smallest) == str(other.leak_smallest)
            and np.array_equal(self.all_leaks, other.all_leaks)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    @cached_property
    def deviations(self) -> Array:
        """``D_k`` ``(K, m, m)`` whose ``sum_k D_k (x) D_k`` is one sample's covariance.

        One-way analysis of variance: unbiased for the variance with divisor ``N - 1``.
        """
        return _deviations(self.matrices, np.array(self.samples))

    @cached_property
    def all_leaks(self) -> Array:
        """Per-sample variance ``(m,)`` of ``H_i`` times each axis, outside the axes."""
        if self.leaks is not None:
            return self.leaks
        if not self.values[0] > 0:
            return np.zeros_like(self.values)
        result: Array = self.leak_largest * np.maximum(self.values / self.values[0], 0.0)
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

        Raises:
            ValueError: the quantile is out of range.
        """
        if quantile is not None:
            require_inner_fraction(quantile=quantile)
        edge = abs(float(self.values[0 if end == "largest" else -1]))
        if inverse <= 0 or edge == 0:
            return Measured(0.0, 0.0)
        if quantile is None:
            shift, error = self._edges.mean_shift(inverse, end)
        else:
            shift, error = self._edges.shift_quantile(inverse, end, quantile)
        leak = self.leak_largest if end == "largest" else self.leak_smallest
        if math.isfinite(leak):
            shift += leak * inverse / edge
        if math.isfinite(leak.stderr):
            error = math.hypot(error, leak.stderr * inverse / edge)
        return Measured(shift, error)

    @cached_property
    def _edges(self) -> ResampledEdges:
        return ResampledEdges(self.values, self.deviations, float(np.mean(self.samples)))

    def mean_square(
        self,
        dynamics: Dynamics,
        inverse: float,
        *,
        largest: float,
        population: float,
        with_error: bool = True,
        without: Sequence["ProjectedCurvature"] | None = None,
    ) -> RateEstimate:
        """The largest rate at which the second moment contracts, with its sampling error.

        Directions that curve less than half a percent of the top count as outside: noise sends
        energy there and back, but they need not be followed one by one.

        Args:
            dynamics: of the optimizer.
            inverse: ``1/b = 1/B - 1/N``.
            largest: the top eigenvalue of the mean over the whole data set.
            population: ``N``, the samples that batches are drawn from.
            with_error: False saves the jackknife behind the error and the correction for bias.
            without: what `leaving_out` gives in metrics that vary too, for the error. The bias is
                that in one metric: what chance in the metric does is the caller's to take off.

        Raises:
            ValueError: there is no positive curvature.
        """
        limit = mean_square_limit(dynamics, self._spread(inverse, largest))
        count, bias, ends = len(self.samples), 0.0, (limit.lr, limit.lr)
        doubt = _doubt(count, population)
        if not with_error:
            return RateEstimate(limit.lr, math.nan, limit.noiseless, 1 / limit.steepness, ends)
        if math.isinf(limit.steepness) and without is None:  # noise does not limit: the mean does
            error = self._mean_error(limit, largest, population)
        elif count >= MIN_GROUPS:
            bias, error = self._jackknife(dynamics, inverse, largest, limit.lr, population, without)
        else:
            shares = limit.by_deviation
            least = math.sqrt(2 / (count - 1)) * float(shares.sum())
            scatter = float(shares.std(ddof=1)) * math.sqrt(count)
            noise_error = math.sqrt(doubt) * max(scatter, least) / limit.steepness
            error = math.hypot(noise_error, self._mean_error(limit, largest, population))
        if self.leak_largest > 0:
            leaked = self.leak_largest.stderr / self.leak_largest * math.sqrt(doubt)
            error = math.hypot(error, leaked * limit.outside / limit.steepness)
        slow = bias and bias * _slow_bias(min(count, MAX_GROUPS), sum(self.samples) / population)
        lr, most = (min(limit.lr * math.exp(-b), limit.noiseless) for b in (bias, slow))
        value = lr if count >= _MIN_CORRECTED else limit.lr
        return RateEstimate(value, error, limit.noiseless, 1 / limit.steepness, (limit.lr, most))

    def _kept(self, largest: float) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Curvatures below ``largest``, and which are followed one by one."""
        values = self.values.copy()
        values[0] = largest
        return values, values > _FLOOR * max(largest, 0.0)

    def _spread(self, inverse: float, largest: float) -> CurvatureSpread:
        values, kept = self._kept(largest)
        across = (self.deviations[:, kept][:, :, ~kept] ** 2).sum((0, 2)) + self.all_leaks[kept]
        leak = across * inverse / values[kept]
        inside = self.deviations[:, kept][:, :, kept]
        return CurvatureSpread(values[kept], inside, scale=inverse, leak=leak)

    def _jackknife(
        self,
        dynamics: Dynamics,
        inverse: float,
        largest: float,
        lr: float,
        population: float,
        without: Sequence["ProjectedCurvature"] | None,
    ) -> tuple[float, float]:
        """Bias and standard error of ``ln lr``, groups left out (Efron & Tibshirani 1993, ch. 11).

        Of mean and noise together, for they are correlated: samples that curve more also spread
        more. The gain is a largest eigenvalue, which errors in the map only raise, so that a
        positive bias of the rate is chance; and samples all of which were measured leave none
        (measured, docs/log.md). What the top owes to the sample goes with ``1/n``.
        """
        doubt = _doubt(len(self.samples), population)
        if doubt == 0:
            return 0.0, 0.0
        owed = 1 - largest / float(self.values[0])

        def changes(rests: Sequence[ProjectedCurvature]) -> Array:
            """Of ``ln lr``, group by group."""
            logs = []
            for rest in rests:
                more = 1 + (sum(self.samples) / sum(rest.samples) - 1) / doubt
                top = float(rest.values[0]) * (1 - min(owed * more, _MOST_OWED))
                top = max(top, _LEAST_TOP * largest)
                there = mean_square_lr(dynamics, rest._spread(inverse, top), near=lr)
                logs.append(math.log(there / lr))
            return np.array(logs)

        here = changes(self.leaving_out(population))
        size, missing = len(here), _doubt(sum(self.samples), population)
        bias = max(-_MOST_BIAS, min(missing * (size - 1) * float(here.mean()), 0.0))
        varied = here if without is None else changes(without)
        return bias, math.sqrt(doubt * (size - 1) * float(varied.var()))

    def leaving_out(
        self, population: float, metrics: Sequence[Array] | None = None
    ) -> list["ProjectedCurvature"]:
        """This without each of `jackknife_groups` in turn, in a metric of its own if given.

        The noise is in doubt by ``1 - K/N`` of its variance (batches of one sample, and all of
        them, leave none), the mean by ``1 - n/N``; so of the group's pull on the mean only the
        root of their ratio is taken.
        """
        counts = np.array(self.samples)
        doubts = [_doubt(number, population) for number in (int(counts.sum()), len(counts))]
        pull = math.sqrt(doubts[0] / doubts[1]) if doubts[1] > 0 else 0.0
        mean = _mean(self.matrices, counts)
        result = []
        for index, group in enumerate(jackknife_groups(len(counts))):
            rest = np.setdiff1d(np.arange(len(counts)), group)
            there = _mean(self.matrices[rest], counts[rest])
            matrices = self.matrices[rest] + (1 - pull) * (mean - there)
            metric = np.eye(len(mean)) if metrics is None else metrics[index]
            values, axes = diagonalise(pull * there + (1 - pull) * mean, metric)
            result.append(
                ProjectedCurvature(
                    values=values,
                    matrices=axes.T @ matrices @ axes,
                    samples=tuple(counts[rest].tolist()),
                    leak_largest=_divided(self.leak_largest, float(metric[0, 0]) ** 2),
                    leak_smallest=self.leak_smallest,
                    leaks=self._leaks_on(axes, float(metric[0, 0])),
                )
            )
        return result

    def _mean_error(self, limit: Limit, largest: float, population: float) -> float:
        """Error of ``ln lr`` because the mean is over a sample, direction by direction.

        An eigenvalue within its error of zero counts for no more than itself: the first order
        says nothing beyond.
        """
        values, kept = self._kept(largest)
        total = sum(self.samples)
        sampling = _doubt(total, population) / total
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
        values, axes = diagonalise(np.diag(self.values), metric)
        return ProjectedCurvature(
            values=values,
            matrices=axes.T @ self.matrices @ axes,
            samples=self.samples,
            leak_largest=_divided(self.leak_largest, float(metric[0, 0]) ** 2),
            leak_smallest=self.leak_smallest,
            leaks=self._leaks_on(axes, float(metric[0, 0])),
        )

    def _leaks_on(self, axes: Array, stretch: float) -> Array | None:
        """``leaks`` on ``axes`` ``(m, m)``, parts from different axes taken as unrelated.

        ``stretch`` is the metric for what lies outside, that at ``v_1``.
        """
        return None if self.leaks is None else (axes**2).T @ self.leaks / stretch


def _deviations(matrices: Array, samples: Array) -> Array:
    """See `ProjectedCurvature.deviations`."""
    roots = np.sqrt(samples / (len(samples) - 1))
    result: Array = roots[:, None, None] * (matrices - _mean(matrices, samples))
    return result


def _mean(matrices: Array, samples: Array) -> Array:
    return np.asarray(np.einsum("k,kij->ij", samples / samples.sum(), matrices))


def _slow_bias(groups: int, share: float) -> float:
    """What a bias that goes with ``n^-1/2`` is of one the jackknife takes to go with ``1/n``.

    The largest of many noisy directions is chosen, and such a bias falls slower than ``1/n``. Of
    ``c n^-1/2`` the jackknife sees ``(g - 1)((g/(g - 1))^1/2 - 1)``; with all samples, of which
    ``share`` are measured, ``1 - share^1/2`` of it is gone, where ``1 - share`` was taken off.
    """
    seen = (groups - 1) * (math.sqrt(groups / (groups - 1)) - 1)
    return 1 / (seen * (1 + math.sqrt(share)))


def _doubt(count: float, population: float) -> float:
    """What ``count`` of ``population`` leave of a variance, without replacement."""
    return max(0.0, 1 - count / population)


def _divided(value: Measured, by: float) -> Measured:
    return Measured(value / by, value.stderr / by)
