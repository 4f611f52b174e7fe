"""Checkpoints that survive a kill at any moment and are verified before they are used.

A folder holds files ``step-00000100.pt`` and a ``manifest.json`` that lists the complete ones,
oldest first, each with its SHA-256, and names the ``last``. The manifest is written after the file
and replaced in one go, so whatever it lists is whole.
"""

import hashlib
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from batchlr.argument_ranges import require_count

MANIFEST = "manifest.json"
_FORMAT = 1
_PLAIN = (bool, int, float, str, bytes, type(None))
_TENSORS = (torch.Tensor, torch.nn.Parameter)


class CheckpointError(Exception):
    """A checkpoint is missing, unlisted or corrupt; the message says which, and the way out."""


@dataclass(frozen=True)
class _Entry:
    file: str
    step: int
    sha256: str


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """The file that now holds ``state``; of all checkpoints, the ``keep`` newest stay.

    Args:
        folder: Folder of the run's checkpoints, made if need be.
        step: Number of updates done.
        state: Tensors, numbers, text, bytes and None, in dictionaries, lists and tuples.
        keep: At least 1.

    Raises:
        TypeError: ``state`` holds something else; the message names the key.
        ValueError: ``keep`` is below 1.
        CheckpointError: The manifest in ``folder`` is damaged.
    """
    require_count(keep=keep)
    _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("step-*.pt.tmp"):  # left by a kill
        unfinished.unlink()
    entries = _read_manifest(folder)
    path = _free_path(folder, step)
    _replace(path, lambda file: torch.save(dict(state), file))
    entries.append(_Entry(path.name, step, _sha256(path)))
    _write_manifest(folder, entries[-keep:])
    for entry in entries[:-keep]:
        (folder / entry.file).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved in a file, or in the newest checkpoint of a folder; tensors on the CPU.

    Raises:
        CheckpointError: It is missing, not listed in the manifest beside it, or not what was
            written. Nothing falls back by itself; the message names the newest good checkpoint
            before it.
    """
    if path.is_dir():
        newest = latest_checkpoint(path)
        if newest is None:
            msg = f"no checkpoint in {path}"
            raise CheckpointError(msg)
        path = newest
    entries = _read_manifest(path.parent)
    names = [entry.file for entry in entries]
    index = names.index(path.name) if path.name in names else len(names)
    problem = _damage(path, entries[index].sha256 if index < len(names) else None)
    if problem:
        raise CheckpointError(problem + _way_out(path.parent, entries[:index]))
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"checkpoint {path} holds more than tensors and plain values; it is not ours"
        raise CheckpointError(msg) from error
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint completed last in ``folder``; None when none ever was.

    Raises:
        CheckpointError: The manifest is damaged, or gone while checkpoints are there.
    """
    entries = _read_manifest(folder)
    if entries:
        return folder / entries[-1].file
    stray = sorted(folder.glob("step-*.pt"))
    if stray:
        msg = f"{folder} has {stray[-1].name} but no {MANIFEST}; remove the folder to start anew"
        raise CheckpointError(msg)
    return None


def listed_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints in ``folder``, oldest first.

    Raises:
        CheckpointError: The manifest is damaged, or there is no checkpoint.
    """
    entries = _read_manifest(folder)
    if not entries:
        msg = f"no checkpoint in {folder}"
        raise CheckpointError(msg)
    return [folder / entry.file for entry in entries]


def checkpoint_digest(path: Path) -> str:
    """SHA-256 of the file at ``path`` as its manifest has it; nothing is read but the manifest.

    Raises:
        CheckpointError: The manifest is damaged or does not list the file.
    """
    for entry in _read_manifest(path.parent):
        if entry.file == path.name:
            return entry.sha256
    msg = _damage(path, None)
    raise CheckpointError(msg)


def _check_plain(value: Any, where: str) -> None:
    """Exact types only: what ``weights_only`` loading accepts, without surprises on the way."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                msg = f"{where} has the key {key!r}: keys of a checkpoint are text or integers"
                raise TypeError(msg)
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (*_PLAIN, *_TENSORS):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        msg = f"{where} is a {kind}: a checkpoint holds tensors, numbers, text, bytes and None"
        raise TypeError(msg)


def _free_path(folder: Path, step: int) -> Path:
    """A name not in use: a listed file is never overwritten, so it stays whole until replaced."""
    path, copy = folder / f"step-{step:08d}.pt", 2
    while path.exists():
        path, copy = folder / f"step-{step:08d}-{copy}.pt", copy + 1
    return path


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes beside ``path``, then moves there in one go: readers see old or new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> list[_Entry]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        return [_Entry(**entry) for entry in manifest["checkpoints"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is damaged ({error!r}); restore it, or remove {folder} to start anew"
        raise CheckpointError(msg) from error


def _write_manifest(folder: Path, entries: list[_Entry]) -> None:
    checkpoints = [asdict(entry) for entry in entries]
    manifest = {"format": _FORMAT, "last": entries[-1].file, "checkpoints": checkpoints}
    text = json.dumps(manifest, indent=2) + "\n"
    _replace(folder / MANIFEST, lambda file: file.write(text.encode()))


def _damage(path: Path, expected: str | None) -> str | None:
    """What is wrong with the file at ``path``; None when it is what was written."""
    if not path.is_file():
        return f"checkpoint {path} does not exist"
    if expected is None:
        return f"checkpoint {path} cannot be verified: no {MANIFEST} beside it lists it"
    actual = _sha256(path)
    if actual != expected:
        return f"checkpoint {path} is corrupt: SHA-256 is {actual}, expected {expected}"
    return None


def _way_out(folder: Path, earlier: list[_Entry]) -> str:
    for entry in reversed(earlier):
        path = folder / entry.file
        if _damage(path, entry.sha256) is None:
            return f"; the newest good checkpoint before it is {path} (step {entry.step})"
    return "; no good checkpoint lies before it"
