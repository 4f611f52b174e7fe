"""Batch normalisation whose second derivative is a few passes over its input."""

from typing import Any

import torch
from torch import Tensor

from batchlr.operators.linear_pass import only_cotangents


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, except that running statistics are not updated.

    Raises:
        ValueError: one value per channel has no variance (train mode).
    """
    channels = input.shape[1]
    if training and input.numel() == channels:
        msg = (
            f"batch norm in train mode needs more than one value per channel, got input "
            f"{tuple(input.shape)}; use larger batches or norm_mode='eval'"
        )
        raise ValueError(msg)
    scale = input.new_ones(channels) if weight is None else weight
    shift = torch.zeros_like(scale) if bias is None else bias
    fixed = not training and running_mean is not None and running_var is not None
    statistics = (running_mean, running_var) if fixed else (None, None)
    result: Tensor = _BatchNorm.apply(input, scale, shift, *statistics, eps)
    return result


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``: `batch_norm` with every image's channels its own."""
    if not use_input_stats:
        if running_mean is None or running_var is None:
            msg = "instance norm in eval mode needs its running statistics, got none"
            raise ValueError(msg)
        return batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    images, channels = input.shape[:2]
    scale, shift = (None if t is None else t.repeat(images) for t in (weight, bias))
    rows = input.reshape(1, images * channels, *input.shape[2:])
    return batch_norm(rows, None, None, scale, shift, training=True, eps=eps).view(input.shape)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        shift: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.by_batch = running_mean is None
        ctx.eps = eps
        if running_mean is None or running_var is None:
            output, mean, inverse_std = torch.native_batch_norm(
                input, scale, shift, None, None, True, 0.0, eps
            )
        else:
            # A copy: to older torch a forward pass on dual numbers is a change of what it reads.
            mean, inverse_std = running_mean.clone(), (running_var + eps).rsqrt()
            output, _, _ = torch.native_batch_norm(
                input, scale, shift, running_mean, running_var, False, 0.0, eps
            )
        ctx.save_for_backward(input, scale, mean, inverse_std)
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return (None,) * 6
        x, w, mean, s = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_pull_back(cotangent, x, w, mean, s, ctx.by_batch), None, None, None
        pulled = _BatchNormBackward.apply(cotangent, x, w, mean, s, ctx.by_batch, ctx.eps)
        return *pulled, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cotangent: Tensor,
        input: Tensor,
        scale: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        by_batch: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.by_batch, ctx.eps = by_batch, eps
        pulled = _pull_back(cotangent, input, scale, mean, inverse_std, by_batch)
        ctx.save_for_backward(cotangent, input, scale, mean, inverse_std, *pulled[1:])
        return pulled

    @staticmethod
    def backward(
        ctx: Any, to_input: Tensor | None, to_scale: Tensor | None, to_shift: Tensor | None
    ) -> Any:
        """From tangents ``v, t, b`` of input, scale and shift: their image and the mixed terms.

        With ``h = (x - mean) s``, ``m`` the mean over a channel's ``n`` values, ``a`` the cotangent
        and ``w`` the scale, the backward pass is ``w s (a - m(a) - h m(a h))``, ``n m(a h)`` and
        ``n m(a)``; this is its derivative by ``a``, ``x`` and ``w``.
        """
        a, x, w, mean, s, sum_ah, sum_a = ctx.saved_tensors
        tangents = (to_input, to_scale, to_shift)
        if torch.is_grad_enabled():  # a third derivative is wanted: the loss holds a gradient
            return *_by_autograd(ctx, a, x, w, mean, s, tangents), None, None, None, None
        count = x.numel() // x.shape[1]
        zero = torch.zeros_like(s)
        t = zero if to_scale is None else to_scale
        b = zero if to_shift is None else to_shift
        slope = _per_channel(s * t, x)
        m_v = m_vh = zero
        image = None
        if to_scale is not None:
            image = torch.addcmul(_per_channel(b - s * t * mean, x), x, slope)
        elif to_shift is not None:
            image = _per_channel(b, x).expand_as(x).clone()
        if to_input is not None and ctx.by_batch:
            pulled, sum_vh, sum_v = _pull_back(to_input, x, w, mean, s, True)
            m_v, m_vh = sum_v / count, sum_vh / count
            image = pulled if image is None else image.add_(pulled)
        elif to_input is not None:
            factor = _per_channel(w * s, x)
            image = to_input * factor if image is None else image.addcmul_(to_input, factor)
        if only_cotangents():
            return image, *[None] * 6
        m_a, m_ah = sum_a / count, sum_ah / count
        m_av = zero
        if to_input is not None:
            m_av = (a * to_input).mean([0, *range(2, x.ndim)], dtype=s.dtype)
        if not ctx.by_batch:
            of_input = None if to_scale is None else a * slope
            return image, of_input, count * s * m_av, *[None] * 4
        spread = m_av - m_a * m_v - m_ah * m_vh
        by_a = s * (t - w * s * m_vh)
        by_v = -w * s.square() * m_ah
        by_h = w * s.square() * (2 * m_ah * m_vh - spread) - s * t * m_ah
        by_x = s * by_h
        rest = -by_a * m_a - by_v * m_v - by_x * mean
        of_input = torch.addcmul(_per_channel(rest, x), a, _per_channel(by_a, x))
        of_input.addcmul_(x, _per_channel(by_x, x))
        if to_input is not None:
            of_input.addcmul_(to_input, _per_channel(by_v, x))
        return image, of_input, count * s * spread, *[None] * 4


def _pull_back(
    cotangent: Tensor,
    input: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, scale and shift."""
    fixed = (None, None) if by_batch else (mean, inverse_std.square().reciprocal())
    saved = (mean, inverse_std) if by_batch else (None, None)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        cotangent, input, scale, *fixed, *saved, by_batch, 0.0, [True, True, True]
    )
    return result


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view([1, -1, *[1] * (like.ndim - 2)])


def _by_autograd(
    ctx: Any,
    cotangent: Tensor,
    input: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The derivative of the backward pass from elementary operations, differentiable itself."""
    # Views, for the derivative is the partial one: the cotangent may depend on the input.
    a, x, w = (
        t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
        for t in (cotangent, input, scale)
    )
    shift = torch.zeros_like(w, requires_grad=True)
    if ctx.by_batch:
        dims = [0, *range(2, x.ndim)]
        centred = x - x.mean(dims, keepdim=True)
        normalised = centred * (centred.square().mean(dims, keepdim=True) + ctx.eps).rsqrt()
    else:
        normalised = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
    output = normalised * _per_channel(w, x) + _per_channel(shift, x)
    pulled = torch.autograd.grad(output, (x, w, shift), a, create_graph=True)
    pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if t is not None]
    return torch.autograd.grad(
        [g for g, _ in pairs],
        (a, x, w),
        [t for _, t in pairs],
        create_graph=True,
        allow_unused=True,
    )
