"""What a measurement of curvature says about any batch size."""

import json
import math
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from batchlr.learning_rates import max_adam_lr, max_sgd_lr, paper_adam_lr, paper_sgd_lr
from batchlr.measured import Measured

Rule = Literal["mean-square", "paper"]

_FORMAT = 1
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)
_WIDEST = 50.0  # assumed: half an interval in the logarithm; nothing is known, nothing overflows
_MIN_BATCHES = 4  # assumed: below it the standard error of a variance says little


@dataclass(frozen=True)
class LRBound:
    """The largest stable learning rate at one batch size.

    ``float(bound)`` is its value.
    """

    value: float
    low: float  # 90 % interval from the sampling errors of curvature and noise
    high: float
    exponent: float  # d ln value / d ln B: 1 is linear scaling, 1/2 the square root, 0 saturation
    regime: Literal["noise", "transition", "curvature"]  # what limits the rate
    reliable: bool
    reasons: tuple[str, ...]  # why not reliable; empty if it is
    batch_size: int
    optimizer: str
    momentum: float  # SGD's or RMSprop's, or Adam's beta1
    rule: Rule

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class CurvatureNoise:
    """Per-sample variances of the curvature's products; unit: curvature squared."""

    parallel: Measured  # r1: along the top eigenvector v1, of v1' H_i v1
    orthogonal: Measured  # c1: of the rest of H_i v1
    random_direction: Measured  # P sigma^2 of the spiked Wigner model; NaN if not measured

    @property
    def total(self) -> float:
        """``r1 + c1``, what the mean-square limit of the learning rate needs."""
        return self.parallel + self.orthogonal


@dataclass(frozen=True)
class AdamCurvature:
    """Extremes of ``D^-1/2 H D^-1/2``, ``D = sqrt(v) + eps``; unit: 1 / learning rate.

    ``D`` is what Adam, or RMSprop, divides by.

    ``D`` depends on the batch size through the gradient noise in ``v``. ``stretch`` is the mean of
    ``D(B)/D(batch_size)`` over the coordinates of the top eigenvector; curvature goes like its
    inverse (a Rayleigh quotient: exact at ``batch_size``, a lower bound elsewhere).
    """

    largest: Measured
    parallel: Measured
    orthogonal: Measured
    batch_size: int  # at which D was measured
    beta1: float  # Adam's, or RMSprop's momentum
    converged: bool
    source: Literal["state", "gradients"]  # of v: the optimizer's state, or batch gradients
    batch_sizes: tuple[float, ...]  # ascending
    stretch: tuple[float, ...]  # of the same length
    optimizer: Literal["adam", "rmsprop"] = "adam"  # whose v it is

    @property
    def total(self) -> float:
        """``r1 + c1`` of the preconditioned matrix."""
        return self.parallel + self.orthogonal

    def stretch_at(self, batch_size: float) -> float:
        """``D(B)/D(batch_size)``, interpolated in the logarithms."""
        position = np.interp(math.log(batch_size), np.log(self.batch_sizes), np.log(self.stretch))
        return math.exp(float(position))


@dataclass(frozen=True)
class CurvatureReport:
    """Extremal curvature at one point of training, and what follows at any batch size.

    Made by `measure_curvature`. Curvature has the unit loss / parameter^2, that is 1 / (learning
    rate of SGD); its noise is that of one sample, and a batch of ``B`` out of ``N`` has
    ``1/b = 1/B - 1/N`` of it.
    """

    largest: Measured  # lambda_1 of the mean over all dataset_size samples
    smallest: Measured  # lambda_P
    noise: CurvatureNoise
    kappa: float  # E lambda_1(H_B) = lambda_1 + kappa/b to second order; unit: curvature
    kappa_smallest: float  # the same of lambda_P, not positive
    ritz_values: tuple[float, ...]  # descending, at both ends
    loss: float
    num_params: int
    num_samples: int  # measured
    num_batches: int  # disjoint, for the noise
    batch_size: int  # of those batches
    dataset_size: int  # N
    small_batch: tuple[int, float] | None  # (B, mean lambda_1 of batches of B), caps the law
    matrix: str
    norm_mode: str | None
    coupled: bool  # samples of a batch interact through train-mode normalisation
    momentum: float  # of the optimizer given, else 0
    weight_decay: float  # likewise
    adam: AdamCurvature | None
    converged: bool
    num_products: int
    seconds: float
    gradient_norm: float = math.nan  # |g_B|, mean over the batches; NaN if not measured
    clip_norm: float | None = None  # at which training clips the gradient's norm; None: nowhere
    kinked: str | None = None  # name of the criterion if it is piecewise linear
    # (P,) of the matrix and of Adam's, if measured: where to start the next time; not saved
    top_vectors: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

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

    def largest_at(self, batch_size: int) -> float:
        """Expected largest eigenvalue of a batch Hessian, ``lambda_1 + kappa/b``.

        Second-order perturbation; for batches below the critical size it overshoots and is capped
        by the mean measured on small batches (or by ``2 lambda_1``, its value at the critical size,
        if that is larger: larger batches never have larger curvature), continued like ``B^-1/2``
        (the Wigner edge) below their size.
        """
        return self._edge(batch_size)[0]

    def smallest_at(self, batch_size: int) -> float:
        """Expected smallest eigenvalue of a batch Hessian, to second order.

        Below the size where it is twice ``lambda_P`` that overshoots, and the Wigner edge, which
        joins it there, takes over.
        """
        shift = self.kappa_smallest * self.inverse_effective_batch_size(batch_size)
        if shift < self.smallest < 0:
            return -2 * math.sqrt(shift * self.smallest)
        return self.smallest + shift

    @property
    def critical_batch_size(self) -> float:
        """``B*`` where ``kappa/b = lambda_1``: below it noise sets the edge, above it curvature.

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
        optimizer: Literal["sgd", "adam", "rmsprop"] = "sgd",
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
                under momentum and batch noise; ``"paper"``, ``2/lambda_1'`` for SGD and
                ``2/sqrt(lambda_1')`` for Adam (Granziol, Zohren & Roberts 2022), which knows
                neither momentum nor the noise's variance.

        Raises:
            ValueError: an argument is illegal, there is no positive curvature, or Adam was not
                measured.
        """
        self.inverse_effective_batch_size(batch_size)  # refuses illegal sizes
        if optimizer not in ("sgd", "adam", "rmsprop"):
            msg = f"optimizer must be 'sgd', 'adam' or 'rmsprop', got {optimizer!r}"
            raise ValueError(msg)
        if rule not in ("mean-square", "paper"):
            msg = f"rule must be 'mean-square' or 'paper', got {rule!r}"
            raise ValueError(msg)
        if momentum is None:
            momentum = self._momentum_of(optimizer)
        if rule == "paper":
            rate = self._paper(batch_size, optimizer)
        elif optimizer == "sgd":
            rate = self._mean_square_sgd(batch_size, momentum)
        else:
            rate = self._mean_square_adam(batch_size, momentum)
            if optimizer == "rmsprop":  # a sum of gradients is 1 / (1 - m) times their average
                rate = rate._replace(value=(1 - momentum) * rate.value)
        margin = math.exp(min(_student_95(self.num_batches - 1) * rate.error, _WIDEST))
        reasons = self._reasons(batch_size, optimizer, rule)
        return LRBound(
            value=rate.value,
            low=rate.value / margin,
            high=rate.value * margin,
            exponent=rate.exponent,
            regime=_regime(rate.noise_share),
            reliable=not reasons,
            reasons=reasons,
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

    def _edge(self, batch_size: float) -> tuple[float, float]:
        """`largest_at` and how much it falls per unit of ``ln B``."""
        shift = self.kappa * self.inverse_effective_batch_size(batch_size)
        law = float(self.largest) + shift, self.kappa / batch_size
        if self.small_batch is None or shift <= self.largest:
            return law
        size, measured = self.small_batch
        excess = max(measured - self.largest, float(self.largest))
        excess *= math.sqrt(max(1.0, size / batch_size))
        return min(law, (self.largest + excess, excess / 2 if batch_size < size else 0.0))

    def _paper(self, batch_size: int, optimizer: str) -> "_Rate":
        largest, fall = self._edge(batch_size)
        decay, power = (self.weight_decay, 1.0) if optimizer == "sgd" else (0.0, 0.5)
        value = (
            paper_sgd_lr(largest, weight_decay=decay)
            if optimizer == "sgd"
            else paper_adam_lr(largest)
        )
        shift = self.kappa * self.inverse_effective_batch_size(batch_size)
        orthogonal = self.noise.orthogonal  # kappa is proportional to it
        shift_error = shift * _finite(orthogonal.stderr) / orthogonal if orthogonal > 0 else 0.0
        error = math.hypot(_finite(self.largest.stderr), shift_error)
        return _Rate(
            value=value,
            error=power * error / (largest + decay),
            exponent=power * fall / (largest + decay),
            noise_share=(largest - self.largest) / (largest + decay),
        )

    def _mean_square_sgd(self, batch_size: int, momentum: float) -> "_Rate":
        inverse = self.inverse_effective_batch_size(batch_size)
        noise = self.noise.total * inverse / self.largest if self.largest > 0 else 0.0
        value = max_sgd_lr(self.largest, noise, momentum=momentum, weight_decay=self.weight_decay)
        error, weight = _noise_weight(
            self.largest, self.noise, momentum, inverse, weight_decay=self.weight_decay
        )
        return _Rate(value, error, exponent=weight / batch_size, noise_share=weight * inverse)

    def _mean_square_adam(self, batch_size: int, beta1: float) -> "_Rate":
        adam = self.adam
        if adam is None:
            msg = (
                "Adam's curvature was not measured; pass optimizer='adam' (or the optimizer) to "
                "measure_curvature, or take rule='paper'"
            )
            raise ValueError(msg)

        def value_at(size: float) -> float:
            inverse = self.inverse_effective_batch_size(size)
            stretch = adam.stretch_at(size)
            noise = adam.total * inverse / (adam.largest * stretch) if adam.largest > 0 else 0.0
            return max_adam_lr(adam.largest / stretch, noise, beta1=beta1)

        value = value_at(batch_size)
        inverse = self.inverse_effective_batch_size(batch_size)
        error, weight = _noise_weight(adam.largest, adam, beta1, inverse)
        low, high = max(1.0, batch_size / 1.1), min(self.dataset_size, batch_size * 1.1)
        exponent = (
            math.log(value_at(high) / value_at(low)) / math.log(high / low) if high > low else 0.0
        )
        return _Rate(value, error, exponent, noise_share=weight * inverse)

    def _reasons(self, batch_size: int, optimizer: str, rule: Rule) -> tuple[str, ...]:
        ratio = batch_size / self.batch_size
        preconditioned = self.adam if optimizer != "sgd" and rule == "mean-square" else None
        converged = self.converged if preconditioned is None else preconditioned.converged
        checks = [
            (not converged, "Lanczos did not converge: allow more products"),
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
                f"train-mode normalisation was measured on batches of {self.batch_size}: measure "
                "with batches nearer to the size asked for",
            ),
            (
                self.clip_norm is not None and self.gradient_norm > self.clip_norm,
                f"gradient clipping at {self.clip_norm} is active: batch gradients have norm "
                f"{self.gradient_norm:.3g}; clipped steps are shorter than the limit assumes, so "
                "it is on the safe side",
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

        The suffix ``.json`` is added if missing. ``top_vectors`` are not kept.
        """
        content = asdict(replace(self, top_vectors=())) | {"format": _FORMAT}
        measured = {name: _errors(value) for name, value in _measured_parts(self).items()}
        path = _json_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"ritz_values": np.asarray(content.pop("ritz_values"), dtype=np.float64)}
        if self.adam is not None:
            for name in ("batch_sizes", "stretch"):
                arrays[f"adam_{name}"] = np.asarray(content["adam"].pop(name), dtype=np.float64)
        np.savez(path.with_suffix(".npz"), allow_pickle=False, **arrays)
        path.write_text(json.dumps(content | {"standard_errors": measured}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> "CurvatureReport":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: they are not a report of this format.
        """
        path = _json_path(path)
        try:
            content = json.loads(path.read_text())
            with (
                path.with_suffix(".npz").open("rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                return _from_content(content, {name: arrays[name] for name in arrays.files})
        except _UNREADABLE as error:
            msg = f"{path} is not a curvature report of format {_FORMAT}: {error}"
            raise ValueError(msg) from error


class _Rate(NamedTuple):
    value: float
    error: float  # relative standard error
    exponent: float  # d ln value / d ln B
    noise_share: float  # of what limits the rate


def _regime(noise_share: float) -> Literal["noise", "transition", "curvature"]:
    if noise_share > 2 / 3:
        return "noise"
    return "curvature" if noise_share < 1 / 3 else "transition"


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


def _student_95(freedom: int) -> float:
    """95 % quantile of Student's t; 12 % low at 1 degree of freedom, 0.3 % at 3.

    Errors estimated from few batches are uncertain themselves. Abramowitz & Stegun 26.7.5.
    """
    z, n = 1.6448536, freedom  # the normal quantile
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def _json_path(path: str | Path) -> Path:
    """``path`` with the suffix ``.json``; other dots in its name are part of it."""
    path = Path(path)
    return path if path.suffix == ".json" else path.with_name(path.name + ".json")


def _measured_parts(report: CurvatureReport) -> dict[str, dict[str, Measured]]:
    parts: dict[str, Any] = {"": report, "noise": report.noise, "adam": report.adam}
    return {
        name: {k: v for k, v in vars(part).items() if isinstance(v, Measured)}
        for name, part in parts.items()
        if part is not None
    }


def _errors(values: dict[str, Measured]) -> dict[str, float]:
    return {name: value.stderr for name, value in values.items()}


def _from_content(content: dict[str, Any], arrays: dict[str, Any]) -> CurvatureReport:
    if content.pop("format") != _FORMAT:
        msg = "another format version"
        raise KeyError(msg)
    errors = content.pop("standard_errors")
    for name, stderrs in errors.items():
        part = content[name] if name else content
        for key, stderr in stderrs.items():
            part[key] = Measured(part[key], stderr)
    adam = content.pop("adam")
    if adam is not None:
        for name in ("batch_sizes", "stretch"):
            adam[name] = tuple(arrays[f"adam_{name}"].tolist())
        adam = AdamCurvature(**adam)
    small_batch = content.pop("small_batch")
    content.pop("top_vectors")
    return CurvatureReport(
        **content | {"noise": CurvatureNoise(**content["noise"])},
        ritz_values=tuple(arrays["ritz_values"].tolist()),
        small_batch=None if small_batch is None else (small_batch[0], small_batch[1]),
        adam=adam,
    )
