"""What to change when the batch size changes: one line a setting, with what it holds for."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from batchlr.argument_ranges import require_non_negative, require_positive
from batchlr.curvature_report import CurvatureReport
from batchlr.scaling_rules import rescale_adam, rescale_lr

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop"]

_NOISY = "batch noise limits the rate: below the critical batch size"
_TOLERATED = 1.25  # assumed: a rate carried over that is a quarter too high has failed
_FINEST = 2 ** (1 / 4)  # between the sizes at which a report is asked


@dataclass(frozen=True)
class SettingChange:
    """What becomes of one setting when the batch size changes."""

    setting: str
    factor: float  # on what it was; 1 stays
    value: float | None  # afterwards; None where the old one was not given
    holds: str  # while
    source: str

    def __str__(self) -> str:
        """The new value, or the factor."""
        if self.value is not None:
            return f"{self.value:.4g}"
        if self.factor == 1:
            return "the same"
        return f"x {self.factor:.3g}" if self.factor > 1 else f"/ {1 / self.factor:.3g}"


def batch_size_change(
    old: int,
    new: int,
    *,
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    weight_decay: float | None = None,
    steps: int | None = None,
) -> tuple[SettingChange, ...]:
    """The settings to change with the batch size, by the rules of the field; no measurement.

    A batch is what one optimizer step sees: samples a device, times devices, times micro-batches
    accumulated. `scaling_reach` says how far the rules hold for a network that was measured.

    Args:
        old: Batch size the settings are of.
        new: Batch size to train with.
        optimizer: ``"adam"`` with weight decay added to the gradient, ``"adamw"`` with decoupled.
        lr: Learning rate at ``old``; without it factors only.
        betas: Adam's, by default 0.9 and 0.999; RMSprop's ``alpha`` is the second, by default 0.99
            (torch's, both).
        eps: Adam's and RMSprop's.
        weight_decay: At ``old``.
        steps: Of the run at ``old``, for as many epochs.

    Raises:
        ValueError: A number is out of range, or the optimizer unknown.

    >>> for change in batch_size_change(128, 1024, lr=0.1)[:3]:
    ...     print(change.setting, change)
    learning rate 0.8
    momentum the same
    weight decay the same
    """
    if optimizer not in get_args(Optimizer):
        msg = f"optimizer must be one of {', '.join(get_args(Optimizer))}, got {optimizer!r}"
        raise ValueError(msg)
    for name, value in (("lr", lr), ("steps", steps)):
        if value is not None:
            require_positive(**{name: value})
    if weight_decay is not None:
        require_non_negative(weight_decay=weight_decay)
    if betas is None:
        betas = (0.9, 0.99 if optimizer == "rmsprop" else 0.999)
    ratio = rescale_lr(1.0, old, new)
    changes = (
        _sgd(ratio, lr, weight_decay)
        if optimizer == "sgd"
        else _adaptive(optimizer, old, new, lr, betas, eps, weight_decay)
    )
    rate = changes[0].factor
    summed = rate / ratio if optimizer == "sgd" else rate
    grows = "gradients grow with the batch" if optimizer == "sgd" else "the gradient's size cancels"
    return (
        *changes,
        SettingChange(
            "steps, warm-up, decay points",
            1 / ratio,
            None if steps is None else max(1, round(steps / ratio)),
            "counted in epochs, they stay as they are",
            "arithmetic",
        ),
        _times("rate if the loss is a sum", summed, lr, grows, "arithmetic"),
    )


def _sgd(ratio: float, lr: float | None, weight_decay: float | None) -> tuple[SettingChange, ...]:
    decay = "rate times decay keeps pace with the samples"
    return (
        _times("learning rate", ratio, lr, _NOISY, "Goyal et al. 2017"),
        SettingChange(
            "momentum", 1.0, None, "the rate makes up for the batch", "Goyal et al. 2017"
        ),
        _times("weight decay", 1.0, weight_decay, decay, "arithmetic"),
    )


def _adaptive(
    optimizer: Optimizer,
    old: int,
    new: int,
    lr: float | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | None,
) -> tuple[SettingChange, ...]:
    settings = rescale_adam(1.0, old, new, betas=betas, eps=eps)
    averages = [
        SettingChange(
            name, there / here, there, "averages forget as fast a sample", "Malladi et al. 2022"
        )
        for name, here, there in zip(("beta1", "beta2"), betas, settings.betas, strict=True)
        if here > 0
    ]
    if optimizer == "rmsprop":  # its momentum adds gradients up and stays, as SGD's does
        averages = [replace(change, setting="alpha") for change in averages[-1:]]
    changes = [
        _times("learning rate", settings.lr, lr, _NOISY, "Malladi et al. 2022"),
        *averages,
        SettingChange("eps", settings.eps / eps if eps else 1.0, settings.eps, _NOISY,
               "Malladi et al. 2022"),
    ]  # fmt: skip
    decoupled = optimizer == "adamw"
    factor = new / old / settings.lr if decoupled else 1.0
    words = (
        "decoupled: a step decays weights by rate times decay"
        if decoupled
        else "added to gradients, which their noise divides"
    )
    changes.append(_times("weight decay", factor, weight_decay, words, "arithmetic"))
    return tuple(changes)


def _times(
    setting: str, factor: float, value: float | None, holds: str, source: str
) -> SettingChange:
    return SettingChange(setting, factor, None if value is None else factor * value, holds, source)


def scaling_reach(
    report: CurvatureReport,
    old: int,
    *,
    optimizer: Literal["sgd", "adam", "rmsprop"] = "sgd",
    momentum: float | None = None,
) -> tuple[int, int]:
    """From which to which batch size the rule that `batch_size_change` carries a rate by holds.

    At either end the rate carried over from ``old``, where it is the measured limit, would be a
    quarter above the limit measured there. The rule is linear with SGD, else the square root; with
    Adam ``beta1`` goes along as the rule says, ``beta1^(size / old)``, which lowers the limit of
    larger batches much more than the same ``beta1`` would.

    Args:
        report: of `measure_curvature`; its limits at other batch sizes are predictions.
        old: Batch size carried over from.
        optimizer: As of `CurvatureReport.max_lr`.
        momentum: As of `CurvatureReport.max_lr`, at ``old``.

    Returns:
        The least and the largest batch size up to which it holds without a gap, to a fifth; 1 and
        the size of the data set where there is no end.

    Raises:
        ValueError: as of `CurvatureReport.max_lr`.
    """
    rule: Literal["linear", "sqrt"] = "linear" if optimizer == "sgd" else "sqrt"
    first = report.max_lr(old, optimizer=optimizer, momentum=momentum)
    here = first.value

    def limit(size: int) -> float:
        kept = first.momentum ** (size / old) if optimizer == "adam" else first.momentum
        return report.max_lr(size, optimizer=optimizer, momentum=kept).value

    def end(factor: float, last: int) -> int:
        held, size = old, float(old)
        while held != last:
            size *= factor
            there = min(max(round(size), 1), report.dataset_size)
            if rescale_lr(here, old, there, rule=rule) > _TOLERATED * limit(there):
                return held
            held = there
        return held

    return end(1 / _FINEST, 1), end(_FINEST, report.dataset_size)
