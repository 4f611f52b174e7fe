"""Embeddings with a second derivative: dense gradients, and bags that torch sums in one kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.nn.functional.embedding`` with dense gradients, also where ``sparse``.

    Raises:
        ValueError: ``scale_grad_by_freq``, whose gradients are those of no loss.
    """
    if scale_grad_by_freq:
        msg = (
            "an embedding with scale_grad_by_freq=True passes on something else than the loss's "
            "gradient, which has no symmetric matrix; switch that off to measure curvature"
        )
        raise ValueError(msg)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag``, whose kernel has no double backward.

    Raises:
        NotImplementedError: ``mode="max"``.
        ValueError: see `embedding`.
    """
    if mode == "max":
        msg = (
            "embedding_bag with mode='max' has no second derivative; take the maximum of "
            "torch.nn.functional.embedding over each bag instead"
        )
        raise NotImplementedError(msg)
    indices = input.flatten()
    bags, count = _bags(input, offsets, include_last_offset)
    rows = embedding(indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten().unsqueeze(1)
    if padding_idx is not None:
        kept = indices != padding_idx % len(weight)
        rows, bags = rows[kept], bags[kept]
    total = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return total
    return total / torch.bincount(bags, minlength=count).clamp(min=1).unsqueeze(1)


def _bags(input: Tensor, offsets: Any, include_last_offset: bool) -> tuple[Tensor, int]:
    """The number of the bag that each index lies in ``(n,)``, and how many bags there are."""
    if offsets is None:  # (B, length)
        lengths = torch.full((len(input),), input.shape[1], device=input.device)
    else:
        ends = offsets if include_last_offset else F.pad(offsets, (0, 1), value=len(input))
        lengths = ends.diff()
    numbers = torch.arange(len(lengths), device=input.device)
    return numbers.repeat_interleave(lengths.to(numbers)), len(lengths)
