"""The decision table: what to change with the batch size, on the terminal."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from batchlr.batch_size_change import Optimizer, batch_size_change, scaling_reach
from batchlr.curvature_report import CurvatureReport

_WIDTH = 100  # characters; narrower, hardly a word would fit beside the figures
_NOTES = (
    "A batch is what one optimizer step sees: samples a device x devices x micro-batches.",
    "Batch norm takes its statistics from one micro-batch on one device; more of them change "
    "nothing there.",
)
_UNMEASURED = (
    "How far the rules hold for your network, only a measurement tells: batchlr lr CONFIG, then "
    "--report runs/NAME/curvature/report.json here."
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
        momentum: as of `CurvatureReport.max_lr`, for the report.
        settings: others of `batch_size_change`.

    Raises:
        OSError: there is no such report.
        ValueError: a number is out of range, or the report is none or not of that optimizer.
    """
    changes = batch_size_change(old, new, optimizer=optimizer, **settings)
    measured = [_UNMEASURED]
    if report is not None:
        if not report.is_file():
            msg = f"{report} is no file; batchlr lr CONFIG writes runs/NAME/curvature/report.json"
            raise FileNotFoundError(msg)
        measured = _measured(CurvatureReport.load(report), old, new, optimizer, momentum)
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


def _measured(
    report: CurvatureReport, old: int, new: int, optimizer: Optimizer, momentum: float | None
) -> list[str]:
    kind = "adam" if optimizer == "adamw" else optimizer
    bounds = [report.max_lr(size, optimizer=kind, momentum=momentum) for size in (old, new)]
    low, high = scaling_reach(report, old, optimizer=kind, momentum=momentum)
    rule = "linear" if kind == "sgd" else "square-root"
    limits = " and ".join(
        f"{bound.value:.3g} at {bound.batch_size} ({bound.low:.2g} .. {bound.high:.2g}, limited by "
        f"{bound.regime})"
        for bound in bounds
    )
    ratio = bounds[1].value / bounds[0].value
    reach = (
        f"at all batch sizes up to {high}, all samples"
        if (low, high) == (1, report.dataset_size)
        else f"from {low} to {high}; beyond, it ends a quarter above the limit"
    )
    reasons = dict.fromkeys(reason for bound in bounds for reason in bound.reasons)
    return [
        f"Measured: the largest stable rate is {limits}, x {ratio:.3g}, momentum or beta1 "
        f"{bounds[0].momentum:g}.",
        f"Carried over from {old}, the {rule} rule holds {reach}.",
        *(f"* {reason}" for reason in reasons),
    ]
