"""The paper's on-the-fly learner: one short Lanczos run becomes a learning rate and a momentum."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from batchlr.learning_rates import StepSize
from batchlr.operators import HessianOperator
from batchlr.operators.curvature_matrix import NormMode
from batchlr.policies import POLICIES, PolicyName
from batchlr.slq import stochastic_lanczos_quadrature


@dataclass(frozen=True)
class LearnedStepSize:
    """A step size by one of the `POLICIES`, and the measurement it comes from."""

    policy: PolicyName
    step_size: StepSize
    ritz_values: tuple[float, ...]  # ascending; curvature: loss per squared parameter
    weights: tuple[float, ...]  # squared first components, their sum is 1
    loss: float  # mean over the samples
    num_samples: int
    num_products: int
    norm_mode: NormMode | None  # None: it has no layers that know modes
    seconds: float

    @property
    def largest(self) -> float:
        """Largest Ritz value, by value; the policies go by magnitude."""
        return self.ritz_values[-1]

    @property
    def smallest(self) -> float:
        """Smallest Ritz value, negative where the loss curves downwards."""
        return self.ritz_values[0]


def learn_step_size(
    model: nn.Module,
    operator: HessianOperator,
    *,
    policy: PolicyName,
    num_steps: int = 20,
    generator: torch.Generator | None = None,
) -> LearnedStepSize:
    """The policy's step size from one Lanczos run on ``operator``.

    As the paper's public code measures: a Gaussian start vector, full reorthogonalisation, dropout
    off, no weight decay in the matrix. There all samples are one batch. Ratios between the rates
    of parameter groups are not seen. Costs ``num_steps`` products; nothing of the model changes.

    Args:
        model: at the weights to measure at, whole (`unsharded`).
        operator: its Hessian, which counts the products, on a failure, too; norms are in train
            mode in the paper.
        policy: a key of `POLICIES`.
        num_steps: of Lanczos, at most P are made; 20 in the paper.
        generator: for the start vector; without one the seed is 0.

    Raises:
        ValueError: ``policy`` is unknown or ``num_steps`` below 1.
        ArithmeticError: the loss or a product is not finite, or the policy finds no step size.
    """
    if policy not in POLICIES:
        msg = f"policy must be one of {', '.join(POLICIES)}, got {policy!r}"
        raise ValueError(msg)
    began = time.perf_counter()
    before = operator.num_products
    with _eval_mode(model):
        loss = float(operator.loss())
        if not math.isfinite(loss):
            msg = f"the loss is {loss} on the batches given; curvature has no meaning there"
            raise ArithmeticError(msg)
        measure = stochastic_lanczos_quadrature(
            operator,
            num_steps=min(num_steps, operator.shape[0]),
            num_probes=1,
            generator=generator,
        )
    ritz_values, weights = measure.nodes.tolist(), measure.weights.tolist()
    return LearnedStepSize(
        policy=policy,
        step_size=POLICIES[policy](ritz_values, weights),
        ritz_values=tuple(ritz_values),
        weights=tuple(weights),
        loss=loss,
        num_samples=sum(operator.samples),
        num_products=operator.num_products - before,
        norm_mode=operator.norm_mode,
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while; every module's own flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
