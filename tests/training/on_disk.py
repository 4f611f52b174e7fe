"""Writers of small data sets in the formats their originals have on disk."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR100_FOLDER = "cifar-100-python"


def write_cifar10(root: Path, *, per_batch: int = 8, num_test: int = 8, seed: int = 0) -> Path:
    """Five training batches and a test batch of random images; returns their folder."""
    generator = np.random.default_rng(seed)
    folder = root / CIFAR10_FOLDER
    folder.mkdir(parents=True)
    sizes = {f"data_batch_{number}": per_batch for number in range(1, 6)}
    for name, size in {**sizes, "test_batch": num_test}.items():
        _dump(
            folder / name,
            {
                "batch_label": name,
                "labels": generator.integers(10, size=size).tolist(),
                "data": generator.integers(256, size=(size, 3072), dtype=np.uint8),
                "filenames": [f"{index}.png" for index in range(size)],
            },
        )
    names = [f"class{index}" for index in range(10)]
    _dump(
        folder / "batches.meta",
        {"num_cases_per_batch": per_batch, "label_names": names, "num_vis": 3072},
    )
    return folder


def write_cifar100(root: Path, *, num_train: int = 40, num_test: int = 8, seed: int = 0) -> Path:
    """Training and test file of random images; returns their folder."""
    generator = np.random.default_rng(seed)
    folder = root / CIFAR100_FOLDER
    folder.mkdir(parents=True)
    for name, size in {"train": num_train, "test": num_test}.items():
        _dump(
            folder / name,
            {
                "batch_label": name,
                "fine_labels": generator.integers(100, size=size).tolist(),
                "coarse_labels": generator.integers(20, size=size).tolist(),
                "data": generator.integers(256, size=(size, 3072), dtype=np.uint8),
                "filenames": [f"{index}.png" for index in range(size)],
            },
        )
    _dump(
        folder / "meta",
        {
            "fine_label_names": [f"fine{index}" for index in range(100)],
            "coarse_label_names": [f"coarse{index}" for index in range(20)],
        },
    )
    return folder


def write_imagefolder(
    root: Path,
    *,
    num_classes: int = 3,
    per_class: int = 4,
    val_per_class: int = 2,
    image_size: int = 40,
    seed: int = 0,
) -> Path:
    """JPEGs of random colour gradients under train/CLASS and val/CLASS; returns ``root``."""
    generator = np.random.default_rng(seed)
    for split, size in {"train": per_class, "val": val_per_class}.items():
        for label in range(num_classes):
            folder = root / split / f"n{label:08d}"  # named like ImageNet's WordNet IDs
            folder.mkdir(parents=True)
            for index in range(size):
                corners = generator.integers(256, size=(2, 2, 3), dtype=np.uint8)
                shape = (image_size, image_size + 8)
                image = Image.fromarray(corners).resize(shape, Image.Resampling.BILINEAR)
                image.save(folder / f"{index}.JPEG", quality=95)
    return root


def write_arrays(path: Path, **replaced: np.ndarray | None) -> Path:
    """An NPZ archive of 12 training and 6 test images, 2 x 8 x 8 uint8, of 3 classes.

    Args:
        path: The archive.
        replaced: Arrays to put in the place of these; None leaves one out.
    """
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {
        "x_train": generator.integers(256, size=(12, 2, 8, 8), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(256, size=(6, 2, 8, 8), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    arrays.update(replaced)
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _dump(path: Path, content: dict[str, object]) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))
