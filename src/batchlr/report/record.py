"""What a run has left in its folder, read and checked."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlr.curvature_report import CurvatureReport
from batchlr.lr_bound import LRBound
from batchlr.slq import SpectralMeasure
from batchlr.training.checkpoint import latest_checkpoint, load_checkpoint
from batchlr.training.data import DataError

Entry = dict[str, Any]  # one object of JSON

# Numbers: of each line of metrics.jsonl, of those after a measurement, and of the other files.
_STEP = ["step", "epoch", "lr", "momentum", "batch_size"]
_MEASURED = ["loss", "largest_eigenvalue", "max_lr", "max_lr_low", "max_lr_high", "peak_lr"]
_MEASURED += ["products", "measurement_seconds"]
_SUMMARY = ["steps", "epochs", "wall_seconds", "curvature_seconds", "curvature_products"]
_RESULTS = ["test_accuracy", "test_loss", "train_loss", "final_lr", "peak_lr"]
_BOUND = ["value", "low", "high", "exponent"]
_RATES = ["critical_batch_size", "largest_eigenvalue", "largest_eigenvalue_stderr"]
_SPECTRUM = ["largest_eigenvalue", "smallest_eigenvalue", "num_products"]
_CELL = ["batch_size", "predicted", "low", "high", "survived", "paper", "steps"]


@dataclass(frozen=True)
class RunRecord:
    """The files of one folder; what is not there is None or empty."""

    folder: Path
    config: Entry | None  # config.yaml
    config_text: str
    environment: Entry | None  # env.json
    summary: Entry | None  # summary.json, unless the run went on after it
    progress: Entry | None  # of the newest checkpoint, where there is no summary
    entries: Sequence[Entry]  # metrics.jsonl
    rates: Entry | None  # curvature/rates.json
    bounds: Sequence[LRBound]  # of it
    report: CurvatureReport | None  # curvature/report.json
    spectrum: Entry | None  # curvature/spectrum.json
    measure: SpectralMeasure | None  # curvature/spectrum.npz
    grid: Sequence[Entry]  # curvature/spectra.jsonl
    sweep: Sequence[Entry]  # curvature/sweep.jsonl

    @property
    def measured(self) -> list[Entry]:
        """The lines of ``entries`` that follow a measurement."""
        return [entry for entry in self.entries if "largest_eigenvalue" in entry]

    @property
    def curvature(self) -> Entry:
        """What ``batchlr lr`` found, by name: of ``report``, and over it of ``rates``."""
        report = self.report
        found: Entry = {}
        if report is not None:
            found = {
                "largest_eigenvalue": float(report.largest),
                "largest_eigenvalue_stderr": report.largest.stderr,
                "smallest_eigenvalue": float(report.smallest),
                "critical_batch_size": report.critical_batch_size,
                "loss": report.loss,
                "num_params": report.num_params,
                "num_samples": report.num_samples,
                "dataset_size": report.dataset_size,
                "num_products": report.num_products,
                "seconds": report.seconds,
                "norm_mode": report.norm_mode,
            }
        return found | (self.rates or {})

    def setting(self, key: str) -> Any:
        """The configuration's value of a dotted ``key``; None where it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_record(folder: Path) -> RunRecord:
    """Everything that ``batchlr train``, ``lr``, ``spectrum`` or ``sweep`` left in ``folder``.

    A last line of a ``.jsonl`` that a kill has torn is left out.

    Raises:
        DataError: the folder is missing, holds nothing of these, or a file of it is corrupt.
        CheckpointError: the run is not finished, and its newest checkpoint is corrupt.
    """
    if not folder.is_dir():
        msg = f"{folder} is not a folder; give that of a run, such as runs/digits_vgg"
        raise DataError(msg)
    curvature = folder / "curvature"
    entries = _metrics(folder / "metrics.jsonl")
    summary = _object(folder / "summary.json", required=_SUMMARY, numbers=_RESULTS)
    if summary is not None:
        _listed(folder / "summary.json", summary, "events", ("step",))
    if summary is not None and entries and entries[-1]["step"] >= summary["steps"]:
        summary = None
    rates = _object(curvature / "rates.json", numbers=_RATES)
    spectrum = _object(curvature / "spectrum.json", numbers=_SPECTRUM)
    config_text, config = _config(folder / "config.yaml")
    record = RunRecord(
        folder=folder,
        config=config,
        config_text=config_text,
        environment=_object(folder / "env.json"),
        summary=summary,
        progress=_progress(folder / "checkpoints") if summary is None else None,
        entries=entries,
        rates=rates,
        bounds=() if rates is None else _bounds(curvature / "rates.json", rates),
        report=_curvature_report(curvature / "report.json"),
        spectrum=spectrum,
        measure=None if spectrum is None else _measure(curvature / "spectrum.npz", spectrum),
        grid=_lines(curvature / "spectra.jsonl", required=("epoch", "batch_size", "largest")),
        sweep=_sweep(curvature / "sweep.jsonl"),
    )
    content = (summary, entries, record.rates, record.report, spectrum, record.grid, record.sweep)
    if not any(content):
        msg = (
            f"{folder} has nothing to report: neither metrics.jsonl with a step, nor summary.json, "
            "nor a measurement in curvature/; give the folder (--out, or runs/NAME) of batchlr "
            "train, lr, spectrum or sweep"
        )
        raise DataError(msg)
    return record


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _corrupt(path, f"it is no text ({error})") from error


def _object(
    path: Path, *, required: Iterable[str] = (), numbers: Iterable[str] = ()
) -> Entry | None:
    text = _text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _corrupt(path, f"it is not JSON ({error})") from error
    return _checked(path, content, required, numbers)


def _lines(path: Path, *, required: Iterable[str], numbers: Iterable[str] = ()) -> list[Entry]:
    text = _text(path)
    entries: list[Entry] = []
    lines = [] if text is None else text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise _corrupt(path, f"line {number} is not JSON ({error})") from error
        entries.append(_checked(path, content, required, numbers, f"line {number}"))
    return entries


def _metrics(path: Path) -> list[Entry]:
    entries = _lines(path, required=_STEP, numbers=_MEASURED)
    for entry in entries:
        _check_reasons(path, entry.get("reasons") or [])
        ends = [entry.get(key) for key in ("max_lr_low", "max_lr", "max_lr_high")]
        if None not in ends and ends != sorted(map(_float, ends)):
            low, rate, high = ends
            raise _corrupt(path, f"max_lr {rate} must lie in its interval, [{low}, {high}]")
    return [{"loss": None} | entry for entry in entries]


def _checked(
    path: Path,
    content: Any,
    required: Iterable[str],
    numbers: Iterable[str],
    where: str = "it",
) -> Entry:
    """``content``, an object: ``required`` are numbers, ``numbers`` may be null or missing."""
    if not isinstance(content, dict):
        raise _corrupt(path, f"{where} must be an object of JSON, got {content!r}")
    for key in required:
        if not _is_number(content.get(key)):
            raise _corrupt(path, f"{where} must have a number {key}, got {content.get(key)!r}")
    for key in numbers:
        if content.get(key) is not None and not _is_number(content[key]):
            raise _corrupt(path, f"{where} must have a number or null {key}, got {content[key]!r}")
    return content


def _listed(
    path: Path, content: Entry, key: str, required: Iterable[str], numbers: Iterable[str] = ()
) -> list[Entry]:
    """The objects in the list ``content[key]``; none where there is no list."""
    found = content.get(key)
    if not isinstance(found, list | None):
        raise _corrupt(path, f"{key} must be a list, got {found!r}")
    return [_checked(path, one, required, numbers, f"one of {key}") for one in found or ()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _config(path: Path) -> tuple[str, Entry | None]:
    import yaml

    text = _text(path)
    if text is None:
        return "", None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _corrupt(path, f"it is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise _corrupt(path, f"it must be a mapping of keys, got {content!r}")
    return text, content


def _progress(checkpoints: Path) -> Entry | None:
    newest = latest_checkpoint(checkpoints)
    if newest is None:
        return None
    progress = load_checkpoint(newest).get("progress")
    return _checked(newest, progress, ("step", "epoch", "wall_seconds"), ())


def _bounds(path: Path, rates: Entry) -> list[LRBound]:
    bounds = []
    for entry in _listed(path, rates, "bounds", ("batch_size", "momentum"), _BOUND):
        ends = {key: _float(entry.get(key)) for key in _BOUND}
        try:
            bounds.append(LRBound(**entry | ends | {"reasons": tuple(entry["reasons"])}))
        except (KeyError, TypeError) as error:
            raise _corrupt(path, f"one of bounds is none ({error})") from error
    return bounds


def _curvature_report(path: Path) -> CurvatureReport | None:
    if not path.exists():
        return None
    try:
        return CurvatureReport.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise _corrupt(path, str(error)) from error


def _sweep(path: Path) -> list[Entry]:
    cells = _lines(path, required=_CELL)
    for cell in cells:
        if cell.get("optimizer") not in ("sgd", "adam"):
            raise _corrupt(path, f"optimizer must be sgd or adam, got {cell.get('optimizer')!r}")
        _check_reasons(path, cell.get("reasons"))
    return cells


def _check_reasons(path: Path, reasons: Any) -> None:
    if not isinstance(reasons, list) or not all(isinstance(one, str) for one in reasons):
        raise _corrupt(path, f"reasons must be a list of sentences, got {reasons!r}")


def _measure(path: Path, spectrum: Entry) -> SpectralMeasure:
    import numpy as np
    import torch

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            nodes, weights, probes = (
                torch.from_numpy(arrays[key]) for key in ("nodes", "weights", "probes")
            )
            return SpectralMeasure(nodes, weights, probes, int(spectrum.get("num_products") or 0))
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise _corrupt(path, f"it holds no spectrum ({error})") from error


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _corrupt(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: {problem}; remove the file, or write it anew")
