"""Adam whose second moment is that of micro-batches, so that it does not see the batch size."""

from collections.abc import Callable, Iterable
from typing import Any, final, overload

import torch
from torch import Tensor, nn

from batchlr.argument_ranges import require_non_negative


@final
class BatchInvariantAdam(torch.optim.Optimizer):
    """AdamW that squares the gradients of micro-batches and then averages, not the reverse.

    Adam divides by the root of the mean *squared* batch gradient, which shrinks with the batch as
    its noise does, and so its rate wants another rule in every regime: a square root where noise
    dominates, a line where signal does. Of micro-batches of one fixed size that denominator knows
    nothing of how many make a step, and one rule holds in both: ``J`` times the rate for ``J``
    times the micro-batches, as for SGD far below the critical batch size (Wang & Aitchison 2024,
    arXiv 2402.18824). So settings are given *per micro-batch*, and a step of ``J`` of them uses

    ======================  ==========================================================
    rate                    ``J lr``
    decay of averages       ``betas^J``
    weight decay            ``(1 - lr weight_decay)^J``, decoupled as in AdamW
    ``eps``                 as it is
    ======================  ==========================================================

    Nothing is to be retuned when the number of micro-batches changes, on the way included. To
    first order in ``J lr``, that is: like any linear rule it ends where ``J lr`` meets the limit of
    stability. With one micro-batch a step it is AdamW.

    Call `accumulate` after the backward pass of each micro-batch, with losses divided by ``J``, so
    that ``.grad`` ends as their mean. What happens to ``.grad`` before `step` (clipping) is seen by
    the first moment only. It holds a copy of the gradients and their squares from the first
    `accumulate` to `step`; a step left out wants this optimizer's `zero_grad`. Where processes
    average their gradients (DDP), that average is one micro-batch, and every backward pass has to
    average: under ``no_sync`` the squares, and so the weights, would differ by process. A scaled
    loss (`torch.amp.GradScaler`) would enter the squares: use bfloat16. `CurvatureController` knows
    no limit for it and refuses it.

    Args:
        params: parameters, or groups of them.
        lr: rate of a step of one micro-batch.
        betas: decay rates of the averages of gradient and square, a micro-batch.
        eps: added to the root of the second moment.
        weight_decay: decoupled; the share of the weights taken off is ``lr`` times it.

    Raises:
        ValueError: an argument is illegal.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = BatchInvariantAdam([weight], lr=0.01)
    >>> for slope in (1.0, 3.0):
    ...     (slope * weight / 2).sum().backward()  # micro-batches of gradient 1 and 3, halved
    ...     optimizer.accumulate()
    >>> optimizer.step()
    >>> round(1.0 - weight.item(), 6)  # 2 lr times the mean gradient 2 over the root of (1 + 9) / 2
    0.017889
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require_non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            msg = f"betas must lie in [0, 1), got {betas}"
            raise ValueError(msg)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._micro_batches = 0  # since the last step
        self._seen: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[nn.Parameter, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has none of the micro-batches noted."""
        super().__setstate__(state)
        self._forget()

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take note of a micro-batch, whose gradient was just added to ``.grad``.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        self._micro_batches += 1
        for parameter, gradient in self._gradients():
            if parameter in self._seen:
                change = self._seen[parameter].neg_().add_(gradient)
                self._squares[parameter].addcmul_(change, change)
                change.copy_(gradient)
            else:
                self._seen[parameter] = gradient.clone()
                self._squares[parameter] = gradient.square()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any optimizer's; micro-batches noted since the last step are dropped, too."""
        self._forget()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update for the micro-batches noted; without any, ``.grad`` is of one.

        Args:
            closure: computes loss and gradients anew, and calls `accumulate` or not, if given.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        count = max(1, self._micro_batches)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for parameter, gradient in self._gradients():
            squares = self._squares.get(parameter)
            # A micro-batch's own gradient is `count` times what it added to the mean.
            mean_square = gradient.square() if squares is None else squares.mul_(count)
            self._update(parameter, gradient, mean_square, count, groups[parameter])
        self._forget()
        return loss

    def _update(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        mean_square: Tensor,
        count: int,
        group: dict[str, Any],
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["micro_batches"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["micro_batches"] += count
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1**count)
        state["exp_avg_sq"].lerp_(mean_square, 1 - beta2**count)
        corrections = [1 - beta ** state["micro_batches"] for beta in (beta1, beta2)]
        root = (state["exp_avg_sq"] / corrections[1]).sqrt_().add_(group["eps"])
        parameter.mul_((1 - group["lr"] * group["weight_decay"]) ** count)
        parameter.addcdiv_(state["exp_avg"], root, value=-count * group["lr"] / corrections[0])

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        pairs = [
            (parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if any(gradient.is_sparse for _, gradient in pairs):
            msg = (
                "BatchInvariantAdam squares dense gradients: build the embedding with sparse=False"
            )
            raise RuntimeError(msg)
        return pairs

    def _forget(self) -> None:
        self._micro_batches, self._seen, self._squares = 0, {}, {}
