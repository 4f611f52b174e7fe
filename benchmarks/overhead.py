"""What `max_overhead`, counted in gradients, is in wall time: the first steps of long runs.

Networks of 32x32 images at batch 128, the milestones of the first steps only.

    python benchmarks/overhead.py --models VGG-11 --steps 17
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import torch

from batchlr.training.config import TrainConfig
from batchlr.training.loop import train

MODELS = {
    "VGG-11": {"name": "vgg", "depth": 11, "width": 0.5, "batch_norm": False},
    "VGG-11-BN": {"name": "vgg", "depth": 11, "width": 0.5, "batch_norm": True},
    "PreResNet-20": {"name": "preresnet", "depth": 20, "block": "basic"},
}


def run(model, optimizer, steps):
    """Summary and lines of the first ``steps`` of some 2,000."""
    config = TrainConfig.model_validate(
        {
            "name": "overhead",
            "data": {"name": "digits", "image_size": 32},
            "model": MODELS[model],
            "optim": {"name": optimizer, "lr": "auto"},
            "batch": {"global_size": 128},
            "train": {"epochs": 182, "max_steps": steps},
            "log": {"progress": False},
            "checkpoint": {"every_epochs": 0},
        }
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "run"
        summary = train(config, out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary, [line for line in lines if "overhead" in line]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=17)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | optimizer | gradients a measurement | 5 % in gradients are, of the time |")
    print("|---|---|---|---|")
    for model in options.models:
        for optimizer in ("sgd", "adam"):
            summary, measured = run(model, optimizer, options.steps)
            step = (summary["wall_seconds"] - summary["curvature_seconds"]) / summary["steps"]
            spent = measured[-1]["overhead"] * (measured[-1]["step"] + 1)
            share = 0.05 * summary["curvature_seconds"] / spent / step
            print(
                f"| {model} | {optimizer} | {spent / len(measured):.1f} | {share:.1%} |", flush=True
            )


if __name__ == "__main__":
    main()
