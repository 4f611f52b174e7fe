"""Policies that give a rate outright: the paper's learners, and CDAT; no limit of stability."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from batchlr.on_the_fly.learned_step_size import LearnedStepSize, learn_step_size
from batchlr.on_the_fly.policy_choice import Policy
from batchlr.on_the_fly.update_curvature import CdatEdge, UpdateCurvature, update_curvature
from batchlr.operators import HessianOperator
from batchlr.operators.curvature_matrix import NormMode
from batchlr.operators.supervised import LossFunction
from batchlr.operators.unsharded import unsharding
from batchlr.policies import POLICIES, PolicyName


@dataclass(frozen=True)
class FoundRate:
    """What a measurement says the optimizer is to go on with."""

    lr: float
    momentum: float | None  # None leaves it as it is
    learned: LearnedStepSize | None = None  # of a policy of the paper
    along: UpdateCurvature | None = None  # of CDAT


@final
class PublishedRate:
    """Measures what a published policy asks for, and has its rate. The twin of `StabilityLimit`.

    Args:
        optimizer: whose rate it is.
        policy: ``"cdat"`` (Roulet et al. 2024; one product), or a key of `POLICIES`. With one that
            keeps to a limit there is nothing to measure here.
        norm_mode: of the measurements.
        num_steps: Lanczos steps, and so products, of a policy of the paper.
        generator: for start vectors.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        policy: Policy,
        norm_mode: NormMode,
        num_steps: int,
        generator: torch.Generator,
    ) -> None:
        self.num_products = 0
        self._optimizer = optimizer
        self._policy: Policy = policy
        self._norm_mode: NormMode = norm_mode
        self._num_steps = num_steps
        self._generator = generator
        self._cdat = CdatEdge()

    @unsharding
    def measure(self, model: nn.Module, loss_fn: LossFunction, batches: Sequence[Any]) -> FoundRate:
        """The rate at the present weights.

        Args:
            model: at the weights to measure at.
            loss_fn: ``(model, batch) -> mean loss``.
            batches: of training data.

        Raises:
            ArithmeticError: the policy finds no rate, or a figure is not finite.
        """
        operator = HessianOperator(model, loss_fn, batches, norm_mode=self._norm_mode)
        try:
            if self._policy in POLICIES:
                return self._learn(model, operator, self._policy)
            assert self._policy == "cdat"
            along = update_curvature(model, operator, self._optimizer)
            return FoundRate(self._cdat.update(along), momentum=None, along=along)
        finally:  # a failure has cost them, too
            self.num_products += operator.num_products

    def _learn(self, model: nn.Module, operator: HessianOperator, policy: PolicyName) -> FoundRate:
        learned = learn_step_size(
            model,
            operator,
            policy=policy,
            num_steps=self._num_steps,
            generator=self._generator,
        )
        return FoundRate(learned.step_size.lr, learned.step_size.momentum, learned=learned)

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; the generator is its owner's."""
        return {"cdat": self._cdat.state_dict(), "learner_products": self.num_products}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._cdat.load_state_dict(state_dict["cdat"])
        self.num_products = state_dict["learner_products"]
