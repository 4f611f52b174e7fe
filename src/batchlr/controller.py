"""When to measure curvature while training, and what to make of it."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from batchlr.argument_ranges import require_non_negative
from batchlr.lanczos import default_generator
from batchlr.lr_bound import Rule
from batchlr.measurement.optimizer_state import get_momentum, set_momentum
from batchlr.on_the_fly.cadence import Cadence, measurement_cost
from batchlr.on_the_fly.collapse import Same
from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.on_the_fly.falling_shape import FallingShape
from batchlr.on_the_fly.peak_bounds import PeakBounds
from batchlr.on_the_fly.policy_choice import LIMIT_POLICIES, Policy, check_policy, sets_momentum
from batchlr.on_the_fly.published_rate import PublishedRate
from batchlr.on_the_fly.rate_filter import RateFilter
from batchlr.on_the_fly.safeguard import EVENTS, Event, Safeguard
from batchlr.on_the_fly.stability_limit import StabilityLimit, relative_error
from batchlr.operators.batches import count_samples
from batchlr.operators.curvature_matrix import NormMode
from batchlr.operators.isolation import in_full_precision
from batchlr.operators.supervised import LossFunction, check_loss_function, piecewise_linear
from batchlr.schedulers import BatchAwareLR

logger = logging.getLogger("batchlr")

_UNBOUNDED = 2**31  # stands for a data set of unknown size: without-replacement effects vanish
_SHOWN = 2  # assumed: steps after which nobody will show the losses who has not yet
_ANEW = 0.5  # measured (docs/log.md): share of the first limit behind a plateau


@final
class CurvatureController:
    """Keeps a scheduler's peak at the largest stable rate of the batch size trained with.

    It measures where curvature moves (`Cadence`), each time starting from the last eigenvector;
    averages what it finds (`RateFilter`); does not let a falling shape lower the rate twice
    (`FallingShape`); moves the peak from a share of the first limit on in bounded steps
    (`PeakBounds`), with Adam and RMSprop up only as far as two limits in a row show, since their
    steps do not shrink with the gradient; and, if it is shown the losses (`observe`),
    slows down when they jump and goes back when the network is lost (`Safeguard`). When a
    measurement fails the last good rate is kept and the failure reported.

    With one of the paper's policies a measurement is instead one Lanczos run of ``max_products``
    steps on the Hessian, and rate and momentum of the policy are applied as they are: no limit, no
    filter, no ``growth``, no guard. They reproduce published experiments; what is wrong with them
    is said in `batchlr.policies`. The rate of ``"cdat"``, of one product, is applied likewise.

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
            batch twice as large, since training survives more noise (measured), but as long as
            `observe` sees a loss that has not come down to stay (by 30 %, or by a tenth for as long
            again as that took) to that of the batch itself, and for good once a loss that had come
            down has jumped, or the network was lost;
            ``"heavy_ball"``, for SGD, sets Polyak's momentum for the curvature outside the bulk,
            and the lesser of his rate and the limit at that momentum; ``"cdat"`` follows the edge
            along the optimizer's own step (Roulet et al. 2024); or a key of `POLICIES`, for SGD.
        every_steps: measure before every so many steps, whatever the cost; None goes by need.
        rollback: undo the steps that destroyed the network, where `observe` sees it; see
            `Safeguard` for the memory it takes.
        generator: for start vectors; without one the seed is 0.

    Raises:
        TypeError: ``scheduler`` is no `BatchAwareLR`, or ``loss_fn`` no function of model and
            batch.
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
        _check_scheduler(scheduler)
        check_loss_function(loss_fn)
        kinked = piecewise_linear(loss_fn)
        if kinked is not None and apply:
            logger.warning(
                "%s is piecewise linear: its kinks have no second derivative, so that the rate set "
                "is likely too high; train with a smooth relative of it (Huber), or set rates",
                kinked,
            )
        self.bounds = PeakBounds(safety, start, growth, drop)
        check_policy(policy, scheduler.optimizer, safety=safety, adjust_momentum=adjust_momentum)
        require_non_negative(max_overhead=max_overhead)
        _check_total_steps(total_steps)
        if every_steps is not None and every_steps < 1:
            msg = f"every_steps must be at least 1, or None, got {every_steps}"
            raise ValueError(msg)
        self.scheduler = scheduler
        self.loss_fn = loss_fn
        self.apply = apply
        self.norm_mode: NormMode = norm_mode
        self.max_products = max_products
        self.policy: Policy = policy
        self.every_steps = every_steps
        self.cadence = Cadence(total_steps, max_overhead)
        self.seconds = 0.0
        self._generator = default_generator(generator)
        self._shape = FallingShape()
        self._filter = RateFilter()
        self._steers = apply and policy in LIMIT_POLICIES
        self._guard = Safeguard(scheduler.optimizer, rollback=rollback and self._steers)
        self._anew = False  # the next limit counts as the first
        self._asked = False  # something happened since the last measurement
        self._step = 0
        self._has_rate = False
        self.limit = StabilityLimit(
            scheduler.optimizer,
            batch_size=scheduler.batch_size if batch_size is None else batch_size,
            dataset_size=_UNBOUNDED if dataset_size is None else dataset_size,
            policy=policy if policy in LIMIT_POLICIES else "edge",
            adjust_momentum=adjust_momentum,
            norm_mode=norm_mode,
            tol=tol,
            max_products=max_products,
            clip_norm=clip_norm,
            rule=rule,
            generator=self._generator,
        )
        self._published = PublishedRate(
            scheduler.optimizer,
            policy=policy,
            norm_mode=norm_mode,
            num_steps=max_products,
            generator=self._generator,
        )

    @property
    def batch_size(self) -> int | None:
        """Trained with; None until it is seen, if nobody said it."""
        return self.limit.batch_size

    @property
    def num_products(self) -> int:
        """Matrix-vector products of all measurements."""
        return self.limit.num_products + self._published.num_products

    @property
    def sets_momentum(self) -> bool:
        """Whether momentum is the controller's, too."""
        return self.apply and (self.limit.sets_momentum or sets_momentum(self.policy))

    @property
    def due(self) -> bool:
        """Whether the next `maybe_update` measures."""
        if self.every_steps is not None:
            return self._asked or self._step % self.every_steps == 0
        return self.cadence.due(self._step)

    @property
    def overhead(self) -> float:
        """Cost of the measurements over that of the steps so far, both in gradients."""
        return self.cadence.spent / max(1, self._step)

    @in_full_precision
    def maybe_update(
        self,
        model: nn.Module,
        batches: Sequence[Any] | Callable[[], Sequence[Any]],
        same: Same | None = None,
    ) -> CurvatureUpdate | None:
        """Measure if due; call it once before every optimizer step.

        Args:
            model: at the weights the step starts from; sharded by `fully_shard`, in every process
                together and on the same batches (`unsharded`).
            batches: one batch ``(x, y)``, a list of disjoint batches, or a function that makes the
                list, called only when a measurement is due.
            same: as that of `observe`.

        Returns:
            What was measured and applied, or None if nothing was due.

        Raises:
            ArithmeticError: the very first measurement failed, so that there is no rate to apply.
        """
        self.watch(model)
        if self._step == _SHOWN and self._guard.unused:
            self._guard.stop()
        if self._shape.see(self.scheduler.share):
            self._stop_holding()
        if not self.due:
            self._step += 1
            return None
        self.rescue(same)
        self._asked = False
        made = batches() if callable(batches) else batches
        listed = [made] if isinstance(made, (tuple, dict, Tensor)) else list(made)
        before, products, seconds = self._filter.log_rate, self.num_products, self.seconds
        began = time.perf_counter()
        update = self._update(model, listed)
        self.seconds += time.perf_counter() - began
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
            self._filter.doubt,
        )
        self._step += 1
        return replace(update, overhead=self.overhead)

    def watch(self, model: nn.Module) -> None:
        """Remember ``model`` as it is, to go back to; the first `maybe_update` does it, else."""
        self._guard.watch(model)

    def observe(self, loss: Tensor, same: Same | None = None) -> Event | None:
        """Show the controller the loss ``()`` of the step just made, its gradients still in place.

        It looks at several steps at a time, and waits for the device only then.

        Args:
            loss: of the step, in several processes that of all.
            same: of `agree`, where there are several.

        Raises:
            TypeError: ``loss`` is no tensor.

        Returns:
            None, mostly; ``"slowed"`` where the loss jumped and the rate is halved; ``"undone"``
            where the network was lost and is what it was some steps ago, to go on at a lower rate;
            ``"recovered"`` where it has left the plateau on which it was lost before, and the rate
            is measured anew.
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
            self._shape.forget()
        self._anew = self._anew or event == "recovered"
        self._asked = True
        self.cadence.look_soon(self._step - 1)
        return event

    def agree(self, same: Callable[[float], float]) -> None:
        """Take over the decisions of the first of several processes; call it after a measurement.

        Without it processes whose figures differ in the last digit could measure, and wait for one
        another, at different steps; with a sharded model for ever.

        Args:
            same: returns what the first process passed, in every process.
        """
        self.scheduler.set_peak(same(self.scheduler.peak))
        if self.sets_momentum:
            set_momentum(self.scheduler.optimizer, same(get_momentum(self.scheduler.optimizer)))
        self._guard.agree(same)
        for part in (self.cadence, self._filter, self._shape):
            part.load_state_dict(
                {
                    name: value if value is None else type(value)(same(value))
                    for name, value in part.state_dict().items()
                }
            )

    def set_batch_size(self, batch_size: int, *, total_steps: int | None = None) -> None:
        """Train with another batch size from the next step on.

        The peak moves at once as the last report's limit does, and is measured again soon.

        Args:
            batch_size: of one optimizer step.
            total_steps: of the run, where the new size changes it; None leaves it.

        Raises:
            ValueError: ``batch_size`` is not in [1, dataset_size], ``total_steps`` is not positive,
                or nothing was measured yet; nothing has changed then.
        """
        if not 1 <= batch_size <= self.limit.dataset_size:
            msg = f"batch_size must lie in [1, {self.limit.dataset_size}], got {batch_size}"
            raise ValueError(msg)
        _check_total_steps(total_steps)
        last, size = self.limit.last, self.limit.batch_size
        if self.apply and (last is None or size is None):
            msg = "nothing was measured yet: change the batch size after the first step"
            raise ValueError(msg)
        if total_steps is not None:
            self.cadence.total_steps = total_steps
        if last is None or size is None:
            self.limit.batch_size = batch_size
            return
        settled = self._bears_edge
        there, here = (self.limit.bound(last, b, settled=settled) for b in (batch_size, size))
        factor = there.value / here.value
        self.limit.batch_size = batch_size
        self._filter.scale(factor)
        self._shape.scale(factor)
        if self.apply:
            self.scheduler.rescale(factor, batch_size)
            self._guard.rescale(factor)
        self.cadence.look_soon(self._step - 1)

    def _update(self, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        try:
            if self.policy in LIMIT_POLICIES:
                update = self._stay_stable(model, batches)
            else:
                update = self._follow(model, batches)
        except (ArithmeticError, ValueError) as error:
            # A rate that is not the controller's own goes on; a mistake is still an error.
            keeps = not self.apply and isinstance(error, ArithmeticError)
            if not self._has_rate and not keeps:
                raise
            logger.warning("step %d: keeping the last good rate: %s", self._step, error)
            return replace(self._record(), failure=str(error))
        self._has_rate = True
        return update

    @property
    def _bears_edge(self) -> bool:
        """Whether the loss has come down to stay, if that is watched, and has not jumped."""
        return not self._guard.unsettled and not self._guard.shaken

    def _stay_stable(self, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        """The largest stable rate of the batch size trained with."""
        settled = self._bears_edge
        report, bound = self.limit.measure(model, self.loss_fn, batches, settled=settled)
        optimizer, change = self.scheduler.optimizer, 1.0
        if self.limit.sets_momentum:  # rates known so far were for the momentum so far
            momentum = get_momentum(optimizer)
            before = self.limit.bound(report, bound.batch_size, momentum, settled=settled)
            change = bound.value / before.value
            if self._has_rate:
                self._filter.scale(change)
                self._shape.scale(change)
        doubt = self._filter.doubt
        seen = self._filter.rate if self._filter.known else None
        rate = self._filter.update(self._step, bound.value, relative_error(bound))
        if self.apply:
            anew, self._anew = self._anew, False
            bounds = replace(self.bounds, start=_ANEW) if anew else self.bounds
            last = self._guard.free * change if self._has_rate and not anew else None
            factor = self._guard.factor
            # Adam's steps do not shrink with the gradient: one that was too long costs for good.
            peak = bounds.peak(
                factor * self._shape.limit_of_peak(rate),
                last,
                doubt,
                None if seen is None else factor * seen,
                confirmed=report.adam is not None,
            )
            self.scheduler.set_peak(self._guard.limited(peak, anew=anew))
            if self.limit.sets_momentum:
                set_momentum(optimizer, bound.momentum)
        return replace(self._record(), bound=bound, report=report)

    def _stop_holding(self) -> None:
        """A rate that rises again has the limit last measured for its peak's."""
        if not self._steers or not self._filter.known:
            return
        self._shape.forget()
        limit = self.bounds.safety * self._guard.factor * self._filter.rate
        if limit < self._guard.free:
            self.scheduler.set_peak(self._guard.limited(limit))

    def _follow(self, model: nn.Module, batches: list[Any]) -> CurvatureUpdate:
        """The rate of a published policy, and its momentum if it has one, as they are."""
        found = self._published.measure(model, self.loss_fn, batches)
        self._filter.update(self._step, found.lr, error=0.0)  # for the cadence only
        if self.apply:
            self.scheduler.set_peak(found.lr)
            if found.momentum is not None:
                set_momentum(self.scheduler.optimizer, found.momentum)
        return replace(self._record(), learned=found.learned, along=found.along)

    def _cost(self, update: CurvatureUpdate, batches: list[Any]) -> float:
        """Of a measurement, as `Cadence` counts it."""
        samples = sum(count_samples(batch) for batch in batches)
        return measurement_cost(update.num_products, samples, self.batch_size or samples)

    def _record(self) -> CurvatureUpdate:
        optimizer = self.scheduler.optimizer
        return CurvatureUpdate(self._step, self.scheduler.peak, get_momentum(optimizer))

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors; with it a resumed controller goes on bit-identically.

        Of a sharded model it holds this process's parts, for each process to save its own;
        `gathered_state` makes one state for all of it, which goes with the model unsharded, too.
        """
        return {
            "step": self._step,
            "cadence": self.cadence.state_dict(),
            "shape": self._shape.state_dict(),
            "filter": self._filter.state_dict(),
            "guard": self._guard.state_dict(),
            "limit": self.limit.state_dict(),
            **self._published.state_dict(),
            "has_rate": self._has_rate,
            "anew": self._anew,
            "asked": self._asked,
            "seconds": self.seconds,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved; the scheduler keeps its own state."""
        self._step = state_dict["step"]
        self.cadence.load_state_dict(state_dict["cadence"])
        self._shape = FallingShape()
        self._shape.load_state_dict(state_dict.get("shape", {}))  # older states have none
        self._filter.load_state_dict(state_dict["filter"])
        self._guard.load_state_dict(state_dict["guard"])
        self._published.load_state_dict(state_dict)
        self.limit.load_state_dict(state_dict["limit"])
        self._has_rate = state_dict["has_rate"]
        self._anew = state_dict["anew"]
        self._asked = state_dict["asked"]
        self.seconds = state_dict["seconds"]
        self._generator.set_state(state_dict["generator"].cpu())


def _check_scheduler(scheduler: object) -> None:
    if not isinstance(scheduler, BatchAwareLR):
        msg = (
            f"scheduler must be a BatchAwareLR, got {type(scheduler).__name__}; make one: "
            "BatchAwareLR(optimizer, peak=1.0, shape=lambda o: CosineAnnealingLR(o, steps))"
        )
        raise TypeError(msg)


def _check_total_steps(total_steps: int | None) -> None:
    if total_steps is not None and total_steps < 1:
        msg = f"total_steps must be positive, or None, got {total_steps}"
        raise ValueError(msg)
