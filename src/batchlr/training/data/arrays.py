"""Image data from a NumPy archive."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchlr.training.data.errors import DataError
from batchlr.training.data.images import ImageData, TensorImages
from batchlr.training.data.transforms import Augment, CropAndFlip, Normalization, augments

KEYS = ("x_train", "y_train", "x_test", "y_test")
LAYOUT = (
    f"an NPZ archive with {', '.join(KEYS)}: images (N, C, H, W) of uint8 or float32, "
    "labels (N,) of integers from 0"
)

_MOST_CLASSES_PER_LABEL = 10  # assumed: a sample of many classes may lack most of them


def load_arrays(*, path: str | Path, augment: Augment = "none") -> ImageData:
    """Images from the NPZ archive at ``path``.

    Pixels of type uint8 are divided by 255 and normalised per channel with the mean and standard
    deviation of the training images (a channel without variation is only centred). Images of type
    float32 are taken as they are.

    Args:
        path: Archive with ``x_train``, ``y_train``, ``x_test``, ``y_test``; images are square,
            ``(N, C, H, W)``, uint8 or float32; labels are integers ``(N,)`` from 0.
        augment: ``"standard"`` crops training images from a border of zeros, an eighth of their
            size wide, and mirrors half of them.

    Raises:
        DataError: The file is missing, is no such archive, or its arrays do not fit together.
        ValueError: ``augment`` is unknown.
    """
    augmented = augments(augment)
    path = Path(path)
    arrays = _read(path)
    for split in ("train", "test"):
        _check_images(path, f"x_{split}", arrays[f"x_{split}"])
        _check_labels(path, split, arrays[f"y_{split}"], len(arrays[f"x_{split}"]))
    _check_classes(path, {*arrays["y_train"].tolist(), *arrays["y_test"].tolist()})
    x_train, x_test = arrays["x_train"], arrays["x_test"]
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        problem = (
            f"x_train has images {x_train.shape[1:]} of {x_train.dtype}, "
            f"x_test {x_test.shape[1:]} of {x_test.dtype}; make them agree"
        )
        raise _error(path, problem)
    train_pixels = torch.from_numpy(x_train)
    normalization = Normalization.of(train_pixels) if train_pixels.dtype == torch.uint8 else None
    augmentation = CropAndFlip(x_train.shape[2] // 8) if augmented else None
    return ImageData(
        name="arrays",
        train=TensorImages(train_pixels, _labels(arrays["y_train"]), normalization, augmentation),
        test=TensorImages(torch.from_numpy(x_test), _labels(arrays["y_test"]), normalization),
        num_classes=1 + max(int(arrays["y_train"].max()), int(arrays["y_test"].max())),
        in_channels=x_train.shape[1],
        image_size=x_train.shape[2],
    )


def _read(path: Path) -> Mapping[str, Any]:
    import zipfile
    import zlib

    import numpy as np

    if not path.is_file():
        raise _error(path, "there is no such file")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _error(path, "it holds a single array; write it with numpy.savez")
            missing = [key for key in KEYS if key not in archive]
            if missing:
                raise _error(path, f"it lacks {', '.join(missing)}; it has {sorted(archive)}")
            return {key: archive[key] for key in KEYS}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _error(path, f"it cannot be read ({error}); write it with numpy.savez") from error


def _check_images(path: Path, key: str, images: Any) -> None:
    import numpy as np

    if images.dtype not in (np.uint8, np.float32):
        raise _error(path, f"{key} must be uint8 or float32, got {images.dtype}")
    if images.ndim != 4 or 0 in images.shape:
        raise _error(
            path, f"{key} must have shape (N, C, H, W), none of them 0, got {images.shape}"
        )
    if images.shape[2] != images.shape[3]:
        raise _error(path, f"{key} must hold square images, got {images.shape[2:]}; pad or resize")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        num_bad = int((~np.isfinite(images)).sum())
        raise _error(path, f"{key} has {num_bad} values that are not finite; remove them")


def _check_labels(path: Path, split: str, labels: Any, num_samples: int) -> None:
    import numpy as np

    key = f"y_{split}"
    if not np.issubdtype(labels.dtype, np.integer):
        raise _error(path, f"{key} must be integers, got {labels.dtype}; use astype('int64')")
    if labels.shape != (num_samples,):
        problem = (
            f"{key} must have shape ({num_samples},), one label for each image of x_{split}, "
            f"got {labels.shape}"
        )
        raise _error(path, problem)
    if labels.min() < 0:
        raise _error(path, f"{key} must not be negative, got {labels.min()}; number classes from 0")


def _check_classes(path: Path, labels: set[int]) -> None:
    if max(labels) >= _MOST_CLASSES_PER_LABEL * len(labels):
        problem = (
            f"y_train and y_test hold {len(labels)} different labels, the largest {max(labels)}; "
            "number classes from 0 without gaps"
        )
        raise _error(path, problem)


def _labels(labels: Any) -> Tensor:
    return torch.from_numpy(labels.astype("int64"))


def _error(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: {problem}. Expected: {LAYOUT}.")
