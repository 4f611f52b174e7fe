"""Labelled images with random access: in memory as tensors, or in folders as files."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from batchlr.training.data.errors import DataError
from batchlr.training.data.randomness import EpochKey, Stream, random_bits
from batchlr.training.data.transforms import CropAndFlip, Normalization

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")
_GRACE = 10  # assumed: seconds that a worker goes on after SIGTERM
UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises on bad files


class LabelledImages(ABC):
    """A fixed sequence of (image, label) pairs."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(
        self,
        index_batches: Sequence[Tensor],
        *,
        augmented_for: EpochKey | None = None,
        device: torch.device = CPU,
    ) -> Iterator[Batch]:
        """One batch for each tensor of indices.

        Args:
            index_batches: Indices ``(B,)`` of the samples of each batch, int64 on the CPU.
            augmented_for: The pass over the data whose random augmentation is applied; None
                gives the images as they are tested.
            device: Where the batches are delivered.

        Yields:
            Images ``(B, C, H, W)``, float32 and normalised, and labels ``(B,)``, int64.
        """

    def __getitem__(self, index: int) -> Batch:
        """Image ``(C, H, W)`` as tested and label ``()`` of one sample."""
        if not 0 <= index < len(self):
            msg = f"index must lie in [0, {len(self) - 1}], got {index}"
            raise IndexError(msg)
        images, labels = next(self.batches([torch.tensor([index])]))
        return images[0], labels[0]


@final
@dataclass(frozen=True, eq=False)
class TensorImages(LabelledImages):
    """Images kept in memory."""

    images: Tensor  # (N, C, H, W), uint8 or float32
    labels: Tensor  # (N,), int64
    normalization: Normalization | None = None  # None: the images are delivered as they are
    augmentation: CropAndFlip | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        index_batches: Sequence[Tensor],
        *,
        augmented_for: EpochKey | None = None,
        device: torch.device = CPU,
    ) -> Iterator[Batch]:
        """See ``LabelledImages.batches``; the arithmetic happens on ``device``."""
        for indices in index_batches:
            local = indices.to(self.images.device)
            images, labels = self.images[local].to(device), self.labels[local].to(device)
            if augmented_for is not None and self.augmentation is not None:
                images = self.augmentation(images, indices.to(device), augmented_for)
            if self.normalization is not None:
                images = self.normalization(images)
            yield images, labels

    def to(self, device: torch.device) -> "TensorImages":
        """The same images kept on ``device``, which saves a copy per batch."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@final
@dataclass(frozen=True, eq=False)
class FolderImages(LabelledImages):
    """Images read from files when asked for."""

    files: tuple[tuple[str, int], ...]  # (path, label) of each sample
    read: Callable[[str], Any]  # path -> image, as the transforms take it
    train_transform: Callable[[Any], Tensor]  # random, through torch's CPU generator
    test_transform: Callable[[Any], Tensor]
    workers: int = 0  # processes that read ahead; 0 reads in this one

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self,
        index_batches: Sequence[Tensor],
        *,
        augmented_for: EpochKey | None = None,
        device: torch.device = CPU,
    ) -> Iterator[Batch]:
        """See ``LabelledImages.batches``.

        Raises:
            DataError: A file cannot be read as an image.
        """
        loader = DataLoader(
            _FolderView(self, augmented_for),
            batch_sampler=[indices.tolist() for indices in index_batches],
            num_workers=self.workers if len(index_batches) > 1 else 0,
            collate_fn=_collated,
            worker_init_fn=_leave_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else each pass would advance the global one
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _FolderView(Dataset[tuple[Tensor, int] | DataError]):
    """What the worker processes of a DataLoader index.

    Errors are handed over: raised there, they would arrive with a traceback for their message.
    """

    def __init__(self, folder: FolderImages, augmented_for: EpochKey | None) -> None:
        self.folder = folder
        self.augmented_for = augmented_for

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        path, label = self.folder.files[index]
        try:
            image = self.folder.read(path)
        except UNREADABLE as error:
            return DataError(f"{path} is not a readable image ({error}); replace or remove it")
        if self.augmented_for is None:
            return self.folder.test_transform(image), label
        seed = random_bits(torch.tensor([index]), self.augmented_for, Stream.TRANSFORM)
        with torch.random.fork_rng(devices=[]):
            # torchvision's transforms draw from the default generator and take no other
            torch.default_generator.manual_seed(int(seed))
            return self.folder.train_transform(image), label


def _collated(samples: list[tuple[Tensor, int] | DataError]) -> Any:
    """The batch, or the first error in it."""
    errors = (sample for sample in samples if isinstance(sample, DataError))
    return next(errors, None) or default_collate(samples)


def _end_later(number: int, frame: object) -> None:
    signal.alarm(_GRACE)


def _leave_signals(worker: int) -> None:
    """In a worker: who asks all processes of a run to stop asks the one that saves it.

    It ends some seconds after SIGTERM, all the same, for a process that exits with its workers
    alive sends that, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # whose signal ends a process
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, _end_later)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for image classification: what to train on, what to test on, and its shape."""

    name: str
    train: LabelledImages
    test: LabelledImages
    num_classes: int
    in_channels: int
    image_size: int  # height and width, in pixels

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with images held in memory moved to ``device``; files stay files."""
        return replace(self, train=_moved(self.train, device), test=_moved(self.test, device))


def _moved(images: LabelledImages, device: torch.device | str) -> LabelledImages:
    return images.to(torch.device(device)) if isinstance(images, TensorImages) else images
