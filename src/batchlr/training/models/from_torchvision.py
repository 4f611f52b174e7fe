"""The classification networks of torchvision by name."""

from difflib import get_close_matches

from torch import nn

AUXILIARY_HEADS = ("googlenet", "inception_v3")  # return more than logits unless told not to


def torchvision_model(arch: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """An untrained ``torchvision.models`` classifier, for example ``resnet50``.

    Args:
        arch: Name of the network, as ``torchvision.models.list_models`` spells it.
        num_classes: Number of outputs.
        in_channels: Channels of the images; these networks take 3 only.

    Raises:
        ValueError: The name is unknown or the images have not 3 channels.
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
    return model
