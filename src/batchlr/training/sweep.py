"""The largest rate that training survives, swept, beside the one that curvature predicts."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from batchlr.curvature import measure_curvature
from batchlr.curvature_report import CurvatureReport
from batchlr.lr_bound import LRBound, marked_column, marked_reasons, reason_marks
from batchlr.operators.isolation import normalises_over_batches
from batchlr.plotting import plot_sweep, save_figure
from batchlr.training.analysis import build_at, common_settings, marked_table
from batchlr.training.checkpoint import latest_checkpoint
from batchlr.training.config import TrainConfig
from batchlr.training.config.variants import SGDOptions
from batchlr.training.data import measurement_batches
from batchlr.training.experiment import Experiment
from batchlr.training.metrics import append_json, read_metrics, write_json
from batchlr.training.resumption import flat
from batchlr.training.run_folder import write_measured
from batchlr.training.survival import Kind, Survival, largest_survivable_lr

_UNCOUPLED_BATCH = 8  # assumed: small batches show the noise best where samples do not interact
_OTHERS_MOMENTUM = 0.9  # assumed: or beta1, of the optimizer that is not configured
_TABLE_WIDTH = 80
_NORMALISED = (
    "train-mode batch norm: the weights' scale drops out of the function, so that training may "
    "survive far above the limit (1.5 to 95 times it on PreResNet-8: docs/learning_rate_law.md)"
)


@dataclass(frozen=True)
class SweepCell:
    """One optimizer and batch size: what was predicted, and what training survived."""

    optimizer: Kind
    batch_size: int
    momentum: float
    predicted: float
    low: float
    high: float
    regime: str
    reliable: bool
    reasons: tuple[str, ...]
    paper: float  # the rule 2 / lambda_1' of Granziol, Zohren & Roberts, for comparison
    survived: float
    diverged: float  # infinite if none did; null in the file
    steps: int


def parse_batch_sizes(text: str) -> list[int]:
    """``"4,16"`` as ``[4, 16]``.

    Raises:
        ValueError: a part is not a positive integer.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        msg = f"batch sizes must be positive integers separated by commas, got {text!r}"
        raise ValueError(msg)
    return [int(part) for part in parts]


def parse_optimizers(text: str) -> list[Kind]:
    """``"sgd,adam"`` as a list.

    Raises:
        ValueError: a part is neither.
    """
    kinds: dict[str, Kind] = {"sgd": "sgd", "adam": "adam"}
    parts = [part.strip() for part in text.split(",")]
    if not all(part in kinds for part in parts):
        msg = f"optimizers must be sgd, adam or both, separated by a comma, got {text!r}"
        raise ValueError(msg)
    return [kinds[part] for part in parts]


def sweep(
    config: TrainConfig,
    *,
    out: Path,
    batch_sizes: Sequence[int] = (4, 16, 64, 256),
    optimizers: Sequence[Kind] = ("sgd", "adam"),
    steps: int = 200,
    checkpoint: Path | None = None,
    notes: Sequence[str] = (),
) -> list[SweepCell]:
    """Predicted and survivable rates over batch sizes: table, ``sweep.jsonl`` and a picture.

    Measured and trained from the initial weights or those of ``checkpoint``. Finished cells in
    ``out / "curvature" / "sweep.jsonl"`` are kept, so that a sweep may be stopped and started at
    will. The settings go into ``out`` (`write_measured`, which takes ``notes``).

    Raises:
        ArithmeticError: there is no curvature to limit a rate, or training diverges at every rate.
        ValueError: a batch is larger than the data set, or kept cells are of other settings.
    """
    experiment = build_at(config, checkpoint)
    total = len(experiment.data.train)
    if illegal := [size for size in batch_sizes if not 1 <= size <= total]:
        msg = f"batch sizes must lie in [1, {total}], the size of the data set, got {illegal}"
        raise ValueError(msg)
    folder = out / "curvature"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.jsonl"
    settings = _settings(config, steps, checkpoint)
    _check_settings(path, folder / "sweep.json", settings)
    write_json(folder / "sweep.json", settings)
    write_measured(config, out, notes, at=checkpoint)
    done = {(cell.optimizer, cell.batch_size): cell for cell in _read(path)}
    samples = _all_samples(experiment)
    worst = math.log(experiment.data.num_classes)
    measured: dict[int, CurvatureReport] = {}
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    for kind, size in itertools.product(optimizers, batch_sizes):
        if (kind, size) in done:
            continue
        bound, paper = _predict(experiment, kind, size, measured)
        found = largest_survivable_lr(
            experiment.model,
            experiment.loss_fn,
            samples,
            optimizer=kind,
            momentum=bound.momentum,
            batch_size=size,
            start=bound.value,
            steps=steps,
            worst_loss=worst,
            seed=config.seed,
        )
        done[kind, size] = _cell(kind, bound, paper, found, steps)
        append_json(path, asdict(done[kind, size]))
        console.print(
            f"{kind} at batch {size}: predicted {bound.value:.3g}, survived {found.lr:.3g} "
            f"({found.runs} runs)",
            markup=False,
        )
    cells = [done[key] for key in itertools.product(optimizers, batch_sizes)]
    save_figure(plot_sweep([asdict(cell) for cell in cells]), folder / "sweep.png")
    _print(console, cells, folder, normalised=normalises_over_batches(experiment.model))
    return cells


def _cell(kind: Kind, bound: LRBound, paper: float, found: Survival, steps: int) -> SweepCell:
    return SweepCell(
        optimizer=kind,
        batch_size=bound.batch_size,
        momentum=bound.momentum,
        predicted=bound.value,
        low=bound.low,
        high=bound.high,
        regime=bound.regime,
        reliable=bound.reliable,
        reasons=bound.reasons,
        paper=paper,
        survived=found.lr,
        diverged=found.diverged,
        steps=steps,
    )


def _predict(
    experiment: Experiment, kind: Kind, size: int, measured: dict[int, CurvatureReport]
) -> tuple[LRBound, float]:
    """The limit at one batch size, and the paper's rule.

    One measurement serves all sizes, unless samples interact through batch normalisation: then each
    size is measured with batches of its own. ``measured`` has those made, by size.
    """
    cut = _measured_size(experiment, size)
    if cut not in measured:
        measured[cut] = _measure(experiment, cut)
    report = measured[cut]
    if report.largest <= 0:
        msg = f"the largest eigenvalue is {report.largest}: no curvature limits the rate here"
        raise ArithmeticError(msg)
    momentum = _momentum(experiment.config, kind)
    bound = report.max_lr(size, optimizer=kind, momentum=momentum)
    return bound, report.max_lr(size, optimizer=kind, rule="paper").value


def _measured_size(experiment: Experiment, size: int) -> int:
    """Samples of the batches on which the limit of batches of ``size`` is measured."""
    options, total = experiment.config.curvature, len(experiment.data.train)
    if options.norm_mode == "train" and normalises_over_batches(experiment.model):
        return min(size, total // 4)
    return min(_UNCOUPLED_BATCH, min(options.samples, total) // 4)


def _measure(experiment: Experiment, size: int) -> CurvatureReport:
    """The curvature of four or more batches of ``size``."""
    config, total = experiment.config, len(experiment.data.train)
    samples = min(config.curvature.samples, total)
    batches = measurement_batches(
        experiment.data,
        batch_size=size,
        num_batches=min(max(samples // size, 4), total // size),
        generator=experiment.sampler,
        device=experiment.device,
    )
    return measure_curvature(
        experiment.model,
        experiment.loss_fn,
        [(experiment.arranged(x), y) for x, y in batches],
        dataset_size=total,
        norm_mode=config.curvature.norm_mode,
        tol=min(config.curvature.tolerance, 1e-2),
        num_small_batches=0,
        memory_budget=config.curvature.memory_budget,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _momentum(config: TrainConfig, kind: Kind) -> float:
    """The configured optimizer's own, or 0.9 for the other."""
    options = config.optim
    if isinstance(options, SGDOptions):
        return options.momentum if kind == "sgd" else _OTHERS_MOMENTUM
    return options.betas[0] if kind == "adam" else _OTHERS_MOMENTUM


def _all_samples(experiment: Experiment) -> tuple[Tensor, Tensor]:
    total = len(experiment.data.train)
    whole = measurement_batches(
        experiment.data,
        batch_size=total,
        num_batches=1,
        generator=torch.Generator().manual_seed(experiment.config.seed),
        device=experiment.device,
    )
    x, y = whole[0]
    return experiment.arranged(x), y


def _settings(config: TrainConfig, steps: int, checkpoint: Path | None) -> dict[str, Any]:
    """What the cells of a sweep have in common, flat."""
    file = latest_checkpoint(checkpoint) if checkpoint and checkpoint.is_dir() else checkpoint
    content = common_settings(config, file, optim=True, curvature=True)
    content["optim"].pop("lr")  # what is swept
    return {"steps": steps} | flat(content)


def _check_settings(path: Path, record: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless the cells in ``path`` are of ``settings``."""
    if not path.exists():
        return
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    changed = [
        f"{key}: {found.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted(found.keys() | settings.keys())
        if found.get(key) != settings.get(key)
    ]
    if changed:
        listed = "\n  ".join(changed)
        msg = (
            f"{path} holds cells of other settings:\n  {listed}\nremove it or choose another --out"
        )
        raise ValueError(msg)


def _read(path: Path) -> list[SweepCell]:
    cells = []
    for row in read_metrics(path):
        diverged = math.inf if row["diverged"] is None else row["diverged"]
        cells.append(SweepCell(**row | {"reasons": tuple(row["reasons"]), "diverged": diverged}))
    return cells


def _print(console: Console, cells: Sequence[SweepCell], folder: Path, *, normalised: bool) -> None:
    console.width = max(console.width, _TABLE_WIDTH)
    marks = reason_marks(cell.reasons for cell in cells)
    columns = [
        ["optimizer", *(cell.optimizer for cell in cells)],
        ["batch", *(str(cell.batch_size) for cell in cells)],
        marked_column("predicted", [(cell.predicted, cell.reasons) for cell in cells], marks),
        ["90 % interval", *(f"{cell.low:.2g} .. {cell.high:.2g}" for cell in cells)],
        ["survived", *map(_survived, cells)],
        ["ratio", *(f"{cell.survived / cell.predicted:.2f}" for cell in cells)],
        ["paper", *(f"{cell.paper:.3g}" for cell in cells)],
    ]
    console.print(marked_table(columns))
    for line in marked_reasons(marks):
        console.print(line, markup=False)
    if normalised:
        console.print(_NORMALISED, markup=False)
    console.print(
        "survived: the largest rate at which training from here does not diverge within "
        f"{cells[0].steps} steps, to a factor 1.2 (>= where none diverged); the record is in "
        f"{folder}",
        markup=False,
    )


def _survived(cell: SweepCell) -> str:
    return f"{'>= ' if math.isinf(cell.diverged) else ''}{cell.survived:.3g}"
