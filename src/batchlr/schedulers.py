"""A torch learning-rate scheduler whose peak may change while its shape goes on."""

from collections.abc import Callable
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from batchlr.argument_ranges import require_positive
from batchlr.curvature_report import CurvatureReport
from batchlr.measurement.optimizer_state import get_momentum
from batchlr.scaling_rules import rescale_lr

ShapeFactory = Callable[[Optimizer], LRScheduler]


class BatchAwareLR(LRScheduler):
    """A torch scheduler whose peak can move: ``lr_g = peak * ratio_g * shape_g(t)``.

    ``g`` is a parameter group. The shape is any torch scheduler, run on a private optimizer whose
    rates are 1, so that a new peak takes effect exactly, whatever the shape; patching a torch
    scheduler's rates from outside is undone or distorted by half of them. ``ratio_g`` is the
    group's rate over the largest one, as the optimizer was configured.

    Args:
        optimizer: its groups' rates give the ratios; they are then set to ``peak``'s.
        peak: largest rate of the group with the largest rate.
        shape: makes the scheduler of the shape, for instance
            ``lambda o: CosineAnnealingLR(o, steps)``; None is a constant. It sees as many groups
            as the optimizer has. What it does to momentum is not applied.
        batch_size: of the optimizer's steps, needed by `set_batch_size` only.

    Raises:
        TypeError: ``shape`` is no function.
        ValueError: ``peak`` is not positive, or all of the optimizer's rates are zero.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> scheduler = BatchAwareLR(optimizer, peak=0.5, shape=lambda o: CosineAnnealingLR(o, 4))
    >>> optimizer.step(); scheduler.step(); optimizer.step(); scheduler.step()
    >>> round(scheduler.get_last_lr()[0], 6)
    0.25
    >>> scheduler.set_peak(0.1)
    >>> round(optimizer.param_groups[0]["lr"], 6)
    0.05
    """

    def __init__(
        self,
        optimizer: Optimizer,
        peak: float,
        shape: ShapeFactory | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if max(rates) <= 0:
            msg = (
                f"the optimizer's rates {rates} give no ratios between its groups: set the largest "
                "to any positive number, its value does not matter"
            )
            raise ValueError(msg)
        if shape is not None and not callable(shape):
            msg = (
                f"shape must be a function that makes the scheduler, got a {type(shape).__name__}: "
                "pass lambda o: CosineAnnealingLR(o, steps), say"
            )
            raise TypeError(msg)
        self._ratios = [rate / max(rates) for rate in rates]
        require_positive(peak=peak)
        self._peak = float(peak)
        self._batch_size = batch_size
        # Each group needs a parameter; nothing is ever stepped with it.
        groups = [{"params": [torch.nn.Parameter(torch.zeros(()))]} for _ in rates]
        self._shadow = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        self._shape = shape(self._shadow) if shape is not None else None
        # Torch schedulers read initial_lr as the rate a group stands for.
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            group["initial_lr"] = self._peak * ratio
        super().__init__(optimizer)

    @property
    def peak(self) -> float:
        """Largest rate of the group with the largest rate."""
        return self._peak

    @property
    def batch_size(self) -> int | None:
        """Batch size the peak stands for."""
        return self._batch_size

    @property
    def multipliers(self) -> list[float]:
        """``shape_g(t)`` of each group."""
        return [float(group["lr"]) for group in self._shadow.param_groups]

    @property
    def share(self) -> float:
        """Largest of the groups' rates now over the peak."""
        return max(r * m for r, m in zip(self._ratios, self.multipliers, strict=True))

    def get_lr(self) -> list[float | Tensor]:
        """The groups' rates now."""
        return [
            self._peak * ratio * multiplier
            for ratio, multiplier in zip(self._ratios, self.multipliers, strict=True)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Advance the shape by one optimizer step.

        Args:
            epoch: none but the next, which `SequentialLR` says before torch 2.14.

        Raises:
            ValueError: it is another.
        """
        if epoch not in (None, self.last_epoch + 1):
            msg = f"BatchAwareLR counts its own steps; call step() without an epoch, got {epoch}"
            raise ValueError(msg)
        if self.last_epoch >= 0 and self._shape is not None:
            self._shadow._opt_called = True  # type: ignore[attr-defined]  # it has no steps to make
            self._shape.step()
        super().step()

    def set_peak(self, peak: float) -> None:
        """Change the peak now; the present rates follow at once, the shape goes on as it was.

        Raises:
            ValueError: ``peak`` is not a positive, finite number.
        """
        require_positive(peak=peak)
        self._peak = float(peak)
        self._apply()

    def set_batch_size(
        self,
        batch_size: int,
        *,
        report: CurvatureReport | None = None,
        optimizer: Literal["sgd", "adam", "rmsprop"] | None = None,
        rule: Literal["linear", "sqrt", "none"] | None = None,
    ) -> None:
        """Carry the peak over to another batch size, by measurement or by a named rule.

        Args:
            batch_size: of the steps from now on.
            report: the peak changes as its ``max_lr`` does, at the momentum of the optimizer.
            optimizer: which of the report's rates; by default told from the optimizer's class. Of
                another than that, at the report's momentum.
            rule: of `rescale_lr`, in place of a report.

        Raises:
            ValueError: not exactly one of ``report`` and ``rule`` is given, or the present batch
                size is unknown.
        """
        if self._batch_size is None:
            msg = "the present batch size is unknown: construct with BatchAwareLR(batch_size=...)"
            raise ValueError(msg)
        if (report is None) == (rule is None):
            msg = "pass either a measured report or a rule ('linear', 'sqrt' or 'none')"
            raise ValueError(msg)
        if report is not None:
            own = _kind(self.optimizer)
            momentum = get_momentum(self.optimizer) if optimizer in (None, own) else None
            old, new = (
                report.max_lr(size, optimizer=optimizer or own, momentum=momentum).value
                for size in (self._batch_size, batch_size)
            )
            factor = new / old
        else:
            assert rule is not None
            factor = rescale_lr(1.0, self._batch_size, batch_size, rule=rule)
        self.rescale(factor, batch_size)

    def rescale(self, factor: float, batch_size: int) -> None:
        """Train with ``batch_size`` from now on, at ``factor`` times the peak.

        Raises:
            ValueError: ``factor`` is not a positive, finite number.
        """
        require_positive(factor=factor)
        self.set_peak(self._peak * factor)
        self._batch_size = batch_size

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts of them only."""
        return {
            "last_epoch": self.last_epoch,
            "peak": self._peak,
            "ratios": list(self._ratios),
            "batch_size": self._batch_size,
            "multipliers": self.multipliers,
            "shape": None if self._shape is None else _primitives(self._shape.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore and set the optimizer's rates, in either order with the optimizer's own state.

        Raises:
            ValueError: the state is of an optimizer with another number of groups, or only one of
                the two schedulers has a shape.
        """
        if len(state_dict["ratios"]) != len(self._ratios):
            msg = (
                f"the state has {len(state_dict['ratios'])} parameter groups, the optimizer "
                f"{len(self._ratios)}: construct both as they were"
            )
            raise ValueError(msg)
        if (state_dict["shape"] is None) != (self._shape is None):
            with_shape = "this scheduler" if state_dict["shape"] is None else "the state"
            msg = f"only {with_shape} has a shape: construct both with the same one"
            raise ValueError(msg)
        self.last_epoch = state_dict["last_epoch"]
        self._peak = state_dict["peak"]
        self._ratios = list(state_dict["ratios"])
        self._batch_size = state_dict["batch_size"]
        if self._shape is not None:
            _restore(self._shape, state_dict["shape"])
        for group, multiplier in zip(
            self._shadow.param_groups, state_dict["multipliers"], strict=True
        ):
            group["lr"] = multiplier
        self._apply()

    def _apply(self) -> None:
        for group, ratio, rate in zip(
            self.optimizer.param_groups, self._ratios, self.get_lr(), strict=True
        ):
            group["initial_lr"] = self._peak * ratio
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(rate))
            else:
                group["lr"] = rate
        self.base_lrs = [self._peak * ratio for ratio in self._ratios]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]


def _kind(optimizer: Optimizer) -> Literal["sgd", "adam", "rmsprop"]:
    if isinstance(optimizer, torch.optim.RMSprop):
        return "rmsprop"
    return "adam" if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) else "sgd"


def _primitives(state: Any) -> Any:
    """The part of a torch scheduler's state that is data; nested schedulers keep theirs."""
    if isinstance(state, dict):
        return {k: _primitives(v) for k, v in state.items() if _is_data(v)}
    if isinstance(state, (list, tuple)):
        return [_primitives(entry) for entry in state if _is_data(entry)]
    return state


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, dict, list, tuple))


def _restore(shape: LRScheduler, state: dict[str, Any]) -> None:
    """Load ``state`` into a freshly built ``shape``; its functions are those it was built with."""
    own = shape.state_dict()
    shape.load_state_dict(own | _as_in(own, state))


def _as_in(own: Any, state: Any) -> Any:
    """``state`` in the containers of ``own``: tuples, counters, keys that are numbers.

    Tuples were saved as lists and counters as dicts, and JSON makes strings of keys.
    """
    if isinstance(own, dict) and isinstance(state, dict):
        keys = {str(key): key for key in own}
        named = {keys.get(str(key), key): value for key, value in state.items()}
        same = copy(own)
        same.clear()
        same.update({key: _as_in(own.get(key), value) for key, value in named.items()})
        return same
    if isinstance(own, (tuple, list)) and isinstance(state, list):
        known = [*own, *[None] * len(state)]
        return type(own)(_as_in(*pair) for pair in zip(known, state, strict=False))
    return state
