"""The Hessian of softmax cross-entropy in its logits, in closed form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def softmax_curvature(
    criterion: Callable[..., Any], outputs: Tensor, targets: Tensor, weight: float
) -> Callable[[Tensor], Tensor] | None:
    """``u -> S u`` of the mean loss for logits ``(B, C, ...)``; None for any other criterion.

    With ``p`` the softmax and ``c`` what the loss's coefficients of one position add up to,
    ``S u = c (p u - p <p, u>) / weight`` (Schraudolph 2002). It keeps one array of the logits' size
    where a double backward through the loss keeps about ten.

    Args:
        criterion: of the loss.
        outputs: logits, detached.
        targets: class indices or probabilities.
        weight: what the mean divides by.
    """
    if criterion is functional.cross_entropy:
        criterion = nn.CrossEntropyLoss()
    if type(criterion) is not nn.CrossEntropyLoss:
        return None
    dim = 1 if outputs.ndim > 1 else 0
    probabilities = outputs.softmax(dim)
    totals = _coefficients(criterion, targets, outputs.shape[dim], dim).to(outputs) / weight
    totals = totals.unsqueeze(dim)

    def multiply(pushed: Tensor) -> Tensor:
        weighted = probabilities * pushed
        inner = weighted.sum(dim, keepdim=True)
        image: Tensor = (weighted - probabilities * inner) * totals
        return image

    return multiply


def _coefficients(
    criterion: nn.CrossEntropyLoss, targets: Tensor, num_classes: int, dim: int
) -> Tensor:
    """Sum over classes of the factors of ``-log p`` at each position, ``(B, ...)``."""
    weights = criterion.weight
    smoothing = criterion.label_smoothing
    if weights is None:
        weights = torch.ones(num_classes, dtype=torch.float64, device=targets.device)
    weights = weights.double().to(targets.device)
    uniform = weights.mean()
    if targets.is_floating_point():
        mixed = (1 - smoothing) * targets.double() + smoothing / num_classes
        return mixed.movedim(dim, -1) @ weights
    kept = targets != criterion.ignore_index
    of_target = weights[targets.where(kept, torch.zeros_like(targets))]
    return ((1 - smoothing) * of_target + smoothing * uniform) * kept
