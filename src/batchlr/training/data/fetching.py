"""Brings a data set to where a run will look for it."""

from pathlib import Path
from typing import Any

from batchlr.training.data import DataError, load_data
from batchlr.training.data.cifar import cifar_folder, fetch_cifar

_CIFAR = ("cifar10", "cifar100")
_BY_HAND = {
    "arrays": "These are images of your own, which nothing can fetch: data.path names their file.",
    "imagefolder": "These are images of your own, which nothing can fetch.",
    "imagenet": (
        "ImageNet is given to registered users only, so fetch it yourself: "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
        "https://image-net.org/download-images. Unpack the first, and every archive in it to a "
        "folder train/WNID of its name; sort the images of the second into val/WNID."
    ),
}


def fetch_data(
    name: str,
    *,
    root: str | Path = "data",
    seed: int = 0,
    url: str | None = None,
    **options: Any,
) -> str:
    """Make sure that the data set ``name`` is there; returns, in words, what was done.

    CIFAR is fetched (`fetch_cifar`); all others are there, or have to be put there by hand.

    Args:
        name: As in ``load_data``, like ``root``, ``seed`` and ``options``.
        root: Folder of the files.
        seed: Seed of data that is drawn.
        url: Where the archive of CIFAR is, if not at its publisher's.
        options: The data set's own.

    Raises:
        DataError: The data cannot be fetched; the message tells what to do.
        ValueError: As from ``load_data``, or ``url`` is none, or given for other data than CIFAR.
    """
    if name in _CIFAR:
        fetched = fetch_cifar(name, root, url=url)
        folder = cifar_folder(name, Path(root).expanduser())
        return f"{name}: {'fetched to' if fetched else 'nothing to do, it is in'} {folder}"
    if url is not None:
        msg = f"url is for {' and '.join(_CIFAR)}, which have one archive; the data are {name}"
        raise ValueError(msg)
    try:
        data = load_data(name, root=root, seed=seed, **options)
    except DataError as error:
        msg = f"{error} {_BY_HAND[name]}"
        raise DataError(msg) from error
    return (
        f"{name}: nothing to do, it is there ({len(data.train)} training and {len(data.test)} "
        f"test images)"
    )
