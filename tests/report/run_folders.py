"""Folders as the commands leave them, written by hand, with what a test wants in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIG = {
    "name": "tiny",
    "optim": {"name": "sgd", "lr": "auto"},
    "schedule": {"name": "cosine"},
    "curvature": {"policy": "edge"},
    "train": {"epochs": 3},
    "resume": False,
}
SUMMARY = {
    "test_accuracy": 0.875,
    "test_loss": 0.5,
    "train_loss": 0.25,
    "steps": 6,
    "epochs": 3,
    "wall_seconds": 10.0,
    "curvature_seconds": 2.5,
    "curvature_products": 40,
    "final_lr": 0.001,
    "peak_lr": 0.2,
    "diverged": False,
    "failure": None,
    "events": [],
}
BOUND = {
    "value": 0.5,
    "low": 0.25,
    "high": 1.0,
    "exponent": 0.75,
    "regime": "noise",
    "reliable": True,
    "reasons": [],
    "batch_size": 16,
    "optimizer": "sgd",
    "momentum": 0.9,
    "rule": "mean-square",
}
RATES = {"largest_eigenvalue": 4.0, "critical_batch_size": 32.0, "bounds": [BOUND]}
SPECTRUM = {
    "matrix": "hessian",
    "largest_eigenvalue": 4.0,
    "smallest_eigenvalue": -1.0,
    "converged": True,
    "num_params": 10,
    "num_samples": 64,
    "num_products": 9,
}
CELL = {
    "optimizer": "sgd",
    "batch_size": 4,
    "predicted": 0.1,
    "low": 0.05,
    "high": 0.2,
    "survived": 0.125,
    "paper": 0.4,
    "steps": 50,
    "reasons": [],
}
DRAW = {"epoch": 0, "checkpoint": None, "batch_size": 8, "largest": 3.0}


def entry(step: int, **changed: Any) -> dict[str, Any]:
    line = {"step": step, "epoch": step // 2, "loss": 2.0 / (step + 1), "lr": 0.1}
    return line | {"momentum": 0.9, "batch_size": 16} | changed


def measured(step: int, **changed: Any) -> dict[str, Any]:
    found = {
        "largest_eigenvalue": 8.0,
        "smallest_eigenvalue": None,
        "max_lr": 0.4,
        "max_lr_low": 0.3,
        "max_lr_high": 0.6,
        "regime": "transition",
        "optimizer": "sgd",
        "peak_lr": 0.2,
        "products": 5,
        "measurement_seconds": 0.5,
        "overhead": 0.1,
        "failure": None,
    }
    return entry(step) | found | changed


STEPS = [measured(0), *(entry(step) for step in range(1, 6))]


def write_run(folder: Path, *, config: Any = CONFIG, summary: Any = SUMMARY, steps: Any = STEPS):
    """What ``batchlr train`` leaves, without checkpoints; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if steps is not None:
        write_lines(folder / "metrics.jsonl", steps)
    environment = {"python": "3.11.7", "packages": {"torch": "2.9"}, "notes": ["a", "b"]}
    (folder / "env.json").write_text(json.dumps(environment))
    return folder


def write_measurements(folder: Path) -> Path:
    """What ``batchlr lr``, ``spectrum`` (once, and on a grid) and ``sweep`` leave."""
    curvature = folder / "curvature"
    curvature.mkdir(parents=True, exist_ok=True)
    (curvature / "rates.json").write_text(json.dumps(RATES))
    (curvature / "spectrum.json").write_text(json.dumps(SPECTRUM))
    arrays = {"nodes": np.array([-1.0, 0.0, 4.0]), "weights": np.array([0.25, 0.5, 0.25])}
    np.savez(curvature / "spectrum.npz", **arrays, probes=np.zeros(3, np.int64))
    write_lines(curvature / "spectra.jsonl", [DRAW, DRAW | {"batch_size": 16}])
    write_lines(curvature / "sweep.jsonl", [CELL])
    return folder


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in entries))
