"""What curvature needs to know of an optimizer: its kind, rates, decays and second moments.

An optimizer is a torch optimizer, or ``"sgd"``, ``"adam"``, ``"rmsprop"`` or None where there is
none yet.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchlr.operators.parameters import trainable_parameters
from batchlr.operators.unsharded import original
from batchlr.sharded_tensors import gathered

Kind = Literal["sgd", "adam", "rmsprop"]
Optimizer = torch.optim.Optimizer | Kind | None

_BETA1 = 0.9  # torch's default, for when there is no optimizer to ask


def optimizer_kind(optimizer: Optimizer) -> Kind | None:
    """Which law limits the optimizer's rate; None, that of SGD and that of Adam, stays None.

    Raises:
        ValueError: no learning rate is known for the optimizer, or not for these options of it.
    """
    if isinstance(optimizer, str) and optimizer not in ("sgd", "adam", "rmsprop"):
        msg = (
            "optimizer must be 'sgd', 'adam' (for AdamW, too), 'rmsprop' or a torch optimizer, got "
            f"{optimizer!r}"
        )
        raise ValueError(msg)
    if optimizer is None or isinstance(optimizer, str):
        return optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_options(optimizer)
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return "adam"
    if isinstance(optimizer, torch.optim.RMSprop):
        return "rmsprop"
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    name = (
        f"the class {optimizer.__name__}"
        if isinstance(optimizer, type)
        else type(optimizer).__name__
    )
    msg = (
        f"learning rates are known for SGD, Adam, AdamW and RMSprop, got "
        f"{name}; pass optimizer='sgd', 'adam' or 'rmsprop' for the nearest one"
    )
    raise ValueError(msg)


def _check_options(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where a step is not one down the loss's own gradient."""
    if any(group.get("maximize") for group in optimizer.param_groups):
        msg = (
            "an optimizer with maximize=True climbs what it is given, and curvature limits "
            "descent: return the negative from loss_fn, and use maximize=False"
        )
        raise ValueError(msg)
    dampening = max(float(group.get("dampening", 0.0)) for group in optimizer.param_groups)
    if dampening != 0:
        msg = (
            f"no limit is known with dampening, got {dampening}: dampening=0 at 1 - dampening "
            "times the rate makes the same steps, but for what remains of the first"
        )
        raise ValueError(msg)


def group_value(optimizer: Optimizer, key: str, *, default: float = 0.0) -> float:
    """The largest value of ``key`` over the optimizer's groups."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return default
    if key == "weight_decay" and not isinstance(optimizer, torch.optim.SGD):
        return 0.0  # Adam's decay does not add to the preconditioned curvature by itself
    if key == "momentum" and not isinstance(optimizer, torch.optim.SGD):
        return 0.0  # RMSprop's is that of its preconditioned gradients: `beta1`
    return max(float(group.get(key, default)) for group in optimizer.param_groups)


def beta1(optimizer: Optimizer) -> float:
    """Adam's decay rate of the gradient average, or RMSprop's momentum; the largest over groups."""
    if isinstance(optimizer, torch.optim.RMSprop):
        return max(float(group["momentum"]) for group in optimizer.param_groups)
    if isinstance(optimizer, torch.optim.Optimizer):
        return max(float(group["betas"][0]) for group in optimizer.param_groups)
    return 0.0 if optimizer == "rmsprop" else _BETA1


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


class SecondMoments(NamedTuple):
    """What an adaptive optimizer has averaged so far."""

    average: Tensor  # (P,) of squared gradients, bias-corrected; unit: gradient squared
    age: float  # steps
    share: Tensor  # (P,) of that average the optimizer takes the root of: all, if it corrects


def second_moments(model: nn.Module, optimizer: Optimizer) -> SecondMoments | None:
    """Adam's or RMSprop's second moments; None before the first step.

    RMSprop divides by the root of an average it does not correct for its start at zero, and, if
    ``centered``, less the square of the averaged gradient; Adam with ``amsgrad`` by that of the
    largest average so far.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    corrects = not isinstance(optimizer, torch.optim.RMSprop)
    key = "exp_avg_sq" if corrects else "square_avg"
    decays = {
        id(p): float(group["betas"][1] if corrects else group["alpha"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    moments, shares = [], []
    age = 0.0
    for parameter in map(original, trainable_parameters(model)):
        state = optimizer.state.get(parameter, {})
        if key not in state:
            return None
        key_of_root = "max_exp_avg_sq" if "max_exp_avg_sq" in state else key  # amsgrad
        age = float(state["step"])
        correction = 1 - decays[id(parameter)] ** age
        moment = gathered(state[key_of_root]).reshape(-1)
        if "grad_avg" in state:
            average = gathered(state["grad_avg"]).reshape(-1)
            moment = (moment - average.square()).clamp(min=0)
        moments.append(moment / correction)
        shares.append(torch.full_like(moment, 1.0 if corrects else correction))
    return SecondMoments(torch.cat(moments), age, torch.cat(shares))


def rate_ratios(model: nn.Module, optimizer: Optimizer) -> Tensor | None:
    """Each parameter's rate over the largest ``(P,)``; None if all are equal.

    Raises:
        ValueError: the optimizer has none of the parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    rates = {
        id(p): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    parameters = trainable_parameters(model)
    if not any(id(original(p)) in rates for p in parameters):
        msg = (
            f"the optimizer has none of the model's {len(parameters)} trainable parameters: make "
            "it of model.parameters(), or measure for optimizer='sgd', 'adam' or 'rmsprop'"
        )
        raise ValueError(msg)
    own = [rates.get(id(original(p)), 0.0) for p in parameters]
    largest = max(own, default=0.0)
    if largest <= 0 or all(rate == largest for rate in own):
        return None
    ratios = [
        torch.full_like(p, rate / largest).reshape(-1).detach()
        for p, rate in zip(parameters, own, strict=True)
    ]
    return torch.cat(ratios)


def get_momentum(optimizer: torch.optim.Optimizer) -> float:
    """SGD's momentum or Adam's beta1, of the first group; 0 if it has neither."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set SGD's momentum or Adam's beta1 in every group."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
