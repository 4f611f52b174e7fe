"""A symmetric matrix known through its products with vectors."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, final

import numpy as np
import torch
from torch import Tensor


class LinearOperator(ABC):
    """A real symmetric ``(P, P)`` matrix, used only through ``operator @ v``.

    ``v`` is one vector ``(P,)`` or a block of ``k`` columns ``(P, k)``, of the operator's dtype and
    on its device; the product has the shape of ``v``. The same ``v`` gives the same product until
    whatever the matrix is made of changes.

    Attributes:
        num_products: matrix-vector products spent so far; a block of ``k`` columns counts ``k``.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._size = size
        self._dtype = dtype
        self._device = device
        self.num_products = 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return (self._size, self._size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors taken and returned."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Of the vectors taken and returned."""
        return self._device

    @final
    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.check(vectors)
        columns = vectors.detach().unsqueeze(1) if vectors.ndim == 1 else vectors.detach()
        self.num_products += columns.shape[1]
        return self._multiply(columns).reshape(vectors.shape)

    @abstractmethod
    def _multiply(self, columns: Tensor) -> Tensor:
        """Product with ``columns`` ``(P, k)``, already checked and counted."""

    def check(self, vectors: Tensor) -> None:
        """Raise TypeError or ValueError unless ``vectors`` can be multiplied."""
        if not isinstance(vectors, Tensor):
            msg = f"an operator multiplies a torch.Tensor, got {type(vectors).__name__}"
            raise TypeError(msg)
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self._size:
            msg = (
                f"expected a vector ({self._size},) or a block ({self._size}, k), "
                f"got shape {tuple(vectors.shape)}"
            )
            raise ValueError(msg)
        if vectors.dtype != self._dtype or vectors.device != self._device:
            msg = (
                f"expected {self._dtype} on {self._device}, got {vectors.dtype} on "
                f"{vectors.device}; convert with v.to(operator.device, operator.dtype)"
            )
            raise ValueError(msg)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` of the same matrix (copies through the CPU)."""
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def multiply(array: Any) -> Any:
            vectors = torch.from_numpy(np.array(array, order="C"))  # it may be read-only
            product = self @ vectors.to(self._device, self._dtype)
            return product.cpu().numpy()

        dtype = torch.empty(0, dtype=self._dtype).numpy().dtype
        return ScipyOperator(
            shape=self.shape,
            dtype=dtype,
            matvec=lambda v: multiply(v.reshape(-1)),
            rmatvec=lambda v: multiply(v.reshape(-1)),
            matmat=multiply,
        )


class BatchedOperator(LinearOperator):
    """A matrix that is the weighted mean of one matrix per batch."""

    @property
    @abstractmethod
    def samples(self) -> tuple[int, ...]:
        """Number of samples of each batch."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Each batch's weight in the mean, in units of samples: their sum is that of `samples`.

        They differ from `samples` where the loss is a mean over something else, as over tokens.
        """
        return tuple(float(count) for count in self.samples)

    @abstractmethod
    def batch_products(self, vectors: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """``A_k v`` ``(P,)`` of each batch in turn: one product of the whole matrix in cost.

        Args:
            vectors: ``v`` ``(P,)``, or for each batch one of its own.
        """

    @final
    def _each(self, vectors: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """A vector for each batch, checked; together they count as one product."""
        count = len(self.samples)
        each = repeat(vectors, count) if isinstance(vectors, Tensor) else vectors
        for number, vector in enumerate(each):
            self.check(vector)
            self.num_products += number == 0
            yield vector.detach()
