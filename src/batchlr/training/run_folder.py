"""Whose a run's folder is, and under which settings and where its files were made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchlr.training.config import TrainConfig, dump_config
from batchlr.training.environment import describe_environment
from batchlr.training.metrics import write_json


def write_settings(
    config: TrainConfig, out: Path, notes: Sequence[str] = (), **environment: Any
) -> None:
    """Write ``config.yaml``, in full, and ``env.json`` into ``out``, which is made if need be.

    Args:
        config: ``load_config`` makes an equal one of the file.
        out: folder of the run.
        notes: of `LoadedConfig`, what the user was told; part of ``env.json``.
        environment: what else belongs there, ready for JSON.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    content = describe_environment() | environment | {"notes": list(notes)}
    write_json(out / "env.json", content)


def write_measured(
    config: TrainConfig,
    out: Path,
    notes: Sequence[str] = (),
    *,
    at: Path | Sequence[Path] | None = None,
) -> None:
    """`write_settings` of a measurement, unless ``out`` is of somebody else (`is_taken`).

    A training run that is measured afterwards stays under the settings it was trained with. Of
    several measurements in one folder, the settings are those of the last.

    Args:
        config: as of `write_settings`.
        out: likewise.
        notes: likewise.
        at: the checkpoints measured at; none are the initial weights.
    """
    if is_taken(out):
        return
    paths = [at] if isinstance(at, Path) else at or ()
    write_settings(config, out, notes, checkpoints=[str(path) for path in paths])


def is_taken(out: Path) -> bool:
    """Whether ``out`` has a ``config.yaml`` that is not a measurement's: a run's, or the user's."""
    trained = any((out / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    return (out / "config.yaml").exists() and (trained or not (out / "env.json").exists())
