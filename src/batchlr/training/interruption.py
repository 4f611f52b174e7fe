"""Stopping a run from outside without losing it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

import torch

from batchlr.training.distributed import Processes

_MOST_STEPS = 20  # assumed: a message in so many steps costs nothing beside them
_SECONDS = 5.0  # assumed: torchrun kills 30 s after it has asked, and a checkpoint takes its time


@final
class StopRequest:
    """Whether someone has asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.requested:  # asked twice: at once
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request, seen between two steps."""
    request = StopRequest()
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = [signal.signal(number, request) for number in signals]
    except ValueError:  # only the main thread receives signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


@final
class StopAgreement:
    """Whether the processes of a run stop after this step: all of them, or none.

    To ask costs a message. So they ask after the first step, and from then on every 20 steps, or
    about every five seconds by the first process's clock where 20 steps take longer.

    Args:
        request: this process's.
        group: the processes.
        device: what their messages travel from.
    """

    def __init__(self, request: StopRequest, group: Processes, device: torch.device) -> None:
        self._request = request
        self._group = group
        self._device = device
        self._since = time.perf_counter()
        self._steps = 0  # since they asked last
        self._due = 1

    def reached(self) -> bool:
        """Count a step just made; whether to stop. At most two messages."""
        if self._group.world_size == 1:
            return self._request.requested
        self._steps += 1
        if self._steps < self._due:
            return False
        stops = self._group.any(self._request.requested, self._device)
        now = time.perf_counter()
        due = steps_between((now - self._since) / self._steps)
        self._due = int(self._group.same(due, self._device))
        self._since, self._steps = now, 0
        return stops


def steps_between(seconds_per_step: float) -> int:
    """How many steps to make from one agreement to the next: five seconds' worth, 1 to 20."""
    return max(1, int(min(_MOST_STEPS, _SECONDS / max(seconds_per_step, 1e-9))))
