"""What happens to pixels on their way into a batch."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from batchlr.training.data.randomness import EpochKey, Stream, random_integers

Augment = Literal["standard", "none"]


def augments(augment: Augment) -> bool:
    """Whether ``augment`` asks for the customary augmentation of a data set.

    Raises:
        ValueError: It is neither "standard" nor "none".
    """
    if augment not in get_args(Augment):
        msg = f"augment must be one of {', '.join(get_args(Augment))}, got {augment!r}"
        raise ValueError(msg)
    return augment == "standard"


@dataclass(frozen=True)
class Normalization:
    """Pixels are divided by 255, shifted and scaled per channel: ``(x / 255 - mean) / std``."""

    mean: tuple[float, ...]  # (C,)
    std: tuple[float, ...]  # (C,)

    @classmethod
    def of(cls, pixels: Tensor) -> "Normalization":
        """Moments of uint8 images ``(N, C, H, W)``, per channel; a constant one has deviation 1."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in pixels.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = (share * levels).sum()
            variance = (share * (levels - mean) ** 2).sum()
            means.append(mean.item())
            stds.append(variance.sqrt().item() or 1.0)
        return cls(tuple(means), tuple(stds))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 images ``(B, C, H, W)`` of uint8 pixels."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, dtype=torch.float32, device=pixels.device)[:, None, None]
        return (pixels.float() / 255 - mean) / std


# of the ImageNet training pixels, as used by torchvision's networks
IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class CropAndFlip:
    """A random crop of the zero-padded image, if wanted mirrored left to right half of the time.

    Acts on pixels before normalisation, so that the padding is black.
    """

    padding: int
    mirror: bool = True

    def __call__(self, pixels: Tensor, samples: Tensor, key: EpochKey) -> Tensor:
        """Augmented ``(B, C, H, W)``; each image's draw depends on ``key`` and its index only.

        Args:
            pixels: Images ``(B, C, H, W)`` of any dtype.
            samples: Their indices ``(B,)`` in the data set, on the device of ``pixels``.
            key: The pass over the data.
        """
        _, num_channels, height, width = pixels.shape
        offsets = 2 * self.padding + 1
        top = random_integers(samples, key, Stream.CROP_ROW, high=offsets)
        left = random_integers(samples, key, Stream.CROP_COLUMN, high=offsets)
        mirrored = random_integers(samples, key, Stream.MIRROR, high=2).bool() & self.mirror
        row = torch.arange(height, device=pixels.device)
        column = torch.arange(width, device=pixels.device)
        rows = top[:, None] + row  # (B, H)
        columns = left[:, None] + torch.where(mirrored[:, None], column.flip(0), column)  # (B, W)
        padded = functional.pad(pixels, (self.padding,) * 4)
        chosen = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (B, H, W), flat
        # one gather over flat pixels is several times faster than indexing with four tensors
        flat = chosen.flatten(1)[:, None].expand(-1, num_channels, -1)  # (B, C, H * W)
        return padded.flatten(2).gather(2, flat).reshape(pixels.shape)
