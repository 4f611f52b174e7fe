"""The numbers of a run, a JSON object a line."""

import json
import math
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor


@final
class MetricsLog:
    """Appends to ``metrics.jsonl``; a loss stays on its device until `flush`, once per many steps.

    Args:
        path: the file; lines from ``first_step`` on are dropped, so that a resumed run writes each
            step once.
        first_step: the step that will be written next.
        enabled: False writes nothing (every process but the first).
    """

    def __init__(self, path: Path, *, first_step: int, enabled: bool = True) -> None:
        self._path = path
        self._enabled = enabled
        self._pending: list[tuple[dict[str, Any] | None, Tensor]] = []
        if enabled:
            kept = [line for line in read_metrics(path) if line["step"] < first_step]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")

    def add(self, entry: dict[str, Any], loss: Tensor, *, write: bool = True) -> None:
        """Keep a line whose ``loss`` ``()`` is not yet known on the host, to be written or not."""
        self._pending.append((entry if write else None, loss))

    def flush(self) -> list[float]:
        """Write what is pending, in one synchronisation; returns all their losses."""
        if not self._pending:
            return []
        losses: list[float] = torch.stack([loss for _, loss in self._pending]).tolist()
        if self._enabled:
            with self._path.open("a", encoding="utf-8") as file:
                for (entry, _), loss in zip(self._pending, losses, strict=True):
                    if entry is not None:
                        file.write(_line(_with_loss(entry, loss)))
        self._pending.clear()
        return losses

    def __len__(self) -> int:
        return len(self._pending)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; none if there is no file. A last, torn line is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Strict JSON: numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_strict(content), indent=2, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def append_json(path: Path, entry: dict[str, Any]) -> None:
    """Add a line to a file that `read_metrics` reads, in place of a last, torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_line(entry).encode())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(_strict(entry), allow_nan=False) + "\n"


def _with_loss(entry: dict[str, Any], loss: float) -> dict[str, Any]:
    head = {key: entry[key] for key in ("step", "epoch")}
    return head | {"loss": loss} | entry


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
