"""The generalised Gauss-Newton matrix of the mean loss."""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Unpack, final

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn

from batchlr.operators.curvature_matrix import CurvatureMatrix, CurvatureOptions
from batchlr.operators.graphs import Recording
from batchlr.operators.hessian import check_scalar
from batchlr.operators.isolation import forked_random_state, swapped_parameters
from batchlr.operators.linear_pass import linear_pass
from batchlr.operators.parameters import check_module
from batchlr.operators.second_order import torchs_own_layers
from batchlr.operators.supervised import SupervisedLoss

logger = logging.getLogger("batchlr")

FEW = 1
"""Products up to which the model is run forward again rather than linearised: for one that is about
as fast (measured, docs/log.md), at the memory of an ordinary gradient."""

_Push = Callable[[Sequence[Tensor], Sequence[int]], Tensor | None]


@final
class GGNOperator(CurvatureMatrix):
    """Gauss-Newton matrix ``J' S J``: ``J`` of the outputs, ``S`` the loss's Hessian in them.

    Positive semi-definite for convex losses (Schraudolph 2002). Arguments and guarantees are those
    of `CurvatureMatrix`; ``loss_fn`` must be split into outputs and loss, as `supervised` does. If
    it has a ``curvature(outputs, batch)``, that is ``u -> S u``; else it comes from autograd.

    A product costs 1.1-1.5 gradients of the same batches on kept graphs, which take one gradient to
    record. A recording that serves one product only is not linearised: 2.1-2.9
    gradients in all, at the memory of an ordinary gradient.

    Raises:
        TypeError: ``loss_fn`` has no ``outputs`` and ``loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: SupervisedLoss,
        batches: Sequence[Any],
        **options: Unpack[CurvatureOptions],
    ) -> None:
        check_module(model)
        if not (hasattr(loss_fn, "outputs") and hasattr(loss_fn, "loss")):
            msg = (
                "the Gauss-Newton matrix needs the loss in two halves, outputs(model, batch) and "
                f"loss(outputs, batch); {type(loss_fn).__name__} lacks them: "
                "use batchlr.supervised(criterion)"
            )
            raise TypeError(msg)
        self._halves = loss_fn
        super().__init__(model, loss_fn, batches, **options)

    def _differentiate(self, batch: Any, uses: int, seed: int) -> Recording:
        outputs = self._evaluate(self._halves.outputs, batch)
        if not outputs.requires_grad:
            msg = "the model's outputs do not depend on its trainable parameters"
            raise ValueError(msg)
        loss, slope, curve = _of_outputs(self._halves, outputs.detach(), batch)
        parameters = self._parameters
        everything = range(len(parameters))
        if uses > FEW:
            push, roots = _linearised(outputs, parameters)
        else:
            again = _run_again(self._model, self._halves, batch, parameters, seed)
            push, roots = _or_linearised(again, outputs, parameters), ()

        def pull_back(cotangent: Tensor, chosen: Sequence[int]) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                outputs,
                [parameters[j] for j in chosen],
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )

        def product(tangents: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor | None]:
            pushed = push(tangents, chosen)
            curved = None if pushed is None else curve(pushed)
            return [None] * len(chosen) if curved is None else pull_back(curved, chosen)

        return Recording(
            loss, lambda: pull_back(slope, everything), product, (outputs, *roots), uses <= FEW
        )


def _of_outputs(
    halves: SupervisedLoss, outputs: Tensor, batch: Any
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor | None]]:
    """Loss, its gradient in the outputs, and ``u -> S u``; None stands for zero."""
    tip = outputs.requires_grad_()
    loss = check_scalar(halves.loss(tip, batch))
    closed = halves.curvature(outputs.detach(), batch) if hasattr(halves, "curvature") else None
    (slope,) = torch.autograd.grad(loss, tip, create_graph=closed is None)
    if closed is not None:
        return loss.detach(), slope, closed

    def curve(pushed: Tensor) -> Tensor | None:
        if not slope.requires_grad:
            return None
        return torch.autograd.grad(slope, tip, pushed, retain_graph=True, allow_unused=True)[0]

    return loss.detach(), slope.detach(), curve


def _linearised(outputs: Tensor, parameters: Sequence[Tensor]) -> tuple[_Push, tuple[Tensor, ...]]:
    """``J v`` from a recorded backward pass, and what its graph hangs on.

    ``J'u`` is linear in ``u``, so its derivative with respect to ``u`` turns ``J'`` into ``J``.
    """
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, parameters, u, create_graph=True, materialize_grads=True)

    def push(tangents: Sequence[Tensor], chosen: Sequence[int]) -> Tensor | None:
        pairs = [
            (pulled[j], tangent)
            for j, tangent in zip(chosen, tangents, strict=True)
            if pulled[j].requires_grad
        ]
        if not pairs:
            return None
        with linear_pass():
            (pushed,) = torch.autograd.grad(
                [p for p, _ in pairs],
                u,
                grad_outputs=[tangent for _, tangent in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        return pushed

    return push, pulled


def _run_again(
    model: nn.Module,
    halves: SupervisedLoss,
    batch: Any,
    parameters: Sequence[Tensor],
    seed: int,
) -> _Push:
    """``J v`` from a forward pass on dual numbers: nothing to set up, nothing kept."""
    device = parameters[0].device

    def push(tangents: Sequence[Tensor], chosen: Sequence[int]) -> Tensor | None:
        _load_forward_mode()
        with torch.no_grad(), fwad.dual_level(), torchs_own_layers():
            duals = {
                id(parameters[j]): fwad.make_dual(  # type: ignore[no-untyped-call]
                    parameters[j].detach(), tangent
                )
                for j, tangent in zip(chosen, tangents, strict=True)
            }
            with swapped_parameters(model, duals), forked_random_state(device, seed):
                outputs = halves.outputs(model, batch)
                pushed = fwad.unpack_dual(outputs).tangent  # type: ignore[no-untyped-call]
                return None if pushed is None else pushed.clone()

    return push


def _or_linearised(push: _Push, outputs: Tensor, parameters: Sequence[Tensor]) -> _Push:
    """``push``, or what is slower, but known to every layer that has a gradient.

    Forward mode is not known to custom autograd functions without a ``jvp``, to some kernels
    (LSTMs of oneDNN), nor to models that take gradients themselves.
    """

    def either(tangents: Sequence[Tensor], chosen: Sequence[int]) -> Tensor | None:
        try:
            return push(tangents, chosen)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.debug("no forward mode, the backward pass is differentiated: %s", error)
        return _linearised(outputs, parameters)[0](tangents, chosen)

    return either


@cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode rules, which warns of what torch itself has deprecated."""
    with warnings.catch_warnings(), fwad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        fwad.make_dual(torch.zeros(1), torch.zeros(1))  # type: ignore[no-untyped-call]
