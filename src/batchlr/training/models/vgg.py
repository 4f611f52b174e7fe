"""VGG for small images (Simonyan & Zisserman 2015), with the 512-512 head used on CIFAR."""

from torch import Tensor, nn

from batchlr.training.models.blocks import check_dropout, conv3x3, initialize, scaled

STAGE_CHANNELS = (64, 128, 256, 512, 512)
CONVS_PER_STAGE = {  # depth: convolutions in each stage; depth counts them and three linear layers
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each halving the image, and a head of three linear layers.

    Takes images of 32x32 or larger; what is left of the image after the stages is averaged (at
    32x32 that is one pixel). Convolutions keep their bias beside batch norm, as in the original.
    Initial weights: see ``blocks.initialize``.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: Number of outputs.
        batch_norm: Whether a batch norm follows each convolution.
        width: Multiplies the channels of all convolutions and the width of the head.
        in_channels: Channels of the images.
        head: Width of the two hidden linear layers (4096 in the ImageNet network).
        dropout: Probability of dropping an input of the two hidden linear layers.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        batch_norm: bool = False,
        width: float = 1.0,
        in_channels: int = 3,
        head: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth not in CONVS_PER_STAGE:
            msg = f"VGG depth must be one of 11, 13, 16, 19, got {depth}"
            raise ValueError(msg)
        if head < 1:
            msg = f"VGG head must be at least 1, got {head}"
            raise ValueError(msg)
        channels = [scaled(c, width) for c in STAGE_CHANNELS]
        hidden = scaled(head, width)
        self.features = _features(depth, in_channels, channels, batch_norm=batch_norm)
        self.dropout = nn.Dropout(check_dropout(dropout)) if dropout else nn.Identity()
        self.hidden1 = nn.Linear(channels[-1], hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_channels, H, W)``."""
        x = self.features(x).mean(dim=(2, 3))  # (B, C)
        x = self.hidden1(self.dropout(x)).relu()
        x = self.hidden2(self.dropout(x)).relu()
        logits: Tensor = self.output(x)
        return logits


def _features(
    depth: int, in_channels: int, channels: list[int], *, batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out_channels, num_convs in zip(channels, CONVS_PER_STAGE[depth], strict=True):
        for _ in range(num_convs):
            layers.append(conv3x3(in_channels, out_channels, bias=True))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU())
            in_channels = out_channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
