"""CIFAR-10 and CIFAR-100 from their original files, kept in memory."""

import tarfile
from pathlib import Path
from typing import Any, Literal

import torch

from batchlr.training.data.errors import DataError
from batchlr.training.data.images import ImageData, TensorImages
from batchlr.training.data.transforms import (
    IMAGENET_NORMALIZATION,
    Augment,
    CropAndFlip,
    Normalization,
    augments,
)

Statistics = Literal["cifar10", "cifar100", "imagenet"]
NORMALIZATIONS = {  # the first two: mean and deviation of the training pixels, to four digits
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": IMAGENET_NORMALIZATION,
}
AUGMENTATION = CropAndFlip(padding=4)  # as in He et al. 2016 and most later CIFAR results


def load_cifar10(
    *,
    root: str | Path = "data",
    augment: Augment = "standard",
    download: bool = False,
    statistics: Statistics = "cifar10",
) -> ImageData:
    """CIFAR-10 from the folder ``cifar-10-batches-py`` under ``root``.

    Args:
        root: Folder that holds the unpacked archive.
        augment: ``"standard"`` crops training images from a border of 4 black pixels and mirrors
            half of them.
        download: Whether to unpack, and if need be fetch, the archive when the folder is missing.
            Only one process at a time may do so.
        statistics: Whose mean and standard deviation normalise the pixels; some published
            results use those of another data set.

    Raises:
        DataError: Files are missing or differ from the published checksums.
        ValueError: Unknown ``statistics`` or ``augment``.
    """
    from torchvision.datasets import CIFAR10  # lazy: the library must import without torchvision

    normalization = _normalization(statistics)
    return _load("cifar10", CIFAR10, 10, root, normalization, augment=augment, download=download)


def load_cifar100(
    *,
    root: str | Path = "data",
    augment: Augment = "standard",
    download: bool = False,
    statistics: Statistics = "cifar100",
) -> ImageData:
    """CIFAR-100 (fine labels) from the folder ``cifar-100-python``; else as ``load_cifar10``.

    Raises:
        DataError: Files are missing or differ from the published checksums.
        ValueError: Unknown ``statistics`` or ``augment``.
    """
    from torchvision.datasets import CIFAR100

    normalization = _normalization(statistics)
    return _load("cifar100", CIFAR100, 100, root, normalization, augment=augment, download=download)


def _normalization(statistics: str) -> Normalization:
    if statistics not in NORMALIZATIONS:
        msg = f"statistics must be one of {', '.join(NORMALIZATIONS)}, got {statistics!r}"
        raise ValueError(msg)
    return NORMALIZATIONS[statistics]


def _load(
    name: str,
    dataset: Any,
    num_classes: int,
    root: str | Path,
    normalization: Normalization,
    *,
    augment: Augment,
    download: bool,
) -> ImageData:
    root = Path(root).expanduser()
    augmentation = AUGMENTATION if augments(augment) else None
    try:
        train = dataset(root, train=True, download=download)
        test = dataset(root, train=False)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise _data_error(name, dataset, root, error, download=download) from error
    return ImageData(
        name=name,
        train=_images(train, normalization, augmentation),
        test=_images(test, normalization, None),
        num_classes=num_classes,
        in_channels=3,
        image_size=32,
    )


def _images(
    split: Any, normalization: Normalization, augmentation: CropAndFlip | None
) -> TensorImages:
    pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return TensorImages(pixels, torch.tensor(split.targets), normalization, augmentation)


def _data_error(
    name: str, dataset: Any, root: Path, error: Exception, *, download: bool
) -> DataError:
    folder = root / dataset.base_folder
    checksums = [*dataset.train_list, *dataset.test_list]
    checksums.append((dataset.meta["filename"], dataset.meta["md5"]))
    missing = [file for file, _ in checksums if not (folder / file).is_file()]
    damaged = [
        file
        for file, md5 in checksums
        if file not in missing and not _is_intact(folder / file, md5)
    ]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"unreadable or with a wrong checksum: {', '.join(damaged)}"] if damaged else []
    problems += [f"the download failed: {error}"] if download else []
    return DataError(
        f"{name} is missing or corrupt in {folder} ({'; '.join(problems) or error}). "
        f"Unpack {dataset.filename} in {root}; or put the archive there and set "
        f"data.download=true, which fetches {dataset.url} if the archive is not there."
    )


def _is_intact(path: Path, md5: str) -> bool:
    from torchvision.datasets.utils import check_integrity

    try:
        return bool(check_integrity(path, md5))
    except OSError:
        return False
