"""Whether a data set is complete and intact: every file is read, every class counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from batchlr.training.data import DataError, FolderImages, ImageData, TensorImages, load_data
from batchlr.training.data.images import UNREADABLE

_LISTED = 20  # assumed: more classes, or broken files, are summed up
_READ_AHEAD = 1024  # files handed to the threads at a time
_IMAGENET = (1000, 1_281_167, 50_000)  # classes, training, validation (Russakovsky et al. 2015)


def verify_data(
    name: str, *, root: str | Path = "data", seed: int = 0, **options: Any
) -> list[str]:
    """Read all of the data set ``name``; returns what is there, a line each.

    CIFAR's files must have the published checksums; every picture in folders must be readable, and
    ImageNet have the published number of them; arrays must be as ``load_data`` asks. Costs one
    reading of all files, in ``workers`` threads where the data have this option.

    Args:
        name: As in ``load_data``, like ``root``, ``seed`` and ``options``.
        root: Folder of the files.
        seed: Seed of data that is drawn.
        options: The data set's own; ``download`` is not heeded.

    Raises:
        DataError: Something is missing or corrupt; the message names all of it.
        ValueError: As from ``load_data``.
    """
    options.pop("download", None)
    data = load_data(name, root=root, seed=seed, **options)
    problems = _unreadable(data.train) + _unreadable(data.test)
    if name == "imagenet":
        problems = _incomplete(data) + problems
    if problems:
        msg = f"{name} in {root} is incomplete or corrupt: {_few(problems, '; ')}"
        raise DataError(msg)
    names = _class_names(data, Path(root).expanduser())
    lines = [f"{name}: complete and intact", *_split_lines(data)]
    train, test = _counts(data.train), _counts(data.test)
    if len(names) <= _LISTED:
        lines += [
            f"  class {label}: {train[number]} training, {test[number]} test images"
            for number, label in enumerate(names)
        ]
    return lines


def _split_lines(data: ImageData) -> list[str]:
    """Number, shape and type of the images of either split, and how the classes share them."""
    lines = []
    for split, images in (("training", data.train), ("test", data.test)):
        counts = _counts(images)
        sizes = [counts[label] for label in range(data.num_classes)]
        shape = f"{data.in_channels} x {data.image_size} x {data.image_size}"
        if isinstance(images, TensorImages):
            kind = str(images.images.dtype).removeprefix("torch.")
        else:
            kind = "read from files"
        lines.append(
            f"{len(images)} {split} images, {shape} {kind}, of {data.num_classes} classes with "
            f"{min(sizes)} to {max(sizes)} each"
        )
    return lines


def _counts(images: Any) -> Counter[int]:
    """Number of images of each label."""
    if isinstance(images, FolderImages):
        return Counter(label for _, label in images.files)
    return Counter(images.labels.tolist())


def _class_names(data: ImageData, root: Path) -> list[str]:
    """Those of folders as torchvision orders them, else numbers."""
    if isinstance(data.train, FolderImages):
        return sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    return [str(number) for number in range(data.num_classes)]


def _unreadable(images: Any) -> list[str]:
    """The files that are no pictures, with the reason."""
    if not isinstance(images, FolderImages):
        return []
    paths = [path for path, _ in images.files]
    found: list[str] = []
    with ThreadPoolExecutor(max(1, images.workers)) as pool:
        for first in range(0, len(paths), _READ_AHEAD):
            some = paths[first : first + _READ_AHEAD]
            found += filter(None, pool.map(partial(_problem, images.read), some))
    return found


def _problem(read: Callable[[str], Any], path: str) -> str | None:
    try:
        read(path)
    except UNREADABLE as error:
        return f"{path} is not a readable image ({error})"
    return None


def _incomplete(data: ImageData) -> list[str]:
    """What ImageNet lacks."""
    found = (data.num_classes, len(data.train), len(data.test))
    if found == _IMAGENET:
        return []
    classes, train, test = found
    return [
        f"{classes} classes, {train} training and {test} test images, where ImageNet has "
        "{} classes, {} and {}; for a part of it, set data.name=imagefolder".format(*_IMAGENET)
    ]


def _few(problems: Sequence[str], joint: str) -> str:
    shown = joint.join(problems[:_LISTED])
    left = len(problems) - _LISTED
    return f"{shown}{joint}and {left} more" if left > 0 else shown
