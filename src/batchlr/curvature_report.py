"""What a measurement of curvature says about any batch size."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from batchlr.argument_ranges import require_fraction, require_inner_fraction
from batchlr.curvature_noise import CurvatureNoise
from batchlr.dataclass_files import load_dataclass, save_dataclass
from batchlr.learning_rates import max_adam_lr, max_sgd_lr, paper_adam_lr, paper_sgd_lr
from batchlr.lr_bound import LRBound, Rate, Rule, tabulated
from batchlr.mean_square import Dynamics
from batchlr.measured import Measured
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.measurement.optimizer_state import Kind
from batchlr.measurement.projected_curvature import MAX_GROUPS, ProjectedCurvature, RateEstimate

_RULES = ("mean-square", "top-direction", "paper")
_FORMAT = 5
_PRINTED = (4, 16, 64, 256, 1024, 4096)  # batch sizes
_STEP = 1e-4  # assumed: of difference quotients, relative
_MIN_BATCHES = 4  # assumed: below it the standard error of a variance says little


_COUPLING = ("samples of a batch interact in the loss, which was", "train-mode normalisation was")


@dataclass(frozen=True)
class CurvatureReport:
    """Extremal curvature at one point of training, and what follows at any batch size.

    Made by `measure_curvature` or `track_curvature`. Curvature has the unit loss / parameter^2,
    that is 1 / (learning rate of SGD); its noise is that of one sample, and a batch of ``B`` out of
    ``N`` has ``1/b = 1/B - 1/N`` of it.

    ``print(report)`` shows the extremes and a table of maximal rates, which takes about a second.
    """

    largest: Measured  # lambda_1 of the mean over all dataset_size samples
    smallest: Measured  # lambda_P
    noise: CurvatureNoise
    kappa: float  # E lambda_1(H_B) = lambda_1 + kappa/b to second order; unit: curvature
    kappa_smallest: float  # the same of lambda_P, not positive
    ritz_values: tuple[float, ...] = field(repr=False)  # descending, all of the Krylov space
    ritz_weights: tuple[float, ...] = field(repr=False)  # at each, of a random start
    trace: Measured  # tr H, from random directions; NaN if not measured
    ggn_along_top: Measured  # v1' G v1 of the Gauss-Newton matrix, with residual; NaN likewise
    loss: float
    num_params: int
    num_samples: int  # measured
    num_batches: int  # disjoint, for the noise
    batch_size: int  # of those batches
    dataset_size: int  # N
    small_batch: tuple[int, Measured] | None  # (B, mean lambda_1 of batches of B)
    matrix: str
    norm_mode: str | None
    coupled: bool  # samples of a batch interact: train-mode normalisation, a loss over pairs
    momentum: float  # of the optimizer given, else 0
    nesterov: bool  # likewise
    weight_decay: float  # likewise
    adam: AdamCurvature | None
    converged: bool
    num_products: int
    seconds: float
    projected: ProjectedCurvature = field(repr=False)
    gradient_norm: float = math.nan  # |g_B|, mean over the batches; NaN if not measured
    clip_norm: float | None = None  # at which training clips the gradient's norm; None: nowhere
    kinked: str | None = None  # name of the criterion if it is piecewise linear

    def __str__(self) -> str:
        rows = self._printed_rates()
        rates = tabulated(rows) if rows[0] else "no curvature limits the rate"
        return f"{self._extremes()}\n\n{rates}"

    def _extremes(self) -> str:
        """What was measured, and both ends of the spectrum, in words."""
        ends = [("largest eigenvalue", self.largest), ("smallest", self.smallest)]
        if self.adam is not None:
            ends.append((f"largest with {self.adam.optimizer}'s preconditioner", self.adam.largest))
        known = [f"{name} {value}" for name, value in ends if math.isfinite(value)]
        lines = [
            f"{self.num_params} parameters, {self.num_samples} of {self.dataset_size} samples in "
            f"{self.num_batches} batches of {self.batch_size}, loss {self.loss:.4g}",
            ", ".join(known),
        ]
        if self.largest > 0:
            lines.append(f"critical batch size {self.critical_batch_size:.3g}")
        return "\n".join(lines)

    def _printed_rates(self) -> list[list[LRBound]]:
        """A row for each batch size, in it the optimizers that were measured for."""
        kinds: list[Kind] = []
        followed = self.adam is not None and math.isnan(self.smallest)  # the plain matrix was not
        if self.largest > 0 and not followed:
            kinds.append("sgd")
        if self.adam is not None and self.adam.largest > 0:
            kinds.append(self.adam.optimizer)
        sizes = [size for size in _PRINTED if size <= self.dataset_size] or [self.dataset_size]
        return [[self.max_lr(size, optimizer=kind) for kind in kinds] for size in sizes]

    def inverse_effective_batch_size(self, batch_size: float) -> float:
        """``1/b = 1/B - 1/N``: what multiplies a per-sample variance.

        Raises:
            ValueError: ``batch_size`` is not in [1, N].
        """
        if not 1 <= batch_size <= self.dataset_size:
            msg = (
                f"batch_size must lie in [1, {self.dataset_size}], the size of the data set, got "
                f"{batch_size}; if there is more data, say so by measure_curvature(dataset_size=)"
            )
            raise ValueError(msg)
        return 1 / batch_size - 1 / self.dataset_size

    def largest_at(self, batch_size: float, *, quantile: float | None = None) -> Measured:
        """Expected largest eigenvalue of a batch Hessian, with its error.

        The deviations of the measured batches, scaled to ``batch_size`` and resampled, are added to
        the mean matrix (`ProjectedCurvature.edge_at`). Below the size of the measured batches their
        skew says too little: there the excess over ``lambda_1`` goes, as a power of the size, to
        the mean measured on small batches, and on like ``B^-1/2`` (the Wigner edge) below their
        size.

        Args:
            batch_size: of one batch; at most the size of the data set.
            quantile: of the distribution over batches, such as 0.5, which heavy tails do not move;
                the mean if None.

        Raises:
            ValueError: an argument is out of range.
        """
        inverse = self.inverse_effective_batch_size(batch_size)
        if quantile is None:
            shift = self._mean_shift(batch_size)
        else:
            shift = self.projected.edge_at(inverse, quantile=quantile)
        error = math.hypot(shift.stderr, _finite(self.largest.stderr))
        return Measured(self.largest + shift, error)

    def _mean_shift(self, batch_size: float) -> Measured:
        inverse = self.inverse_effective_batch_size(batch_size)
        if self.small_batch is None or not self.small_batch[0] < self.batch_size:
            return self.projected.edge_at(inverse)
        size, mean = self.small_batch
        here = self.projected.edge_at(
            self.inverse_effective_batch_size(max(batch_size, self.batch_size))
        )
        if batch_size >= self.batch_size or here <= 0:
            return here
        there = max(mean - self.largest, float(here))
        share = min(1.0, math.log(self.batch_size / batch_size) / math.log(self.batch_size / size))
        shift = math.exp((1 - share) * math.log(here) + share * math.log(there))
        shift *= math.sqrt(max(1.0, size / batch_size))
        error = math.hypot((1 - share) * here.stderr / here, share * _finite(mean.stderr) / there)
        return Measured(shift, shift * error)

    def smallest_at(self, batch_size: float, *, quantile: float | None = None) -> Measured:
        """Expected smallest eigenvalue of a batch Hessian; as `largest_at`, without a cap.

        Below the size where the second order doubles ``lambda_P`` the Wigner edge, a root of
        ``1/b`` which joins it there, bounds it. A ``quantile`` is one of the eigenvalue: below that
        of 0.1 it lies in a tenth of the batches.
        """
        inverse = self.inverse_effective_batch_size(batch_size)
        if quantile is not None:
            require_inner_fraction(quantile=quantile)
            quantile = 1 - quantile  # of its distance downwards
        shift = self.projected.edge_at(inverse, "smallest", quantile=quantile)
        edge = self.smallest - shift
        if self.kappa_smallest * inverse < self.smallest < 0:
            join = self.smallest / self.kappa_smallest
            there = self.projected.edge_at(join, "smallest", quantile=quantile)
            edge = max(edge, (self.smallest - there) * math.sqrt(inverse / join))
        return Measured(edge, math.hypot(shift.stderr, _finite(self.smallest.stderr)))

    @property
    def critical_batch_size(self) -> float:
        """``B*`` where ``kappa/b = lambda_1``; below it noise sets the edge, above it curvature.

        NaN if ``lambda_1`` is not positive; at most the size of the data set.
        """
        if self.largest <= 0:
            return math.nan
        critical = self.kappa / self.largest
        return critical / (1 + critical / self.dataset_size)

    def max_lr(
        self,
        batch_size: int,
        *,
        optimizer: Kind = "sgd",
        momentum: float | None = None,
        rule: Rule = "mean-square",
    ) -> LRBound:
        """The largest stable rate at ``batch_size``, with a 90 % interval.

        Args:
            batch_size: of one optimizer step, at most the size of the data set.
            optimizer: ``"adam"`` stands for Adam and AdamW. ``"rmsprop"`` is limited by the same
                preconditioned curvature, but its momentum adds gradients up like SGD's where
                Adam's averages them.
            momentum: SGD's or RMSprop's, or Adam's ``beta1``; by default that of the optimizer
                measured with, else 0, and 0.9 for Adam.
            rule: ``"mean-square"``, where the second moment of a perturbation stops shrinking
                under momentum and batch noise, in all measured directions together;
                ``"top-direction"``, its closed form for one direction (`max_sgd_lr`); ``"paper"``,
                ``2/lambda_1'`` for SGD and ``2/sqrt(lambda_1')`` for Adam (Granziol, Zohren &
                Roberts 2022), which knows neither momentum nor the noise's variance.

        Raises:
            ValueError: an argument is illegal, there is no positive curvature, or Adam was not
                measured.
        """
        self.inverse_effective_batch_size(batch_size)  # refuses illegal sizes
        if optimizer not in ("sgd", "adam", "rmsprop"):
            msg = f"optimizer must be 'sgd', 'adam' or 'rmsprop', got {optimizer!r}"
            raise ValueError(msg)
        if rule not in _RULES:
            msg = f"rule must be one of {', '.join(map(repr, _RULES))}, got {rule!r}"
            raise ValueError(msg)
        if momentum is None:
            momentum = self._momentum_of(optimizer)
        require_fraction(momentum=momentum)
        if rule == "paper":
            rate = self._paper(batch_size, optimizer)
        elif rule == "top-direction":
            rate = self._top_direction(batch_size, optimizer, momentum)
        else:
            rate = self._mean_square(batch_size, optimizer, momentum)
        return LRBound.of(
            rate,
            freedom=self._freedom(rule),
            reasons=self._reasons(batch_size, optimizer, rule),
            batch_size=batch_size,
            optimizer=optimizer,
            momentum=momentum,
            rule=rule,
        )

    def _momentum_of(self, optimizer: str) -> float:
        if optimizer == "sgd":
            return self.momentum
        if self.adam is not None and self.adam.optimizer == optimizer:
            return self.adam.beta1
        return 0.9 if optimizer == "adam" else 0.0

    def _freedom(self, rule: Rule) -> int:
        """Degrees of freedom of a rate's error: terms it was estimated from, less one."""
        most = MAX_GROUPS if rule == "mean-square" else self.num_batches
        return min(self.num_batches, most) - 1

    def _paper(self, batch_size: int, optimizer: str) -> Rate:
        edge = self.largest_at(batch_size)
        largest = float(edge)
        decay, power = (self.weight_decay, 1.0) if optimizer == "sgd" else (0.0, 0.5)
        value = (
            paper_sgd_lr(largest, weight_decay=decay)
            if optimizer == "sgd"
            else paper_adam_lr(largest)
        )
        low, high = self._around(batch_size)
        edges = [self.largest_at(size) + decay for size in (low, high)]
        fall = math.log(edges[0] / edges[1]) / math.log(high / low)
        orthogonal = self.noise.orthogonal  # the shift is proportional to it
        share = _finite(orthogonal.stderr) / orthogonal if orthogonal > 0 else 0.0
        error = math.hypot(edge.stderr, (largest - self.largest) * share)
        return Rate(
            value=value,
            error=power * error / (largest + decay),
            exponent=power * max(fall, 0.0),
            noise_share=(largest - self.largest) / (largest + decay),
        )

    def _mean_square(self, batch_size: float, optimizer: str, momentum: float) -> Rate:
        inverse = self.inverse_effective_batch_size(batch_size)
        if optimizer == "sgd":
            max_sgd_lr(self.largest)  # refuses curvature that is not positive
            dynamics = Dynamics(momentum, nesterov=self.nesterov, weight_decay=self.weight_decay)
            rate = self.projected.mean_square(
                dynamics, inverse, largest=self.largest, population=self._population
            )
            exponent = rate.exponent / (batch_size * inverse) if inverse > 0 else 0.0
            return Rate(rate.lr, rate.error, exponent, 1 - rate.lr / rate.noiseless, rate.ends)
        adam = self._measured_adam()
        max_sgd_lr(adam.largest)  # likewise
        dynamics = Dynamics(
            momentum, averaged=optimizer == "adam", decoupled_decay=adam.decoupled_decay
        )

        def rate_at(size: float, *, with_error: bool = False) -> RateEstimate:
            projected = adam.projected_at(size)
            # what the sample adds to the top eigenvalue is the same share in any metric
            largest = float(projected.values[0]) * adam.largest / float(adam.projected.values[0])
            return projected.mean_square(
                dynamics,
                self.inverse_effective_batch_size(size),
                largest=largest,
                population=self._population,
                with_error=with_error,
                without=adam.without_groups_at(size, self._population) if with_error else None,
            )

        rate = rate_at(batch_size, with_error=True)
        low, high = self._around(batch_size)
        exponent = math.log(rate_at(high).lr / rate_at(low).lr) / math.log(high / low)
        ends = rate.ends[0] / adam.optimism_at(batch_size), rate.lr
        return Rate(rate.lr, rate.error, exponent, 1 - rate.lr / rate.noiseless, ends)

    def _top_direction(self, batch_size: float, optimizer: str, momentum: float) -> Rate:
        inverse = self.inverse_effective_batch_size(batch_size)
        if optimizer == "sgd":
            return self._top_direction_of_sgd(batch_size, inverse, momentum)
        adam = self._measured_adam()

        def value_at(size: float) -> float:
            inverse = self.inverse_effective_batch_size(size)
            stretch = adam.stretch_at(size)
            noise = adam.total * inverse / (adam.largest * stretch) if adam.largest > 0 else 0.0
            average = max_adam_lr(
                adam.largest / stretch, noise, beta1=momentum, weight_decay=adam.decoupled_decay
            )
            # a sum of gradients is 1 / (1 - m) times their average
            return average if optimizer == "adam" else (1 - momentum) * average

        value = value_at(batch_size)
        error, weight = _noise_weight(adam.largest, adam, momentum, inverse)
        low, high = self._around(batch_size)
        exponent = math.log(value_at(high) / value_at(low)) / math.log(high / low)
        return Rate(value, error, exponent, noise_share=weight * inverse)

    def _top_direction_of_sgd(self, batch_size: float, inverse: float, momentum: float) -> Rate:
        limit = partial(
            max_sgd_lr, momentum=momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )
        noise = self.noise.total * inverse / self.largest if self.largest > 0 else 0.0
        value = limit(self.largest, noise)
        if not self.nesterov:
            error, weight = _noise_weight(
                self.largest, self.noise, momentum, inverse, weight_decay=self.weight_decay
            )
            return Rate(value, error, exponent=weight / batch_size, noise_share=weight * inverse)
        by_largest, by_noise = _slopes(limit, self.largest, noise)
        per_variance = by_noise * inverse / self.largest
        errors = (
            (by_largest - by_noise * noise / self.largest) * _finite(self.largest.stderr),
            per_variance * _finite(self.noise.parallel.stderr),
            per_variance * _finite(self.noise.orthogonal.stderr),
        )
        exponent = -by_noise * self.noise.total / (self.largest * batch_size)
        return Rate(value, math.hypot(*errors), exponent, 1 - value / limit(self.largest))

    @property
    def _population(self) -> float:
        """Samples whose matrices all batches' are means of: no number where they interact.

        A batch is then no mean over samples, and to have met each of them once is not to know what
        other batches of them do. For the rule ``"mean-square"``; standard errors of the other rules
        take a batch for a mean over samples.
        """
        return math.inf if self.coupled else self.dataset_size

    def _measured_adam(self) -> AdamCurvature:
        if self.adam is None:
            msg = (
                "Adam's curvature was not measured; pass optimizer='adam' (or the optimizer) to "
                "measure_curvature, or take rule='paper'"
            )
            raise ValueError(msg)
        return self.adam

    def _around(self, batch_size: float) -> tuple[float, float]:
        """Two sizes a tenth below and above, for a difference quotient."""
        low, high = max(1.0, batch_size / 1.1), min(float(self.dataset_size), batch_size * 1.1)
        return low, max(high, low * 1.001)

    def _reasons(self, batch_size: int, optimizer: str, rule: Rule) -> tuple[str, ...]:
        ratio = batch_size / self.batch_size
        preconditioned = self.adam if optimizer != "sgd" and rule != "paper" else None
        converged = self.converged if preconditioned is None else preconditioned.converged
        checks = [
            (
                not converged,
                "the largest eigenvalue did not converge: allow more products, and measure for "
                "this optimizer",
            ),
            (
                rule == "paper" and batch_size < self.critical_batch_size,
                f"batch below the critical size {self.critical_batch_size:.3g}: the second-order "
                "law overshoots there",
            ),
            (
                self.num_samples < min(self.dataset_size, self.critical_batch_size),
                f"measured on {self.num_samples} samples, fewer than the critical batch size "
                f"{self.critical_batch_size:.3g}: measure on more",
            ),
            (
                self.num_batches < _MIN_BATCHES,
                f"the noise rests on {self.num_batches} batches: pass {_MIN_BATCHES} or more",
            ),
            (
                preconditioned is not None
                and batch_size > max(self.dataset_size / 4, preconditioned.batch_size),
                "Adam's curvature near the full batch is a lower bound, up to several times too "
                "low: measure with batches nearer to the size asked for",
            ),
            (
                self.coupled and not 1 / 4 <= ratio <= 4,
                f"{_COUPLING[self.norm_mode == 'train']} measured on batches of {self.batch_size}: "
                "measure with batches nearer to the size asked for",
            ),
            (
                self.clip_norm is not None and self.gradient_norm > self.clip_norm,
                f"gradient clipping at {self.clip_norm} is active: batch gradients have norm "
                f"{self.gradient_norm:.3g}; clipped steps are shorter than the limit assumes, so "
                "larger rates may be stable",
            ),
            (
                self.kinked is not None,
                f"{self.kinked} is piecewise linear: its kinks limit the step and have no second "
                "derivative, so the limit misses them",
            ),
        ]
        return tuple(reason for holds, reason in checks if holds)

    def save(self, path: str | Path) -> None:
        """Write ``path`` (JSON) and its arrays (``.npz``) beside it.

        The suffix ``.json`` is added if missing.
        """
        save_dataclass(self, path, version=_FORMAT)

    @staticmethod
    def load(path: str | Path) -> "CurvatureReport":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: they are not a report of this format.
        """
        return load_dataclass(CurvatureReport, path, version=_FORMAT)


def _noise_weight(
    largest: Measured,
    noise: CurvatureNoise | AdamCurvature,
    momentum: float,
    inverse: float,
    *,
    weight_decay: float = 0.0,
) -> tuple[float, float]:
    """Relative standard error of the mean-square rate, and what ``1/b`` times is noise's share."""
    factor = (1 + momentum) / (1 - momentum) / largest
    denominator = largest + weight_decay + factor * noise.total * inverse
    errors = (
        _finite(largest.stderr) * (1 - factor * noise.total * inverse / largest),
        factor * inverse * _finite(noise.parallel.stderr),
        factor * inverse * _finite(noise.orthogonal.stderr),
    )
    return math.hypot(*errors) / denominator, factor * noise.total / denominator


def _slopes(
    limit: Callable[[float, float], float], largest: float, noise: float
) -> tuple[float, float]:
    """``d ln limit`` by curvature and by noise, as difference quotients."""
    step = _STEP * largest
    here = limit(largest, noise)
    by_largest = limit(largest + step, noise) / limit(largest - step, noise)
    # To one side, as there is no noise below zero; two of them, for the second order.
    once, twice = (math.log(limit(largest, noise + k * step) / here) for k in (1, 2))
    return math.log(by_largest) / (2 * step), (2 * once - twice / 2) / step


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0
