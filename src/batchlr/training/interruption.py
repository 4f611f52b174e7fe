"""Stopping a run from outside without losing it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final


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
