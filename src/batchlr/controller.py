"""When to measure curvature while training, and what to make of it."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from batchlr.curvature import measure_curvature
from batchlr.curvature_report import CurvatureReport
from batchlr.lanczos import default_generator
from batchlr.learning_rates import balanced_momentum
from batchlr.lr_bound import LRBound, Rule
from batchlr.on_the_fly import LearnedStepSize, learn_step_size
from batchlr.operators.batches import count_samples
from batchlr.operators.curvature_matrix import NormMode
from batchlr.operators.supervised import LossFunction
from batchlr.optimizer_state import Kind
from batchlr.policies import POLICIES, PolicyName
from batchlr.schedulers import BatchAwareLR

logger = logging.getLogger("batchlr")

_UNBOUNDED = 2**31  # stands for a data set of unknown size: without-replacement effects vanish


@dataclass(frozen=True)
class CurvatureUpdate:
    """One measurement during training and what was made of it."""

    step: int  # optimizer steps made before it
    peak: float  # of the scheduler, after it
    momentum: float  # of the optimizer, after it
    failure: str | None  # why the last good rate was kept; None if the measurement succeeded
    bound: LRBound | None  # None after a failure, and with a policy of the paper
    report: CurvatureReport | None  # likewise
    learned: LearnedStepSize | None = None  # with a policy of the paper; None after a failure

    @property
    def largest_eigenvalue(self) -> float:
        """Of the matrix that limits the optimizer (Adam's is preconditioned); NaN on failure."""
        if self.learned is not None:
            return self.learned.largest
        if self.report is None:
            return math.nan
        return float(self.report.largest if self.report.adam is None else self.report.adam.largest)

    @property
    def smallest_eigenvalue(self) -> float:
        """The lower end of the Hessian, as far as Lanczos came; NaN on failure."""
        if self.learned is not None:
            return self.learned.smallest
        return math.nan if self.report is None else float(self.report.smallest)

    @property
    def num_products(self) -> int:
        """Matrix-vector products spent; 0 on failure."""
        measured = self.learned or self.report
        return 0 if measured is None else measured.num_products

    @property
    def seconds(self) -> float:
        """Time spent measuring; 0 on failure."""
        measured = self.learned or self.report
        return 0.0 if measured is None else measured.seconds


@final
class CurvatureController:
    """Keeps a scheduler's peak at the largest stable rate of the batch size trained with.

    Measurements are dense while curvature moves fast, before steps 0, 1, 2, 4, 8, ..., then every
    ``total_steps / refreshes``. Each starts from the last one's eigenvectors. A lower limit applies
    at once, a higher one raises the peak by at most ``growth``. When a measurement fails the last
    good rate is kept and the failure reported.

    With one of the paper's policies a measurement is instead one Lanczos run of ``max_products``
    steps on the Hessian, and rate and momentum of the policy are applied as they are: no limit, no
    ``growth``. They reproduce published experiments; what is wrong with them is said in
    `batchlr.policies`.

    Args:
        scheduler: whose peak to set, and through it the optimizer's rates.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss trained with.
        total_steps: optimizer steps of the run; None measures every 100 steps after the first.
        batch_size: of one optimizer step; by default the scheduler's, else that of the batches.
        dataset_size: what batches are drawn from without replacement; None is unbounded.
        refreshes: sparse measurements over the run (assumed).
        growth: largest rise of the peak per measurement (assumed).
        safety: fraction of the limit to apply, in (0, 1]; 1 because the limit has the noise in it.
        adjust_momentum: set the momentum too, to where batch noise and curvature limit the rate
            alike (`balanced_momentum`).
        apply: False measures and reports only.
        norm_mode: of the measurements.
        tol: relative residual at which Lanczos stops (assumed; the eigenvalue's own
            error is of second order in it).
        max_products: of one Lanczos run.
        clip_norm: at which training clips the gradient's norm; the rates then say if it is active.
        rule: of `CurvatureReport.max_lr`. The closed form of one direction is what the demos were
            measured with; ``"mean-square"`` knows all directions, but its correction for few
            batches is noisy where a measurement has only four.
        policy: ``"mean_square"``, or a key of `POLICIES`; those are for SGD and set its momentum.
        every_steps: measure before every so many steps, and not densely; None as said above.
        generator: for start vectors; without one the seed is 0.

    Raises:
        ValueError: an argument is illegal, or does not go with the policy.
    """

    def __init__(
        self,
        scheduler: BatchAwareLR,
        loss_fn: LossFunction,
        *,
        total_steps: int | None = None,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        refreshes: int = 15,
        growth: float = 1.5,
        safety: float = 1.0,
        adjust_momentum: bool = False,
        apply: bool = True,
        norm_mode: NormMode = "train",
        tol: float = 0.1,
        max_products: int = 20,
        clip_norm: float | None = None,
        rule: Rule = "top-direction",
        policy: Literal["mean_square"] | PolicyName = "mean_square",
        every_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < safety <= 1:
            msg = f"safety must lie in (0, 1], got {safety}"
            raise ValueError(msg)
        if not growth > 1:
            msg = f"growth must be above 1, got {growth}"
            raise ValueError(msg)
        if adjust_momentum and isinstance(scheduler.optimizer, torch.optim.RMSprop):
            msg = (
                "adjust_momentum needs SGD or Adam, got RMSprop, which makes its momentum's buffer "
                "only once; set its momentum yourself and leave adjust_momentum out"
            )
            raise ValueError(msg)
        if refreshes < 1 or (total_steps is not None and total_steps < 1):
            msg = f"refreshes and total_steps must be positive, got {refreshes} and {total_steps}"
            raise ValueError(msg)
        if every_steps is not None and every_steps < 1:
            msg = f"every_steps must be at least 1, or None, got {every_steps}"
            raise ValueError(msg)
        if policy != "mean_square":
            _check_policy(policy, scheduler.optimizer, safety, adjust_momentum)
        self.scheduler = scheduler
        self.loss_fn = loss_fn
        self.batch_size = batch_size if batch_size is not None else scheduler.batch_size
        self.dataset_size = _UNBOUNDED if dataset_size is None else dataset_size
        self.growth = growth
        self.safety = safety
        self.adjust_momentum = adjust_momentum
        self.apply = apply
        self.norm_mode: NormMode = norm_mode
        self.tol = tol
        self.max_products = max_products
        self.clip_norm = clip_norm
        self.rule: Rule = rule
        self.policy: Literal["mean_square"] | PolicyName = policy
        self.every_steps = every_steps
        self.interval = 100 if total_steps is None else max(1, total_steps // refreshes)
        self.num_products = 0
        self.seconds = 0.0
        self._generator = default_generator(generator)
        self._step = 0
        self._next = 0
        self._has_rate = False
        self._vectors: tuple[Tensor, ...] = ()

    @property
    def sets_momentum(self) -> bool:
        """Whether momentum is the controller's, too."""
        return self.apply and (self.adjust_momentum or self.policy != "mean_square")

    @property
    def due(self) -> bool:
        """Whether the next `maybe_update` measures."""
        return self._step >= self._next

    def maybe_update(
        self, model: nn.Module, batches: Sequence[Any] | Callable[[], Sequence[Any]]
    ) -> CurvatureUpdate | None:
        """Measure if due; call it once before every optimizer step.

        Args:
            model: at the weights the step starts from.
            batches: one batch ``(x, y)``, a list of disjoint batches, or a function that makes the
                list, called only when a measurement is due.

        Returns:
            What was measured and applied, or None if nothing was due.

        Raises:
            ArithmeticError: the very first measurement failed, so that there is no rate to apply.
        """
        if not self.due:
            self._step += 1
            return None
        made = batches() if callable(batches) else batches
        listed = [made] if isinstance(made, (tuple, dict, Tensor)) else list(made)
        update = self._update(model, listed)
        self._next = self._step + (self.every_steps or min(max(self._step, 1), self.interval))
        self._step += 1
        return update

    def _update(self, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        try:
            if self.policy != "mean_square":
                update = self._follow(self.policy, model, batches)
            else:
                update = self._stay_stable(model, batches)
        except (ArithmeticError, ValueError) as error:
            # A rate that is not the controller's own goes on; a mistake is still an error.
            keeps = not self.apply and isinstance(error, ArithmeticError)
            if not self._has_rate and not keeps:
                raise
            logger.warning("step %d: keeping the last good rate: %s", self._step, error)
            return self._record(failure=str(error))
        self._has_rate = True
        return update

    def _stay_stable(self, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        """The mean-square limit of the batch size trained with."""
        batch_size = self.batch_size or count_samples(batches[0])
        report = self._measure(model, batches)
        bound = self._bound(report, batch_size)
        if self.apply:
            self._apply(bound)
        return self._record(bound=bound, report=report)

    def _follow(self, policy: PolicyName, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        """The step size of a published policy."""
        learned = learn_step_size(
            model,
            self.loss_fn,
            batches,
            policy=policy,
            num_steps=self.max_products,
            norm_mode=self.norm_mode,
            generator=self._generator,
        )
        self.num_products += learned.num_products
        self.seconds += learned.seconds
        if self.apply:
            self.scheduler.set_peak(learned.step_size.lr)
            set_momentum(self.scheduler.optimizer, learned.step_size.momentum)
        return self._record(learned=learned)

    def _measure(self, model: nn.Module, batches: list[Any]) -> CurvatureReport:
        report = measure_curvature(
            model,
            self.loss_fn,
            batches,
            dataset_size=self.dataset_size,
            optimizer=self.scheduler.optimizer,
            norm_mode=self.norm_mode,
            num_eigenpairs=1,
            tol=self.tol,
            max_products=self.max_products,
            tracking=True,
            start_vectors=self._vectors,
            clip_norm=self.clip_norm,
            generator=self._generator,
        )
        self.num_products += report.num_products
        self.seconds += report.seconds
        self._vectors = report.top_vectors
        return report

    def _bound(self, report: CurvatureReport, batch_size: int) -> LRBound:
        kind: Kind = "sgd" if report.adam is None else report.adam.optimizer
        part = report if report.adam is None else report.adam
        if part.largest <= 0:
            msg = (
                f"largest must be positive and finite, got {part.largest}: nothing limits the rate"
            )
            raise ArithmeticError(msg)
        momentum = None
        if self.adjust_momentum:
            inverse = report.inverse_effective_batch_size(batch_size)
            variance = report.noise.total if report.adam is None else report.adam.total
            momentum = balanced_momentum(part.largest, variance * inverse / part.largest)
        return report.max_lr(batch_size, optimizer=kind, momentum=momentum, rule=self.rule)

    def _apply(self, bound: LRBound) -> None:
        peak = self.safety * bound.value
        if self._has_rate:
            peak = min(peak, self.growth * self.scheduler.peak)
        self.scheduler.set_peak(peak)
        if self.adjust_momentum:
            set_momentum(self.scheduler.optimizer, bound.momentum)

    def _record(
        self,
        *,
        failure: str | None = None,
        bound: LRBound | None = None,
        report: CurvatureReport | None = None,
        learned: LearnedStepSize | None = None,
    ) -> CurvatureUpdate:
        return CurvatureUpdate(
            step=self._step,
            peak=self.scheduler.peak,
            momentum=get_momentum(self.scheduler.optimizer),
            failure=failure,
            bound=bound,
            report=report,
            learned=learned,
        )

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors; with it a resumed controller goes on bit-identically."""
        return {
            "step": self._step,
            "next": self._next,
            "has_rate": self._has_rate,
            "num_products": self.num_products,
            "seconds": self.seconds,
            "vectors": [vector.clone() for vector in self._vectors],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved; the scheduler keeps its own state."""
        self._step = state_dict["step"]
        self._next = state_dict["next"]
        self._has_rate = state_dict["has_rate"]
        self.num_products = state_dict["num_products"]
        self.seconds = state_dict["seconds"]
        parameter = self.scheduler.optimizer.param_groups[0]["params"][0]
        self._vectors = tuple(vector.to(parameter) for vector in state_dict["vectors"])
        self._generator.set_state(state_dict["generator"].cpu())


def get_momentum(optimizer: torch.optim.Optimizer) -> float:
    """SGD's momentum or Adam's beta1, of the first group; 0 if it has neither."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set SGD's momentum or Adam's beta1 in every group."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def _check_policy(
    policy: str, optimizer: torch.optim.Optimizer, safety: float, adjust_momentum: bool
) -> None:
    if policy not in POLICIES:
        msg = f"policy must be one of mean_square, {', '.join(POLICIES)}, got {policy!r}"
        raise ValueError(msg)
    if not isinstance(optimizer, torch.optim.SGD):
        msg = (
            f"policy {policy} gives a rate and a momentum for SGD, got "
            f"{type(optimizer).__name__}: use SGD, or policy='mean_square'"
        )
        raise ValueError(msg)
    if safety != 1.0:
        msg = f"policy {policy} is applied as published: safety must be 1, got {safety}"
        raise ValueError(msg)
    if adjust_momentum:
        msg = f"policy {policy} sets the momentum itself: leave adjust_momentum False"
        raise ValueError(msg)
