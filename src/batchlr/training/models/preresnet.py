"""Pre-activation residual networks for CIFAR (He et al. 2016)."""

from typing import Literal

from batchlr.training.models.blocks import (
    BasicBlock,
    Bottleneck,
    PreactivatedNetwork,
    conv3x3,
    residual_blocks,
    scaled,
)

STAGE_CHANNELS = (16, 32, 64)
BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], int]] = {
    "basic": (BasicBlock, 6),  # depth = 6 blocks + 2
    "bottleneck": (Bottleneck, 9),  # depth = 9 blocks + 2
}


class PreResNet(PreactivatedNetwork):
    """Three stages of pre-activation blocks, a final batch norm and ReLU, average pool, linear.

    "PreResNet-110" is the name of two networks: with bottleneck blocks it has 1.2 million
    parameters, with basic blocks 1.7 million. Convolutions have no bias, convolved shortcuts
    read the raw input of their block. Initial weights: see ``blocks.initialize``.

    Args:
        depth: ``9 n + 2`` with bottleneck blocks, ``6 n + 2`` with basic ones.
        block: Kind of block.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Multiplies the channels of all convolutions.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        block: Literal["bottleneck", "basic"] = "bottleneck",
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        if block not in BLOCKS:
            msg = f"PreResNet block must be one of {', '.join(BLOCKS)}, got {block!r}"
            raise ValueError(msg)
        block_type, layers_per_block = BLOCKS[block]
        num_blocks, rest = divmod(depth - 2, layers_per_block)
        if rest or num_blocks < 1:
            msg = (
                f"PreResNet depth must be {layers_per_block} n + 2 with n >= 1 "
                f"for {block} blocks, got {depth}"
            )
            raise ValueError(msg)
        stage_channels = [scaled(c, width) for c in STAGE_CHANNELS]
        stem = conv3x3(in_channels, stage_channels[0])
        blocks = residual_blocks(
            block_type,
            in_channels=stage_channels[0],
            stage_channels=stage_channels,
            num_blocks=num_blocks,
        )
        super().__init__(stem, blocks, num_classes)
