"""Tiny runs: configurations, starting them, and comparing what two of them left."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from batchlr.training import loop
from batchlr.training.checkpoint import load_checkpoint
from batchlr.training.config import TrainConfig, load_config

# 12 steps in 4 epochs, on real digits.
TINY = """
name: tiny
data: {name: digits, image_size: 8}
model: {name: mlp, hidden: [16]}
optim: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5.0e-4}
batch: {global_size: 400}
curvature: {samples: 64, max_products: 6}
train: {epochs: 4}
"""

# The same 12 steps with other networks, on few images.
NETWORKS = {
    "mlp": [],
    "batch norm": [
        "data={name: synthetic, num_samples: 96, num_test_samples: 50, image_size: 4}",
        "model={name: preresnet, block: basic, depth: 8, width: 0.25}",
        "batch.global_size=32",
        "curvature={samples: 32, max_products: 3}",
    ],
    "dropout": [  # 32 is the smallest image that VGG takes
        "data={name: synthetic, num_samples: 48, num_test_samples: 20, image_size: 32}",
        "model={name: vgg, depth: 11, width: 0.03, dropout: 0.5}",
        "batch.global_size=16",
        "curvature={samples: 16, max_products: 3}",
    ],
}

# What a clock says, which no two runs share.
TIMES = {"wall_seconds", "curvature_seconds", "measurement_seconds", "seconds"}


def tiny(folder: Path, *overrides: str) -> TrainConfig:
    """The tiny configuration, changed by ``a.b=value``; its file stays in ``folder``."""
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return load_config(path, overrides).config


def run(folder: Path, *overrides: str, out: str = "out") -> Path:
    """Train; returns the folder of the run."""
    loop.train(tiny(folder, *overrides), folder / out)
    return folder / out


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, read as strict JSON."""
    return [strict_json(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    return strict_json((out / "summary.json").read_text())


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def state(out: Path) -> dict[str, Any]:
    """What the last checkpoint holds of model, optimizer, scheduler, controller and generators."""
    return load_checkpoint(out / "checkpoints")["experiment"]


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Where two nested values differ, bit by bit in tensors; times are not looked at."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            if key in TIMES:
                continue
            if key not in left or key not in right:
                yield f"{where}.{key} is only on one side"
            else:
                yield from differences(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            yield f"{where} has {len(left)} and {len(right)} entries"
        for index, (a, b) in enumerate(zip(left, right, strict=False)):
            yield from differences(a, b, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype or not torch.equal(left, right):
            yield f"{where} differs"
    elif left != right and not (left != left and right != right):  # NaN is like NaN
        yield f"{where}: {left!r} and {right!r}"


def assert_same(left: Any, right: Any) -> None:
    found = list(differences(left, right))
    assert not found, found[:10]


def assert_same_end(left: Path, right: Path) -> None:
    """The same weights, buffers, optimizer, scheduler, controller, generators, and record."""
    assert_same(state(left), state(right))
    assert_same(metrics(left), metrics(right))
    assert_same(summary(left), summary(right))
