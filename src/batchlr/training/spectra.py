"""The batch-spectrum grid: spectra of single random batches, over sizes, draws and checkpoints."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from batchlr.plotting import plot_batch_spectra, save_figure
from batchlr.slq import stochastic_lanczos_quadrature
from batchlr.training.analysis import (
    common_settings,
    curvature_operator,
    load_weights,
    save_measure,
)
from batchlr.training.checkpoint import listed_checkpoints
from batchlr.training.config import TrainConfig
from batchlr.training.data import batches_per_epoch, measurement_batches
from batchlr.training.experiment import Experiment, build_experiment
from batchlr.training.metrics import append_json, read_metrics
from batchlr.training.run_folder import write_measured


@dataclass(frozen=True)
class _Cell:
    """One batch at one point of training; ``setting`` stands for all else that matters."""

    setting: str
    batch_size: int
    draw: int

    @property
    def file(self) -> str:
        return f"spectra/{self.setting}-b{self.batch_size:05d}-d{self.draw:03d}.npz"


def measure_spectra(
    config: TrainConfig,
    *,
    out: Path,
    checkpoints: Sequence[Path] = (),
    notes: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Spectra of ``spectrum.draws`` random batches of each of ``spectrum.batch_sizes``.

    A cell costs ``probes * steps`` products of one batch, which is measured in one piece. Draw
    ``k`` seeds samples and start vectors with ``k``, so that it is the same at every checkpoint
    and a smaller batch is part of a larger one. Images are not augmented and dropout is off, as in
    the paper's public code.

    Below ``out / "curvature"``, ``spectra.jsonl`` gets a line for each finished cell,
    ``spectra/`` its nodes and weights, and ``spectra.png`` the largest eigenvalues. Cells that are
    there already, of the same weights and settings, are not measured again.

    Args:
        config: of the experiment.
        out: folder of the run.
        checkpoints: where to measure: files, and folders of which all are taken; none stands for
            the initial weights.
        notes: for the settings, which go into ``out`` (`write_measured`).

    Returns:
        The lines of the grid asked for, those of earlier calls included.

    Raises:
        CheckpointError: a checkpoint is missing, corrupt or of another model.
        ArithmeticError: the loss of a batch is not finite.
        ValueError: a batch is larger than the data set.
    """
    experiment = build_experiment(config)
    experiment.model.eval()  # dropout; the norms are the operator's
    for size in config.spectrum.batch_sizes:
        batches_per_epoch(experiment.data, batch_size=size)  # refuses one that is too large
    sources = _sources(checkpoints)
    write_measured(config, out, notes, at=checkpoints)
    record = out / "curvature" / "spectra.jsonl"
    finished = _finished(record)
    lines = []
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    for source in sources:
        cells = _cells(config, source)
        missing = [cell for cell in cells if cell not in finished]
        if missing:
            where = _go_to(experiment, source)
        for cell in missing:
            line = where | _measure(experiment, cell, record.parent)
            append_json(record, line)
            finished[cell] = line
            console.print(_words(line), markup=False)
        lines += [finished[cell] for cell in cells]
    save_figure(plot_batch_spectra(lines), record.parent / "spectra.png")
    console.print(f"{len(lines)} spectra; record in {record.parent}", markup=False)
    return lines


def _sources(checkpoints: Sequence[Path]) -> list[Path | None]:
    """Files for folders, each once; None stands for the initial weights."""
    files: dict[Path | None, None] = {}
    for path in checkpoints:
        files |= dict.fromkeys(listed_checkpoints(path) if path.is_dir() else [path])
    return list(files) or [None]


def _cells(config: TrainConfig, source: Path | None) -> list[_Cell]:
    options = config.spectrum
    content = common_settings(
        config,
        source,
        curvature={"norm_mode"},
        spectrum={"matrix", "steps", "probes"},
    )
    text = json.dumps(content, sort_keys=True)
    setting = hashlib.sha256(text.encode()).hexdigest()[:12]
    return [
        _Cell(setting, size, draw) for size in options.batch_sizes for draw in range(options.draws)
    ]


def _finished(record: Path) -> dict[_Cell, dict[str, Any]]:
    """The cells on record, with their files; a line torn by a kill is not."""
    finished = {}
    for line in read_metrics(record):
        cell = _Cell(line["setting"], line["batch_size"], line["draw"])
        if (record.parent / cell.file).is_file():
            finished[cell] = line
    return finished


def _go_to(experiment: Experiment, source: Path | None) -> dict[str, Any]:
    """Load the weights; returns what a line says about them."""
    if source is None:
        return {"checkpoint": None, "step": 0, "epoch": 0}
    progress = load_weights(experiment, source)["progress"]
    return {"checkpoint": str(source), "step": progress["step"], "epoch": progress["epoch"]}


def _measure(experiment: Experiment, cell: _Cell, folder: Path) -> dict[str, Any]:
    config = experiment.config
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(cell.draw)
    batches = measurement_batches(
        experiment.data,
        batch_size=cell.batch_size,
        num_batches=1,
        generator=generator,
        device=experiment.device,
    )
    batches = [(experiment.arranged(x), y) for x, y in batches]
    operator, source = curvature_operator(experiment, batches)
    loss = float(source.loss())
    if not math.isfinite(loss):
        msg = (
            f"the loss is {loss} on draw {cell.draw} of {cell.batch_size} samples; its curvature "
            "has no meaning there"
        )
        raise ArithmeticError(msg)
    measure = stochastic_lanczos_quadrature(
        operator,
        num_steps=min(config.spectrum.steps, operator.shape[0]),
        num_probes=config.spectrum.probes,
        generator=generator,
    )
    save_measure(folder / cell.file, measure)
    return {
        "batch_size": cell.batch_size,
        "draw": cell.draw,
        "matrix": config.spectrum.matrix,
        "largest": float(measure.nodes.max()),
        "smallest": float(measure.nodes.min()),
        "loss": loss,
        "norm_mode": source.norm_mode,
        "num_params": operator.shape[0],
        "num_products": operator.num_products,
        "seconds": time.perf_counter() - began,
        "file": cell.file,
        "setting": cell.setting,
    }


def _words(line: dict[str, Any]) -> str:
    return (
        f"epoch {line['epoch']}  batch {line['batch_size']}  draw {line['draw']}  eigenvalues from "
        f"{line['smallest']:.4g} to {line['largest']:.4g}  {line['seconds']:.1f} s"
    )
