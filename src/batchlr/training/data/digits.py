"""Scikit-learn's handwritten digits: real data that needs no download."""

import torch
from torch.nn import functional

from batchlr.argument_ranges import require_count
from batchlr.training.data.images import ImageData, TensorImages
from batchlr.training.data.transforms import Augment, CropAndFlip, Normalization, augments

TEST_EVERY = 5  # every fifth sample is a test sample: 360 of 1797


def load_digits(*, image_size: int = 32, augment: Augment = "none") -> ImageData:
    """1437 training and 360 test images of ten digits, one channel.

    The 8x8 originals are enlarged bilinearly and normalised with the mean and standard deviation
    of the training pixels. The split is fixed: sorted by class, and within a class in the order of
    scikit-learn, every fifth sample is a test sample.

    Args:
        image_size: Height and width of the images, in pixels.
        augment: ``"standard"`` shifts training images by up to an eighth of their size; they are
            not mirrored, which would make other characters of them.

    Raises:
        ValueError: ``image_size`` is below 1 or ``augment`` unknown.
    """
    from sklearn import datasets  # lazy: takes a second to import

    require_count(image_size=image_size)
    augmentation = CropAndFlip(image_size // 8, mirror=False) if augments(augment) else None
    digits = datasets.load_digits()
    originals = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    enlarged = functional.interpolate(originals, size=(image_size, image_size), mode="bilinear")
    pixels = (255 * enlarged).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    by_class = torch.argsort(labels, stable=True)
    is_test = torch.arange(len(labels)) % TEST_EVERY == 0
    train, test = by_class[~is_test], by_class[is_test]
    normalization = Normalization.of(pixels[train])
    return ImageData(
        name="digits",
        train=TensorImages(pixels[train], labels[train], normalization, augmentation),
        test=TensorImages(pixels[test], labels[test], normalization),
        num_classes=10,
        in_channels=1,
        image_size=image_size,
    )
