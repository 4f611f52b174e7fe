"""The page: a record, put into words, tables and pictures, and those into HTML."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchlr.report.pictures import pictures
from batchlr.report.record import Entry, RunRecord, read_record
from batchlr.report.verdict import verdict

_RESULTS = {
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "train_loss": "training loss of the last epoch",
    "steps": "steps",
    "epochs": "epochs",
    "final_lr": "rate of the last step",
    "peak_lr": "peak rate at the end",
    "wall_seconds": "seconds",
    "curvature_seconds": "seconds spent measuring",
    "curvature_products": "products spent measuring",
}
_CURVATURE = {
    "largest_eigenvalue": "largest eigenvalue",
    "largest_eigenvalue_stderr": "its standard error",
    "smallest_eigenvalue": "smallest eigenvalue",
    "critical_batch_size": "critical batch size",
    "loss": "loss there",
    "num_params": "parameters",
    "num_samples": "samples measured",
    "dataset_size": "samples in all",
    "num_products": "products",
    "gradient_equivalents": "cost, in gradients of the samples measured",
    "seconds": "seconds",
    "norm_mode": "batch normalisation",
}
_SPECTRUM = {
    "matrix": "matrix",
    "largest_eigenvalue": "largest eigenvalue",
    "smallest_eigenvalue": "smallest eigenvalue",
    "mean": "mean of all",
    "mean_stderr": "its standard error",
    "second_moment": "mean square of all",
    "num_params": "parameters",
    "num_samples": "samples measured",
    "num_probes": "random start vectors",
    "num_products": "products",
    "seconds": "seconds",
    "norm_mode": "batch normalisation",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; ``heads`` is empty where each row is a name and its value."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write what a run has left in ``folder`` as one HTML file; returns its path.

    The file names nothing outside it, and needs no script. Nothing is measured; takes a second or
    two.

    Args:
        folder: of ``batchlr train``, ``lr``, ``spectrum`` or ``sweep``; the run may be unfinished.
        out: the file; by default ``folder / "report.html"``.

    Raises:
        DataError: the folder is missing, holds nothing of a run, or a file of it is corrupt.
        CheckpointError: the run is not finished, and its newest checkpoint is corrupt.
        ValueError: ``out`` is a folder.
    """
    path = folder / "report.html" if out is None else out
    if path.is_dir():
        msg = f"out must be a file, {path} is a folder; give {path / 'report.html'}"
        raise ValueError(msg)
    page = render(read_record(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def render(record: RunRecord) -> str:
    """The page of ``record``; all text is escaped, but the pictures', which matplotlib escapes."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = files("batchlr.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = [(picture.caption, Markup(picture.svg)) for picture in pictures(record)]
    return environment.from_string(source).render(
        name=record.setting("name") or record.folder.resolve().name,
        folder=str(record.folder),
        verdict=verdict(record),
        tables=_tables(record),
        pictures=drawn,
        commands=_commands(record),
        config=record.config_text,
    )


def _tables(record: RunRecord) -> list[Table]:
    """All but the empty ones."""
    tables = [
        Table("Result", (), _named(record.summary, _RESULTS)),
        _measurements(record),
        Table("Curvature", (), _named(record.curvature, _CURVATURE)),
        _bounds(record),
        Table("Spectrum", (), _named(record.spectrum, _SPECTRUM)),
        _sweep(record),
        Table("Environment", (), _environment(record.environment or {})),
    ]
    return [table for table in tables if table.rows]


def _named(content: Entry | None, names: dict[str, str]) -> list[tuple[str, str]]:
    found = content or {}
    return [(words, _shown(found[key])) for key, words in names.items() if key in found]


def _measurements(record: RunRecord) -> Table:
    heads = (
        "step", "epoch", "batch", "loss", "largest eigenvalue", "largest stable rate",
        "90 % interval", "limited by", "rate", "peak", "products", "seconds", "remark",
    )  # fmt: skip
    keys = ("step", "epoch", "batch_size", "loss", "largest_eigenvalue", "max_lr")
    rows = [
        (
            *(_shown(entry.get(key)) for key in keys),
            _interval(entry.get("max_lr_low"), entry.get("max_lr_high")),
            *(_shown(entry.get(key)) for key in ("regime", "lr", "peak_lr", "products")),
            _shown(entry.get("measurement_seconds"), digits=2),
            str(entry.get("failure") or "; ".join(entry.get("reasons") or ())),
        )
        for entry in record.measured
    ]
    return Table("Measurements while training", heads, rows)


def _bounds(record: RunRecord) -> Table:
    heads = (
        "optimizer", "momentum", "batch", "reliable", "largest stable rate", "90 % interval",
        "exponent", "limited by", "not reliable, because",
    )  # fmt: skip
    rows = [
        (
            bound.optimizer,
            _shown(bound.momentum),
            _shown(bound.batch_size),
            _yes(bound.reliable),
            _shown(bound.value),
            _interval(bound.low, bound.high),
            _shown(bound.exponent, digits=2),
            bound.regime,
            "; ".join(map(str, bound.reasons)),
        )
        for bound in record.bounds
    ]
    return Table("Rates by batch size", heads, rows)


def _sweep(record: RunRecord) -> Table:
    heads = (
        "optimizer", "batch", "reliable", "predicted", "90 % interval", "survived",
        "the paper's rule", "not reliable, because",
    )  # fmt: skip
    rows = [
        (
            cell["optimizer"],
            _shown(cell["batch_size"]),
            _yes(not cell["reasons"]),
            _shown(cell["predicted"]),
            _interval(cell["low"], cell["high"]),
            _shown(cell["survived"]),
            _shown(cell["paper"]),
            "; ".join(cell["reasons"]),
        )
        for cell in record.sweep
    ]
    return Table("Predicted and survived rates", heads, rows)


def _environment(content: Entry) -> list[tuple[str, str]]:
    rows = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += [(str(inner), _shown(version)) for inner, version in value.items()]
        else:
            shown = "; ".join(map(str, value)) if isinstance(value, list) else _shown(value)
            rows.append((key, shown))
    return rows


def _commands(record: RunRecord) -> list[str]:
    """What makes the same again; CONFIG where the folder does not say of what."""
    folder = record.folder
    again = shlex.quote(f"{folder}-again")
    kept = "CONFIG.yaml" if record.config is None else shlex.quote(str(folder / "config.yaml"))
    commands = []
    if record.entries or record.summary:
        fresh = "" if record.setting("resume") in (None, False) else " resume=false"
        several = record.setting("dist.strategy") in ("ddp", "fsdp")
        program = "torchrun --nproc-per-node N -m batchlr" if several else "batchlr"
        commands.append(f"{program} train {kept} --out {again}{fresh}")
    trained = bool(commands)  # then the settings are those of the training
    measured = {  # each with its options
        "lr": "" if record.rates is not None or record.report is not None else None,
        "spectrum": "" if record.spectrum is not None or record.grid else None,
        "sweep": _swept(record.sweep) if record.sweep else None,
    }
    given = "CONFIG.yaml" if trained else kept
    found = [] if trained else (record.environment or {}).get("checkpoints") or []
    at = "".join(f" --checkpoint {shlex.quote(str(path))}" for path in found)
    commands += [
        f"batchlr {name} {given} --out {again}{at}{options}"
        for name, options in measured.items()
        if options is not None
    ]
    return commands


def _swept(cells: Sequence[Entry]) -> str:
    """The options of ``batchlr sweep`` that ask for ``cells``."""
    sizes, optimizers = (
        ",".join(dict.fromkeys(str(cell[key]) for cell in cells))
        for key in ("batch_size", "optimizer")
    )
    return f" --batch-sizes {sizes} --optimizers {optimizers} --steps {cells[-1]['steps']}"


def _interval(low: float | None, high: float | None) -> str:
    return f"{_shown(low, digits=3)} to {_shown(high, digits=3)}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _shown(value: Any, *, digits: int = 4) -> str:
    """A number with ``digits`` digits, a whole one in full, nothing as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return str(value)
