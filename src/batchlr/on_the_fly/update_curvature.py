"""Slope and curvature along the step an optimizer is about to make: the edge it may follow."""

import copy
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from batchlr.gradients.gradient_noise import mean_gradient
from batchlr.operators import HessianOperator
from batchlr.operators.parameters import trainable_parameters
from batchlr.operators.unsharded import original
from batchlr.sharded_tensors import gathered

_SCALING = 2.0  # cited: Roulet et al. (2024), the edge; 1 is the least loss on the quadratic
_MEMORY = 0.9  # assumed: share of the averages that a new measurement leaves


@dataclass(frozen=True)
class UpdateCurvature:
    """The loss to second order along ``u``, the optimizer's step at a rate of 1."""

    slope: float  # g'u, negative where the step descends; loss
    curvature: float  # u'Hu; loss
    square: float  # |u|^2; squared parameter
    loss: float  # mean over the samples
    num_samples: int
    num_products: int


@final
@dataclass
class CdatEdge:
    """The rate ``2 max(-g'u, 0) / |u'Hu|`` of CDAT (Roulet et al. 2024), both parts averaged.

    At that rate the loss, to second order, is after the step what it was before it; half of it
    would be the greedy rate, whose feedback on curvature ends in ever smaller steps.
    """

    slope: float = 0.0  # average of max(-g'u, 0)
    curvature: float = 0.0  # average of |u'Hu|

    def update(self, found: UpdateCurvature) -> float:
        """The rate after one more measurement.

        Raises:
            ArithmeticError: on average no step descends, or none is curved; the averages keep what
                was found.
        """
        keep = _MEMORY if self.curvature > 0 else 0.0
        self.slope = keep * self.slope + (1 - keep) * max(-found.slope, 0.0)
        self.curvature = keep * self.curvature + (1 - keep) * abs(found.curvature)
        if not (self.slope > 0 and self.curvature > 0):
            msg = (
                f"along the step the loss falls by {self.slope:.3g} and curves by "
                f"{self.curvature:.3g} on average: both must be positive to give a rate"
            )
            raise ArithmeticError(msg)
        return _SCALING * self.slope / self.curvature

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.slope, self.curvature = state_dict["slope"], state_dict["curvature"]


def update_curvature(
    model: nn.Module, operator: HessianOperator, optimizer: torch.optim.Optimizer
) -> UpdateCurvature:
    """Slope and curvature along the next step of ``optimizer``, whichever it is.

    The step is what the optimizer itself makes of the operator's mean gradient, from its own
    state, tried on copies at the ratios between its groups' rates. Weight decay is part of the step
    where the optimizer has it, and not of slope and curvature. One gradient and one product, and
    the memory of the copies; nothing of model and optimizer changes.

    Args:
        model: at the weights to measure at, whole (`unsharded`).
        operator: its Hessian, on batches that are together as large as the batch trained with,
            best: the edge is that of one such batch.
        optimizer: of the model's parameters.

    Raises:
        ArithmeticError: loss, gradient or product are not finite.
    """
    before = operator.num_products
    gradient = mean_gradient(operator)
    step = trial_step(model, optimizer, gradient)
    product = operator @ step
    lines = torch.stack([gradient, product, step])
    slope, curvature, square = (lines.double() @ step.double()).tolist()
    loss = float(operator.loss())
    if not all(map(math.isfinite, (slope, curvature, square, loss))):
        msg = (
            f"loss {loss:.3g}, slope {slope:.3g} and curvature {curvature:.3g} along the step must "
            "be finite"
        )
        raise ArithmeticError(msg)
    samples = sum(operator.samples)
    return UpdateCurvature(slope, curvature, square, loss, samples, operator.num_products - before)


def trial_step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    """The step ``(P,)`` that ``optimizer`` would make with ``gradient`` ``(P,)`` at a rate of 1.

    With unequal groups the largest rate is 1. Parameters the optimizer does not have stand still.
    """
    weights = trainable_parameters(model)
    gradients = torch.split(gradient, [w.numel() for w in weights])
    copies = {}
    for weight, part in zip(weights, gradients, strict=True):
        twin = weight.detach().clone()
        twin.grad = part.view_as(weight).to(weight.dtype, copy=True)  # steps change it
        copies[original(weight)] = twin
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    trial = copy.copy(optimizer)  # which leaves attributes of its own behind
    own = {name: value for name, value in vars(optimizer).items() if name != "step"}
    trial.__dict__ = own | vars(trial)  # `step` may be a scheduler's, for the original
    trial.param_groups = [
        {
            **group,
            "params": [copies[p] for p in group["params"] if p in copies],
            "lr": rate / max(rates) if max(rates) > 0 else 1.0,
        }
        for group, rate in zip(optimizer.param_groups, rates, strict=True)
    ]
    trial.state = defaultdict(dict)
    for weight, twin in copies.items():
        if weight in optimizer.state:
            trial.state[twin] = {
                key: gathered(value).clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state[weight].items()
            }
    trial.step()
    changes = [copies[original(w)] - w.detach() for w in weights]
    return torch.cat([change.reshape(-1).to(gradient) for change in changes])
