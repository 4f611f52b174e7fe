"""Images in folders, one folder for each class: ImageNet and data sets laid out like it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from batchlr.argument_ranges import require_count
from batchlr.training.data.errors import DataError
from batchlr.training.data.images import FolderImages, ImageData
from batchlr.training.data.transforms import IMAGENET_NORMALIZATION, Augment, augments

RESIZE_RATIO = 256 / 224  # shorter side over crop in testing, as in Krizhevsky et al. 2012


def load_imagefolder(
    *,
    root: str | Path = "data",
    augment: Augment = "standard",
    image_size: int = 224,
    workers: int = 0,
    name: str = "imagefolder",
) -> ImageData:
    """Images under ``root/train/CLASS`` and ``root/val/CLASS``, read when asked for.

    Test images are the centre of the resized picture. All are normalised with the usual ImageNet
    constants.

    Args:
        root: Folder that holds ``train`` and ``val``.
        augment: ``"standard"`` takes a random part of each training picture (8 to 100 % of its
            area), resizes it and mirrors half of them; ``"none"`` cuts them like test images.
        image_size: Height and width of the images delivered, in pixels.
        workers: Processes that read ahead; 0 reads in this one.
        name: Name of the data set.

    Raises:
        DataError: A folder is missing or empty, or the classes of the two differ.
        ValueError: ``image_size`` is below 1, ``workers`` negative or ``augment`` unknown.
    """
    from torchvision.datasets import ImageFolder  # lazy: the library must import without it

    require_count(image_size=image_size)
    if workers < 0:
        msg = f"workers must not be negative, got {workers}"
        raise ValueError(msg)
    augmented = augments(augment)
    root = Path(root).expanduser()
    folders = {split: _open(ImageFolder, root, split, name) for split in ("train", "val")}
    classes = folders["train"].classes
    if classes != folders["val"].classes:
        odd = sorted(set(classes) ^ set(folders["val"].classes))
        msg = (
            f"{root}: train and val must hold the same classes; only one of them has "
            f"{_few(odd)}. Add or remove these folders."
        )
        raise DataError(msg)
    train_transform, test_transform = _transforms(image_size)
    train, test = (
        FolderImages(
            files=tuple(folder.samples),
            read=partial(_read, folder.loader),
            train_transform=train_transform if augmented else test_transform,
            test_transform=test_transform,
            workers=workers,
        )
        for folder in folders.values()
    )
    return ImageData(name, train, test, len(classes), in_channels=3, image_size=image_size)


def load_imagenet(
    *,
    root: str | Path = "data",
    augment: Augment = "standard",
    image_size: int = 224,
    workers: int = 0,
) -> ImageData:
    """ImageNet under ``root/train`` and ``root/val``, a folder for each WordNet ID.

    See ``load_imagefolder``.
    """
    return load_imagefolder(
        root=root, augment=augment, image_size=image_size, workers=workers, name="imagenet"
    )


def _open(image_folder: Any, root: Path, split: str, name: str) -> Any:
    try:
        return image_folder(root / split)
    except OSError as error:
        msg = (
            f"{name}: no images in {root / split} ({error}). Expected: a folder for each class "
            f"with its images, {root}/train/CLASS/*.jpeg and {root}/val/CLASS/*.jpeg; "
            f"set data.root to the folder that holds train and val."
        )
        raise DataError(msg) from error


def _read(load: Callable[[str], Any], path: str) -> Any:
    """``load(path)``; a picture too large for Pillow is one that cannot be read."""
    from PIL import Image

    try:
        return load(path)
    except Image.DecompressionBombError as error:
        raise OSError(error) from error


def _transforms(image_size: int) -> tuple[Any, Any]:
    from torchvision import transforms

    to_tensor = [
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_NORMALIZATION.mean, IMAGENET_NORMALIZATION.std),
    ]
    train = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    test = [
        transforms.Resize(round(RESIZE_RATIO * image_size)),
        transforms.CenterCrop(image_size),
    ]
    return transforms.Compose(train + to_tensor), transforms.Compose(test + to_tensor)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
