"""Dense curvature matrices by plain autograd: slow, obvious, and sharing no code with batchlr.

Each is the sample-weighted mean over the batches of a problem (see `cases`), in the order of
``model.named_parameters()``, trainable parameters only.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import CASES, Problem

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.InstanceNorm1d,
)


@functools.cache
def dense(case: str, kind: str) -> Tensor:
    """The ``(P, P)`` Hessian or GGN of a named case; computed once per session."""
    return {"hessian": dense_hessian, "ggn": dense_ggn}[kind](CASES[case]())


def dense_hessian(problem: Problem) -> Tensor:
    weights, outputs = _as_function(problem)
    return _mean_over_samples(problem, lambda x, y: _hessian(problem, weights, outputs, x, y))


def dense_ggn(problem: Problem) -> Tensor:
    """``J' S J`` from the full Jacobian and the criterion's full Hessian."""
    weights, outputs = _as_function(problem)

    def of_batch(x: Tensor, y: Tensor) -> Tensor:
        z = outputs(weights, x)
        jacobian = _rows(z.reshape(-1), weights)
        tip = z.detach().requires_grad_()
        curvature = _rows(_gradient(problem.criterion(tip, y), tip).reshape(-1), tip)
        return jacobian.T @ curvature.reshape(tip.numel(), tip.numel()) @ jacobian

    return _mean_over_samples(problem, of_batch)


def hessian_of(model: nn.Module, loss_fn: Callable[..., Tensor], batch: object) -> Tensor:
    """``(P, P)`` of ``loss_fn(model, batch)``, by plain autograd on the model as it is."""
    weights = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(loss_fn(model, batch), weights, create_graph=True)
        entries = torch.cat([g.reshape(-1) for g in slope])
        rows = [
            torch.autograd.grad(e, weights, retain_graph=True, materialize_grads=True)
            for e in entries
        ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def gradients(problem: Problem) -> list[Tensor]:
    """Gradient ``(P,)`` of each batch's mean loss."""
    weights, outputs = _as_function(problem)
    losses = [problem.criterion(outputs(weights, x), y) for x, y in problem.pairs]
    return [_gradient(loss, weights).detach() for loss in losses]


def _hessian(
    problem: Problem, weights: Tensor, outputs: Callable[..., Tensor], x: Tensor, y: Tensor
) -> Tensor:
    return _rows(_gradient(problem.criterion(outputs(weights, x), y), weights), weights)


def _mean_over_samples(problem: Problem, of_batch: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    total = sum(len(x) for x, _ in problem.pairs)
    return sum(len(x) / total * of_batch(x, y) for x, y in problem.pairs)


def _as_function(problem: Problem) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The flat weights, and the network's outputs as a function of flat weights and inputs."""
    model = copy.deepcopy(problem.model)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.train(problem.norm_mode == "train")
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.cat([p.reshape(-1) for p in parameters.values()]).requires_grad_()

    def outputs(weights: Tensor, x: Tensor) -> Tensor:
        pieces = weights.split([p.numel() for p in parameters.values()])
        named = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, named, (x,))

    return weights, outputs


def _gradient(scalar: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scalar, of, create_graph=True)
    return gradient


def _rows(vector: Tensor, of: Tensor) -> Tensor:
    """Jacobian ``(n, P)`` of ``vector`` ``(n,)``, 64 rows at a time."""
    if not vector.requires_grad:
        return torch.zeros(vector.numel(), of.numel(), dtype=of.dtype)
    identity = torch.eye(vector.numel(), dtype=vector.dtype)
    pieces = [
        torch.autograd.grad(
            vector, of, rows, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )[0]
        for rows in identity.split(64)
    ]
    return torch.cat(pieces).reshape(vector.numel(), -1)
