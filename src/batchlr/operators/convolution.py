"""A convolution whose second derivative is made of fast kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchlr.operators.linear_pass import only_cotangents

_NUM_SPATIAL: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}

_Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


def is_convolution(function: Callable[..., Any]) -> bool:
    """Whether `convolve` can stand in for ``function``."""
    return function in _NUM_SPATIAL


def convolve(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``function``, one of torch's convolutions, of these arguments.

    Torch's own double backward turns two of its four terms into convolutions with kernels as large
    as an image, and computes terms nobody asked for.
    """
    num_spatial = _NUM_SPATIAL[function]
    if isinstance(padding, str) or input.ndim != num_spatial + 2 or input.is_complex():
        return function(input, weight, bias, stride, padding, dilation, groups)

    def spread(value: int | Sequence[int]) -> list[int]:
        given = [value] if isinstance(value, int) else list(value)
        return given * num_spatial if len(given) == 1 else given

    geometry = (
        spread(stride), spread(padding), spread(dilation), False, [0] * num_spatial, groups,
    )  # fmt: skip
    result: Tensor = _Convolution.apply(input, weight, bias, geometry)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return torch.convolution(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *_pull_back(cotangent, input, weight, ctx.geometry, wanted), None
        return *_ConvolutionBackward.apply(cotangent, input, weight, ctx.geometry, wanted), None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cotangent: Tensor,
        input: Tensor,
        weight: Tensor,
        geometry: _Geometry,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cotangent, input, weight)
        ctx.geometry = geometry
        return _pull_back(cotangent, input, weight, geometry, wanted)

    @staticmethod
    def backward(ctx: Any, to_input: Tensor | None, to_weight: Tensor | None, to_bias: Any) -> Any:
        """From tangents of input, weight and bias: their image, and the two mixed terms."""
        cotangent, input, weight = ctx.saved_tensors
        needs_cotangent, needs_input, needs_weight = ctx.needs_input_grad[:3]
        pushed = of_input = of_weight = None
        if needs_cotangent:
            if to_input is not None:
                pushed = torch.convolution(to_input, weight, to_bias, *ctx.geometry)
            if to_weight is not None:
                bias = to_bias if pushed is None else None
                term = torch.convolution(input, to_weight, bias, *ctx.geometry)
                pushed = term if pushed is None else pushed.add_(term)
            if pushed is None and to_bias is not None:
                shape = [1, -1, *[1] * (cotangent.ndim - 2)]
                pushed = to_bias.view(shape).expand_as(cotangent)
        if not only_cotangents():
            if needs_input and to_weight is not None:
                mask = (True, False, False)
                of_input = _pull_back(cotangent, input, to_weight, ctx.geometry, mask)[0]
            if needs_weight and to_input is not None:
                mask = (False, True, False)
                of_weight = _pull_back(cotangent, to_input, weight, ctx.geometry, mask)[1]
        return pushed, of_input, of_weight, None, None


def _pull_back(
    cotangent: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    result: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        cotangent, input, weight, [weight.shape[0]], *geometry, wanted
    )
    return result
