"""What the convolutional networks share: residual blocks, widths and initial weights."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from batchlr.argument_ranges import require_fraction, require_positive

Shortcut = Literal["raw", "preactivated"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, added to a shortcut.

    The shortcut is the identity, or a 1x1 convolution where the shape changes. That convolution
    reads the block's input (``"raw"``) or the input after the first norm and ReLU
    (``"preactivated"``); published networks do either, with equal parameter counts.

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions and of the output.
        stride: Stride of the first convolution.
        dropout: Probability of dropping a value between the convolutions.
        conv_bias: Whether convolutions have a bias.
        shortcut: What a convolved shortcut reads.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        dropout: float = 0.0,
        conv_bias: bool = False,
        shortcut: Shortcut = "raw",
    ) -> None:
        super().__init__()
        self.out_channels = channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride=stride, bias=conv_bias)
        self.norm2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv3x3(channels, channels, bias=conv_bias)
        self.shortcut = projection(in_channels, channels, stride=stride, bias=conv_bias)
        self.shortcut_reads = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        activated: Tensor = self.norm1(x).relu()
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(self.dropout(self.norm2(residual).relu()))
        carried = _carried(self.shortcut, x, activated, self.shortcut_reads)
        return residual + carried


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU, added to a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the inner convolutions; the output has four times as many.
        stride: Stride of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.out_channels = 4 * channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride=stride)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.out_channels, 1, bias=False)
        self.shortcut = projection(in_channels, self.out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, 4 channels, H / stride, W / stride)``."""
        activated: Tensor = self.norm1(x).relu()
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(self.norm2(residual).relu())
        residual = self.conv3(self.norm3(residual).relu())
        return residual + _carried(self.shortcut, x, activated, "raw")


class PreactivatedNetwork(nn.Module):
    """A stem and pre-activation blocks, then what ends every such network.

    That is a batch norm and ReLU, the average over the image, and a linear layer. Initial weights:
    see ``initialize``.

    Args:
        stem: First layer.
        blocks: Blocks in order, at least one.
        num_classes: Number of outputs.
    """

    def __init__(
        self, stem: nn.Module, blocks: Sequence[BasicBlock | Bottleneck], num_classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(blocks[-1].out_channels)
        self.output = nn.Linear(blocks[-1].out_channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_channels, H, W)``."""
        x = self.norm(self.blocks(self.stem(x))).relu()
        logits: Tensor = self.output(x.mean(dim=(2, 3)))
        return logits


def residual_blocks(
    make_block: Callable[..., BasicBlock | Bottleneck],
    *,
    in_channels: int,
    stage_channels: Sequence[int],
    num_blocks: int,
) -> list[BasicBlock | Bottleneck]:
    """Stages of ``num_blocks`` blocks; each stage but the first halves the image."""
    blocks: list[BasicBlock | Bottleneck] = []
    for stage, channels in enumerate(stage_channels):
        for index in range(num_blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(make_block(in_channels, channels, stride=stride))
            in_channels = blocks[-1].out_channels
    return blocks


def conv3x3(
    in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A 3x3 convolution with padding 1, so that stride 1 keeps the image size."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def projection(
    in_channels: int, out_channels: int, *, stride: int, bias: bool = False
) -> nn.Conv2d | None:
    """The 1x1 convolution of a shortcut whose shape changes, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least 1.

    Raises:
        ValueError: ``width`` is not positive and finite.
    """
    require_positive(width=width)
    return max(1, round(channels * width))


def check_dropout(dropout: float) -> float:
    """``dropout``, if it is a probability below 1.

    Raises:
        ValueError: It is not.
    """
    require_fraction(dropout=dropout)
    return dropout


def initialize(model: nn.Module) -> None:
    """Draw the initial weights of a convolutional network.

    Convolutions: normal with variance ``2 / fan_out`` (He et al. 2015), biases zero. Batch norm:
    scale 1, shift 0. Linear layers keep PyTorch's default, as in the published CIFAR networks.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _carried(shortcut: nn.Module | None, x: Tensor, activated: Tensor, reads: Shortcut) -> Tensor:
    if shortcut is None:
        return x
    carried: Tensor = shortcut(x if reads == "raw" else activated)
    return carried
