"""CIFAR-10 and CIFAR-100 from their original files, kept in memory."""

import tarfile
from http.client import HTTPException
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
_FAILURES = (OSError, RuntimeError, EOFError, tarfile.TarError, HTTPException)


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
        download: Whether to unpack, and if need be fetch, the archive when the folder is missing;
            see `fetch_cifar`.
        statistics: Whose mean and standard deviation normalise the pixels; some published
            results use those of another data set.

    Raises:
        DataError: Files are missing or differ from the published checksums.
        ValueError: Unknown ``statistics`` or ``augment``.
    """
    normalization = _normalization(statistics)
    return _load("cifar10", 10, root, normalization, augment=augment, download=download)


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
    normalization = _normalization(statistics)
    return _load("cifar100", 100, root, normalization, augment=augment, download=download)


def fetch_cifar(name: str, root: str | Path, *, url: str | None = None) -> bool:
    """Put the files of ``name`` below ``root``; returns whether any were missing.

    Unpacks the archive that lies in ``root``, or fetches it first. One process of a machine does
    so at a time; others wait, and find it done.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: Folder for the archive and the folder unpacked from it.
        url: Where a copy of the archive is, if its publisher is slow; the checksum is the same.

    Raises:
        DataError: The archive cannot be had, or is not the published one.
        ValueError: ``url`` is none.
    """
    from filelock import FileLock
    from torchvision.datasets.utils import download_and_extract_archive

    if url is not None and not url.startswith(("https://", "http://")):
        msg = f"url must begin with https:// or http://, got {url!r}; a file goes into data.root"
        raise ValueError(msg)
    dataset, root = _dataset(name), Path(root).expanduser()
    if not cifar_problems(name, root):
        return False
    url = url or dataset.url
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset.filename}.lock"):
            if not cifar_problems(name, root):  # another process was faster
                return False
            archive = {"filename": dataset.filename, "md5": dataset.tgz_md5}
            download_and_extract_archive(url, root, **archive)
    except _FAILURES as error:
        problems = [*cifar_problems(name, root), f"the download of {url} failed: {error}"]
        raise _data_error(name, root, problems) from error
    return True


def cifar_problems(name: str, root: Path) -> list[str]:
    """Which files of ``name`` below ``root`` are missing, and which are not as published."""
    dataset = _dataset(name)
    checksums = dict([*dataset.train_list, *dataset.test_list])
    checksums[dataset.meta["filename"]] = dataset.meta["md5"]
    folder = cifar_folder(name, root)
    missing = [file for file in checksums if not (folder / file).is_file()]
    damaged = [
        file
        for file, md5 in checksums.items()
        if file not in missing and not _is_intact(folder / file, md5)
    ]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"unreadable or with a wrong checksum: {', '.join(damaged)}"] if damaged else []
    return problems


def cifar_folder(name: str, root: Path) -> Path:
    """The folder below ``root`` that the archive of ``name`` unpacks to."""
    return root / str(_dataset(name).base_folder)


def _dataset(name: str) -> Any:
    from torchvision import datasets  # lazy: the library must import without torchvision

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _normalization(statistics: str) -> Normalization:
    if statistics not in NORMALIZATIONS:
        msg = f"statistics must be one of {', '.join(NORMALIZATIONS)}, got {statistics!r}"
        raise ValueError(msg)
    return NORMALIZATIONS[statistics]


def _load(
    name: str,
    num_classes: int,
    root: str | Path,
    normalization: Normalization,
    *,
    augment: Augment,
    download: bool,
) -> ImageData:
    dataset, root = _dataset(name), Path(root).expanduser()
    augmentation = AUGMENTATION if augments(augment) else None
    if download:
        fetch_cifar(name, root)
    try:
        train, test = dataset(root, train=True), dataset(root, train=False)
    except _FAILURES as error:
        raise _data_error(name, root, cifar_problems(name, root) or [str(error)]) from error
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


def _data_error(name: str, root: Path, problems: list[str]) -> DataError:
    dataset = _dataset(name)
    return DataError(
        f"{name} is missing or corrupt in {cifar_folder(name, root)} ({'; '.join(problems)}). "
        f"Unpack {dataset.filename} in {root}; or run `batchlr data fetch CONFIG` (--url "
        f"names a mirror) or set data.download=true, which unpack the archive there, or fetch it "
        f"from {dataset.url}."
    )


def _is_intact(path: Path, md5: str) -> bool:
    from torchvision.datasets.utils import check_integrity

    try:
        return bool(check_integrity(path, md5))
    except OSError:
        return False
