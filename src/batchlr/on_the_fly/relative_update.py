"""How much a step changed the layers, relative to what they were."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchlr.sharded_tensors import local_part, norms_of_whole

_LEAST = (
    0.5  # measured (docs/log.md): of the norm of LeCun's initialisation, which a layer has at least
)


@final
class RelativeUpdate:
    """``sum_l |W_l' - W_l| / |W_l|`` over a network's linear layers and convolutions.

    Without normalisation or shortcuts a network is a product of its layers, and what passes through
    changes by at most ``prod_l (1 + r_l) - 1 <= exp(sum_l r_l) - 1`` of its size when each layer
    changes by ``r_l`` (Bernstein et al. 2020, arXiv 2002.03432). Curvature measured before the step
    knows nothing of where it leads when that is above 1.

    A layer of a small norm, or zero, counts as if it had half the norm of LeCun's initialisation:
    what begins at zero changes without bound relative to itself, which alone does no harm. Of a
    single layer nothing is measured: what it makes of its input is as curved after a step as
    before. Nor where the network normalises (a module with "norm" in the name of its class), so
    that sums of 2.5 do no harm (measured, docs/log.md); nor where some layers are frozen: adapters
    change much beside their own norm and little beside that of the layers they are added to. Holds
    a copy of the weights, of sharded ones this process's parts; a step costs five passes over them,
    and no synchronisation.
    """

    def __init__(self) -> None:
        self._of: list[nn.Parameter] = []
        self._before: list[Tensor] = []
        self._taken = False

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Compare with the weights of now."""
        layers = _layers(model)
        if self._compares(layers):
            if layers:
                torch._foreach_copy_(self._before, [local_part(layer) for layer in layers])
        else:
            self._of, self._before = layers, [local_part(w).detach().clone() for w in layers]
        self._taken = True

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """The sum ``()`` since the last `take`, once; zero where the layers are others."""
        layers, changes = _layers(model), self._before
        if not layers or not self._taken or not self._compares(layers):
            return torch.zeros(())
        self._taken = False
        norms = [_norm(before) for before in changes]
        torch._foreach_sub_(changes, [local_part(w) for w in layers])  # in place: no second copy
        norms += [_norm(change) for change in changes]
        whole = norms_of_whole(norms, [*layers, *layers])
        befores, moves = whole[: len(layers)], whole[len(layers) :]
        shares = [
            move / before.clamp(min=_LEAST * len(layer) ** 0.5)
            for move, before, layer in zip(moves, befores, layers, strict=True)
        ]
        return torch.stack([share.to(shares[0]) for share in shares]).sum()

    def free(self) -> None:
        """Give the copy's memory back."""
        self._of, self._before, self._taken = [], [], False

    def _compares(self, layers: list[nn.Parameter]) -> bool:
        return len(layers) == len(self._of) and all(
            layer is other and layer.device == before.device and layer.dtype == before.dtype
            for layer, other, before in zip(layers, self._of, self._before, strict=True)
        )


def _norm(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision is some percent off where there are many numbers."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return found


def _layers(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions, each once; none where none is measured."""
    if any("norm" in type(module).__name__.lower() for module in model.modules()):
        return []
    weights = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | _ConvNd)
        and isinstance(module.weight, nn.Parameter)
        and module.weight.numel() > 0
    }
    whole = len(weights) > 1 and all(w.requires_grad for w in weights.values())
    return list(weights.values()) if whole else []
