"""Batch normalisation written so that its second derivative is cheap."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@final
class DifferentiableBatchNorm(TorchFunctionMode):
    """Inside this context, train-mode batch norms are composed of elementary operations.

    The fused kernel has no fused double backward; the generic one recomputes the statistics
    several times over. Running statistics are not updated: here they are copies anyway.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return torch.batch_norm(
            input, weight, bias, running_mean, running_var, False, momentum, eps, False
        )
    channels = input.shape[1]
    if input.numel() == channels:
        msg = (
            f"batch norm in train mode needs more than one value per channel, got input "
            f"{tuple(input.shape)}; use larger batches or norm_mode='eval'"
        )
        raise ValueError(msg)
    dims = [0, *range(2, input.ndim)]
    shape = [1, channels, *[1] * (input.ndim - 2)]
    centred = input - input.mean(dims, keepdim=True)
    scale = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.view(shape)
    output = centred * scale
    return output if bias is None else output + bias.view(shape)
