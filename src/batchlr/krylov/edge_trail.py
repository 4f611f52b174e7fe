"""One end of a spectrum, remembered from one matrix to the next."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from batchlr.krylov.rayleigh_ritz import RitzSpace
from batchlr.measured import Measured

End = Literal["largest", "smallest"]

_EXPLORE_NEAR = 2  # assumed: most updates between two explorations, where the second is near
_CLOSED = 1e-5  # assumed: a residual this small beside the spectrum is rounding
_NEAR = 0.75  # assumed: share of the edge from which on the second eigenvalue is near
_GRADIENT_SHARE = 0.2  # assumed: of the gradient's direction in an exploration
_DOUBT = (4.0, 1.4)  # measured (docs/log.md): of a gap that is remembered, and of one that is seen
_FLUSHED = 1e-30  # assumed: entries of a unit vector that may be zero as well
_SURE = 1e-3  # assumed: least 1 - c^2, lest a perfect estimate have all the weight
_LEAST = 1e-3  # assumed: least weight of the last vector, lest the gradient's share be infinite
_FORGET = 0.97  # measured (docs/log.md): factor on what was seen beside the edge, at each update


@dataclass(frozen=True)
class TrackedEdge:
    """One end of the spectrum at one update."""

    value: float  # Rayleigh quotient of `vector`: never beyond the true edge
    residual: float  # |A v - value v|: certified, some eigenvalue lies within it of the value
    error: float  # an estimate of the order of residual^2 / gap, at most the residual
    # (P,) of unit norm; the tracker's own until its next update: do not change it
    vector: Tensor = field(repr=False)

    @property
    def measured(self) -> Measured:
        """The value with its estimated error."""
        return Measured(self.value, self.error)


@dataclass(frozen=True)
class EdgeLook:
    """What a space says of one end, before any vector is made."""

    value: float
    residual: float
    error: float
    relative: float  # the error over what a search is for, see `EdgeTrail.look`
    closed: bool  # the residual is rounding: the space is as good as invariant here
    column: Tensor  # (m,) coefficients of the end's Ritz vector v
    remainder: Tensor  # (P,) A v - value v, of which the residual is the norm

    def edge(self, space: RitzSpace) -> TrackedEdge:
        """The same with its vector, which takes the place of the remainder."""
        vector = space.vector(self.column, out=self.remainder)
        vector = _flushed(vector.div_(vector.norm()))
        return TrackedEdge(self.value, self.residual, self.error, vector)


@final
@dataclass
class EdgeTrail:
    """What earlier searches have left for the next: where to start, where else to look, the gap.

    The "second" eigenvalue is the neighbour of the edge, which may overtake it as the matrix
    changes. Ritz values come in descending order, as `RitzSpace.ritz` has them.
    """

    end: End
    vector: Tensor | None = None  # (P,) the last eigenvector; None before the first search
    explorer: Tensor | None = None  # (P,) where the second eigenvector is sought
    ratio: float | None = None  # second eigenvalue over the edge: the largest seen of late
    far: float = 0.0  # the opposite end as far as it was seen of late, zero if that is on this side
    kept: float | None = None  # |cosine| of the vectors of two searches in turn, averaged
    lean: float | None = None  # |cosine| of the gradient with the vector then found, averaged

    @property
    def index(self) -> int:
        """Of the edge among descending Ritz values."""
        return 0 if self.end == "largest" else -1

    @property
    def second(self) -> int:
        """Index of its neighbour, likewise."""
        return 1 if self.end == "largest" else -2

    @property
    def gradient_share(self) -> float:
        """How much of the gradient a start has beside the last vector, both of unit norm.

        Estimates of one direction whose errors are independent go together best with weights
        ``c / (1 - c^2)``, where ``c`` are their cosines with it. A gradient that told less than the
        last vector is left out (measured, docs/log.md).
        """
        if self.kept is None or self.lean is None or self.lean < self.kept:
            return 0.0
        return _weight(self.lean) / max(_weight(self.kept), _LEAST)

    def start(self, gradient: Tensor | None) -> Tensor | None:
        """Where the next search begins, ``(P,)``: the last vector, with its share of the gradient.

        None before the first search.
        """
        if self.vector is None or gradient is None or self.gradient_share == 0:
            return self.vector
        # An eigenvector has no sign of its own: the two are added up, not taken off each other.
        share = math.copysign(self.gradient_share, float(torch.dot(self.vector, gradient)))
        return torch.add(self.vector, gradient, alpha=share / float(gradient.norm()))

    def explores(self, update: int, *, every: int) -> bool:
        """Whether search number ``update`` looks for an eigenvalue that has overtaken.

        Each ``every``-th does, or every other while the second eigenvalue is near.
        """
        if self.vector is None:
            return False
        near = self.ratio is not None and self.ratio > _NEAR
        return update % (min(every, _EXPLORE_NEAR) if near else every) == 0

    def exploration(self, gradient: Tensor | None) -> Tensor | None:
        """Where an eigenvalue that has overtaken is looked for, ``(P,)``; None if nothing is known.

        At the second eigenvector, as far as it has been found, and a little along the gradient.
        """
        if gradient is None:
            return self.explorer
        if self.explorer is None:
            return gradient
        share = _GRADIENT_SHARE / float(gradient.norm())
        return torch.add(self.explorer, gradient, alpha=share)

    def look(
        self, space: RitzSpace, values: Tensor, coefficients: Tensor, *, out: Tensor
    ) -> EdgeLook:
        """The end as ``space`` knows it.

        Errors of the largest are relative to itself, for negative curvature may be many times
        stronger, and a largest that is negative is not believed: networks have their bulk at zero.
        Those of the smallest are relative to the largest magnitude.

        Args:
            space: the matrix on a few directions.
            values: its Ritz values ``(m,)``, descending.
            coefficients: of their vectors, ``(m, m)``.
            out: room for the remainder ``(P,)``.
        """
        value, column = float(values[self.index]), coefficients[:, self.index]
        magnitude = float(values.abs().max())
        rounding = torch.finfo(space.operator.dtype).eps * magnitude
        remainder = space.residual(value, column, out=out)
        residual = max(float(remainder.norm()), rounding)
        error = self._error(values, residual)
        scale = max(value, 0.0) if self.end == "largest" else magnitude
        nothing_is_enough = math.inf if error > 0 else 0.0
        return EdgeLook(
            value=value,
            residual=residual,
            error=error,
            relative=nothing_is_enough if scale == 0 else error / scale,
            closed=residual <= _CLOSED * magnitude,
            column=column,
            remainder=remainder,
        )

    def learn(self, space: RitzSpace, found: Tensor, gradient: Tensor | None) -> None:
        """Remember a search that is over.

        Args:
            space: in which it was made.
            found: the edge's eigenvector ``(P,)``.
            gradient: ``(P,)`` at the time of the search, if there was one.
        """
        if self.vector is not None:
            self.kept = _averaged(self.kept, _cosine(self.vector, found))
        if gradient is not None:
            self.lean = _averaged(self.lean, _cosine(gradient, found))
        self.vector = found
        self._learn_second(space)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """A trail read from a checkpoint may lie elsewhere than the model."""
        if self.vector is not None:
            self.vector = self.vector.to(device, dtype)
        if self.explorer is not None:
            self.explorer = self.explorer.to(device, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors of its own; the end is not among them."""
        return {
            "vector": None if self.vector is None else self.vector.clone(),
            "explorer": None if self.explorer is None else self.explorer.clone(),
            "ratio": self.ratio,
            "far": self.far,
            "kept": self.kept,
            "lean": self.lean,
        }

    @staticmethod
    def of_state(end: End, state: dict[str, Any]) -> "EdgeTrail":
        """The trail whose `state_dict` this is."""
        trail = EdgeTrail(end, **state)
        if trail.explorer is not None:
            trail.explorer = trail.explorer.clone()  # which the next search overwrites
        return trail

    def _error(self, values: Tensor, residual: float) -> float:
        """Of the edge: ``residual^2 / gap`` with a doubt of the gap, or the residual if less."""
        if self.vector is None:  # a gap seen from a random start means nothing
            return residual
        value = float(values[self.index])
        # Networks have their bulk at zero, so zero is a neighbour, whatever the space has seen.
        neighbours = [0.0] if self.ratio is None else [0.0, self.ratio * value]
        if len(values) > 1:
            neighbours.append(float(values[self.second]))
        gap = min(abs(value - neighbour) for neighbour in neighbours)
        doubt = _DOUBT[0] if len(values) == 1 else _DOUBT[1]
        return residual if gap <= doubt * residual else doubt * residual**2 / gap

    def _learn_second(self, space: RitzSpace) -> None:
        """Note what the space has seen beside the edge: the opposite end, and the neighbour."""
        values, coefficients = space.ritz()
        outermost = min if self.end == "largest" else max
        self.far = outermost(float(values[-1 - self.index]), _FORGET * self.far)
        if len(values) < 2:
            return
        column = coefficients[:, self.second]
        # One step of power iteration, shifted so that the far end of the spectrum dies out.
        step = space.residual(self.far, column, out=self.explorer)
        norm = float(step.norm())
        self.explorer = _flushed(step.div_(norm) if norm > 0 else space.vector(column))
        edge = float(values[self.index])
        if edge == 0:
            return
        found = float(values[self.second]) / edge
        self.ratio = found if self.ratio is None else max(found, _FORGET * self.ratio)


def _weight(cosine: float) -> float:
    """Of an estimate of a direction; see `EdgeTrail.gradient_share`."""
    return cosine / max(1 - cosine**2, _SURE)


def _averaged(before: float | None, new: float) -> float:
    """Half of what was, half of what is (assumed)."""
    return new if before is None else (before + new) / 2


def _cosine(left: Tensor, unit: Tensor) -> float:
    """Magnitude of the cosine between a vector and one of unit norm."""
    return min(1.0, abs(float(torch.dot(left, unit) / left.norm())))


def _flushed(vector: Tensor) -> Tensor:
    """The vector less its tiniest entries, in place.

    What a matrix maps to zero, such as the weights of dead units, shrinks by a factor at each
    update. Some hundred updates later it consists of subnormal numbers, with which a CPU multiplies
    four times as slowly (measured, docs/log.md).
    """
    return torch.hardshrink(vector, _FLUSHED, out=vector)
