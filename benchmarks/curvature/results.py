"""Raw rows in ``results/curvature/<part>.jsonl``, tables in ``<part>.md``."""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "results" / "curvature"
PACKAGES = ("torch", "curvlinops-for-pytorch", "hessian-eigenthings", "pyhessian")

Row = dict[str, Any]


def environment(device: str) -> str:
    """Hardware, threads and versions in one line."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else processor()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return ", ".join([hardware, threads, *versions, date.today().isoformat()])


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read(part: str, device: str) -> list[Row]:
    path = place(part, device, "jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def place(part: str, device: str, ending: str) -> Path:
    kind = device.split(":")[0]
    return FOLDER / (f"{part}.{ending}" if kind == "cpu" else f"{part}.{kind}.{ending}")


def store(part: str, rows: Sequence[Row], key: Sequence[str], device: str) -> list[Row]:
    """Put ``rows`` in the place of those with the same ``key``; returns all."""
    rows = [{**row, "environment": environment(device)} for row in rows]
    new = {tuple(row[k] for k in key) for row in rows}
    kept = [row for row in read(part, device) if tuple(row[k] for k in key) not in new]
    FOLDER.mkdir(parents=True, exist_ok=True)
    everything = [*kept, *rows]
    text = "".join(json.dumps(row) + "\n" for row in everything)
    place(part, device, "jsonl").write_text(text)
    return everything


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    cells = [list(header), ["---"] * len(header), *[[str(cell) for cell in line] for line in lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def publish(
    part: str, rows: Sequence[Row], title: str, render: Callable[[Sequence[Row]], str], device: str
) -> None:
    """Write and print the table of all rows, with the environments they were taken in."""
    places = sorted({row["environment"] for row in rows})
    text = f"# {title}\n\n{render(rows)}\n\n" + "\n".join(f"Taken on: {p}." for p in places) + "\n"
    place(part, device, "md").write_text(text)
    print(text, flush=True)
