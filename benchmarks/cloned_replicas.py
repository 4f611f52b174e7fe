"""How fast the second moment of a perturbation grows under an optimizer, in all directions at once.

Replicas of a random perturbation follow the optimizer on the Gauss-Newton quadratic, each with
batches of its own. The mean of their squared norms grows by few that grow much, which plain
averaging misses; so replicas are weighted by their squared norm, and cloned or dropped when few
carry the weight (sequential Monte Carlo: Del Moral 2004; for growth rates Tailleur & Kurchan 2007).
No direction is left out, so that this is the reference where a network has too many weights for the
second moment itself and its batches' matrices are no means over samples. It shares no code with the
library, whose prediction it judges.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

REPLICAS = 32  # assumed; `stable_rate.py --replicas` measures the error. Fewer of large batches
STEPS = 50  # assumed: of a run that count, after `settling`
RATIO = 1.1  # assumed: of the rates that bracket a limit, at which the search ends


@dataclass(frozen=True)
class Dynamics:
    """Of the optimizer: heavy ball, or averaged momentum."""

    momentum: float
    averaged: bool = False

    @property
    def gain(self) -> float:
        return 1 - self.momentum if self.averaged else 1.0


Product = Callable[[Tensor, Tensor], Tensor]
"""``(rows (R, B), w (R, P)) -> G_B w (R, P)``, each replica with the matrix of its own batch."""


def replicas_for(batch_size: int) -> int:
    """Fewer of larger batches, whose matrices scatter less: they cost more and need less."""
    return max(12, round(REPLICAS / math.sqrt(max(1, batch_size / 16))))


def settling(momentum: float) -> int:
    """Steps that do not count: what shrinks swings up at first, as long as momentum lasts.

    Measured at momentum 0.9 (docs/log.md): with 20 the limit came out at half.
    """
    return max(20, round(6 / (1 - momentum)))


def growth(
    product: Product,
    dynamics: Dynamics,
    lr: float,
    *,
    size: int,
    samples: int,
    batch_size: int,
    seed: int = 0,
) -> float:
    """Growth of ``ln E |w|^2`` a step."""
    generator = torch.Generator().manual_seed(seed)
    count = replicas_for(batch_size)

    def rows() -> Tensor:
        drawn = [torch.randperm(samples, generator=generator) for _ in range(count)]
        return torch.stack(drawn)[:, :batch_size]

    w = product(rows(), torch.randn(count, size, generator=generator))  # no null direction
    w /= w.norm(dim=1, keepdim=True)
    v, weights, grown = torch.zeros_like(w), torch.zeros(count), []
    for _ in range(settling(dynamics.momentum) + STEPS):
        v = dynamics.momentum * v + dynamics.gain * product(rows(), w)
        w = w - lr * v
        squares = w.square().sum(1) + lr**2 * v.square().sum(1)
        w, v = w / squares.sqrt()[:, None], v / squares.sqrt()[:, None]
        before, weights = torch.logsumexp(weights, 0), weights + squares.log()
        grown.append(float(torch.logsumexp(weights, 0) - before))
        shares = torch.softmax(weights, 0)
        if shares.square().sum() > 2 / count:
            places = (torch.arange(count) + torch.rand(1, generator=generator)) / count
            kept = torch.searchsorted(shares.cumsum(0), places).clamp(max=count - 1)
            w, v, weights = w[kept], v[kept], torch.zeros(count)
    return sum(grown[-STEPS:]) / STEPS


def limit(level: Callable[[float], float], start: float) -> float:
    """The rate at which ``level``, a growth, crosses zero; the search begins at ``start``."""
    here = level(start)
    step = 1.6 if here < 0 else 1 / 1.6
    other = start * step
    there = level(other)
    for _ in range(20):
        if not there * here > 0:
            break
        start, here, other = other, there, other * step
        there = level(other)
    if not there * here <= 0:
        msg = f"growth does not cross zero between rates {start:.3g} and {other:.3g}"
        raise ArithmeticError(msg)
    (low, below), (high, above) = sorted([(start, here), (other, there)])
    while high / low > RATIO:
        # growth is flat below its limit, for what curves little shrinks slowly: not far from middle
        share = min(max(below / (below - above), 0.35), 0.65)
        middle = low * (high / low) ** share
        found = level(middle)
        if found < 0:
            low, below = middle, found
        else:
            high, above = middle, found
    return low * (high / low) ** (below / (below - above))
