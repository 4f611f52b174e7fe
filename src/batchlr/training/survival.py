"""The largest constant rate that training survives, found by training at many."""

import copy
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchlr.operators.supervised import LossFunction

Kind = Literal["sgd", "adam"]

_FACTOR = 2.0  # between rates while searching for the limit
_HALVINGS = 2  # bisections after that, in the logarithm: the limit is good to a factor 2^(1/4)
_REACH = 12  # factors tried in either direction


class Survival(NamedTuple):
    """What a sweep of rates found."""

    lr: float  # the largest rate survived
    diverged: float  # the smallest found to diverge; infinite if none did
    runs: int


def largest_survivable_lr(
    model: nn.Module,
    loss_fn: LossFunction,
    samples: tuple[Tensor, Tensor],
    *,
    optimizer: Kind,
    momentum: float,
    batch_size: int,
    start: float,
    steps: int = 200,
    worst_loss: float = 0.0,
    seed: int = 0,
) -> Survival:
    """The largest constant rate at which training from these weights does not diverge.

    A run diverges when its loss is not finite, or its mean over the last fifth of the steps exceeds
    both the first loss and ``worst_loss``. Rates go up or down from ``start`` by factors of two
    until the answer changes, then the gap is halved twice in the logarithm. Every run sees the
    same batches.

    Args:
        model: in the mode to train in; it is left as it was.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        samples: inputs and targets to draw batches from, without replacement within an epoch.
        optimizer: ``"sgd"`` or ``"adam"``.
        momentum: SGD's, or Adam's ``beta1``.
        batch_size: of one step.
        start: where to begin, for example the predicted limit.
        steps: of one run.
        worst_loss: a loss that is no sign of divergence yet, such as that of a uniform guess.
        seed: of the batches and of dropout; the global random state is left as it was.

    Raises:
        ArithmeticError: training diverges at every rate tried.
        ValueError: ``batch_size`` is not in [1, number of samples].
    """
    total = len(samples[0])
    if not 1 <= batch_size <= total:
        msg = f"batch_size must lie in [1, {total}], the number of samples, got {batch_size}"
        raise ValueError(msg)
    runs = 0

    def survives(lr: float) -> bool:
        nonlocal runs
        runs += 1
        twin = copy.deepcopy(model)
        stepper = _optimizer(optimizer, twin, lr, momentum)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of dropout: every run sees the same masks
            losses = _losses(twin, loss_fn, samples, stepper, batch_size, steps, seed)
        tail = losses[-max(1, steps // 5) :]
        finite = len(losses) == steps and all(map(math.isfinite, losses))
        return finite and sum(tail) / len(tail) <= max(losses[0], worst_loss)

    good, bad = (start, math.inf) if survives(start) else (0.0, start)
    for _ in range(_REACH):
        if good > 0 and math.isfinite(bad):
            break
        guess = good * _FACTOR if math.isinf(bad) else bad / _FACTOR
        good, bad = (guess, bad) if survives(guess) else (good, guess)
    if good == 0:
        msg = f"training diverges at every rate from {start:.3g} down to {bad:.3g}"
        raise ArithmeticError(msg)
    for _ in range(_HALVINGS if math.isfinite(bad) else 0):
        guess = math.sqrt(good * bad)
        good, bad = (guess, bad) if survives(guess) else (good, guess)
    return Survival(good, bad, runs)


def _losses(
    model: nn.Module,
    loss_fn: LossFunction,
    samples: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    steps: int,
    seed: int,
) -> list[float]:
    """Loss before each step; it ends with the first that is not finite."""
    x, y = samples
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    first = 0
    losses: list[float] = []
    for _ in range(steps):
        if first + batch_size > len(x):
            order, first = torch.randperm(len(x), generator=generator), 0
        rows = order[first : first + batch_size].to(x.device)
        first += batch_size
        optimizer.zero_grad()
        loss = loss_fn(model, (x[rows], y[rows]))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def _optimizer(kind: Kind, model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(momentum, 0.999))
