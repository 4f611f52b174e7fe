"""The Hessian of the mean loss."""

from typing import Any, final

import torch
from torch import Tensor

from batchlr.operators.curvature_matrix import CurvatureMatrix, Recording, flatten, split_like


@final
class HessianOperator(CurvatureMatrix):
    """``H = d^2 L / dw^2`` by reverse over reverse (Pearlmutter 1994).

    Arguments and guarantees are those of `CurvatureMatrix`. A product costs 1.5-2.2 gradients of
    the same batches once their graphs are kept.
    """

    def _differentiate(self, batch: Any) -> Recording:
        loss = check_scalar(self._evaluate(self._loss_fn, batch))
        parameters = self._parameters
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        # A gradient that does not depend on the weights (a loss linear in them) has no graph.
        pairs = [(j, g) for j, g in enumerate(gradients) if g.requires_grad]

        def product(vector: Tensor) -> Tensor:
            if not pairs:
                return torch.zeros_like(vector)
            pieces = split_like(vector, parameters)
            columns = torch.autograd.grad(
                [g for _, g in pairs],
                parameters,
                grad_outputs=[pieces[j] for j, _ in pairs],
                retain_graph=True,
                materialize_grads=True,
            )
            return flatten(columns)

        return Recording(loss.detach(), flatten(gradients), product)


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
