"""The Hessian of the mean loss."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from batchlr.operators.curvature_matrix import CurvatureMatrix
from batchlr.operators.graphs import Recording, check_differentiable


@final
class HessianOperator(CurvatureMatrix):
    """Hessian ``H = d^2 L / dw^2`` of the mean loss, by reverse over reverse (Pearlmutter 1994).

    Arguments and guarantees are those of `CurvatureMatrix`. A product costs 1.3-2.2 gradients of
    the same batches once their graphs are kept, about one more where they are not.
    """

    _checked = False  # that all layers can be differentiated twice

    def _differentiate(self, batch: Any, uses: int, seed: int) -> Recording:
        loss = check_scalar(self._evaluate(self._loss_fn, batch))
        if not self._checked:
            check_differentiable([loss])
            self._checked = True
        parameters = self._parameters
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)

        def product(tangents: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor | None]:
            # A gradient that does not depend on the weights (a loss linear in them) has no graph.
            pairs = [
                (gradients[j], tangent)
                for j, tangent in zip(chosen, tangents, strict=True)
                if gradients[j].requires_grad
            ]
            if not pairs:
                return [None] * len(chosen)
            return torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                [parameters[j] for j in chosen],
                grad_outputs=[tangent for _, tangent in pairs],
                retain_graph=True,
                allow_unused=True,
            )

        return Recording(loss.detach(), lambda: gradients, product, gradients)


def check_scalar(loss: Tensor) -> Tensor:
    """``loss`` if it is one number that depends on the weights.

    Raises:
        ValueError: it is not.
    """
    if loss.numel() != 1 or loss.ndim > 0:
        msg = (
            f"the loss must be a scalar, got shape {tuple(loss.shape)}; "
            "return its mean over the batch"
        )
        raise ValueError(msg)
    if not loss.requires_grad:
        msg = "the loss does not depend on the model's trainable parameters"
        raise ValueError(msg)
    return loss
