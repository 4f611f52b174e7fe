"""Images made on the spot: a smooth prototype for each class, plus pixel noise."""

import torch
from torch import Tensor
from torch.nn import functional

from batchlr.argument_ranges import require_count, require_non_negative
from batchlr.training.data.images import ImageData, TensorImages

PROTOTYPE_SIZE = 4  # pixels; coarse, so that convolutions and pooling keep what tells classes apart


def load_synthetic(
    *,
    seed: int = 0,
    num_samples: int = 1024,
    num_test_samples: int = 256,
    num_classes: int = 10,
    image_size: int = 8,
    channels: int = 3,
    noise: float = 1.0,
) -> ImageData:
    """Float32 images ``prototype[label] + noise * normal``; classes have equal shares up to one.

    Args:
        seed: Seed of prototypes and noise.
        num_samples: Number of training samples.
        num_test_samples: Number of test samples.
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
        channels: Channels of the images.
        noise: Standard deviation of the noise; that of the prototypes' pixels is 1.

    Raises:
        ValueError: A number is out of range.
    """
    require_count(num_samples=num_samples, num_test_samples=num_test_samples)
    require_count(num_classes=num_classes, image_size=image_size, channels=channels)
    require_non_negative(noise=noise)
    generator = torch.Generator().manual_seed(seed)
    coarse_shape = (num_classes, channels, PROTOTYPE_SIZE, PROTOTYPE_SIZE)
    coarse = torch.randn(coarse_shape, generator=generator)
    prototypes = functional.interpolate(coarse, size=(image_size, image_size), mode="bilinear")
    prototypes = prototypes / prototypes.square().mean().sqrt()
    train = _draw(prototypes, num_samples, noise, generator)
    test = _draw(prototypes, num_test_samples, noise, generator)
    return ImageData("synthetic", train, test, num_classes, channels, image_size)


def _draw(
    prototypes: Tensor, num_samples: int, noise: float, generator: torch.Generator
) -> TensorImages:
    labels = torch.arange(num_samples) % len(prototypes)
    clean = prototypes[labels]
    return TensorImages(clean + noise * torch.randn(clean.shape, generator=generator), labels)
