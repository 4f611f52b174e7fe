"""Time of contestants that take turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timed:
    seconds: float
    result: Any


def clock(function: Callable[[], Any], device: str = "cpu") -> Timed:
    """CPU time of all threads; on an accelerator, wall time up to the last kernel."""
    now = time.process_time if device == "cpu" else time.perf_counter
    settle(device)
    began = now()
    result = function()
    settle(device)
    return Timed(now() - began, result)


def settle(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, list[Timed]]:
    """Each contestant once a round, the order turned by one place from round to round."""
    names = list(contestants)
    times: dict[str, list[Timed]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(contestants[name], device))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios within a round: what slows the machine down falls on both."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (lower quartile - upper quartile)``."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"
