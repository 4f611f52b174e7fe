"""Wide residual networks (Zagoruyko & Komodakis 2016)."""

from functools import partial
from typing import get_args

from batchlr.argument_ranges import require_count
from batchlr.training.models.blocks import (
    BasicBlock,
    PreactivatedNetwork,
    Shortcut,
    check_dropout,
    conv3x3,
    residual_blocks,
)

STEM_CHANNELS = 16
STAGE_CHANNELS = (16, 32, 64)  # times the widening factor


class WideResNet(PreactivatedNetwork):
    """WRN-``depth``-``widen_factor``: three stages of wide pre-activation basic blocks.

    The defaults are the authors' network. Some reimplementations, among them the one behind many
    published Hessian spectra, have ``conv_bias=True`` and ``shortcut="raw"``. Initial weights: see
    ``blocks.initialize``.

    Args:
        depth: ``6 n + 4``.
        widen_factor: Multiplies the channels 16, 32, 64 of the stages.
        num_classes: Number of outputs.
        dropout: Probability of dropping a value between the two convolutions of a block.
        in_channels: Channels of the images.
        conv_bias: Whether convolutions have a bias.
        shortcut: Whether convolved shortcuts read the raw or the pre-activated input of a block.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        *,
        num_classes: int,
        dropout: float = 0.0,
        in_channels: int = 3,
        conv_bias: bool = False,
        shortcut: Shortcut = "preactivated",
    ) -> None:
        num_blocks, rest = divmod(depth - 4, 6)
        if rest or num_blocks < 1:
            msg = f"WideResNet depth must be 6 n + 4 with n >= 1, got {depth}"
            raise ValueError(msg)
        require_count(widen_factor=widen_factor)
        if shortcut not in get_args(Shortcut):
            legal = ", ".join(get_args(Shortcut))
            msg = f"shortcut must be one of {legal}, got {shortcut!r}"
            raise ValueError(msg)
        check_dropout(dropout)
        stem = conv3x3(in_channels, STEM_CHANNELS, bias=conv_bias)
        make_block = partial(BasicBlock, dropout=dropout, conv_bias=conv_bias, shortcut=shortcut)
        blocks = residual_blocks(
            make_block,
            in_channels=STEM_CHANNELS,
            stage_channels=[widen_factor * channels for channels in STAGE_CHANNELS],
            num_blocks=num_blocks,
        )
        super().__init__(stem, blocks, num_classes)
