"""Batches as they are run: whole or in parts, each with its weight in the mean over all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from batchlr.operators.batch_weight import batch_weight
from batchlr.operators.batches import count_samples, cut
from batchlr.operators.supervised import LossFunction


@dataclass(frozen=True)
class _Part:
    """Samples that are run together."""

    batch: Any
    owner: int  # number of the batch it is cut from
    weight: float


@final
class BatchParts:
    """The parts of a list of batches, numbered through. What they weigh says `batch_weight`.

    Args:
        batches: kept, not copied.
        loss_fn: whose mean is over all of them.
        most: samples in one part; None keeps batches whole.

    Raises:
        ValueError: all batches have weight zero.
    """

    def __init__(
        self, batches: Sequence[Any], loss_fn: LossFunction, *, most: int | None = None
    ) -> None:
        self.samples = tuple(count_samples(batch) for batch in batches)
        self._parts: list[_Part] = []
        for owner, batch in enumerate(batches):
            pieces = [batch] if most is None else cut(batch, most)
            self._parts += [_Part(piece, owner, batch_weight(loss_fn, piece)) for piece in pieces]
        if not any(part.weight > 0 for part in self._parts):
            msg = "all batches have weight zero: are all their targets ignored?"
            raise ValueError(msg)
        self.weights = self._in_samples()

    def batch(self, number: int) -> Any:
        """The samples of part ``number``, in the form of a batch."""
        return self._parts[number].batch

    def shares(self, owner: int | None = None) -> list[tuple[int, float]]:
        """Number and share of each part in the mean over batch ``owner``, or over all.

        Parts of weight zero are left out.
        """
        parts = [(j, p.weight) for j, p in enumerate(self._parts) if owner in (None, p.owner)]
        total = sum(weight for _, weight in parts)
        return [(number, weight / total) for number, weight in parts if weight > 0]

    def largest(self) -> int:
        """Number of the part with the most samples, among those of some weight."""
        numbers = [number for number, _ in self.shares()]
        return max(numbers, key=lambda number: count_samples(self._parts[number].batch))

    def _in_samples(self) -> tuple[float, ...]:
        """Weights of the batches, scaled so that their sum is the number of samples."""
        weights = [0.0] * len(self.samples)
        for part in self._parts:
            weights[part.owner] += part.weight
        if weights == list(self.samples):  # without rounding
            return tuple(weights)
        return tuple(weight * sum(self.samples) / sum(weights) for weight in weights)
