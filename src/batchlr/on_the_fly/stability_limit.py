"""The largest stable rate of the batch size trained with, followed along training."""

import math
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from batchlr.curvature import track_curvature
from batchlr.curvature_report import CurvatureReport
from batchlr.dataclass_files import dataclass_from_state, dataclass_state
from batchlr.learning_rates import balanced_momentum, heavy_ball
from batchlr.lr_bound import LRBound, Rule
from batchlr.measurement.curvature_point import CurvaturePoint
from batchlr.measurement.optimizer_state import Kind, group_value
from batchlr.on_the_fly.policy_choice import LimitPolicy
from batchlr.on_the_fly.usable_curvature import usable_edges
from batchlr.operators.batches import count_samples
from batchlr.operators.curvature_matrix import NormMode
from batchlr.operators.supervised import LossFunction
from batchlr.operators.unsharded import unsharding
from batchlr.slq import stochastic_lanczos_quadrature
from batchlr.tracker import CurvatureTracker

_INTERVAL = 2 * 1.645  # standard errors in a 90 % interval
_WARM_PRODUCTS = 3  # assumed: more of them, and the noise takes a product of its own
_LONGEST = 10, 6  # measured (docs/log.md): products of the first search, of any other
_FINENESS = 0.5  # measured (docs/log.md): tolerance of a search over the error of the last limit
_COARSEST = 0.3  # assumed: no search is coarser
_FIRST = 3  # measured (docs/log.md): the first search is that much coarser, its limit counts little
_EDGE = 2  # measured against 1, 4 and 16: docs/log.md
_MOST_MOMENTUM = 0.95  # assumed: above it the noise counts more than 39 times


@final
class StabilityLimit:
    """Measures `LRBound` again and again, each time from the last top eigenvector.

    Args:
        optimizer: whose limit it is.
        batch_size: trained with; None is that of the first batch measured on.
        dataset_size: what batches are drawn from without replacement.
        policy: ``"mean_square"`` is the limit in the mean square; ``"edge"`` that of a batch twice
            as large, once the loss has settled; ``"heavy_ball"`` the lesser of Polyak's rate and
            the limit at his momentum.
        adjust_momentum: take the limit at `balanced_momentum`, not at the optimizer's own.
        norm_mode: of the measurements.
        tol: of the search, see `CurvatureController`.
        max_products: likewise; of the Lanczos run for the lower edge, too.
        clip_norm: at which training clips.
        rule: of `CurvatureReport.max_lr`.
        generator: for start vectors.

    Raises:
        ValueError: ``batch_size`` is not in [1, dataset_size].
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int | None,
        dataset_size: int,
        policy: LimitPolicy,
        adjust_momentum: bool,
        norm_mode: NormMode,
        tol: float,
        max_products: int,
        clip_norm: float | None,
        rule: Rule,
        generator: torch.Generator,
    ) -> None:
        if batch_size is not None and not 1 <= batch_size <= dataset_size:
            msg = f"batch_size must lie in [1, {dataset_size}], got {batch_size}"
            raise ValueError(msg)
        self.batch_size = batch_size
        self.last: CurvatureReport | None = None
        self.num_products = 0
        self._optimizer = optimizer
        self.dataset_size = dataset_size
        self._policy = policy
        self.adjust_momentum = adjust_momentum
        self._norm_mode: NormMode = norm_mode
        self.tol = tol
        self.max_products = max_products
        self.clip_norm = clip_norm
        self._rule: Rule = rule
        self._generator = generator
        self._ratio: float | None = None  # of the usable edges, smallest over largest
        self._tracker = self._new_tracker()

    @property
    def sets_momentum(self) -> bool:
        """Whether the limit is one at a momentum yet to be set."""
        return self.adjust_momentum or self._policy == "heavy_ball"

    @unsharding
    def measure(
        self, model: nn.Module, loss_fn: LossFunction, batches: list[Any], *, settled: bool = True
    ) -> tuple[CurvatureReport, LRBound]:
        """Measure and take the limit; two to five products, the first time up to ten.

        Heavy ball's lower edge takes ``max_products`` more, once per call.

        Args:
            model: at the weights to measure at.
            loss_fn: ``(model, batch) -> mean loss``.
            batches: disjoint ones.
            settled: as that of `bound`.

        Raises:
            ValueError: an argument is illegal.
            ArithmeticError: nothing limits the rate, or a figure is not finite.
        """
        self.batch_size = self.batch_size or count_samples(batches[0])
        report = self._track(model, loss_fn, batches)
        if self._policy == "heavy_ball":
            self._find_lower_edge(model, loss_fn, batches)
        bound = self.bound(report, self.batch_size, settled=settled)
        self.last = replace(report, seconds=0.0)  # it goes into the state
        return report, bound

    def bound(
        self,
        report: CurvatureReport,
        batch_size: int,
        momentum: float | None = None,
        *,
        settled: bool = True,
    ) -> LRBound:
        """The limit at ``batch_size``, as the policy has it.

        Args:
            report: the last one.
            batch_size: trained with.
            momentum: another than the policy's.
            settled: the loss has come down, and does not leave a plateau any more, where curvature
                rises; before, ``"edge"`` keeps to the limit in the mean square.

        Raises:
            ArithmeticError: nothing limits the rate.
        """
        kind: Kind = "sgd" if report.adam is None else report.adam.optimizer
        largest = report.largest if report.adam is None else report.adam.largest
        if largest <= 0:
            msg = f"largest must be positive and finite, got {largest}: nothing limits the rate"
            raise ArithmeticError(msg)
        size = _EDGE * batch_size if settled and self._policy == "edge" else batch_size
        bound = report.max_lr(
            min(size, report.dataset_size),
            optimizer=kind,
            momentum=self._momentum(report, batch_size) if momentum is None else momentum,
            rule=self._rule,
        )
        bound = replace(bound, batch_size=batch_size)
        if self._policy != "heavy_ball":
            return bound
        fastest = (1 + math.sqrt(bound.momentum)) ** 2 / largest  # Polyak's rate
        share = min(1.0, fastest / bound.value)
        return replace(
            bound, value=share * bound.value, low=share * bound.low, high=share * bound.high
        )

    def _momentum(self, report: CurvatureReport, batch_size: int) -> float | None:
        """Which the limit is taken at; None is the optimizer's."""
        if self._policy == "heavy_ball":
            assert self._ratio is not None  # every measurement starts by finding it
            return min(_MOST_MOMENTUM, heavy_ball(1.0, self._ratio).momentum)
        if not self.adjust_momentum:
            return None
        inverse = report.inverse_effective_batch_size(batch_size)
        if report.adam is None:
            largest, variance = report.largest, report.noise.total
        else:
            largest, variance = report.adam.largest, report.adam.total
        return balanced_momentum(largest, variance * inverse / largest)

    def _find_lower_edge(self, model: nn.Module, loss_fn: LossFunction, batches: list[Any]) -> None:
        """One Lanczos run from a random vector, for the usable edges."""
        point = CurvaturePoint.at(
            model,
            loss_fn,
            batches,
            optimizer=self._optimizer,
            norm_mode=self._norm_mode,
        )
        try:
            measure = stochastic_lanczos_quadrature(
                point.matrix,
                num_steps=min(self.max_products, point.matrix.shape[0]),
                num_probes=1,
                generator=self._generator,
            )
        finally:
            self.num_products += point.operator.num_products
        largest, smallest = usable_edges(
            measure.nodes.tolist(),
            measure.weights.tolist(),
            floor=group_value(self._optimizer, "weight_decay"),
        )
        self._ratio = smallest / largest

    def _new_tracker(self) -> CurvatureTracker:
        return CurvatureTracker(
            tol=self.tol,
            max_products=min(_WARM_PRODUCTS, self.max_products),
            max_run=self.max_products,
            explore_every=1,
            with_noise=True,
            generator=self._generator,
        )

    def _track(
        self, model: nn.Module, loss_fn: LossFunction, batches: list[Any]
    ) -> CurvatureReport:
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
                loss_fn,
                batches,
                dataset_size=self.dataset_size,
                optimizer=self._optimizer,
                norm_mode=self._norm_mode,
                clip_norm=self.clip_norm,
            )
        except ArithmeticError:
            self.num_products += self._tracker.num_products - before
            raise
        self.num_products += report.num_products
        return report

    def _tolerance(self) -> float:
        """As fine as asked, but not much finer than the few samples allow."""
        if self.last is None or self.batch_size is None:
            return min(_FIRST * self.tol, max(self.tol, _COARSEST))
        error = relative_error(self.bound(self.last, self.batch_size))
        return min(max(self.tol, _FINENESS * error), max(self.tol, _COARSEST))

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors; the generator is its owner's."""
        return {
            "batch_size": self.batch_size,
            "last": None if self.last is None else dataclass_state(self.last),
            "num_products": self.num_products,
            "ratio": self._ratio,
            "tracker": self._tracker.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        last = state_dict["last"]
        self.batch_size = state_dict["batch_size"]
        self.last = None if last is None else dataclass_from_state(CurvatureReport, last)
        self.num_products = state_dict["num_products"]
        self._ratio = state_dict["ratio"]
        self._tracker.load_state_dict(state_dict["tracker"])


def relative_error(bound: LRBound) -> float:
    """Standard error of the logarithm of a bound, from its 90 % interval."""
    return math.log(bound.high / bound.low) / _INTERVAL
