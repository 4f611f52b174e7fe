"""Networks for the training programs, built by name."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from batchlr.argument_ranges import require_count
from batchlr.training.models.from_torchvision import torchvision_model
from batchlr.training.models.mlp import MLP, mlp_for_images
from batchlr.training.models.preresnet import PreResNet
from batchlr.training.models.vgg import VGG
from batchlr.training.models.wide_resnet import WideResNet

__all__ = ["MLP", "MODELS", "VGG", "PreResNet", "WideResNet", "build_model", "torchvision_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg": VGG,
    "wide_resnet": WideResNet,
    "preresnet": PreResNet,
    "mlp": mlp_for_images,
    "torchvision": torchvision_model,
}
SMALLEST_IMAGE = {"vgg": 32, "wide_resnet": 4, "preresnet": 4}  # side; below, a stage has no pixel


def build_model(
    name: str, *, num_classes: int, in_channels: int, image_size: int, **options: Any
) -> nn.Module:
    """The network ``name`` for square images, with initial weights from torch's global generator.

    Args:
        name: A key of ``MODELS``.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        options: The network's own arguments, for example ``depth=16`` (``arch="resnet50"`` for
            ``torchvision``).

    Raises:
        ValueError: Unknown name, unknown, missing or illegal option, or images too small.
    """
    if name not in MODELS:
        nearest = get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        msg = f"model must be one of {', '.join(MODELS)}, got {name!r}{hint}"
        raise ValueError(msg)
    require_count(num_classes=num_classes, in_channels=in_channels)
    smallest = SMALLEST_IMAGE.get(name, 1)
    if image_size < smallest:
        msg = f"{name} needs images of at least {smallest} pixels, got {image_size}"
        raise ValueError(msg)
    data_shape = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
    }
    signature = inspect.signature(MODELS[name])
    taken = {key: value for key, value in data_shape.items() if key in signature.parameters}
    try:
        arguments = signature.bind(**options, **taken)
    except TypeError as error:
        legal = ", ".join(key for key in signature.parameters if key not in data_shape)
        msg = f"model {name}: {error}; its options are {legal}"
        raise ValueError(msg) from None
    return MODELS[name](*arguments.args, **arguments.kwargs)
