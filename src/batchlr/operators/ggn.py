"""The generalised Gauss-Newton matrix of the mean loss."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from batchlr.operators.curvature_matrix import (
    CurvatureMatrix,
    NormMode,
    Recording,
    flatten,
    split_like,
)
from batchlr.operators.hessian import check_scalar
from batchlr.operators.supervised import SupervisedLoss


@final
class GGNOperator(CurvatureMatrix):
    """``G = J' S J``: ``J`` of the network's outputs, ``S`` the loss's Hessian in the outputs.

    Positive semi-definite for convex losses (Schraudolph 2002). Arguments and guarantees are those
    of `CurvatureMatrix`; ``loss_fn`` must be split into outputs and loss, as `supervised` does. A
    product costs about as much as the Hessian's.

    Raises:
        TypeError: ``loss_fn`` has no ``outputs`` and ``loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: SupervisedLoss,
        batches: Sequence[Any],
        *,
        norm_mode: NormMode | None = None,
        generator: torch.Generator | None = None,
        keep_graph: bool = True,
    ) -> None:
        if not (hasattr(loss_fn, "outputs") and hasattr(loss_fn, "loss")):
            msg = (
                "the Gauss-Newton matrix needs the loss in two halves, outputs(model, batch) and "
                f"loss(outputs, batch); {type(loss_fn).__name__} lacks them: "
                "use batchlr.supervised(criterion)"
            )
            raise TypeError(msg)
        self._halves = loss_fn
        super().__init__(
            model,
            loss_fn,
            batches,
            norm_mode=norm_mode,
            generator=generator,
            keep_graph=keep_graph,
        )

    def _differentiate(self, batch: Any) -> Recording:
        outputs = self._evaluate(self._halves.outputs, batch)
        if not outputs.requires_grad:
            msg = "the model's outputs do not depend on its trainable parameters"
            raise ValueError(msg)
        tip = outputs.detach().requires_grad_()
        loss = check_scalar(self._halves.loss(tip, batch))
        (slope,) = torch.autograd.grad(loss, tip, create_graph=True)
        parameters = self._parameters
        # J'u is linear in u, so its derivative with respect to u turns J' into J.
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, parameters, u, create_graph=True, materialize_grads=True
        )
        pairs = [(j, p) for j, p in enumerate(pulled) if p.requires_grad]

        def pull_back(cotangent: Tensor) -> Tensor:
            return flatten(
                torch.autograd.grad(
                    outputs, parameters, cotangent, retain_graph=True, materialize_grads=True
                )
            )

        def product(vector: Tensor) -> Tensor:
            pieces = split_like(vector, parameters)
            (pushed,) = torch.autograd.grad(
                [p for _, p in pairs],
                u,
                grad_outputs=[pieces[j] for j, _ in pairs],
                retain_graph=True,
            )
            if not slope.requires_grad:
                return torch.zeros_like(vector)
            (curved,) = torch.autograd.grad(
                slope, tip, pushed, retain_graph=True, materialize_grads=True
            )
            return pull_back(curved)

        return Recording(loss.detach(), pull_back(slope.detach()), product)
