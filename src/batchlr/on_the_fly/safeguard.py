"""What is done when training goes wrong: slow down, or go back and then slow down."""

import math
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from batchlr.on_the_fly.collapse import OFTEN, SELDOM, CollapseDetector, Look, Same
from batchlr.on_the_fly.relative_update import RelativeUpdate
from batchlr.on_the_fly.snapshots import Snapshot
from batchlr.on_the_fly.spike_guard import SpikeGuard
from batchlr.operators.unsharded import reshard

_CUT = 0.25  # measured (docs/log.md): factor on the rate at each attempt, and the least in one look
_SHORT = 0.8  # assumed: of a leap, what Adam's step may be behind one
_PROGRESS = 0.1  # assumed: an attempt has succeeded when the loss is down by this share
_PATIENCE = 10  # assumed: or, once something is learnt, after so many quiet looks
_ATTEMPTS = 8  # assumed: without success; then the run is left to itself

Event = Literal["slowed", "undone", "recovered"]
EVENTS = {
    "slowed": "the loss jumped, the rate is halved",
    "undone": "the network was lost and is what it was before, to go on at a lower rate",
    "recovered": "the network has left the plateau on which it was lost before",
}

_NUMBERS = (
    "rollback", "free", "held", "top", "ceiling", "start", "norm", "seen", "attempts", "leaving",
    "early", "quiet", "level", "shaken",
)  # fmt: skip


@final
class Safeguard:
    """Halves the rate when the loss jumps, and undoes the steps that destroyed the network.

    What a jump is says `SpikeGuard`, what destroyed is `CollapseDetector`. A network that is lost
    becomes what it was at a look that at least one more quiet look has followed (the start, where
    the loss settled in the first look that had learnt anything). Looks at a loss that is not a
    tenth below the first do not count, so that a run which stays there goes back far. Until the
    loss has come down by 30 %, or for as long again as its first tenth took, it becomes what it was
    at the start. Weights, buffers and the optimizer's state go back; data, schedule and random
    states go on. The rate is cut to a quarter, which `SpikeGuard` gives back while it is quiet.

    On a plateau curvature says nothing about the rate that its end will bear, so a network back at
    its start does not get its rate back: each attempt has a ceiling on the peak of a quarter of the
    last one's. (Where a step of Adam's or RMSprop's under a ceiling leapt, it is what makes that
    step four fifths of a leap, if that is more.) As the gradient grows, curvature does (Zhang et
    al. 2020, arXiv 1905.11881): the ceiling is lowered in proportion as the gradient exceeds that
    of the first look, but not for Adam and RMSprop, whose steps do not grow with the gradient. When
    the loss has come down by a tenth curvature is worth measuring, as if the run began anew, but no
    higher than the plateau's ceiling. Each limit measured there is the ceiling, lowered as the
    gradient exceeds that of the measurement; when it has come down to stay there is none any more.

    Keeps two snapshots, also in its state: twice the memory of weights, buffers and optimizer state
    (four times the weights with SGD's momentum, six times with Adam). Until something is learnt
    there is a copy of the weights more. A step costs the norms of its gradients, a look one copy of
    that memory.

    Args:
        optimizer: whose state goes back with the weights.
        rollback: False only slows down, sees losses only and keeps no snapshots.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rollback: bool = True) -> None:
        self.optimizer = optimizer
        self.rollback = rollback
        self.spikes = SpikeGuard()
        self.free = math.nan  # the peak were there no ceiling
        self._know_nothing()
        self._model: nn.Module | None = None
        self._scales = isinstance(optimizer, torch.optim.SGD)
        self._sure, self._latest = Snapshot(), Snapshot()
        self._update = RelativeUpdate()

    def _know_nothing(self) -> None:
        self.detector = CollapseDetector()
        self.held = math.inf  # the ceiling of this attempt on the plateau
        self.top = math.inf  # the ceiling at gradients of `norm`
        self.ceiling = math.inf  # at the last gradient
        self.start = 0.0  # largest gradient of the first look
        self.norm = 0.0  # above which a gradient lowers the ceiling
        self.seen = 0.0  # last gradient looked at
        self.attempts = 0  # since the last success
        self.leaving = False  # the plateau was left, by what may not last
        self.early = True  # the snapshots are of the start
        self.quiet = 0  # looks since the last attempt
        self.shaken = False  # a jump or a return, once the loss had settled if that is known
        self.level = math.nan  # loss of the snapshot gone back to
        self.losses = [math.nan, math.nan]  # at the two snapshots

    @property
    def factor(self) -> float:
        """On the rate, of jumps past."""
        return self.spikes.factor

    @property
    def peak(self) -> float:
        """The peak to train with; NaN before the first one is set."""
        return min(self.free, self.ceiling)

    def watch(self, model: nn.Module) -> None:
        """Remember whose weights to keep, and what they are before the next step."""
        if not self.rollback:
            return
        reshard(model)
        if not self.detector.learnt or self._model is not model:
            self._update.take(model)
        if self._model is model:
            return
        if self._model is not None:  # another network
            self._know_nothing()
        if self._model is not None or not self._sure.fits(model):
            for snapshot in (self._sure, self._latest):
                snapshot.take(model, self.optimizer)
        for snapshot in (self._sure, self._latest):
            snapshot.shard(model, self.optimizer)
        self._model = model

    def stop(self) -> None:
        """Do without rollback from now on, and free its memory."""
        self.rollback, self.leaving, self._model = False, False, None
        self.top = self.ceiling = math.inf
        self._sure, self._latest = Snapshot(), Snapshot()
        self._update.free()
        self.detector = CollapseDetector()

    @property
    def unsettled(self) -> bool:
        """Whether losses are watched that have not come down to stay, or are yet to be shown.

        True for good where all attempts were in vain.
        """
        return self.early and (self.rollback or self.attempts >= _ATTEMPTS)

    @property
    def unused(self) -> bool:
        """Whether no loss was ever shown."""
        return self.detector.steps == 0

    def limited(self, peak: float, *, anew: bool = False) -> float:
        """``peak``, just measured, or the ceiling where that is lower.

        Args:
            peak: from the limit.
            anew: it is the first one behind a plateau, and no higher than the ceiling that led off.
        """
        self.free = min(peak, self.held) if anew else peak
        if self.leaving:
            self._set_ceiling(peak, self.seen)
        return self.peak

    def rescale(self, factor: float) -> None:
        """Carry the rates over to a setting that bears ``factor`` times as much."""
        self.free *= factor
        self.held *= factor
        self.top *= factor
        self.ceiling *= factor

    def agree(self, same: Same) -> None:
        """Take over what the first of several processes has: rates, their gradient, a jump seen."""
        for name in ("free", "held", "top", "ceiling", "norm"):
            setattr(self, name, same(getattr(self, name)))
        self.shaken = bool(same(float(self.shaken)))

    def observe(self, loss: Tensor, same: Same | None = None) -> Event | None:
        """Take note of a step just made; what was done about it, or about one shortly before.

        Args:
            loss: of the step ``()``.
            same: returns what the first of several processes passed.
        """
        before = self.spikes.factor
        event: Event | None = "slowed" if self.spikes.observe(loss) else None
        self.shaken = self.shaken or (event is not None and not self.unsettled)
        if self._model is not None:
            reshard(self._model)
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            change = None if self.detector.learnt else self._update.measure(self._model)
            look = self.detector.observe(loss, gradients, same, change)
            if look is not None:
                event = self._judge(look, before) or event
        self.free *= self.spikes.factor / before
        return event

    def rescue(self, same: Same | None = None, *, lost: bool = False) -> Event | None:
        """Look ahead of time if a loss not yet looked at has exploded; waits for the device.

        Args:
            same: as that of `observe`.
            lost: the caller knows that the network is lost.
        """
        if self._model is None:
            return None
        urgent = lost or self.detector.urgent
        if same is not None:
            urgent = bool(same(float(urgent)))
        before = self.spikes.factor
        event = self._undo(before) if urgent else None
        self.free *= self.spikes.factor / before
        return event

    def _judge(self, look: Look, factor: float) -> Event | None:
        if look.lost:
            return self._undo(factor, look.leap)
        if 0 < look.norm < math.inf:
            self.seen = look.norm
        event: Event | None = None
        settles = self.early and look.settled
        if self.attempts and (self._succeeded(look.loss) or settles):
            event = "recovered" if self.ceiling < math.inf else None
            self.free = self.peak  # until the next limit is measured
            self.attempts, self.leaving = 0, self.early
            self._set_ceiling(math.inf, 0.0)
            self.detector.within = OFTEN if self.early else SELDOM
        elif self._scales and self.top < math.inf and 0 < look.norm < math.inf:
            self.norm = self.norm or look.norm  # zero if no look was quiet before the collapse
            self.ceiling = self.top * min(1.0, self.norm / look.norm)
        self._keep(look)
        if self.detector.learnt:
            self._update.free()
        return event

    def _set_ceiling(self, top: float, norm: float) -> None:
        """At gradients of ``norm`` and below it is ``top``."""
        self.top = self.ceiling = top
        self.norm = norm

    def _succeeded(self, loss: float) -> bool:
        self.quiet += 1
        down = loss < self.level - _PROGRESS * abs(self.level)
        return down or (not self.early and self.quiet >= _PATIENCE)

    def _keep(self, look: Look) -> None:
        assert self._model is not None
        if math.isnan(self.losses[0]):
            self.losses = [look.loss, look.loss]
            self.level, self.start = look.loss, self.detector.largest
        if self.early and look.settled:
            self.early = self.leaving = False
            self._set_ceiling(math.inf, 0.0)
            self.detector.within = SELDOM
        if not self.detector.learnt or not look.sound:
            return
        if not self.early:
            self._sure, self._latest = self._latest, self._sure
            self.losses[0] = self.losses[1]
        self._latest.take(self._model, self.optimizer)
        self.losses[1] = look.loss

    def _undo(self, factor: float, leap: float = 0.0) -> Event | None:
        assert self._model is not None
        if self.attempts >= _ATTEMPTS:
            self.free = self.peak
            self.stop()
            return None
        reshard(self._model)
        if not self._sure.fits(self._model):
            return None
        self._sure.restore(self._model, self.optimizer)
        self._latest.take(self._model, self.optimizer)
        self.level = self.losses[0]
        self.losses = [self.level, self.level]
        self.detector.restart()
        self.spikes.pending = []
        if self.early:
            self.detector.learnt = 0
            self.detector.largest = self.start
            self.held = self._lower(leap)
            self.leaving = False
            self._set_ceiling(self.held, self.start)
            self.free = max(self.free, self.held)  # what was learnt of the rate is undone, too
            self.detector.within = 1
            self.spikes.factor = factor
        else:
            self.spikes.factor = _CUT * factor
            self.shaken = True
        self.attempts += 1
        self.quiet = 0
        return "undone"

    def _lower(self, leap: float) -> float:
        """The ceiling of the next attempt on the plateau.

        Steps of Adam and RMSprop are as long as the rate says, the first one longest, so that one
        that leapt under a ceiling tells by how much to lower the rate it was made at.
        """
        if self.held == math.inf:
            return _CUT * self.free
        if leap and not self._scales:
            return max(_CUT, _SHORT / leap) * min(self.held, self.free)
        return _CUT * self.held

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors."""
        state = {name: getattr(self, name) for name in _NUMBERS} | {
            "losses": list(self.losses),
            "spikes": self.spikes.state_dict(),
            "detector": self.detector.state_dict(),
        }
        if self.rollback:
            state |= {"sure": self._sure.state_dict(), "latest": self._latest.state_dict()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in _NUMBERS:  # what an older version did not know is as at the start
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        self.losses = list(state_dict["losses"])
        self.spikes.load_state_dict(state_dict["spikes"])
        self.detector.load_state_dict(state_dict["detector"])
        if self.rollback and "sure" in state_dict:
            self._sure.load_state_dict(state_dict["sure"])
            self._latest.load_state_dict(state_dict["latest"])
        self._model = None  # so that the next `watch` shards what is whole
