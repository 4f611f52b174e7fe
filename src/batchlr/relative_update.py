"""How much a step changed the layers, relative to what they were."""

from typing import final

import torch
from torch import Tensor, nn

_LEAST = 0.05  # assumed: of the norm of LeCun's initialisation, which a layer has at least


@final
class RelativeUpdate:
    """``sum_l |W_l' - W_l| / |W_l|`` over the layers' matrices and kernels, step by step.

    Without normalisation or shortcuts a network is a product of its layers, and what passes through
    changes by at most ``prod_l (1 + r_l) - 1 <= exp(sum_l r_l) - 1`` of its size when each layer
    changes by ``r_l`` (Bernstein et al. 2020, arXiv 2002.03432). Curvature measured before the step
    knows nothing of where it leads when that is above 1.

    A layer whose norm is tiny, or zero as at the start of an adapter, counts as if it had a
    twentieth of the norm of LeCun's initialisation. Holds a copy of the weights; a step costs four
    passes over them, and no synchronisation.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] = []

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Compare the next step with the weights of now."""
        layers = _layers(model)
        if _alike(self._before, layers):
            if layers:
                torch._foreach_copy_(self._before, layers)
        else:
            self._before = [layer.clone() for layer in layers]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """The sum ``()`` since the last call of either; zero where the layers are others."""
        layers, before = _layers(model), self._before
        if not layers or not _alike(before, layers):
            self.take(model)
            return torch.zeros(())
        changes = torch._foreach_norm(torch._foreach_sub(layers, before))
        norms = torch._foreach_norm(before)
        shares = [
            change / norm.clamp(min=_LEAST * len(layer) ** 0.5)
            for change, norm, layer in zip(changes, norms, layers, strict=True)
        ]
        self.take(model)
        return torch.stack([share.to(shares[0].device, torch.float32) for share in shares]).sum()

    def free(self) -> None:
        """Give the copy's memory back."""
        self._before = []


def _layers(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad and p.dim() > 1]


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    return [(t.shape, t.dtype, t.device) for t in one] == [
        (t.shape, t.dtype, t.device) for t in other
    ]
