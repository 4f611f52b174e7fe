"""Frozen dataclasses of numbers and arrays as files (JSON beside NPZ, no pickle) or states."""

import json
import types
import typing
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from batchlr.measured import Measured

_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)

T = TypeVar("T")


def save_dataclass(value: Any, path: str | Path, *, version: int) -> None:
    """Write ``path`` (JSON) and the arrays in ``value`` (``.npz``) beside it.

    Standard errors of `Measured` numbers go under ``standard_errors``, by the path of the dataclass
    that holds them. The suffix ``.json`` is added if missing.
    """
    path = _json_path(path)
    arrays: dict[str, Any] = {}
    errors: dict[str, dict[str, float]] = {}
    content = _plain(value, "", arrays, errors)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **arrays)
    content |= {"format": version, "standard_errors": errors}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_dataclass(kind: type[T], path: str | Path, *, version: int) -> T:
    """Read what `save_dataclass` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: they do not hold a ``kind`` of this version.
    """
    path = _json_path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != version:
            msg = "another format version"
            raise KeyError(msg)
        errors = content.pop("standard_errors")
        file = path.with_suffix(".npz").open("rb")
        with file, np.load(file, allow_pickle=False) as arrays:
            result: T = _build(kind, content, "", dict(arrays.items()), errors)
            return result
    except _UNREADABLE as error:
        msg = f"{path} is not a {kind.__name__} of format {version}: {error}"
        raise ValueError(msg) from error


def dataclass_state(value: Any) -> dict[str, Any]:
    """``value`` as primitives and tensors, for a ``state_dict``."""
    arrays: dict[str, Any] = {}
    errors: dict[str, dict[str, float]] = {}
    content = _plain(value, "", arrays, errors)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return {"content": content, "arrays": tensors, "standard_errors": errors}


def dataclass_from_state(kind: type[T], state: dict[str, Any]) -> T:
    """What `dataclass_state` took apart."""
    arrays = {name: tensor.numpy(force=True) for name, tensor in state["arrays"].items()}
    result: T = _build(kind, state["content"], "", arrays, state["standard_errors"])
    return result


def _plain(
    value: Any, name: str, arrays: dict[str, Any], errors: dict[str, dict[str, float]]
) -> Any:
    """``value`` in the types of JSON; arrays and standard errors are put aside by name."""
    if is_dataclass(value):
        content = {}
        for field in fields(value):
            part = getattr(value, field.name)
            where = f"{name}.{field.name}" if name else field.name
            if isinstance(part, np.ndarray):
                arrays[where] = part
                continue
            if isinstance(part, Measured):
                errors.setdefault(name, {})[field.name] = part.stderr
            content[field.name] = _plain(part, where, arrays, errors)
        return content
    if isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            if isinstance(part, Measured):
                errors.setdefault(name, {})[str(index)] = part.stderr
        return [_plain(part, name, arrays, errors) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    return float(value) if isinstance(value, float) else value


def _build(
    kind: Any, content: Any, name: str, arrays: dict[str, Any], errors: dict[str, dict[str, float]]
) -> Any:
    if content is None:
        return None
    if typing.get_origin(kind) is types.UnionType:
        kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
    if not is_dataclass(kind):
        if not isinstance(content, list):
            return content
        parts = tuple(content)
        for index, error in errors.get(name, {}).items():
            parts = (
                *parts[: int(index)],
                Measured(parts[int(index)], error),
                *parts[int(index) + 1 :],
            )
        return parts
    hints = typing.get_type_hints(kind)
    values = {}
    for field in fields(kind):
        where = f"{name}.{field.name}" if name else field.name
        if where in arrays:
            values[field.name] = arrays[where]
        elif hints[field.name] is Measured:
            values[field.name] = Measured(content[field.name], errors[name][field.name])
        else:
            values[field.name] = _build(
                hints[field.name], content[field.name], where, arrays, errors
            )
    if surplus := set(content) - set(values):
        msg = f"unknown entries {sorted(surplus)}"
        raise KeyError(msg)
    return kind(**values)  # type: ignore[operator]  # a dataclass


def _json_path(path: str | Path) -> Path:
    """``path`` with the suffix ``.json``; other dots in its name are part of it."""
    path = Path(path)
    return path if path.suffix == ".json" else path.with_name(path.name + ".json")
