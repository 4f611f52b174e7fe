"""When a new Lanczos vector must be orthogonalised against all earlier ones."""

from typing import final

import torch
from torch import Tensor

_LIMIT = 256.0
"""Overlap allowed in units of rounding: 3e-5 in float32. The estimate is 5 to 30 times too high on
networks (measured, docs/log.md), so that overlaps stay near 1e-5."""

_MISTRUST = 4.0  # assumed: times the limit; an estimate that is overtaken so far is not used again


@final
class OrthogonalityWatch:
    """Estimates the overlaps of each new vector with all others, without looking at them.

    In exact arithmetic the recurrence keeps vectors orthogonal; rounding enters at every step and
    grows along eigenvectors that have converged. Overlaps obey a recurrence of their own (Simon
    1984), ``O(m^2)`` numbers a step. Where it exceeds the limit two vectors in a row are swept, for
    the next one is made of two. The rounding of a step, unknown to theory, is what the sweeps find.

    It reads numbers on the host, so it is for vectors on the CPU.

    Args:
        capacity: vectors at most.
        dtype: of the vectors.
    """

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self._rounding = torch.finfo(dtype).eps
        self._limit = _LIMIT * self._rounding
        self._overlaps = torch.eye(capacity + 1, dtype=torch.float64)
        self._noise = 0.0  # largest overlap that one step brings; not known yet
        self._forced = 3  # sweeps to come in any case
        self._after_sweep = False
        self._trusted = True

    def due(self, matrix: Tensor, length: Tensor) -> bool:
        """Whether the vector after ``T`` ``(m, m)``, of this ``length``, must be swept."""
        m = len(matrix)
        known = self._overlaps[:m, :m]
        drift = (matrix @ known[:, -1] - known @ matrix[:, -1]) / length
        drift += torch.where(drift < 0, -self._noise, self._noise)
        drift[-1] = self._noise
        self._overlaps[m, :m] = self._overlaps[:m, m] = drift
        good = bool(drift.abs().max() <= self._limit)  # not if it is not a number
        if self._forced == 0 and not (good and self._trusted):
            self._forced = 2
        if self._forced == 0:
            self._after_sweep = False
            return False
        self._forced -= 1
        return True

    def swept(self, found: Tensor) -> None:
        """The vector after the last `due` has been: it had overlaps ``found`` ``(m,)``."""
        m = len(found)
        worst = float(found.abs().max())
        if self._after_sweep:  # what a single step brings
            self._noise = max(worst, 0.5 * self._noise)
        elif worst > _MISTRUST * self._limit:
            self._trusted = False
        self._after_sweep = True
        self._overlaps[m, :m] = self._overlaps[:m, m] = self._rounding

    def fresh(self, count: int) -> None:
        """The vector after ``count`` has been made anew, orthogonal to all."""
        self._overlaps[count, :count] = self._overlaps[:count, count] = self._rounding
        self._forced, self._after_sweep = 2, False

    def turned(self, turn: Tensor) -> None:
        """The ``m`` vectors have been replaced by combinations ``(m, k)`` of theirs."""
        m, k = turn.shape
        overlaps = torch.eye(len(self._overlaps), dtype=torch.float64)
        overlaps[:k, :k] = turn.T @ self._overlaps[:m, :m] @ turn
        overlaps[k, :k] = overlaps[:k, k] = turn.T @ self._overlaps[:m, m]
        self._overlaps = overlaps
        self._forced, self._after_sweep = 2, False
