"""Telling from losses and gradients that a step has destroyed the network."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from batchlr.sharded_tensors import local_part, norms_of_whole

Same = Callable[[float], float]

OFTEN, SELDOM = 2, 10  # assumed: steps between two looks, at least and at most
_AGE = 8  # assumed: between those, the steps so far over this
_LEARNT = 0.1  # assumed: the loss has come down by this share
_SETTLED = 0.3  # assumed: by this share, or that other long ago, and it is not about to be lost
_JUMP, _SURGE = 0.1, 3.0  # measured (docs/log.md): rise of the loss, factor of the gradient
_SILENT = 0.5  # measured (docs/log.md): share of tensors without gradient in a dead network
_EXPLODED = 100.0  # assumed: a loss this many times its first value, or 1, does not come back
_BACK, _SUNK = 0.03, 3  # assumed: so near the first loss again, for so many looks
_WORSE = 3.0  # assumed: nor does the mean of a look before anything is learnt
_LEAP = math.log(2)  # Bernstein et al. 2020: sum of the layers' relative changes in a step
_KNOWN = 3  # assumed: degrees of freedom from which on the noise of losses is known
_SIGMAS, _LITTLE = 5.0, 4.0  # measured (docs/log.md): standard errors beyond which is no noise


@final
@dataclass(frozen=True)
class Look:
    """What the last steps showed."""

    loss: float  # their mean
    norm: float  # of the last one's gradient
    lost: bool
    sound: bool  # what was learnt is still there, and the loss has not risen since the last look
    settled: bool  # what was learnt will last
    leap: float = 0.0  # change of the layers in a step that was one, over ln 2


@final
@dataclass
class CollapseDetector:
    """Looks at losses and gradients every few steps, and knows five kinds of collapse.

    Explosion: a loss that is no finite number, or a hundred times the first, or in the mean of a
    look three times the first, a tenth above it once something was learnt (a first loss below 1
    counts as 1). A jump: before the loss has come down by a tenth, a loss a tenth above the first
    one in the same step as a gradient three times the largest before. A leap: while the loss lies
    where it began, a step that changes the layers by more than ln 2 in sum (`RelativeUpdate`), and
    so what passes through them by up to its own size. Silence: in every step of a look most tensors
    of weights have a gradient of exactly zero, as behind units that have died, at a loss above half
    the first one. Oblivion: once something was learnt, three looks in a row whose loss is within
    3 % of the first one, or worse.
    What compares losses does so beyond their noise, pooled from the scatter within quiet looks, of
    those that descend about the descent, of those that rise by more than noise not at all: a jump,
    oblivion and a mean too large are told from the third quiet look of two steps on.

    A gradient that training clips cannot jump, and one that is gone before `observe` tells nothing;
    losses then have to do alone.

    Looks are two steps apart at first, an eighth of the steps so far later on, ten at most; each
    waits for the device once. A step costs the norms of its gradients.
    """

    steps: int = 0
    within: int = SELDOM  # steps between two looks at most
    squares: float = 0.0  # of losses about the means of their looks, or their descent; quiet ones
    freedom: int = 0  # degrees of freedom of that sum
    first: float | None = None  # mean loss of the first look
    largest: float = 0.0  # norm of a gradient up to the last look that was quiet
    sparse: bool = False  # most tensors had no gradient from the start
    fresh: bool = False  # the next step is the first behind a return
    learnt: int = 0  # steps after which the loss had come down; 0 is not yet
    before: list[float] = field(default_factory=list)  # mean loss and steps of the last quiet look
    sunk: int = 0  # looks since it is back at the first
    pending: list[Tensor] = field(default_factory=list)  # (4,) each, see `_signs`

    def observe(
        self,
        loss: Tensor,
        gradients: Sequence[Tensor],
        same: Same | None = None,
        change: Tensor | None = None,
    ) -> Look | None:
        """Take note of a step.

        Args:
            loss: its loss ``()``.
            gradients: it was made with.
            same: returns what the first of several processes passed.
            change: what it did to the layers ``()``, as of `RelativeUpdate`; None is not known.

        Returns:
            What was seen, if it was time to look.
        """
        sign = _signs(loss, gradients, change)
        self.pending = [*(other.to(sign.device) for other in self.pending), sign]
        self.steps += 1
        apart = min(max(self.steps // _AGE, OFTEN), self.within)
        return self.look(same) if len(self.pending) >= apart else None

    @property
    def urgent(self) -> bool:
        """Whether a loss not yet looked at has exploded; waits for the device."""
        return bool(self.pending) and any(
            self._exploded(loss) for loss in torch.stack(self.pending)[:, 0].tolist()
        )

    def look(self, same: Same | None = None) -> Look:
        """What the steps since the last look show."""
        rows: list[list[float]] = torch.stack(self.pending).tolist()
        self.pending = []
        rows, leap = self._until_leap(rows)
        count = len(rows)
        loss = sum(row[0] for row in rows) / len(rows)
        norm = rows[-1][1]
        largest = max((row[1] for row in rows if math.isfinite(row[1])), default=0.0)
        silent = self._silent(rows)
        losses = [row[0] for row in rows]
        squares = _squares(losses, loss, slope=0.0)
        self.sunk = self.sunk + 1 if self.learnt and self._back(loss, squares, len(rows)) else 0
        squares = min(squares, _squares(losses, loss, self._slope(loss, len(rows))))
        lost, risen = self._lost(rows, loss, silent), self._risen(loss, len(rows))
        if same is not None:
            loss, norm, largest = (same(v) for v in (loss, norm, largest))
            squares, leap = same(squares), same(leap)
            lost, silent = bool(same(float(lost))), bool(same(float(silent)))
            risen = bool(same(float(risen)))
            self.sunk, count = int(same(self.sunk)), int(same(count))
        if not lost:
            self._settle(loss, largest, silent, count)
            if not risen:
                self.squares, self.freedom = self.squares + squares, self.freedom + count - 1
            self.before = [loss, count]
        sound = self.sunk == 0 and not risen and not self._forgotten(loss)
        return Look(loss, norm, lost or leap > 0, sound, self._settled(loss), 0.0 if lost else leap)

    def _silent(self, rows: list[list[float]]) -> bool:
        """Whether most tensors had no gradient in all steps but the first behind a return.

        Behind weights that begin at zero no gradient passes in that one.
        """
        later = rows[1:] if self.fresh and self.first is not None else rows
        self.fresh = False
        return bool(later) and all(row[2] > _SILENT for row in later)

    def _risen(self, mean: float, count: int) -> bool:
        """Whether the mean has risen since the last look by more than noise: then it is none."""
        if not self.before or self.freedom < _KNOWN:
            return False
        last, steps = self.before
        return mean > last + self._noise * math.sqrt(1 / count + 1 / steps)

    def _slope(self, mean: float, count: int) -> float:
        """Of losses that fall from the last look to this one, a step."""
        if not self.before:
            return 0.0
        last, steps = self.before
        return min(0.0, (mean - last) / ((steps + count) / 2))

    def _until_leap(self, rows: list[list[float]]) -> tuple[list[list[float]], float]:
        """The steps up to a leap, which do not know yet where it led, and its length over ln 2."""
        for number, (_, _, _, change) in enumerate(rows, start=1):
            before = sum(row[0] for row in rows[:number]) / number
            if _LEAP < change < math.inf and self._unmoved(before):
                return rows[:number], change / _LEAP
        return rows, 0.0

    def _unmoved(self, loss: float) -> bool:
        if self.first is None:
            return True
        return not self.learnt and loss > self.first - _BACK * abs(self.first)

    def _settled(self, loss: float) -> bool:
        if not self.learnt or self.first is None:
            return False
        down, unit = self.first - loss, abs(self.first)
        lasting = self.steps >= 2 * self.learnt and down > _LEARNT * unit
        return down > _SETTLED * unit or lasting

    @property
    def _noise(self) -> float:
        """What a single loss may be off by: standard errors, more while they are little known."""
        if not self.freedom:
            return 0.0
        errors = _SIGMAS * (1 + _LITTLE / self.freedom)
        return errors * math.sqrt(self.squares / self.freedom)

    def _back(self, loss: float, squares: float, count: int) -> bool:
        """By more than the scatter of this look itself, which in a dead network is small."""
        if self.first is None:
            return False
        own = _SIGMAS * math.sqrt(squares / (count - 1) / count) if count > 1 else self._noise
        return loss > self.first - _BACK * abs(self.first) + own

    def _forgotten(self, loss: float) -> bool:
        """Whether what counted for learnt is gone, be it for good or by noise."""
        if self.first is None or not self.learnt:
            return False
        return loss > self.first - _LEARNT * abs(self.first)

    def _exploded(self, loss: float) -> bool:
        return not abs(loss) <= _EXPLODED * self._unit + self._noise

    @property
    def _unit(self) -> float:
        """The first loss, or 1; without one, so much that only what is not finite exceeds it."""
        return sys.float_info.max / _EXPLODED if self.first is None else max(abs(self.first), 1.0)

    def _lost(self, rows: list[list[float]], mean: float, silent: bool) -> bool:
        if any(self._exploded(row[0]) for row in rows):
            return True
        if self.first is None:
            return False
        known, noise = self.freedom >= _KNOWN, self._noise
        worst = self.first + _JUMP * self._unit if self.learnt else _WORSE * self._unit
        if known and mean > worst + noise / math.sqrt(len(rows)):
            return True
        if self.sunk >= _SUNK:
            self.sunk = 0
            return True
        if silent and not self.sparse and mean > self.first / 2:
            return True
        above = self.first + max(_JUMP * abs(self.first), noise)
        return (
            known
            and not self.learnt
            and any(loss > above and norm > _SURGE * self.largest for loss, norm, *_ in rows)
        )

    def _settle(self, loss: float, largest: float, silent: bool, count: int) -> None:
        """Keep what a quiet look tells."""
        if self.first is None:
            self.first, self.sparse = loss, silent and count > 1
        self.largest = max(self.largest, largest)
        down = _LEARNT * abs(self.first) + self._noise / math.sqrt(count)
        if not self.learnt and loss < self.first - down:
            self.learnt = self.steps

    def restart(self) -> None:
        """The next step does not go on from the last."""
        self.pending, self.before, self.fresh = [], [], True

    def state_dict(self) -> dict[str, Any]:
        """Numbers and the signs not yet looked at."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state_dict.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)


def _squares(losses: list[float], mean: float, slope: float) -> float:
    """Sum of the squares about a line through the middle."""
    middle = (len(losses) - 1) / 2
    return sum((loss - mean - slope * (i - middle)) ** 2 for i, loss in enumerate(losses))


@torch.no_grad()
def _signs(loss: Tensor, gradients: Sequence[Tensor], change: Tensor | None) -> Tensor:
    """Loss, norm of the gradient, share of tensors whose gradient is zero, change ``(4,)``."""
    loss = loss.detach().float()
    moved = loss.new_zeros(()) if change is None else change.to(loss)
    dense = [gradient for gradient in gradients if not gradient.is_sparse]
    if not dense:
        return torch.stack([loss, *loss.new_zeros(2), moved])
    parts = torch._foreach_norm([local_part(gradient) for gradient in dense])
    norms = norms_of_whole(parts, dense)
    each = torch.stack([norm.to(loss.device, torch.float32) for norm in norms])
    return torch.stack([loss, each.norm(), (each == 0).float().mean(), moved])
