"""When to measure curvature while training, and what to make of it."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from batchlr.cadence import Cadence
from batchlr.collapse import Same
from batchlr.curvature import track_curvature
from batchlr.curvature_report import CurvatureReport
from batchlr.curvature_update import CurvatureUpdate
from batchlr.dataclass_files import dataclass_from_state, dataclass_state
from batchlr.lanczos import default_generator
from batchlr.learning_rates import balanced_momentum
from batchlr.lr_bound import LRBound, Rule
from batchlr.on_the_fly import LearnedStepSize, check_learner, learn_step_size
from batchlr.operators.batches import count_samples
from batchlr.operators.curvature_matrix import NormMode
from batchlr.operators.supervised import LossFunction
from batchlr.optimizer_state import Kind, get_momentum, set_momentum
from batchlr.peak_bounds import PeakBounds
from batchlr.policies import POLICIES, PolicyName
from batchlr.rate_filter import RateFilter
from batchlr.safeguard import EVENTS, Event, Safeguard
from batchlr.schedulers import BatchAwareLR
from batchlr.tracker import CurvatureTracker

logger = logging.getLogger("batchlr")

Policy = Literal["mean_square", "edge"] | PolicyName

_STABLE = ("mean_square", "edge")
_INTERVAL = 2 * 1.645  # standard errors in a 90 % interval
_WARM_PRODUCTS = 3  # assumed: more of them, and the noise takes a product of its own
_LONGEST = 10, 6  # measured (docs/log.md): products of the first search, of any other
_FINENESS = 0.5  # measured (docs/log.md): tolerance of a search over the error of the last limit
_COARSEST = 0.3  # assumed: no search is coarser
_FIRST = 3  # measured (docs/log.md): the first search is that much coarser, its limit counts little
_UNBOUNDED = 2**31  # stands for a data set of unknown size: without-replacement effects vanish
_EDGE = 2  # measured against 1, 4 and 16: docs/log.md
_ANEW = 0.5  # measured (docs/log.md): share of the first limit behind a plateau
# In gradients of the measured samples: recording their graphs with all around it, a product, a
# product through train-mode batch norm. Assumed, above what benchmarks/product_routes.py measures.
_RECORDING, _PRODUCT, _COUPLED_PRODUCT = 3.0, 2.2, 3.5


@final
class CurvatureController:
    """Keeps a scheduler's peak at the largest stable rate of the batch size trained with.

    It measures where curvature moves (`Cadence`), each time starting from the last eigenvector;
    averages what it finds (`RateFilter`); moves the peak from a share of the first limit on in
    bounded steps (`PeakBounds`); and, if it is shown the losses (`observe`), slows down when they
    jump and goes back when the network is lost (`Safeguard`). When a measurement fails the last
    good rate is kept and the failure reported.

    With one of the paper's policies a measurement is instead one Lanczos run of ``max_products``
    steps on the Hessian, and rate and momentum of the policy are applied as they are: no limit, no
    filter, no ``growth``, no guard. They reproduce published experiments; what is wrong with them
    is said in `batchlr.policies`.

    Args:
        scheduler: whose peak to set, and through it the optimizer's rates.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss trained with.
        total_steps: optimizer steps of the run; None is open-ended.
        batch_size: of one optimizer step; by default the scheduler's, else that of the batches.
        dataset_size: what batches are drawn from without replacement; None is unbounded.
        max_overhead: cost of the measurements over that of the steps, see `Cadence` (assumed).
        start: see `PeakBounds`.
        growth: likewise.
        drop: likewise.
        safety: likewise.
        adjust_momentum: set the momentum too, to where batch noise and curvature limit the rate
            alike (`balanced_momentum`).
        apply: False measures and reports only.
        norm_mode: of the measurements.
        tol: of the `CurvatureTracker` that follows the largest eigenvalue (assumed); three times as
            coarse in the first search (measured), and coarser, up to 0.3, where the samples at hand
            know the limit worse than that.
        max_products: of one search, which takes no more than 10 the first time and 6 later
            (measured); what is not settled by then has its residual for its error. Of one Lanczos
            run with the paper's policies.
        clip_norm: at which training clips the gradient's norm; the rates then say if it is active.
        rule: of `CurvatureReport.max_lr`. The closed form of one direction is what the demos were
            measured with; ``"mean-square"`` knows all directions, but its correction for few
            batches is noisy where a measurement has only four.
        policy: ``"mean_square"`` keeps to the limit in the mean square; ``"edge"`` to that of a
            batch twice as large, since training survives more noise (measured); or a key of
            `POLICIES`; those are for SGD and set its momentum.
        every_steps: measure before every so many steps, whatever the cost; None goes by need.
        rollback: undo the steps that destroyed the network, where `observe` sees it; see
            `Safeguard` for the memory it takes.
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
        max_overhead: float = 0.05,
        start: float = 0.25,
        growth: float = 1.5,
        drop: float = 0.5,
        safety: float = 1.0,
        adjust_momentum: bool = False,
        apply: bool = True,
        norm_mode: NormMode = "train",
        tol: float = 0.1,
        max_products: int = 20,
        clip_norm: float | None = None,
        rule: Rule = "top-direction",
        policy: Policy = "edge",
        every_steps: int | None = None,
        rollback: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        self.bounds = PeakBounds(safety, start, growth, drop)
        if adjust_momentum and isinstance(scheduler.optimizer, torch.optim.RMSprop):
            msg = (
                "adjust_momentum needs SGD or Adam, got RMSprop, which makes its momentum's buffer "
                "only once; set its momentum yourself and leave adjust_momentum out"
            )
            raise ValueError(msg)
        if not 0 <= max_overhead < math.inf:
            msg = f"max_overhead must be finite and not negative, got {max_overhead}"
            raise ValueError(msg)
        if total_steps is not None and total_steps < 1:
            msg = f"total_steps must be positive, or None, got {total_steps}"
            raise ValueError(msg)
        if every_steps is not None and every_steps < 1:
            msg = f"every_steps must be at least 1, or None, got {every_steps}"
            raise ValueError(msg)
        if policy not in _STABLE:
            check_learner(policy, scheduler.optimizer, safety, adjust_momentum)
        self.scheduler = scheduler
        self.loss_fn = loss_fn
        self.batch_size = batch_size if batch_size is not None else scheduler.batch_size
        self.dataset_size = _UNBOUNDED if dataset_size is None else dataset_size
        self.adjust_momentum = adjust_momentum
        self.apply = apply
        self.norm_mode: NormMode = norm_mode
        self.tol = tol
        self.max_products = max_products
        self.clip_norm = clip_norm
        self.rule: Rule = rule
        self.policy: Policy = policy
        self.every_steps = every_steps
        self.cadence = Cadence(total_steps, max_overhead)
        self.num_products = 0
        self.seconds = 0.0
        self._generator = default_generator(generator)
        self._filter = RateFilter()
        self._steers = apply and policy in _STABLE
        self._guard = Safeguard(scheduler.optimizer, rollback=rollback and self._steers)
        self._anew = False  # the next limit counts as the first
        self._step = 0
        self._has_rate = False
        self._last: CurvatureReport | None = None
        self._tracker = self._new_tracker()

    @property
    def sets_momentum(self) -> bool:
        """Whether momentum is the controller's, too."""
        return self.apply and (self.adjust_momentum or self.policy not in _STABLE)

    @property
    def due(self) -> bool:
        """Whether the next `maybe_update` measures."""
        if self.every_steps is not None:
            return self._step % self.every_steps == 0
        return self.cadence.due(self._step)

    @property
    def overhead(self) -> float:
        """Cost of the measurements over that of the steps so far, both in gradients."""
        return self.cadence.spent / max(1, self._step)

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
        self._guard.watch(model)
        if not self.due:
            self._step += 1
            return None
        self.rescue()
        made = batches() if callable(batches) else batches
        listed = [made] if isinstance(made, (tuple, dict, Tensor)) else list(made)
        before, products, seconds = self._filter.log_rate, self.num_products, self.seconds
        began = time.perf_counter()
        update = self._update(model, listed)
        if update.failure is not None:  # what it took all the same
            self.seconds = seconds + time.perf_counter() - began
        update = replace(
            update,
            num_products=self.num_products - products,
            seconds=self.seconds - seconds,
        )
        change = self._filter.log_rate - before
        self.cadence.measured(
            self._step,
            self._cost(update, listed),
            math.inf if update.failure or math.isnan(change) else change,
            self._filter.variance**0.5,
        )
        self._step += 1
        return replace(update, overhead=self.overhead)

    def observe(self, loss: Tensor, same: Same | None = None) -> Event | None:
        """Show the controller the loss ``()`` of the step just made, its gradients still in place.

        It looks at several steps at a time, and waits for the device only then.

        Args:
            loss: of the step, in several processes that of all.
            same: of `agree`, where there are several.

        Returns:
            ``"slowed"``: the loss jumped, the rate is halved. ``"undone"``: the network was lost
            and is what it was some steps ago, the rate is a quarter. ``"recovered"``: it has left
            the plateau on which it was lost before, a full rate is measured. Mostly None.
        """
        return self._heed(lambda: self._guard.observe(loss, same))

    def rescue(self, same: Same | None = None, *, lost: bool = False) -> Event | None:
        """Undo steps now if a loss shown since the last look has exploded; waits for the device.

        For before something is done with the weights; `maybe_update` calls it before it measures.

        Args:
            same: as that of `observe`.
            lost: undo them in any case: the network is lost, by what only the caller has seen.
        """
        return self._heed(lambda: self._guard.rescue(same, lost=lost))

    def _heed(self, look: Callable[[], Event | None]) -> Event | None:
        if not self._steers or not self._has_rate:
            return None
        before = self._guard.peak
        event = look()
        if self._guard.peak != before:
            self.scheduler.set_peak(self.scheduler.peak * self._guard.peak / before)
        if event is None:
            return None
        logger.warning("step %d: %s", self._step, EVENTS[event])
        if event != "slowed":
            self._filter.forget()
        self._anew = self._anew or event == "recovered"
        self.cadence.look_soon(self._step - 1)
        return event

    def agree(self, same: Callable[[float], float]) -> None:
        """Take over the decisions of the first of several processes; call it after a measurement.

        Without it processes whose figures differ in the last digit could measure, and wait for one
        another, at different steps.

        Args:
            same: returns what the first process passed, in every process.
        """
        self.scheduler.set_peak(same(self.scheduler.peak))
        if self.sets_momentum:
            set_momentum(self.scheduler.optimizer, same(get_momentum(self.scheduler.optimizer)))
        self._guard.free = same(self._guard.free)
        for part in (self.cadence, self._filter):
            part.load_state_dict(
                {
                    name: value if value is None else type(value)(same(value))
                    for name, value in part.state_dict().items()
                }
            )

    def set_batch_size(self, batch_size: int) -> None:
        """Train with another batch size from the next step on.

        The peak moves at once as the last report's limit does, and is measured again soon.

        Raises:
            ValueError: ``batch_size`` is not in [1, dataset_size], or nothing was measured yet.
        """
        if self._last is None or self.batch_size is None:
            msg = "nothing was measured yet: change the batch size after the first step"
            raise ValueError(msg)
        new = self._bound(self._last, batch_size).value
        factor = new / self._bound(self._last, self.batch_size).value
        self.batch_size = batch_size
        self._filter.scale(factor)
        if self.apply:
            self.scheduler.rescale(factor, batch_size)
            self._guard.rescale(factor)
        self.cadence.look_soon(self._step - 1)

    def _update(self, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        try:
            if self.policy in POLICIES:
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
        """The largest stable rate of the batch size trained with."""
        self.batch_size = self.batch_size or count_samples(batches[0])
        report = self._measure(model, batches)
        bound = self._bound(report, self.batch_size)
        self._last = replace(report, seconds=0.0)  # it goes into the state
        rate = self._filter.update(self._step, bound.value, _relative_error(bound))
        if self.apply:
            self._apply(rate, bound.momentum)
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
        self._filter.update(self._step, learned.step_size.lr, error=0.0)  # for the cadence only
        if self.apply:
            self.scheduler.set_peak(learned.step_size.lr)
            set_momentum(self.scheduler.optimizer, learned.step_size.momentum)
        return self._record(learned=learned)

    def _new_tracker(self) -> CurvatureTracker:
        return CurvatureTracker(
            tol=self.tol,
            max_products=min(_WARM_PRODUCTS, self.max_products),
            max_run=self.max_products,
            explore_every=1,
            with_noise=True,
            generator=self._generator,
        )

    def _measure(self, model: nn.Module, batches: list[Any]) -> CurvatureReport:
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if any(vector.numel() != size for vector in self._tracker.vectors):
            self._tracker = self._new_tracker()  # layers were frozen, or set free
        self._tracker.tol = self._tolerance()
        self._tracker.max_run = min(self.max_products, _LONGEST[bool(self._tracker.vectors)])
        before = self._tracker.num_products
        try:
            report = track_curvature(
                self._tracker,
                model,
                self.loss_fn,
                batches,
                dataset_size=self.dataset_size,
                optimizer=self.scheduler.optimizer,
                norm_mode=self.norm_mode,
                clip_norm=self.clip_norm,
            )
        except ArithmeticError:
            self.num_products += self._tracker.num_products - before
            raise
        self.num_products += report.num_products
        self.seconds += report.seconds
        return report

    def _tolerance(self) -> float:
        """As fine as asked, but not much finer than the few samples allow."""
        if self._last is None or self.batch_size is None:
            return min(_FIRST * self.tol, max(self.tol, _COARSEST))
        error = _relative_error(self._bound(self._last, self.batch_size))
        return min(max(self.tol, _FINENESS * error), max(self.tol, _COARSEST))

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
        size = batch_size if self.policy == "mean_square" else _EDGE * batch_size
        bound = report.max_lr(
            min(size, report.dataset_size), optimizer=kind, momentum=momentum, rule=self.rule
        )
        return replace(bound, batch_size=batch_size)

    def _apply(self, rate: float, momentum: float) -> None:
        bounds = replace(self.bounds, start=_ANEW) if self._anew else self.bounds
        last = self._guard.free if self._has_rate and not self._anew else None
        self._anew = False
        peak = bounds.peak(self._guard.factor * rate, last)
        self.scheduler.set_peak(self._guard.limited(peak))
        if self.adjust_momentum:
            set_momentum(self.scheduler.optimizer, momentum)

    def _cost(self, update: CurvatureUpdate, batches: list[Any]) -> float:
        """Of a measurement, in gradients of one training batch."""
        report = update.report or self._last  # the last one's, after a failure
        product = _COUPLED_PRODUCT if report is not None and report.coupled else _PRODUCT
        samples = sum(count_samples(batch) for batch in batches)
        gradients = (_RECORDING + product * update.num_products) * samples
        return gradients / (self.batch_size or samples)

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
            "cadence": self.cadence.state_dict(),
            "filter": self._filter.state_dict(),
            "guard": self._guard.state_dict(),
            "batch_size": self.batch_size,
            "last": None if self._last is None else dataclass_state(self._last),
            "has_rate": self._has_rate,
            "anew": self._anew,
            "num_products": self.num_products,
            "seconds": self.seconds,
            "tracker": self._tracker.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved; the scheduler keeps its own state."""
        self._step = state_dict["step"]
        self.cadence.load_state_dict(state_dict["cadence"])
        self._filter.load_state_dict(state_dict["filter"])
        self._guard.load_state_dict(state_dict["guard"])
        self.batch_size = state_dict["batch_size"]
        last = state_dict["last"]
        self._last = None if last is None else dataclass_from_state(CurvatureReport, last)
        self._has_rate = state_dict["has_rate"]
        self._anew = state_dict["anew"]
        self.num_products = state_dict["num_products"]
        self.seconds = state_dict["seconds"]
        self._tracker.load_state_dict(state_dict["tracker"])
        self._generator.set_state(state_dict["generator"].cpu())


def _relative_error(bound: LRBound) -> float:
    return math.log(bound.high / bound.low) / _INTERVAL
