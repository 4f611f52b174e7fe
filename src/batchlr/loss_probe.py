"""The losses of the trained batch and of a held-out one along the step that was taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from batchlr.lanczos import default_generator
from batchlr.measured import Measured, ratio_of_means
from batchlr.operators.isolation import (
    Isolation,
    NormMode,
    check_norm_mode,
    swapped_parameters,
    unwrapped,
)
from batchlr.operators.parameters import named_trainable_parameters
from batchlr.operators.supervised import LossFunction, check_loss_function
from batchlr.operators.unsharded import unsharding

_MULTIPLES = (0.0, 0.5, 1.0, 1.5, 2.0)  # assumed: both vertices of interest lie among them


@dataclass(frozen=True)
class LossParabola:
    """``level + slope x + curvature x^2 / 2``, fitted to losses at ``x`` steps; unit: loss."""

    multiples: tuple[float, ...]  # x: 0 before the step, 1 after it
    losses: tuple[float, ...]
    level: float
    slope: float
    curvature: float
    residual: float  # root mean square of what the parabola misses, 3 degrees of freedom spent
    r_squared: float  # share of the losses' variation that it explains; NaN where there is none

    @property
    def vertex(self) -> float:
        """Multiple of the step with the least loss; NaN where the loss is not curved up."""
        return -self.slope / self.curvature if self.curvature > 0 else math.nan


@dataclass(frozen=True)
class ProbedLosses:
    """Losses of the trained and of a held-out batch along one step.

    The vertex of ``own`` is ``g'g / (lr g'Hg)`` for SGD on a quadratic and says nothing of a useful
    rate: do not feed it to an optimizer. The mean vertex of ``held_out`` over many steps
    (`mean_vertex`) is 1/2 where the expected loss stands still, whatever the optimizer and its
    rate; above it training still descends, below it loses ground. It is no rate to use, either.
    """

    own: LossParabola
    held_out: LossParabola


@final
class LossProbe:
    """Measures losses along a step, in units of the step (Sandler et al. 2023, arXiv:2301.02312).

    ``take`` before ``optimizer.step()``, ``measure`` behind it: the step is what the optimizer
    made, clipped, preconditioned and decayed as it was. Weights, ``.grad``, buffers, flags and
    global random state are bit-identical afterwards. Weight decay is no part of the losses. A
    measurement costs a forward pass a multiple and batch, the probe a copy of the trainable weights
    and for a moment another.

    Args:
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        multiples: of the step, at which to look: at least four, so that the fit can fail.
        norm_mode: of normalisation layers at all of them; ``"train"`` measures the loss a training
            step descends, by each batch's own statistics.
        generator: seeds the dropout masks, one a batch, the same at all multiples; without one the
            seed is 0.

    Raises:
        TypeError: ``loss_fn`` is no function of model and batch.
        ValueError: there are fewer than four different multiples, or one is not finite.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        *,
        multiples: Sequence[float] = _MULTIPLES,
        norm_mode: NormMode = "train",
        generator: torch.Generator | None = None,
    ) -> None:
        check_loss_function(loss_fn)
        if len(set(multiples)) < 4 or not all(map(math.isfinite, multiples)):
            msg = (
                f"multiples must be at least four different finite numbers, got {list(multiples)}: "
                "a parabola through three points always fits"
            )
            raise ValueError(msg)
        self._loss_fn = loss_fn
        self._multiples = tuple(map(float, multiples))
        self._norm_mode = norm_mode
        self._generator = default_generator(generator)
        self._before: dict[str, Tensor] = {}

    @unsharding
    def take(self, model: nn.Module) -> None:
        """Remember the weights before the step.

        Raises:
            ValueError: they are not trainable, or in half precision, in which the differences of
                losses along a step are rounding.
        """
        weights = named_trainable_parameters(unwrapped(model))
        for name, weight in weights.items():
            _check_precision(weight, f"weight {name!r}")
        self._before = {name: weight.detach().clone() for name, weight in weights.items()}

    @unsharding
    def measure(self, model: nn.Module, batch: Any, held_out: Any) -> ProbedLosses:
        """Losses along the step from the weights last taken to those of now.

        Args:
            model: after the step.
            batch: what the step was made from.
            held_out: another batch, drawn as those of training are and not used by this step.

        Raises:
            ValueError: nothing was taken of a model with these weights, ``norm_mode`` is illegal,
                or the loss is not a scalar of single precision or more.
            ArithmeticError: a loss is not finite.
        """
        model = unwrapped(model)
        now = named_trainable_parameters(model)
        shapes = {name: weight.shape for name, weight in self._before.items()}
        if shapes != {name: weight.shape for name, weight in now.items()}:
            msg = "the weights are not those taken: call take(model) before the step to measure"
            raise ValueError(msg)
        isolate = Isolation(model, check_norm_mode(model, self._norm_mode))
        found, generator = [], self._generator
        for name, data in (("own", batch), ("held-out", held_out)):
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
            losses = [self._loss(model, now, data, x, isolate, seed) for x in self._multiples]
            found.append(_fit(self._multiples, torch.stack(losses).tolist(), name))
        return ProbedLosses(*found)

    def _loss(
        self,
        model: nn.Module,
        now: dict[str, nn.Parameter],
        batch: Any,
        multiple: float,
        isolate: Isolation,
        seed: int,
    ) -> Tensor:
        """The loss ``()``, in double precision; a new isolation gives masks and buffers anew."""
        with isolate(seed), torch.no_grad():
            there = {id(w): torch.lerp(self._before[n], w, multiple) for n, w in now.items()}
            with swapped_parameters(model, there):
                loss = self._loss_fn(model, batch)
        if loss.dim() > 0:
            msg = f"the loss must be a scalar, got shape {tuple(loss.shape)}: take its mean"
            raise ValueError(msg)
        _check_precision(loss, "the loss")
        return loss.double()


def mean_vertex(parabolas: Sequence[LossParabola]) -> Measured:
    """Vertex of the mean of several steps' parabolas; NaN where that is not curved up.

    A single step's held-out slope is mostly noise, and the mean of vertices, which are ratios, does
    not settle. The error takes the steps for independent: leave some out in between.

    Raises:
        ValueError: there are no parabolas.
    """
    if not parabolas:
        msg = "parabolas is empty; give those of at least one step"
        raise ValueError(msg)
    curvatures = [parabola.curvature for parabola in parabolas]
    if math.fsum(curvatures) <= 0:
        return Measured(math.nan)
    return ratio_of_means([-parabola.slope for parabola in parabolas], curvatures)


def _fit(multiples: Sequence[float], losses: Sequence[float], name: str) -> LossParabola:
    """Least squares in double precision."""
    if not all(map(math.isfinite, losses)):
        pairs = ", ".join(f"{y:.3g} at {x:g}" for x, y in zip(multiples, losses, strict=True))
        msg = f"the {name} losses along the step must be finite, got {pairs}"
        raise ArithmeticError(msg)
    x = torch.tensor(multiples, dtype=torch.float64)
    y = torch.tensor(losses, dtype=torch.float64)
    powers = torch.stack([torch.ones_like(x), x, x.square() / 2], dim=1)
    level, slope, curvature = torch.linalg.lstsq(powers, y - y[0]).solution.tolist()
    missed = y - y[0] - powers @ torch.tensor([level, slope, curvature], dtype=torch.float64)
    squares, total = float(missed.square().sum()), float((y - y.mean()).square().sum())
    return LossParabola(
        multiples=tuple(multiples),
        losses=tuple(losses),
        level=losses[0] + level,
        slope=slope,
        curvature=curvature,
        residual=math.sqrt(squares / (len(multiples) - 3)),
        r_squared=1 - squares / total if total > 0 else math.nan,
    )


def _check_precision(tensor: Tensor, name: str) -> None:
    if torch.finfo(tensor.dtype).bits < 32:
        msg = (
            f"{name} is in {str(tensor.dtype).removeprefix('torch.')}, whose rounding is as large "
            "as what losses differ by along a step: measure a copy of the model in float32"
        )
        raise ValueError(msg)
