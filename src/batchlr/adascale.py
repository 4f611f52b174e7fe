"""AdaScale: a schedule tuned at a small batch, carried to a larger one by the gain measured."""

import math
from dataclasses import replace
from typing import Any, final

from batchlr.argument_ranges import require_count, require_fraction
from batchlr.gradients.gradient_scatter import GradientScatter
from batchlr.schedulers import BatchAwareLR


def adascale_gain(scatter: GradientScatter, base_batch_size: int) -> float:
    """How many steps of the base batch one step of ``scatter``'s is worth.

    ``(trace / b_base + |G|^2) / (trace / b + |G|^2)`` (Johnson et al. 2020, arXiv 2007.05105): 1
    where the gradient stands out, so that a larger batch adds nothing, and the ratio of the batch
    sizes where noise hides it, as the linear rule has it everywhere. Sizes count as in
    `GradientScatter`, ``1/b = 1/B - 1/N``; where a batch has nearly all data, and next to no noise,
    the gain is still that ratio at most, as so many base batches have the same samples.

    Returns:
        The gain; NaN of gradients that are not finite.

    Raises:
        ValueError: ``base_batch_size`` is not positive, or above the batch's.

    >>> scatter = GradientScatter(batch_size=256, square_norm=2.0, trace=256.0)  # |G|^2 = 1
    >>> adascale_gain(scatter, base_batch_size=64)
    2.5
    """
    if not 0 < base_batch_size <= scatter.batch_size:
        msg = f"base_batch_size must lie in [1, {scatter.batch_size}], got {base_batch_size}"
        raise ValueError(msg)
    base = GradientScatter(base_batch_size, 0.0, 0.0, dataset_size=scatter.dataset_size)
    signal = max(0.0, scatter.mean_square)
    noise = signal + scatter.trace * scatter.inverse_size
    most = scatter.batch_size / base_batch_size
    alone = signal + scatter.trace * base.inverse_size
    if not math.isfinite(scatter.mean_square + alone):
        return math.nan
    return most if alone >= most * noise else alone / noise


@final
class AdaScale:
    """Multiplies a base schedule's rate by the gain, and goes through it at the gain's pace.

    ``scheduler`` is the base run's: its peak is the rate tuned at ``base_batch_size``, its shape
    counts steps of that size. A step of a larger batch has ``gain`` times the rate the shape has
    reached, and takes the shape ``gain`` steps on. Training ends when `progress` has reached the
    base run's steps, after between as many and ``B_base / B`` times as many of one's own. Of SGD;
    Adam's rates do not go with the noise in this way.

    Call `observe` before ``optimizer.step()``, and `step` after it in place of the scheduler's.

    Args:
        scheduler: of the base run; its peak and steps are set from now on.
        base_batch_size: that its peak was tuned at.
        total_steps: of the base run, beyond which the shape is not taken by the last step.
        smoothing: weight of the past in the averages of trace and ``|G|^2``, in [0, 1); None is
            ``1 - scale / 1000``, at least 0, with ``scale`` the ratio of batch sizes (assumed,
            after the paper).

    Raises:
        ValueError: an argument is illegal.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    >>> adascale = AdaScale(BatchAwareLR(optimizer, peak=0.1), base_batch_size=64)
    >>> adascale.observe(GradientScatter(batch_size=256, square_norm=2.0, trace=256.0))
    >>> optimizer.param_groups[0]["lr"]
    0.25
    >>> optimizer.step(); adascale.step(); adascale.progress
    2.5
    """

    def __init__(
        self,
        scheduler: BatchAwareLR,
        base_batch_size: int,
        *,
        total_steps: float = math.inf,
        smoothing: float | None = None,
    ) -> None:
        require_count(base_batch_size=base_batch_size)
        if smoothing is not None:
            require_fraction(smoothing=smoothing)
        self.scheduler = scheduler
        self.base_batch_size = base_batch_size
        self.base_peak = scheduler.peak
        self.total_steps = total_steps
        self.smoothing = smoothing
        self.progress = 0.0  # steps of the base run made good
        self.gain = 1.0  # of the next step
        self._weight, self._trace, self._mean_square = 0.0, 0.0, 0.0

    def observe(self, scatter: GradientScatter) -> None:
        """Set the gain and the rate of the step about to be made.

        A gradient that is zero or not finite leaves both as they were.

        Raises:
            ValueError: the batch is smaller than the base batch.
        """
        if not scatter.is_usable:
            return
        past = self.smoothing
        if past is None:
            past = max(0.0, 1 - scatter.batch_size / self.base_batch_size / 1000)
        self._weight = past * self._weight + 1 - past
        self._trace = past * self._trace + (1 - past) * scatter.trace
        self._mean_square = past * self._mean_square + (1 - past) * scatter.mean_square
        trace, mean_square = self._trace / self._weight, self._mean_square / self._weight
        norm = mean_square + trace * scatter.inverse_size
        average = replace(scatter, square_norm=norm, trace=trace)
        self.gain = adascale_gain(average, self.base_batch_size)
        self.scheduler.set_peak(self.base_peak * self.gain)

    def step(self) -> None:
        """Count the step just made, and take the shape as many base steps on as it was worth."""
        before = self._whole_steps()
        self.progress += self.gain
        for _ in range(self._whole_steps() - before):
            self.scheduler.step()

    def _whole_steps(self) -> int:
        return math.floor(min(self.progress, self.total_steps))

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; the scheduler's state is its own."""
        return {
            "base_peak": self.base_peak,
            "progress": self.progress,
            "gain": self.gain,
            "averages": [self._weight, self._trace, self._mean_square],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; restore the scheduler, too."""
        self.base_peak = state_dict["base_peak"]
        self.progress = state_dict["progress"]
        self.gain = state_dict["gain"]
        self._weight, self._trace, self._mean_square = state_dict["averages"]
