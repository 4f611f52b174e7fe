"""The classification networks of torchvision by name."""

from difflib import get_close_matches

import torch
from torch import nn

AUXILIARY_HEADS = ("googlenet", "inception_v3")  # return more than logits unless told not to


def torchvision_model(
    arch: str, num_classes: int, in_channels: int = 3, image_size: int | None = None
) -> nn.Module:
    """An untrained ``torchvision.models`` classifier, for example ``resnet50``.

    Args:
        arch: Name of the network, as ``torchvision.models.list_models`` spells it.
        num_classes: Number of outputs.
        in_channels: Channels of the images; these networks take 3 only.
        image_size: Height and width of the images, tried once; None tries nothing.

    Raises:
        ValueError: The name is unknown, or the images have not 3 channels or a size that the
            network does not take.
    """
    from torchvision import models  # lazy: the library itself must import without torchvision

    known = models.list_models(module=models)
    if arch not in known:
        nearest = get_close_matches(arch, known) or ["resnet18", "resnet50", "vgg16_bn"]
        msg = f"torchvision.models has no classifier {arch!r}; near names: {', '.join(nearest)}"
        raise ValueError(msg)
    if in_channels != 3:
        msg = f"torchvision's networks take images of 3 channels, got {in_channels}"
        raise ValueError(msg)
    options = {"aux_logits": False, "init_weights": True} if arch in AUXILIARY_HEADS else {}
    model: nn.Module = models.get_model(arch, weights=None, num_classes=num_classes, **options)
    if image_size is not None:
        _try(model, arch, image_size)
    return model


def _try(model: nn.Module, arch: str, image_size: int) -> None:
    """Raise ValueError unless ``model`` takes such images; in eval mode it is left as it was."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        msg = f"{arch} takes no images of {image_size} pixels: {str(error).partition(chr(10))[0]}"
        raise ValueError(msg) from error
    model.train()
