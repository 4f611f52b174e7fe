"""The decision table: what to change with the batch size, on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from batchlr.batch_size_change import (
    Optimizer,
    SettingChange,
    batch_size_change,
    scaling_reach,
)
from batchlr.curvature_report import CurvatureReport
from batchlr.lr_bound import LRBound

_WIDTH = 100  # characters; narrower, hardly a word would fit beside the figures
_BETA2 = 0.999  # torch's default
_NOTES = (
    "A batch is what one optimizer step sees: samples per device x devices x micro-batches.",
    "Batch norm takes its statistics from one micro-batch on one device: more devices or "
    "micro-batches change nothing there.",
)
_UNMEASURED = (
    "How far the rules hold for your network, only a measurement tells: run batchlr lr CONFIG, "
    "then this with --report runs/NAME/curvature/report.json."
)


def print_decision_table(
    old: int,
    new: int,
    *,
    optimizer: Optimizer,
    report: Path | None = None,
    momentum: float | None = None,
    **settings: Any,
) -> None:
    """What becomes of each setting, while what holds, and how far for a network measured.

    Args:
        old: batch size the settings are of.
        new: batch size to train with.
        optimizer: as of `batch_size_change`.
        report: saved by `CurvatureReport.save`, as ``batchlr lr`` does.
        momentum: SGD's or RMSprop's, or Adam's ``beta1``; by default the report's, or 0.9.
        settings: others of `batch_size_change`.

    Raises:
        OSError: there is no such report.
        ValueError: a number is out of range, or the report is none or not of that optimizer.
    """
    measured = [_UNMEASURED]
    if report is not None:
        if not report.is_file() or report.suffix != ".json":
            msg = f"{report} is no report; batchlr lr CONFIG writes runs/NAME/curvature/report.json"
            raise FileNotFoundError(msg)
        read = CurvatureReport.load(report)
        here = read.max_lr(old, optimizer=_kind(optimizer), momentum=momentum)
        momentum = here.momentum
    if optimizer in ("adam", "adamw") and momentum is not None:
        settings["betas"] = (momentum, _BETA2)
    changes = batch_size_change(old, new, optimizer=optimizer, **settings)
    if report is not None:
        measured = _measured(read, here, new, optimizer, changes, settings.get("lr"))
    table = Table(box=SIMPLE, pad_edge=False)
    for title in (f"{optimizer}, batch {old} -> {new}", "becomes", "while", "source"):
        table.add_column(title, no_wrap=title != "while")
    for change in changes:
        table.add_row(change.setting, str(change), change.holds, change.source)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _WIDTH)
    console.print(table)
    for line in (*measured, *_NOTES):
        console.print(line, markup=False)


def _kind(optimizer: Optimizer) -> Literal["sgd", "adam", "rmsprop"]:
    return "adam" if optimizer == "adamw" else optimizer


def _measured(
    report: CurvatureReport,
    here: LRBound,
    new: int,
    optimizer: Optimizer,
    changes: Sequence[SettingChange],
    lr: float | None,
) -> list[str]:
    kind = _kind(optimizer)
    name = "beta1" if kind == "adam" else "momentum"
    kept = next((c.value for c in changes if c.setting == name), None)
    there = report.max_lr(new, optimizer=kind, momentum=here.momentum if kept is None else kept)
    low, high = scaling_reach(report, here.batch_size, optimizer=kind, momentum=here.momentum)
    rule = "linear" if kind == "sgd" else "square-root"
    limits = " and ".join(
        f"{bound.value:.3g} at batch {bound.batch_size} (90 % interval {bound.interval}, {name} "
        f"{bound.momentum:.3g}, limited by {bound.regime})"
        for bound in (here, there)
    )
    reach = (
        f"at all batch sizes up to {high}, all samples"
        if (low, high) == (1, report.dataset_size)
        else f"from batch {low} to {high}; beyond these its rate is a quarter above the limit or "
        "more"
    )
    ends = [report.max_lr(size, optimizer=kind, momentum=here.momentum) for size in (low, high)]
    doubts = _doubts([here, there, *ends])
    holds = "would hold" if doubts else "holds"
    lines = [
        *doubts,
        f"Measured: the largest stable rate is {limits}, {there.value / here.value:.3g} times as "
        "large.",
        f"Carried over from batch {here.batch_size}, the {rule} rule {holds} {reach}.",
    ]
    if lr is not None:
        carried = changes[0].value or lr
        lines.append(
            f"Your rate of {lr:.4g} is {lr / here.value:.2g} times the limit at batch "
            f"{here.batch_size}; carried over to {carried:.4g} it is {carried / there.value:.2g} "
            f"times that at {there.batch_size}."
        )
    if new > report.dataset_size / 10:
        lines.append(
            f"Noise goes with 1/B - 1/{report.dataset_size}: as a batch of B nears all samples, "
            "limits grow faster than B."
        )
    return lines


def _doubts(bounds: Sequence[LRBound]) -> list[str]:
    """A line for each reason not to rely on ``bounds``, with the batch sizes it is true of."""
    sizes: dict[str, set[int]] = {}
    for bound in bounds:
        for reason in bound.reasons:
            sizes.setdefault(reason, set()).add(bound.batch_size)
    return [
        f"Do not rely on limits at batch {', '.join(map(str, sorted(found)))}: {reason}."
        for reason, found in sizes.items()
    ]
