"""Adaptive batch sizes: grow the batch until its gradient stands out of its noise.

The norm test (Byrd et al. 2012) and the inner-product tests (Bollapragada et al. 2017), as
AdAdaGrad (Lau et al. 2024, arXiv 2402.11215) applies them while training.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

from batchlr.argument_ranges import require_count, require_fraction, require_positive
from batchlr.gradients.gradient_scatter import GradientScatter

Test = Literal["norm", "inner_product", "augmented"]


@final
@dataclass(frozen=True)
class BatchSizeTest:
    """What a test of the batch size found, and the size that follows."""

    batch_size: int  # tested
    next_batch_size: int  # to go on with; never less
    passed: bool
    target: float  # smallest batch size to pass; if noise dominates infinite, or all data
    smallest_tolerance: float  # smallest tolerance that would pass at this size
    noise_scale: float  # tr Cov / |G|^2, of the smoothed figures; infinite if noise dominates
    noise_dominated: bool  # the figures show no gradient beyond its noise


@final
class AdaptiveBatchSize:
    """Chooses batch sizes from the gradients' noise, on plain numbers.

    ============== ============================================ ================================
    test           passes if                                    fails: next batch size at least
    ============== ============================================ ================================
    norm           ``trace / b <= tolerance^2 |G|^2``           ``trace / (tolerance^2 |G|^2)``
    inner_product  ``along / b <= tolerance^2 |G|^4``           ``along / (tolerance^2 |G|^4)``
    augmented      that, and ``across / b <= orthogonality^2    the larger of the two
                   |G|^2``
    ============== ============================================ ================================

    with the figures of `GradientScatter` and ``1/b = 1/B - 1/N``, so that a batch of all data
    passes. Batches never shrink.

    By default ``|G|^2`` is unbiased (``debias``). The tests as published put ``|g|^2`` in its
    place, which holds ``trace / b`` of noise: iterated on noise as it is they end at
    ``noise_scale (1 / tolerance^2 - 1)``, which is nothing from ``tolerance = 1`` on, and
    without any gradient at ``1 / tolerance^2`` times the size, each time. Unbiased, ``tolerance =
    1`` makes for batches of one noise scale, twice the steps and twice the samples of the best in
    either (McCandlish et al. 2018). Trace and ``|G|^2`` are averaged separately over observations,
    and keep their meaning when the batch grows; the ratio of two averages is less biased than an
    average of ratios.

    Args:
        batch_size: to begin with.
        max_batch_size: never exceeded, what fits the device, say. It may lie above the other bound,
            ``dataset_size``; `max_batch_size` is the lesser of the two, in whole ``multiple_of``.
        dataset_size: ``N``, what batches are drawn from without replacement; None is unbounded.
        test: the table's. The inner-product tests need figures from gradients
            (`scatter_of_gradients`), and ``debias=False``: no unbiased form is known.
        tolerance: of the test, dimensionless (assumed: 1).
        orthogonality: tolerance of the second condition of ``"augmented"``; 5.84 is the tangent of
            80 degrees (assumed, after Bollapragada et al. 2017).
        debias: see above.
        max_growth: largest factor of one test, but that one ``multiple_of`` more is always allowed,
            which may be a larger factor; infinite is no bound (assumed: 2).
        interval: steps between two tests (assumed).
        smoothing: weight of the past in the averages, in [0, 1); 0 takes the last observation
            alone (assumed).
        multiple_of: every batch size is; of what a caller can share out.

    Raises:
        ValueError: an argument is illegal.

    >>> adaptive = AdaptiveBatchSize(64, max_batch_size=1024, interval=1)
    >>> adaptive.observe(GradientScatter(batch_size=64, square_norm=3.0, trace=128.0))
    >>> test = adaptive.step()
    >>> test.passed, test.target, test.next_batch_size  # |G|^2 = 3 - 128 / 64
    (False, 128.0, 128)
    """

    def __init__(
        self,
        batch_size: int,
        *,
        max_batch_size: int,
        dataset_size: int | None = None,
        test: Test = "norm",
        tolerance: float = 1.0,
        orthogonality: float = 5.84,
        debias: bool = True,
        max_growth: float = 2.0,
        interval: int = 50,
        smoothing: float = 0.9,
        multiple_of: int = 1,
    ) -> None:
        require_positive(tolerance=tolerance, orthogonality=orthogonality)
        require_count(interval=interval, multiple_of=multiple_of)
        require_fraction(smoothing=smoothing)
        if test not in get_args(Test):
            msg = f"test must be one of {', '.join(map(repr, get_args(Test)))}, got {test!r}"
            raise ValueError(msg)
        if dataset_size is not None:
            require_count(dataset_size=dataset_size)
        if not max_growth > 1:
            msg = f"max_growth must be above 1, got {max_growth}"
            raise ValueError(msg)
        if test != "norm" and debias:
            msg = f"the {test} test has no unbiased form: pass debias=False"
            raise ValueError(msg)
        if batch_size < 1 or batch_size % multiple_of:
            msg = f"batch_size must be a positive multiple of {multiple_of}, got {batch_size}"
            raise ValueError(msg)
        most = max_batch_size if dataset_size is None else min(max_batch_size, dataset_size)
        if most < batch_size:
            msg = (
                f"max_batch_size {max_batch_size} and dataset_size {dataset_size} must not be "
                f"below batch_size {batch_size}"
            )
            raise ValueError(msg)
        self.batch_size = batch_size
        self.max_batch_size = most // multiple_of * multiple_of
        self.dataset_size = dataset_size
        self.test_name: Test = test
        self.tolerance = tolerance
        self.orthogonality = orthogonality
        self.debias = debias
        self.max_growth = max_growth
        self.interval = interval
        self.smoothing = smoothing
        self.multiple_of = multiple_of
        self._steps = 0
        self._weight = 0.0
        self._sums = [0.0] * 4

    @classmethod
    def paper(
        cls, batch_size: int, *, max_batch_size: int, tolerance: float = 0.1, test: Test = "norm"
    ) -> "AdaptiveBatchSize":
        """As in the authors' code: biased norms, tested every step, growth without bound.

        Their default tolerance, 0.1, goes to the largest batch almost at once: in theory at 99
        noise scales, and in 100-fold steps where noise dominates.
        """
        return cls(
            batch_size,
            max_batch_size=max_batch_size,
            test=test,
            tolerance=tolerance,
            orthogonality=tolerance,
            debias=False,
            max_growth=math.inf,
            interval=1,
            smoothing=0.0,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_size={self.batch_size}, max_batch_size="
            f"{self.max_batch_size}, dataset_size={self.dataset_size}, test={self.test_name!r}, "
            f"tolerance={self.tolerance}, interval={self.interval}, multiple_of={self.multiple_of})"
        )

    @property
    def may_grow(self) -> bool:
        """Whether observations still serve a purpose."""
        return self.batch_size < self.max_batch_size

    def observe(self, scatter: GradientScatter) -> None:
        """Average what one step's gradients show; ignored if they are zero or not finite.

        The data set's size is taken to be the one given here, whatever ``scatter`` says.

        Raises:
            ValueError: the test needs figures that ``scatter`` does not have.
        """
        if not scatter.is_usable:
            return
        mean_square = replace(scatter, dataset_size=self.dataset_size).mean_square
        figures = [scatter.trace, mean_square, 0.0, 0.0]
        if self.test_name != "norm":
            if scatter.along is None or scatter.across is None:
                msg = (
                    f"the {self.test_name} test needs the gradients themselves, and the norms of "
                    "groups alone were given: use scatter_of_gradients, or test='norm'"
                )
                raise ValueError(msg)
            figures[2:] = scatter.along, scatter.across
        share = 1 - self.smoothing
        self._weight = self.smoothing * self._weight + share
        self._sums = [
            self.smoothing * past + share * now
            for past, now in zip(self._sums, figures, strict=True)
        ]

    def step(self) -> BatchSizeTest | None:
        """Count an optimizer step; every ``interval`` of them test, and take the next size over.

        None between two tests, and where there is nothing to test: before the first observation and
        at the largest size, whose averages are of smaller batches and stay what they are.
        """
        self._steps += 1
        if self._steps % self.interval or not self._weight or not self.may_grow:
            return None
        found = self.test()
        self.batch_size = found.next_batch_size
        return found

    @property
    def scatter(self) -> GradientScatter:
        """The averages, as they stand for a batch of the present size.

        Raises:
            ValueError: nothing was observed yet.
        """
        if not self._weight:
            msg = "nothing was observed yet: call observe() first"
            raise ValueError(msg)
        trace, mean_square, along, across = (total / self._weight for total in self._sums)
        inverse = GradientScatter(self.batch_size, 0.0, 0.0, dataset_size=self.dataset_size)
        norm = mean_square + trace * inverse.inverse_size
        return GradientScatter(self.batch_size, norm, trace, along, across, self.dataset_size)

    def test(self) -> BatchSizeTest:
        """What the averages say now; nothing changes.

        Raises:
            ValueError: nothing was observed yet.
        """
        scatter = self.scatter
        ratio = self._ratio(scatter)
        inverse = scatter.inverse_size
        smallest = math.sqrt(ratio * inverse) if inverse else 0.0
        unseen = 0.0 if self.dataset_size is None else 1 / self.dataset_size
        needed = (self.tolerance**2 / ratio if ratio else math.inf) + unseen  # of 1/B at most
        target = 1 / needed if needed else math.inf
        return BatchSizeTest(
            batch_size=self.batch_size,
            next_batch_size=self._next(target),
            passed=smallest <= self.tolerance,
            target=target,
            smallest_tolerance=smallest,
            noise_scale=scatter.noise_scale,
            noise_dominated=scatter.noise_dominated,
        )

    def _ratio(self, scatter: GradientScatter) -> float:
        """Noise of one sample over signal: a batch passes if ``ratio / b <= tolerance^2``."""
        signal = scatter.mean_square if self.debias else scatter.square_norm
        if signal <= 0:
            return math.inf
        if self.test_name == "norm":
            return scatter.trace / signal
        assert scatter.along is not None
        assert scatter.across is not None
        ratio = scatter.along / signal**2
        if self.test_name == "augmented":
            weight = (self.tolerance / self.orthogonality) ** 2
            ratio = max(ratio, weight * scatter.across / signal)
        return ratio

    def _next(self, target: float) -> int:
        size, unit = self.batch_size, self.multiple_of
        most = self.max_batch_size
        if self.max_growth * size < most:
            most = max(size + unit, int(self.max_growth * size) // unit * unit)
        if target >= most:
            return most
        # Rounding must not cost a whole unit.
        return max(size, math.ceil(target / unit * (1 - 1e-12)) * unit)

    def forget(self) -> None:
        """Begin the averages anew: what was observed was of another network."""
        self._weight = 0.0
        self._sums = [0.0] * 4

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; what the object was constructed with is not among them."""
        return {
            "batch_size": self.batch_size,
            "steps": self._steps,
            "weight": self._weight,
            "sums": list(self._sums),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the batch size saved is no multiple of ``multiple_of``, or above
                `max_batch_size`; nothing has changed then.
        """
        size = state_dict["batch_size"]
        if size % self.multiple_of:
            msg = (
                f"the batch size saved, {size}, is no multiple of {self.multiple_of}, and cannot "
                "be shared out as configured now"
            )
            raise ValueError(msg)
        if size > self.max_batch_size:
            msg = (
                f"the batch size saved, {size}, is above the largest allowed now, "
                f"{self.max_batch_size}, and batches never shrink: allow {size}, or begin anew"
            )
            raise ValueError(msg)
        self.batch_size = size
        self._steps = state_dict["steps"]
        self._weight = state_dict["weight"]
        self._sums = list(state_dict["sums"])
