"""A symmetric matrix held in memory."""

from typing import final

from torch import Tensor

from batchlr.operators.base import LinearOperator


@final
class DenseOperator(LinearOperator):
    """An explicit symmetric ``(P, P)`` matrix behind the operator interface.

    Raises:
        ValueError: the matrix is not square, not floating point, or not symmetric to rounding.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            msg = f"expected a square matrix (P, P) with P >= 1, got shape {tuple(matrix.shape)}"
            raise ValueError(msg)
        if not matrix.is_floating_point():
            msg = f"expected a floating-point matrix, got {matrix.dtype}; convert with .double()"
            raise ValueError(msg)
        asymmetry = (matrix - matrix.T).abs().max()
        if asymmetry > 1e-4 * matrix.abs().max():
            msg = (
                f"the matrix is not symmetric: entries differ from the transpose by up to "
                f"{float(asymmetry):.3g}; pass (A + A.T) / 2"
            )
            raise ValueError(msg)
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self._matrix = matrix.detach()

    def __repr__(self) -> str:
        return f"DenseOperator(P={self.shape[0]})"

    def _multiply(self, columns: Tensor) -> Tensor:
        return self._matrix @ columns
