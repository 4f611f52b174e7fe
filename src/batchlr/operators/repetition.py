"""Whether an operator is one symmetric matrix, from the products it gives anyway."""

from typing import final

import torch
from torch import Tensor

# Relative to |u| |A v|. Rounding of a float32 product reaches 4e-4 in convolutional networks
# (measured); for the other types assumed in proportion to their precision.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
_TOLERANCE_OF_HALF = 0.1

_REMEDY = (
    "Something differs from one time to the next: does the loss draw random numbers of its own, or "
    "the model keep state outside its buffers? Or the backward pass of a layer hides from autograd "
    "what it depends on (a custom autograd.Function, detach). If it is the kernels, try "
    "torch.use_deterministic_algorithms(True); self_check=False switches this check off"
)


@final
class RepetitionCheck:
    """Compares ``u' A v`` with ``v' A u`` for the first two vectors multiplied, and losses.

    It takes no product, two dot products and one synchronisation. A matrix that changes from one
    product to the next shows best if the second vector has to do with the first product, as in
    every Krylov method; for two independent random vectors of a large model it hardly does.
    """

    def __init__(self, precision: torch.dtype) -> None:
        self._tolerance = _TOLERANCE.get(precision, _TOLERANCE_OF_HALF)
        self._first: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._losses: dict[int, Tensor] = {}

    def restart(self) -> None:
        """The matrix has changed on purpose."""
        self._first.clear()
        self._losses.clear()

    def see(self, matrix: str, vector: Tensor, product: Tensor) -> None:
        """Take note of ``product = A vector``, both ``(P,)``, ``A`` named by ``matrix``.

        Raises:
            ArithmeticError: it does not fit the first product seen.
        """
        if matrix not in self._first:
            self._first[matrix] = vector.clone(), product.clone()
            return
        first, self._first[matrix] = self._first[matrix], None
        if first is not None:
            self.compare(*first, vector, product)

    def see_loss(self, number: int, loss: Tensor) -> None:
        """Take note of the loss of a batch; raise ArithmeticError if it was another one before."""
        before = self._losses.setdefault(number, loss)
        if before is loss:
            return
        was, now = torch.stack([before, loss]).double().tolist()
        if abs(now - was) > self._tolerance * abs(was):
            msg = f"the loss of batch {number} was {was:.6g} and is {now:.6g}. {_REMEDY}"
            raise ArithmeticError(msg)

    def compare(self, u: Tensor, a_u: Tensor, v: Tensor, a_v: Tensor) -> None:
        """Raise ArithmeticError unless ``u' A v`` and ``v' A u`` agree; NaN passes."""
        u_a_v, v_a_u = torch.stack([torch.dot(u, a_v), torch.dot(v, a_u)]).double().tolist()
        if abs(u_a_v - v_a_u) <= self._tolerance * max(abs(u_a_v), abs(v_a_u)):
            return  # which the norms bound: no need to take them
        norms = torch.stack([torch.linalg.vector_norm(t) for t in (u, a_v, v, a_u)])
        of_u, of_a_v, of_v, of_a_u = norms.double().tolist()
        scale = max(of_u * of_a_v, of_v * of_a_u)
        if abs(u_a_v - v_a_u) > self._tolerance * scale:
            msg = (
                f"the operator is not one symmetric matrix: u'Av = {u_a_v:.6g} but v'Au = "
                f"{v_a_u:.6g}, with |u||Av| = {scale:.3g}. {_REMEDY}"
            )
            raise ArithmeticError(msg)
