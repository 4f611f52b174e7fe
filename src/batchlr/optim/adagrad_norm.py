"""AdaGrad-Norm: one rate for all weights, divided by the norm of all gradients so far."""

from collections.abc import Callable, Iterable
from typing import Any, final, overload

import torch
from torch import Tensor, nn

from batchlr.argument_ranges import require_non_negative, require_positive
from batchlr.inner_products import norm
from batchlr.sharded_tensors import local_part, norms_of_whole


@final
class AdaGradNorm(torch.optim.Optimizer):
    """SGD over the norm of all gradients so far: ``b^2 <- b^2 + |g|^2``, ``x <- x - lr g / b``.

    ``g`` is over all parameters of all groups (Ward, Wu & Bottou 2019, arXiv 1806.01811). It keeps
    one number; a group's rate is its own, the accumulator all groups'. `CurvatureController` knows
    no limit for it and refuses it. For sharded parameters all processes step together.

    A gradient that is not finite stays in the accumulator, and what it makes NaN of the weights is
    lost. `torch.amp.GradScaler` leaves such steps out: unscale, then step through ``scaler.step``,
    never by ``optimizer.step`` itself. Without one, skip a step whose gradients are not finite.

    Args:
        params: parameters, or groups of them.
        lr: no step is longer; the first one is nearly as long if ``|g|^2`` far exceeds
            ``initial_accumulator``, else much shorter.
        initial_accumulator: ``b^2`` before the first step (as in the code of AdAdaGrad).
        weight_decay: L2 penalty, added to the gradient and so counted in its norm.

    Raises:
        ValueError: an argument is illegal.

    >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = AdaGradNorm([weight], lr=1.0, initial_accumulator=11.0)
    >>> (weight.square().sum() / 2).backward()  # the gradient is the weight, of norm 5
    >>> optimizer.step()
    >>> weight.detach()
    tensor([2.5000, 3.3333])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        initial_accumulator: float = 1e-2,
        weight_decay: float = 0.0,
    ) -> None:
        require_non_negative(lr=lr, weight_decay=weight_decay)
        require_positive(initial_accumulator=initial_accumulator)
        accumulator = torch.tensor(initial_accumulator, dtype=torch.float64)
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "accumulator": accumulator}
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; no synchronisation with the device.

        Args:
            closure: computes loss and gradients anew, if given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [
            (group, parameter, _decayed(parameter, group["weight_decay"]))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not pairs:
            return loss
        gradients = [gradient for _, _, gradient in pairs]
        norms = norms_of_whole([norm(local_part(g)) for g in gradients], gradients)
        accumulator = self.param_groups[0]["accumulator"].to(norms[0].device)
        accumulator = accumulator + torch.stack([n.to(norms[0]) for n in norms]).square().sum()
        for group in self.param_groups:
            group["accumulator"] = accumulator
        for group, parameter, gradient in pairs:
            share = (group["lr"] / accumulator.sqrt()).to(gradient)
            local_part(parameter).sub_(local_part(gradient) * share)
        return loss


def _decayed(parameter: nn.Parameter, weight_decay: float) -> Tensor:
    assert parameter.grad is not None
    if weight_decay == 0:
        return parameter.grad
    return parameter.grad.add(parameter.detach(), alpha=weight_decay)
