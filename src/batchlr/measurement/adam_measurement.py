"""What Adam's preconditioner is at one point of training, and how it moves with the batch size."""

import math
from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from batchlr.gradients.gradient_noise import GradientMoments, gradient_moments, rarely_moved
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.measurement.curvature_point import CurvaturePoint
from batchlr.measurement.metric import Array, lifted, selection_bias
from batchlr.measurement.optimizer_state import (
    beta1,
    decoupled_decay,
    group_value,
    optimizer_kind,
    second_moments,
)
from batchlr.measurement.projected_curvature import MIN_GROUPS, jackknife_groups
from batchlr.measurement.spectral_edges import SpectralEdges
from batchlr.operators import PreconditionedOperator

_ADAM_EPS = 1e-8  # torch's default, for when there is no optimizer to ask
_RARE = 0.05  # measured (benchmarks/short_runs.py): of the samples; 0.02 does as well
_OFTEN = 0.1  # assumed: with a smaller share of parameters moved more often, all count
_ROUNDING = 1e-6  # assumed: an eigenvalue this small beside the largest is none
_LEADING = 3  # measured (docs/log.md): eigenvectors that a search starts from
_APART = 4.0  # derived: D is tabulated at noises so far apart; 1.5 % off at most, below N/2


@final
class AdamMeasurement:
    """``D = sqrt(v) + eps`` of Adam or RMSprop at a point of training, and the matrix it makes.

    ``v`` is the optimizer's own, or, without an optimizer, that of the batches' gradients.

    A parameter that fewer than one sample in twenty seems to move (`rarely_moved`) is left out.
    There ``v`` is of those few gradients, so that a step which is too long for them raises it at
    once and ends shorter; to hold ``D`` for frozen would limit the rate by what no run is limited
    by. Where nearly all parameters are such, as of one-hot inputs, they count. One whose ``v`` is
    zero, as behind weights that begin at zero, never does.
    """

    def __init__(self, point: CurvaturePoint) -> None:
        self._point = point
        self._centred = group_value(point.optimizer, "centered") > 0
        self._eps = group_value(point.optimizer, "eps", default=_ADAM_EPS)
        self._moments = self._moments_of(None)
        self._here = self._seen(self._moments, point.batch_size)
        self._state = second_moments(point.model, point.optimizer)
        self._second_moment = self._here
        self._known = 0.0  # share of v not in doubt
        if self._state is not None:
            # A young average is of few gradients, some near zero by chance; the batches at hand
            # are as many more.
            averaged, age, fraction = self._state
            count = len(point.batches)
            self._second_moment = fraction * (age * averaged + count * self._here) / (age + count)
            self._known = age / (age + count)
        self._metric = self._second_moment.sqrt() + self._eps
        still = self._second_moment == 0
        if self._eps == 0 and bool(still.any()):
            msg = (
                "eps must be positive where parameters had no gradient yet, got 0: the optimizer "
                "divides 0 by 0 there"
            )
            raise ValueError(msg)
        rare = still | rarely_moved(point.operator, share=_RARE)
        few = bool((~rare).sum() < _OFTEN * (~still).sum())
        scale = self._metric.rsqrt().masked_fill(still if few else rare, 0)
        self.matrix = PreconditionedOperator(point.matrix, scale)
        self.gradient = scale * point.gradient

    def direction(self, vector: Tensor) -> Tensor:
        """A vector ``(P,)`` of `matrix` in the coordinates of the plain one."""
        return self.matrix.scale * vector

    def start(self, edges: SpectralEdges) -> Tensor | None:
        """Where to look for the largest eigenvalues of `matrix` ``(P,)``, from those of the plain.

        The sum of the first eigenvectors of ``D^-1/2 H+ D^-1/2``, ``H+`` being the plain matrix
        where ``edges`` saw it curve upwards; None if nowhere. It takes no product.
        """
        axes, scale = edges.axes, self.matrix.scale
        metric = torch.zeros(axes.count, axes.count, dtype=torch.float64, device=scale.device)
        for part, rows in axes.parts():
            metric += (rows * scale[part].square()) @ rows.T
        curvatures = torch.from_numpy(edges.projected.values).to(metric)
        curvatures[curvatures <= _ROUNDING * curvatures.abs().max()] = 0
        roots = curvatures.sqrt()
        values, vectors = torch.linalg.eigh(roots.unsqueeze(1) * metric * roots)
        upwards = values > _ROUNDING * values[-1]
        upwards[:-_LEADING] = False
        if not bool(upwards.any()):
            return None
        leading = vectors[:, upwards] / values[upwards].sqrt()  # of unit norm on all parameters
        return scale * axes.combine(roots * leading.sum(1))

    def batch_gradients(self) -> Iterator[Tensor]:
        """Of each batch in turn, in the coordinates of `matrix`."""
        for gradient in self._point.batch_gradients():
            yield self.matrix.scale * gradient

    def curvature(self, edges: SpectralEdges, *, with_doubt: bool) -> AdamCurvature:
        """The curvature at any batch size, from the ``edges`` of `matrix`; no product.

        Args:
            edges: of `matrix`.
            with_doubt: also ask what ``D`` would be, had some batches not been there.
        """
        point, count = self._point, len(self._point.batches)
        sizes = _grid(point.dataset_size)
        metrics = self._metrics(sizes, edges.axes)
        optimism, without = np.ones(len(sizes)), None
        if with_doubt and count >= MIN_GROUPS:
            optimism, without = self._doubt(sizes, metrics, edges)
            metrics = metrics * optimism[:, None, None]
        optimizer = point.optimizer
        return AdamCurvature(
            largest=edges.largest,
            parallel=edges.noise.parallel,
            orthogonal=edges.noise.orthogonal,
            batch_size=round(point.batch_size),
            beta1=beta1(optimizer),
            decoupled_decay=decoupled_decay(optimizer),
            converged=edges.converged,
            source="gradients" if self._state is None else "state",
            optimizer="rmsprop" if optimizer_kind(optimizer) == "rmsprop" else "adam",
            batch_sizes=tuple(sizes),
            projected=edges.projected,
            metrics=metrics,
            optimism=tuple(optimism.tolist()),
            metrics_without=without,
        )

    def _doubt(
        self, sizes: list[float], metrics: Array, edges: SpectralEdges
    ) -> tuple[Array, Array]:
        """What chance put into ``metrics`` ``(G, m, m)``, by halves and groups of the batches.

        It is small and moves slowly with the size, so every other size is enough.

        Returns:
            The `selection_bias` ``(G,)``, and the metrics, corrected, without each group
            ``(G, groups, m, m)``.
        """
        count = len(self._point.batches)
        parts: list[Sequence[int]] = [range(first, count, 2) for first in (0, 1)]
        for group in jackknife_groups(count):
            parts.append(sorted(set(range(count)) - set(group.tolist())))
        places = sorted({*range(0, len(sizes), 2), len(sizes) - 1})
        chosen = [sizes[place] for place in places]
        had_only = np.stack(  # one part's moments at a time: 2 P numbers each
            [self._metrics(chosen, edges.axes, self._moments_of(part)) for part in parts], axis=1
        )
        biases = [selection_bias(edges.projected.values, list(rows[:2])) for rows in had_only]
        optimism = _spread(places, np.array(biases), len(sizes))
        without = _spread_relatively(places, had_only[:, 2:], metrics)
        return optimism, without * optimism[:, None, None, None]

    def _moments_of(self, numbers: Sequence[int] | None) -> GradientMoments:
        return gradient_moments(
            self._point.operator, dataset_size=self._point.dataset_size, only=numbers
        )

    def _metrics(
        self, sizes: list[float], axes: KrylovBasis, had_only: GradientMoments | None = None
    ) -> Array:
        """``D`` at these batch sizes over that of `matrix`, seen on the ``axes`` ``(G, m, m)``.

        Had some of the batches not been there, ``had_only`` are the moments of the others. A slice
        of the parameters at a time, for it all to stay in the cache.
        """
        shape = len(sizes), axes.count, axes.count
        total = torch.zeros(shape, dtype=torch.float64, device=self._metric.device)
        for part, rows in axes.parts():
            for number, size in enumerate(sizes):
                stretch = self._stretched(size, part, had_only).sqrt_().add_(self._eps)
                total[number] += (rows * stretch.div_(self._metric[part])) @ rows.T
        return lifted(total.cpu().numpy())

    def _stretched(
        self, batch_size: float, part: slice, had_only: GradientMoments | None
    ) -> Tensor:
        """``v`` ``(n,)`` at another batch size: measured, by the ratio that gradients say."""
        there = self._seen(self._moments.part(part), batch_size)
        v = self._second_moment[part] * _ratio(there, self._here[part])
        if had_only is None:
            return v
        ratio = _ratio(self._seen(had_only.part(part), batch_size), there)
        return v * (self._known + (1 - self._known) * ratio)

    def _seen(self, moments: GradientMoments, batch_size: float) -> Tensor:
        """``v`` of batches of ``batch_size``, of the shape of ``moments``."""
        inverse = max(1 / batch_size - 1 / self._point.dataset_size, 0.0)
        effective = 1 / inverse if inverse > 0 else math.inf
        return moments.second_moment(effective, centred=self._centred)


def _grid(dataset_size: int) -> list[float]:
    """Batch sizes from 1 to that of the data set; their noise a factor of `_APART` apart.

    Towards the data set's size a batch's noise vanishes, so the last steps are small: up to a
    sixteenth of its noise, and none.
    """
    least, most = 1 - 1 / dataset_size, 1 / (_APART**2 * dataset_size)  # 1/B - 1/N
    count = 2 + math.floor(math.log(least / most) / math.log(_APART))
    noises = [*np.geomspace(least, most, count).tolist(), 0.0]
    return [1 / (noise + 1 / dataset_size) for noise in noises]


def _spread(places: list[int], known: Array, count: int) -> Array:
    """``(count, ...)``: what is ``known`` at some places, in a straight line between them."""
    wanted = np.arange(count)
    below = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, len(places) - 2)
    start, end = np.take(places, below), np.take(places, below + 1)
    share = ((wanted - start) / (end - start)).reshape(-1, *[1] * (known.ndim - 1))
    result: Array = (1 - share) * known[below] + share * known[below + 1]
    return result


def _spread_relatively(places: list[int], known: Array, metrics: Array) -> Array:
    """``(G, groups, m, m)``: ``known`` at some places, between them relative to ``metrics``.

    Positive definite as they are, which a difference of the neighbours' would not ensure.
    """
    roots = np.linalg.cholesky(metrics)[:, None]
    inverse = np.linalg.inv(roots)
    there = inverse[places]
    relative = _spread(places, there @ known @ there.swapaxes(-1, -2), len(metrics))
    result: Array = roots @ relative @ roots.swapaxes(-1, -2)
    return (result + result.swapaxes(-1, -2)) / 2


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, and one where ``whole`` is zero."""
    return torch.where(whole > 0, part / whole, torch.ones_like(whole))
