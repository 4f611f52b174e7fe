"""Layers whose second derivative is cheap, in place of torch's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from batchlr.operators.batch_norm import batch_norm, instance_norm
from batchlr.operators.convolution import convolve, is_convolution
from batchlr.operators.embedding import embedding, embedding_bag
from batchlr.operators.layer_norm import layer_norm
from batchlr.operators.weight_norm import weight_norm

_suspended = [False]

_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch._weight_norm: weight_norm,
}


@final
class CheapSecondDerivatives(TorchFunctionMode):
    """Inside this context convolutions, norms and embeddings are those of this package.

    Their values and gradients come from the kernels torch uses; their double backward does not,
    which is slow, wrong (weight norm, measured with torch 2.14) or not there (bags of embeddings).
    Running statistics are not updated. Inside a transform of ``torch.func`` torch's own are called,
    which know all transforms. Autocast is off on ``device_type``, also where it is entered inside.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _suspended[0] or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                return _call(func, args, kwargs)
        return _call(func, args, kwargs)


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if is_convolution(func):
        return convolve(func, *args, **kwargs)
    own: Callable[..., Any] = _OWN.get(func, func)
    return own(*args, **kwargs)


@contextmanager
def torchs_own_layers() -> Iterator[None]:
    """Inside, `CheapSecondDerivatives` is suspended: its layers know no dual numbers."""
    before = _suspended[0]
    _suspended[0] = True
    try:
        yield
    finally:
        _suspended[0] = before
