"""When to measure curvature while training: where it moves, and within a budget."""

import math
from dataclasses import asdict, dataclass
from typing import Any, final

# In gradients of the measured samples: recording their graphs with all around it, a product.
# Measured (benchmarks/overhead.py): what they count up to is CPU time within a third.
_RECORDING, _PRODUCT = 4.0, 3.0

_DENSE = 8  # assumed: up to this step milestones lie a factor 2 apart (4 is worse, docs/log.md)
_FEWEST = (
    4  # measured (docs/log.md): milestones after it, if as many fit between the factors 2 and 4
)
_APART = (2.0, 4.0)  # assumed; in short runs 4 is too far (docs/log.md)
_MOVED = 0.2  # assumed: a change of the limit by 20 % is worth another look soon
_ADVANCE = 0.25  # assumed: share of the whole run's budget that may be spent before it is earned


@final
@dataclass
class Cadence:
    """Says before which steps to measure, without a clock, so that runs are repeatable.

    Milestones are steps 0, 1, 2, 4, 8, and from there on twice the step of the last measurement, or
    up to four times in a long run whose budget asks for it: at those it always measures, some ten
    times in a run. In between it goes by need: the interval halves when the limit has moved, and
    doubles when it has not, but only for what the budget has left beside the milestones. Costs are
    in gradients of one training batch, about one step each.

    Args:
        total_steps: of the run; None is open-ended, and nothing is spent in advance.
        max_overhead: cost of all measurements over that of the steps. Only milestones may exceed
            it: short runs need a rate as well.
    """

    total_steps: int | None = None
    max_overhead: float = 0.05
    next: float = 0  # step before which to measure
    interval: int = 1
    spent: float = 0.0

    def due(self, step: int) -> bool:
        """Whether to measure before ``step``."""
        return step >= self.next

    def measured(self, step: int, cost: float, change: float, error: float = 0.0) -> None:
        """Note a measurement before ``step`` and plan the next.

        Args:
            step: steps made before it.
            cost: in gradients of one training batch.
            change: logarithm of the limit over the last one.
            error: standard error of that change; a change within it is none.
        """
        self.spent += cost
        moved = abs(change) > max(_MOVED, error)
        longest = max(1, (self.total_steps or step) // 10)
        self.interval = max(1, self.interval // 2) if moved else min(2 * self.interval, longest)
        by_need = max(step + self.interval, self._affordable(step, cost))
        self.next = min(by_need, self._milestone(step, cost))

    def look_soon(self, step: int) -> None:
        """Something has happened: measure before the step after ``step``, and often for a while."""
        self.interval = 1
        self.next = min(self.next, step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _milestone(self, step: int, cost: float) -> int:
        if step < _DENSE:
            return 1 if step == 0 else 2 ** step.bit_length()
        return math.ceil(step * self._spacing(step, cost))

    def _spacing(self, step: int, cost: float) -> float:
        """The factor between milestones from ``step`` on, were all to cost as much."""
        near, far = _APART
        if self.total_steps is None or step < _DENSE or cost <= 0:
            return near
        widest: float = min(max((self.total_steps / _DENSE) ** (1 / _FEWEST), near), far)
        left = self.max_overhead * self.total_steps - self.spent
        octaves = math.log(max(self.total_steps / step, 1))
        if octaves * cost >= left * math.log(widest):
            return widest
        return max(near, math.exp(octaves * cost / left))

    def _affordable(self, step: int, cost: float) -> float:
        """The first step at which another measurement of ``cost`` is within the budget."""
        if self.max_overhead <= 0:
            return math.inf
        if self.total_steps is None:
            return (self.spent + cost) / self.max_overhead
        start = max(step, _DENSE)
        octaves = math.log(max(self.total_steps / start, 1))
        dense = max(0, _DENSE.bit_length() - step.bit_length())
        milestones = dense + octaves / math.log(self._spacing(start, cost))
        earned = (self.spent + cost) / self.max_overhead
        if earned + milestones * cost / self.max_overhead > self.total_steps:
            return math.inf
        return math.ceil(earned - _ADVANCE * self.total_steps)


def measurement_cost(num_products: int, samples: int, batch_size: int) -> float:
    """Of a measurement of ``num_products`` on ``samples``, in gradients of one training batch."""
    return (_RECORDING + _PRODUCT * num_products) * samples / batch_size
