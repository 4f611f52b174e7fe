"""How a run starts: anew in a folder of its own, or from a checkpoint of the same run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from batchlr.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from batchlr.training.config import TrainConfig
from batchlr.training.config.variants import VARIANTS
from batchlr.training.experiment import Experiment
from batchlr.training.run_folder import is_taken, write_settings

# What may differ between an interrupted run and its continuation: sections and single keys.
_FREE_SECTIONS = ("log.", "checkpoint.", "dist.", "spectrum.")
_FREE_KEYS = (
    "name",
    "resume",
    "data.root",
    "data.path",
    "data.download",
    "data.workers",
    "train.max_steps",
    "train.device",
)


@dataclass
class Progress:
    """How far a run has come, and what it has cost."""

    step: int = 0  # optimizer steps made
    epoch: int = 0  # the one being made
    samples: int = 0  # of that epoch, trained with so far
    trained: int = 0  # samples of all steps
    loss_sum: float = 0.0  # over the batches of the epoch so far
    counted: int = 0  # of them, whose losses are in the sum
    first_loss: float | None = None
    undone: int = 0  # steps before this one are not judged by their losses: some were undone
    # what the controller did about losses: "step" after which, and "event" (`safeguard.EVENTS`)
    events: list[dict[str, int | str]] = field(default_factory=list)
    last_lr: float = math.nan  # of the last step made
    wall_seconds: float = 0.0
    result: dict[str, float] = field(default_factory=dict)  # of the last evaluation

    @property
    def mean_loss(self) -> float:
        """Over the batches of the epoch so far; NaN if there are none."""
        return self.loss_sum / self.counted if self.counted else math.nan

    def advance(self, samples: int, *, lr: float) -> None:
        """Count a step made with a batch of ``samples`` at the rate ``lr``."""
        self.step += 1
        self.samples += samples
        self.trained += samples
        self.last_lr = lr

    def close_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.samples = self.epoch + 1, 0
        self.loss_sum, self.counted = 0.0, 0


def start_run(experiment: Experiment, out: Path, notes: Sequence[str]) -> Progress:
    """Prepare the folder and, if asked, take up the checkpoint; all processes read the same.

    An earlier run in ``out`` is moved aside, unless it is the one resumed.

    Raises:
        CheckpointError: the checkpoint to resume is missing or corrupt.
        ValueError: the run to resume was configured otherwise, or the folder cannot be moved.
    """
    config, group, device = experiment.config, experiment.processes, experiment.device
    # No process may still be looking for a checkpoint when the first one changes the folder.
    source, progress, state = group.together(partial(_start, config, out), device)
    if state is not None:
        experiment.load_state_dict(state)

    def prepare() -> None:
        if not group.is_first:
            return
        if source is None or source.resolve().parent != (out / "checkpoints").resolve():
            _move_aside(out)
        write_settings(config, out, notes)

    group.together(prepare, device)
    return progress


def _start(config: TrainConfig, out: Path) -> tuple[Path | None, Progress, dict[str, Any] | None]:
    """The checkpoint to start from, how far it is, and the experiment's state in it."""
    source = _source(config, out)
    return (None, Progress(), None) if source is None else (source, *_read(config, source))


def _source(config: TrainConfig, out: Path) -> Path | None:
    """The checkpoint to start from; None starts anew."""
    if config.resume is False:
        return None
    if config.resume == "auto":
        return latest_checkpoint(out / "checkpoints")
    path = Path(config.resume)
    if path.is_dir():
        found = latest_checkpoint(path)
        if found is None:
            msg = f"resume: no checkpoint in {path}; give the path of one, or resume=auto"
            raise CheckpointError(msg)
        return found
    return path


def _read(config: TrainConfig, source: Path) -> tuple[Progress, dict[str, Any]]:
    state = load_checkpoint(source)
    try:
        saved = state["config"]
        progress = Progress(**_in_samples(state["progress"], saved["batch"]["global_size"]))
        experiment: dict[str, Any] = state["experiment"]
    except (KeyError, TypeError) as error:
        msg = f"{source} is not a checkpoint of a run: {error!r}"
        raise CheckpointError(msg) from error
    _check_same_run(saved, config, source)
    return progress, experiment


def _in_samples(progress: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """``progress`` as it is kept today; older versions counted batches, all of one size."""
    if "batch" not in progress:
        return progress
    kept = {key: value for key, value in progress.items() if key != "batch"}
    counts = {"samples": progress["batch"] * batch_size, "trained": progress["step"] * batch_size}
    return kept | counts


def _check_same_run(saved: dict[str, Any], config: TrainConfig, source: Path) -> None:
    """Raise ValueError, naming what differs, unless the run may go on as configured now."""
    old, new = flat(saved), flat(config.model_dump(mode="json"))
    # Keys that an older version did not know did what is now their default.
    plain = TrainConfig().model_dump(mode="json", exclude=set(VARIANTS))
    old = {key: value for key, value in flat(plain).items() if key in new} | old
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in _FREE_KEYS
        and not key.startswith(_FREE_SECTIONS)
    ]
    if changed:
        listed = "\n  ".join(changed)
        msg = (
            f"{source} belongs to a run configured otherwise:\n  {listed}\n"
            "go on with the same configuration, or start anew with resume=false"
        )
        raise ValueError(msg)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def _move_aside(out: Path) -> None:
    """Keep an earlier run: ``runs/demo`` becomes ``runs/demo-1``. Measurements alone stay."""
    if not is_taken(out):
        return
    if out.resolve() == Path.cwd():
        msg = (
            f"{out.resolve()} has a config.yaml, so it holds an earlier run, and as the present "
            "folder it cannot be moved aside: choose another --out"
        )
        raise ValueError(msg)
    number = 1
    while (other := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(other)
