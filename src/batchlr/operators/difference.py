"""The difference of two matrices, such as the Hessian less its Gauss-Newton part."""

from typing import final

from torch import Tensor

from batchlr.operators.base import LinearOperator


@final
class DifferenceOperator(LinearOperator):
    """``A - B``; a product costs one of each.

    Raises:
        ValueError: shapes, dtypes or devices differ.
    """

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        kinds = [(operator.shape, operator.dtype, operator.device) for operator in (left, right)]
        if kinds[0] != kinds[1]:
            words = [f"{shape} {dtype} on {device}" for shape, dtype, device in kinds]
            msg = f"only like matrices have a difference, got {words[0]} and {words[1]}"
            raise ValueError(msg)
        super().__init__(left.shape[0], dtype=left.dtype, device=left.device)
        self._left = left
        self._right = right

    def __repr__(self) -> str:
        return f"DifferenceOperator({self._left!r}, {self._right!r})"

    def _multiply(self, columns: Tensor) -> Tensor:
        return self._left @ columns - self._right @ columns
