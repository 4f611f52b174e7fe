"""Layer normalisation whose second derivative is a few passes over its input."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchlr.operators.linear_pass import only_cotangents


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm``; torch's own for half precision and mixed dtypes.

    Torch's double backward writes every term of the second derivative out: forty passes, nine
    times its backward's time (measured, docs/log.md).
    """
    shape = list(normalized_shape)
    dtypes = {t.dtype for t in (input, weight, bias) if t is not None}
    if dtypes not in ({torch.float32}, {torch.float64}) or input.numel() == 0:
        return F.layer_norm(input, shape, weight, bias, eps)
    scale = input.new_ones(shape) if weight is None else weight
    shift = torch.zeros_like(scale) if bias is None else bias
    result: Tensor = _LayerNorm.apply(input.contiguous(), scale, shift, shape, eps)
    return result


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, scale: Tensor, shift: Tensor, shape: list[int], eps: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.eps = shape, eps
        output, mean, inverse_std = torch.native_layer_norm(input, shape, scale, shift, eps)
        ctx.save_for_backward(input, scale, mean, inverse_std)
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return (None,) * 5
        x, w, mean, s = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_pull_back(cotangent, x, w, mean, s, ctx.shape), None, None
        pulled = _LayerNormBackward.apply(cotangent, x, w, mean, s, ctx.shape, ctx.eps)
        return *pulled, None, None


class _LayerNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cotangent: Tensor,
        input: Tensor,
        scale: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        shape: list[int],
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.eps = shape, eps
        # What all products have in common is computed once.
        size = math.prod(shape)
        h = ((input - mean) * inverse_std).view(-1, size)
        share = inverse_std.view(-1, 1) / -size
        by_tangent = share * torch.mv(h * cotangent.reshape(-1, size), scale.flatten()).unsqueeze(1)
        ctx.save_for_backward(cotangent, input, scale, mean, inverse_std, h, share, by_tangent)
        return _pull_back(cotangent, input, scale, mean, inverse_std, shape)

    @staticmethod
    def backward(
        ctx: Any, to_input: Tensor | None, to_scale: Tensor | None, to_shift: Tensor | None
    ) -> Any:
        """From tangents ``v, t, b`` of input, scale and shift: their image and the mixed terms.

        With ``h = (x - mean) s``, ``m`` the mean over a row, ``c`` the cotangent, ``w`` the scale
        and ``p(q) = s (q - m(q) - h m(q h))``, the backward pass is ``p(c w)``, and the sums of
        ``c h`` and ``c`` over the rows; this is its derivative by ``c``, ``x`` and ``w``.
        """
        c, x, w, mean, s, h, share, by_tangent = ctx.saved_tensors
        tangents = (to_input, to_scale, to_shift)
        if torch.is_grad_enabled():  # a third derivative is wanted: the loss holds a gradient
            return *_by_autograd(c, x, w, tangents, ctx.shape, ctx.eps), *[None] * 4
        size = h.shape[1]
        v = None if to_input is None else to_input.reshape(-1, size)
        t = None if to_scale is None else to_scale.reshape(size)
        w = w.reshape(size)
        image = pushed = None
        if t is not None:
            shift = torch.zeros_like(t) if to_shift is None else to_shift.reshape(size)
            image = torch.addcmul(shift, h, t)
        elif to_shift is not None:
            image = to_shift.reshape(size).expand_as(h).clone()
        if v is not None:
            pushed = _project(v, x, mean, s, ctx.shape)
            image = pushed * w if image is None else image.addcmul_(pushed, w)
        image = None if image is None else image.view(x.shape)
        if only_cotangents() or (v is None and t is None):
            return image, *[None] * 6
        c = c.reshape(-1, size)
        if v is None or pushed is None:
            return image, _project(c * t, x, mean, s, ctx.shape).view(x.shape), *[None] * 5
        by_c = share * torch.linalg.vecdot(v, h).unsqueeze(1)
        slope = by_c * w if t is None else torch.addcmul(t, by_c, w)
        slope = slope.mul_(c).addcmul_(v, by_tangent)
        common = pushed * c
        of_input = _project(slope, x, mean, s, ctx.shape)
        of_input.addcmul_(h, share * torch.mv(common, w).unsqueeze(1))
        return image, of_input.view(x.shape), common.sum(0).view(ctx.shape), *[None] * 4


def _pull_back(
    cotangent: Tensor,
    input: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shape: list[int],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, scale and shift."""
    result: tuple[Tensor | None, ...] = torch.ops.aten.native_layer_norm_backward(
        cotangent, input, shape, mean, inverse_std, scale, scale, [True, True, True]
    )
    return result


def _project(
    rows: Tensor, input: Tensor, mean: Tensor, inverse_std: Tensor, shape: list[int]
) -> Tensor:
    """``s (q - m(q) - h m(q h))`` of each row ``q``."""
    result: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
        rows.view(input.shape), input, shape, mean, inverse_std, None, None, [True, False, False]
    )
    return result[0].view(rows.shape)


def _by_autograd(
    cotangent: Tensor,
    input: Tensor,
    scale: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    shape: list[int],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """The derivative of the backward pass from elementary operations, differentiable itself.

    Torch's own double backward is not: it takes mean and deviation for constants, so that a Hessian
    made of its derivative is not even symmetric (measured with torch 2.13).
    """
    # Views, for the derivative is the partial one: the cotangent may depend on the input.
    a, x, w = (
        t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
        for t in (cotangent, input, scale)
    )
    shift = torch.zeros_like(w, requires_grad=True)
    dims = [*range(-len(shape), 0)]
    centred = x - x.mean(dims, keepdim=True)
    output = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt() * w + shift
    pulled = torch.autograd.grad(output, (x, w, shift), a, create_graph=True)
    pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if t is not None]
    return torch.autograd.grad(
        [g for g, _ in pairs],
        (a, x, w),
        [t for _, t in pairs],
        create_graph=True,
        allow_unused=True,
    )
