"""Backing off when the training loss jumps, and coming back."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor

_LOOK_EVERY = 10  # assumed: steps between two looks; each one waits for the device
_JUMP = 0.3  # assumed: a spike takes the loss up by this share of where it began
_SIGMAS = 4.0  # assumed: and by so many standard errors
_RECOVER = 1.25  # assumed: growth of the factor per quiet look


@final
@dataclass
class SpikeGuard:
    """A factor on the rate, halved when the training loss jumps.

    Costs no product: it sees losses only, ten at a time, compares their mean with the lowest so
    far, and calls it a spike if it lies higher by 0.3 of the first mean and by four standard
    errors of their difference. While quiet the factor grows back to 1.
    """

    factor: float = 1.0
    first: float | None = None  # mean loss of the first look
    lowest: float = 0.0
    lowest_error: float = 0.0  # standard error of that mean
    pending: list[Tensor] = field(default_factory=list)

    def observe(self, loss: Tensor) -> bool:
        """Take note of a step's loss ``()``; True if it completes a spike.

        Raises:
            TypeError: it is no tensor.
        """
        if not isinstance(loss, Tensor):
            msg = f"the loss must be a tensor (), got {type(loss).__name__}: pass it without item()"
            raise TypeError(msg)
        loss = loss.detach()
        self.pending = [*(other.to(loss.device) for other in self.pending), loss]
        if len(self.pending) < _LOOK_EVERY:
            return False
        losses = torch.stack(self.pending).double()
        self.pending = []
        return self._look(float(losses.mean()), float(losses.std()) / _LOOK_EVERY**0.5)

    def _look(self, mean: float, error: float) -> bool:
        if self.first is None and math.isfinite(mean):
            self.first, self.lowest, self.lowest_error = mean, mean, error
            return False
        noise = _SIGMAS * math.hypot(error, self.lowest_error)
        jump = max(_JUMP * abs(self.first or 0.0), noise)
        if not mean <= self.lowest + jump:
            self.factor /= 2
            return True
        if mean < self.lowest:
            self.lowest, self.lowest_error = mean, error
        self.factor = min(1.0, _RECOVER * self.factor)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Numbers and the losses not yet looked at."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state_dict.items():
            setattr(self, name, list(value) if name == "pending" else value)
