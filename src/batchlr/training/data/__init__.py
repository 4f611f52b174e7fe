"""Image data for the training programs, loaded by name and delivered in reproducible batches."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from batchlr.training.data.arrays import load_arrays
from batchlr.training.data.batches import (
    batches_per_epoch,
    measurement_batches,
    test_batches,
    train_batches,
)
from batchlr.training.data.cifar import load_cifar10, load_cifar100
from batchlr.training.data.digits import load_digits
from batchlr.training.data.errors import DataError
from batchlr.training.data.folders import load_imagefolder, load_imagenet
from batchlr.training.data.images import (
    Batch,
    FolderImages,
    ImageData,
    LabelledImages,
    TensorImages,
)
from batchlr.training.data.synthetic import load_synthetic

__all__ = [
    "DATA_SETS",
    "Batch",
    "DataError",
    "FolderImages",
    "ImageData",
    "LabelledImages",
    "TensorImages",
    "batches_per_epoch",
    "load_data",
    "measurement_batches",
    "test_batches",
    "train_batches",
]

DATA_SETS: dict[str, Callable[..., ImageData]] = {
    "digits": load_digits,
    "arrays": load_arrays,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "imagenet": load_imagenet,
    "imagefolder": load_imagefolder,
    "synthetic": load_synthetic,
}


def load_data(
    name: str,
    *,
    root: str | Path = "data",
    seed: int = 0,
    **options: Any,
) -> ImageData:
    """The data set ``name``.

    Args:
        name: A key of ``DATA_SETS``.
        root: Folder of the files, for the data sets that are read from a folder.
        seed: Seed of the data, for data that is drawn (synthetic). Order and augmentation take
            theirs in ``train_batches``.
        options: The data set's own options, for example ``path`` for arrays, or
            ``augment="standard" | "none"`` for all but synthetic; see its loader.

    Raises:
        DataError: Data is missing or corrupt.
        ValueError: Unknown name, or unknown, missing or illegal option.
    """
    if name not in DATA_SETS:
        nearest = get_close_matches(name, DATA_SETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        msg = f"data must be one of {', '.join(DATA_SETS)}, got {name!r}{hint}"
        raise ValueError(msg)
    signature = inspect.signature(DATA_SETS[name])
    common = {"root": root, "seed": seed}
    taken = {key: value for key, value in common.items() if key in signature.parameters}
    try:
        arguments = signature.bind(**options, **taken)
    except TypeError as error:
        legal = ", ".join(signature.parameters) or "none"
        msg = f"data {name}: {error}; its options are {legal}"
        raise ValueError(msg) from None
    return DATA_SETS[name](**arguments.kwargs)
