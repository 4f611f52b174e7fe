"""A model's parameters as one vector."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


def check_module(model: object) -> None:
    """Raise TypeError unless ``model`` is one."""
    if not isinstance(model, nn.Module):
        msg = (
            f"model must be a torch.nn.Module, got {type(model).__name__}; the order of arguments "
            "is model, loss_fn, batches"
        )
        raise TypeError(msg)


def check_device(device: torch.device) -> None:
    """Raise ValueError if sums over parameters cannot be taken there."""
    if device.type == "mps":
        msg = (
            "parameters on 'mps' cannot be measured, for it has no float64, in which inner "
            "products are summed: measure a copy on the CPU, copy.deepcopy(model).cpu()"
        )
        raise ValueError(msg)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters a curvature matrix is about, in its order; shared ones once.

    Raises:
        ValueError: there is none, they differ in device, are complex, or lie where there is no
            float64.
    """
    return list(named_trainable_parameters(model).values())


def named_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`trainable_parameters` by name."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        frozen = sum(1 for _ in model.parameters())
        way_out = "; set requires_grad=True on the ones to measure" if frozen else ", nor any other"
        msg = f"the model has no trainable parameters ({frozen} frozen){way_out}"
        raise ValueError(msg)
    odd = [name for name, p in parameters.items() if p.is_complex()]
    if odd:
        msg = (
            f"trainable parameters must be real, got complex ones (first {odd[0]!r}): hold them as "
            "torch.view_as_real of them, and use torch.view_as_complex in forward"
        )
        raise ValueError(msg)
    devices = {p.device for p in parameters.values()}
    if len(devices) > 1:
        msg = (
            f"trainable parameters must share one device, got {sorted(map(str, devices))}; "
            "move the model or freeze the odd ones"
        )
        raise ValueError(msg)
    check_device(*devices)
    return parameters


def common_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The widest of the parameters' dtypes, and float32 at least: that of vectors."""
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of ``vector`` ``(P,)`` in the shapes of ``tensors``: views."""
    pieces = torch.split(vector, [t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


@final
class Adder:
    """Adds up vectors that come in pieces, in place: ``total`` needs no initial value."""

    def __init__(self, total: Tensor, tensors: Sequence[Tensor]) -> None:
        self._pieces = split_like(total, tensors)
        self._written = [False] * len(tensors)

    def add(self, pieces: Sequence[Tensor | None], factor: float) -> None:
        """Add ``factor`` times the vector; None is a piece of zeros."""
        for j, (total, piece) in enumerate(zip(self._pieces, pieces, strict=True)):
            if piece is None:
                continue
            if self._written[j]:
                total.add_(piece.detach(), alpha=factor)
            elif factor == 1:
                total.copy_(piece.detach())
            else:
                torch.mul(piece.detach().to(total.dtype), factor, out=total)
            self._written[j] = True

    def finish(self) -> None:
        """Write zeros where nothing came."""
        for total, written in zip(self._pieces, self._written, strict=True):
            if not written:
                total.zero_()
