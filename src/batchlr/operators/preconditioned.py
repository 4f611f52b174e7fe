"""A matrix seen in another metric: ``S A S`` with a diagonal ``S``."""

from collections.abc import Iterable, Iterator
from typing import final

from torch import Tensor

from batchlr.operators.base import BatchedOperator


@final
class PreconditionedOperator(BatchedOperator):
    """``diag(scale) A diag(scale)``, one product of ``A`` each.

    An optimizer that steps by ``lr * D^-1 g`` is stable as plain descent on
    ``D^-1/2 H D^-1/2``: ``scale = D^-1/2``. Parameter groups whose rates have the ratios ``r``
    are the case ``scale = sqrt(r)``.

    Raises:
        ValueError: ``scale`` is not a finite, non-negative ``(P,)`` vector.
    """

    def __init__(self, operator: BatchedOperator, scale: Tensor) -> None:
        if scale.shape != operator.shape[:1]:
            msg = f"scale must have shape ({operator.shape[0]},), got {tuple(scale.shape)}"
            raise ValueError(msg)
        if not bool((scale.isfinite() & (scale >= 0)).all()):
            msg = "scale must be finite and non-negative; is the optimizer's second moment finite?"
            raise ValueError(msg)
        super().__init__(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.operator = operator
        self.scale = scale.detach().to(operator.device, operator.dtype)

    def __repr__(self) -> str:
        return f"PreconditionedOperator({self.operator!r})"

    @property
    def samples(self) -> tuple[int, ...]:
        """Number of samples of each batch."""
        return self.operator.samples

    @property
    def weights(self) -> tuple[float, ...]:
        """Each batch's weight in the mean, in samples."""
        return self.operator.weights

    def batch_products(self, vectors: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """See `BatchedOperator.batch_products`."""
        scaled = (self.scale * vector for vector in self._each(vectors))
        for product in self.operator.batch_products(scaled):
            yield self.scale * product

    def _multiply(self, columns: Tensor) -> Tensor:
        scale = self.scale.unsqueeze(1)
        return scale * (self.operator @ (scale * columns))
