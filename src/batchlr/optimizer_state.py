"""What curvature needs to know of an optimizer: its kind, rates, decays and second moments.

An optimizer is a torch optimizer, or ``"sgd"``, ``"adam"`` or None where there is none yet.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from batchlr.operators.curvature_matrix import trainable_parameters

Optimizer = torch.optim.Optimizer | Literal["sgd", "adam"] | None

_BETA1 = 0.9  # torch's default, for when there is no optimizer to ask


def is_adam(optimizer: Optimizer) -> bool:
    """Whether Adam's curvature is wanted; None wants both kinds.

    Raises:
        ValueError: no learning rate is known for the optimizer.
    """
    if isinstance(optimizer, str) and optimizer not in ("sgd", "adam"):
        msg = f"optimizer must be 'sgd', 'adam' or a torch optimizer, got {optimizer!r}"
        raise ValueError(msg)
    if optimizer is None or isinstance(optimizer, str):
        return optimizer != "sgd"
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return True
    if isinstance(optimizer, torch.optim.SGD):
        return False
    msg = (
        f"learning rates are known for SGD, Adam and AdamW, got {type(optimizer).__name__}; "
        "pass optimizer='sgd' or 'adam' for the nearer one"
    )
    raise ValueError(msg)


def group_value(optimizer: Optimizer, key: str, *, default: float = 0.0) -> float:
    """The largest value of ``key`` over the optimizer's groups."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return default
    if key == "weight_decay" and not isinstance(optimizer, torch.optim.SGD):
        return 0.0  # Adam's decay does not add to the preconditioned curvature by itself
    return max(float(group.get(key, default)) for group in optimizer.param_groups)


def beta1(optimizer: Optimizer) -> float:
    """Adam's decay rate of the gradient average, the largest over its groups."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return max(float(group["betas"][0]) for group in optimizer.param_groups)
    return _BETA1


def decoupled_decay(optimizer: Optimizer) -> float:
    """Weight decay that acts beside the gradient (AdamW), the largest over the groups."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return 0.0
    decays = (
        float(group["weight_decay"])
        for group in optimizer.param_groups
        if group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    )
    return max(decays, default=0.0)


def second_moments(model: nn.Module, optimizer: Optimizer) -> tuple[Tensor, float] | None:
    """Adam's bias-corrected second moments ``(P,)`` and age; None before its first step."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    betas = {
        id(p): float(group["betas"][1]) for group in optimizer.param_groups for p in group["params"]
    }
    moments = []
    age = 0.0
    for parameter in trainable_parameters(model):
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            return None
        age = float(state["step"])
        correction = 1 - betas[id(parameter)] ** age
        moments.append((state["exp_avg_sq"] / correction).reshape(-1))
    return torch.cat(moments), age


def rate_ratios(model: nn.Module, optimizer: Optimizer) -> Tensor | None:
    """Each parameter's rate over the largest ``(P,)``; None if all are equal."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    rates = {
        id(p): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    parameters = trainable_parameters(model)
    largest = max((rates.get(id(p), 0.0) for p in parameters), default=0.0)
    if largest <= 0 or all(rates.get(id(p), 0.0) == largest for p in parameters):
        return None
    return torch.cat(
        [
            torch.full_like(p, rates.get(id(p), 0.0) / largest).reshape(-1).detach()
            for p in parameters
        ]
    )
