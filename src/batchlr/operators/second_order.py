"""Layers whose second derivative is cheap, in place of torch's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from batchlr.operators.batch_norm import batch_norm
from batchlr.operators.convolution import convolve, is_convolution
from batchlr.operators.layer_norm import layer_norm

_suspended = [False]


@final
class CheapSecondDerivatives(TorchFunctionMode):
    """Inside this context convolutions, batch and layer norms are those of this package.

    Their values and gradients come from the kernels torch uses; their double backward does not.
    Running statistics are not updated. Inside a transform of ``torch.func`` torch's own are called,
    which know all transforms.
    """

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
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        if func is F.layer_norm:
            return layer_norm(*args, **kwargs)
        if is_convolution(func):
            return convolve(func, *args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def torchs_own_layers() -> Iterator[None]:
    """Inside, `CheapSecondDerivatives` is suspended: its layers know no dual numbers."""
    before = _suspended[0]
    _suspended[0] = True
    try:
        yield
    finally:
        _suspended[0] = before
