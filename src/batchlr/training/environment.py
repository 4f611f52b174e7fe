"""What a run depends on outside its configuration: versions and devices."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("batchlr", "torch", "torchvision", "numpy", "scipy")


def describe_environment() -> dict[str, Any]:
    """Versions, processors and devices, ready for JSON."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: package_version(package) for package in PACKAGES},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def package_version(package: str) -> str | None:
    """The version installed; None if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
