"""Which policies a controller may follow, and what goes with which."""

from typing import Literal, get_args

import torch

from batchlr.measurement.optimizer_state import optimizer_kind
from batchlr.policies import POLICIES, PolicyName

LimitPolicy = Literal["mean_square", "edge", "heavy_ball"]
Policy = Literal[LimitPolicy, "cdat", PolicyName]

LIMIT_POLICIES: tuple[LimitPolicy, ...] = get_args(LimitPolicy)
"""Those that keep to a limit of stability; the others apply a rate as it is."""


def sets_momentum(policy: str) -> bool:
    """Whether the policy has a momentum of its own, which is for SGD."""
    return policy == "heavy_ball" or policy in POLICIES


def check_policy(
    policy: str, optimizer: torch.optim.Optimizer, *, safety: float, adjust_momentum: bool
) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: ``policy`` is unknown, it cannot steer ``optimizer``, or it is to be changed.
    """
    if policy not in get_args(Policy):
        msg = f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}"
        raise ValueError(msg)
    if sets_momentum(policy) and not isinstance(optimizer, torch.optim.SGD):
        msg = (
            f"policy {policy} gives a rate and a momentum for SGD, got "
            f"{type(optimizer).__name__}: use SGD, or policy='edge'"
        )
        raise ValueError(msg)
    if policy in LIMIT_POLICIES:
        optimizer_kind(optimizer)
    elif safety != 1.0:
        msg = f"policy {policy} is applied as published: safety must be 1, got {safety}"
        raise ValueError(msg)
    if adjust_momentum and policy not in ("mean_square", "edge"):
        owner = "sets the momentum itself" if sets_momentum(policy) else "leaves it alone"
        msg = f"policy {policy} {owner}: leave adjust_momentum False"
        raise ValueError(msg)
    if adjust_momentum and isinstance(optimizer, torch.optim.RMSprop):
        msg = (
            "adjust_momentum needs SGD or Adam, got RMSprop, which makes its momentum's buffer "
            "only once; set its momentum yourself and leave adjust_momentum out"
        )
        raise ValueError(msg)
