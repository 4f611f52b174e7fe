"""Measuring curvature at one point of training: where the theory meets the tensors."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from batchlr.adam_curvature import AdamCurvature
from batchlr.curvature_noise import CurvatureNoise, DirectionalNoise, directional_noise
from batchlr.curvature_report import CurvatureReport
from batchlr.gradient_noise import GradientMoments, gradient_moments
from batchlr.lanczos import default_generator, first_vector, top_eigenpairs
from batchlr.measured import Measured
from batchlr.operators import GGNOperator, HessianOperator, PreconditionedOperator
from batchlr.operators.base import BatchedOperator
from batchlr.operators.batches import check_batches, count_samples, join, recut, take
from batchlr.operators.curvature_matrix import (
    CurvatureMatrix,
    NormMode,
    normalises_over_batches,
)
from batchlr.operators.supervised import LossFunction, SupervisedLoss, piecewise_linear
from batchlr.optimizer_state import (
    Optimizer,
    beta1,
    decoupled_decay,
    group_value,
    optimizer_kind,
    rate_ratios,
    second_moments,
)
from batchlr.projected_curvature import (
    MIN_GROUPS,
    ProjectedCurvature,
    jackknife_groups,
    selection_bias,
)
from batchlr.trace import estimate_trace
from batchlr.tracker import mean_gradient

Matrix = Literal["hessian", "ggn"]

_SMALL_BATCH = 4  # assumed: small enough to lie below most critical sizes, and batch norm's 2
_ADAM_EPS = 1e-8  # torch's default, for when there is no optimizer to ask
_GRADIENT_SHARE = 0.3  # assumed: of the gradient's direction in a warm start
_ASIDE = 3  # assumed: products for the plain matrix where only Adam's limit is tracked
_TRACE_PROBES = 4  # assumed: it only feeds laws given for comparison
_ADAM_GRID = 15  # assumed: batch sizes at which Adam's D is tabulated; interpolated between


def measure_curvature(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Sequence[Any],
    *,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    optimizer: Optimizer = None,
    norm_mode: NormMode = "train",
    matrix: Matrix = "hessian",
    num_eigenpairs: int = 3,
    tol: float = 1e-3,
    max_products: int = 100,
    num_small_batches: int = 16,
    tracking: bool = False,
    start_vectors: Sequence[Tensor] = (),
    clip_norm: float | None = None,
    generator: torch.Generator | None = None,
) -> CurvatureReport:
    """Extremal curvature of the mean loss, how it fluctuates between batches, and what follows.

    Weights, ``.grad``, buffers, flags and global random state are bit-identical afterwards. Costs
    one Lanczos run (10-40 products from a random start, 2-5 from an earlier report's vectors) and
    ten products for noise, trace and Gauss-Newton share (one when tracking); Adam or RMSprop
    take another run and one more.

    Args:
        model: see `HessianOperator`.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        batches: disjoint batches of training data. Four or more give the noise a meaningful
            error; a single one is cut into four.
        batch_size: cut the samples anew into batches of this size. It matters for models that
            normalise over the batch: measure at the size trained with. At most half the
            samples, for the noise needs two batches.
        dataset_size: ``N``, what batches are drawn from; by default the samples given are all.
        optimizer: the optimizer itself (its momentum, weight decay, Adam's second moments and the
            ratios of its groups' rates are used), ``"sgd"``, or ``"adam"`` or ``"rmsprop"`` to
            estimate second moments from the batches' gradients; None measures for SGD and Adam.
        norm_mode: ``"train"`` measures the loss a training step descends, ``"eval"`` the one that
            is a sum over samples.
        matrix: ``"ggn"`` needs a loss from `supervised`.
        num_eigenpairs: at each end; further ones sharpen ``kappa``.
        tol: relative residual at which Lanczos stops.
        max_products: of one Lanczos run.
        num_small_batches: batches of 4 whose largest eigenvalues lead the law for small batches;
            0 leaves them out.
        tracking: leave out what only the report's other batch sizes need (small batches, the
            random direction, the lower end's noise, the doubt about Adam's metric); with Adam, the
            plain matrix gets three products only.
        start_vectors: the ``top_vectors`` of an earlier report, to start from.
        clip_norm: at which training clips the gradient's norm, if it does; the report's rates then
            say whether it is active at the batches' size. It changes no number.
        generator: for start vectors and subsamples; without one the seed is 0.

    Raises:
        ValueError: an argument is illegal, or there are fewer than two samples.
        ArithmeticError: loss, gradients or products are not finite.
    """
    began = time.perf_counter()
    with_adam = optimizer_kind(optimizer) != "sgd"
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        msg = f"clip_norm must be positive and finite, got {clip_norm}; None is no clipping"
        raise ValueError(msg)
    generator = default_generator(generator)
    batches = _disjoint(check_batches(batches), batch_size)
    operator = _operator(matrix, model, loss_fn, batches, norm_mode)
    total = sum(operator.samples)
    size = _population(dataset_size, total)
    loss = float(operator.loss())
    if not math.isfinite(loss):
        msg = f"the loss is {loss} on the batches given; curvature has no meaning there"
        raise ArithmeticError(msg)
    search = _Search(num_eigenpairs, tol, max_products, generator, 1 / total - 1 / size)
    ratios = rate_ratios(model, optimizer)
    metric: BatchedOperator = operator
    if ratios is not None:
        metric = PreconditionedOperator(operator, ratios.sqrt())
    slope = mean_gradient(operator)
    slope = slope if ratios is None else ratios.sqrt() * slope
    start = _start(start_vectors[:1], slope, tracking=tracking)
    plain = replace(search, max_products=_ASIDE) if tracking and with_adam else search
    edges = _edges(metric, plain, start, tracking)
    random_direction = trace = ggn = Measured(math.nan)
    small_batch = None
    if not tracking:
        probe = first_vector(operator, None, generator)
        noise = directional_noise(metric, probe)
        random_direction = Measured(noise.total, noise.orthogonal.stderr)
        ends = edges.axes[:, [0, -1]].contiguous() if metric.shape[0] > 1 else edges.axes
        trace = estimate_trace(
            metric, num_probes=_TRACE_PROBES, vectors=ends, generator=generator
        ).trace
        ggn = _ggn_along(edges.axes[:, 0], model, loss_fn, batches, norm_mode, ratios)
        small_batch = _small_batch(
            matrix,
            model,
            loss_fn,
            batches,
            norm_mode,
            ratios,
            num_small_batches,
            edges.axes[:, 0],
            float(edges.projected.values[0]),
            generator,
        )
    adam, adam_vector = None, None
    if with_adam:
        adam, adam_vector = _adam_curvature(
            operator, model, optimizer, ratios, search, start_vectors[1:2], size, tracking=tracking
        )
    vectors = [edges.axes[:, 0].clone()] + ([] if adam_vector is None else [adam_vector])
    return CurvatureReport(
        largest=edges.largest,
        smallest=edges.smallest,
        noise=CurvatureNoise(edges.noise.parallel, edges.noise.orthogonal, random_direction),
        kappa=edges.projected.second_order(),
        kappa_smallest=math.nan if tracking else edges.projected.second_order("smallest"),
        ritz_values=tuple(edges.projected.values.tolist()),
        ritz_weights=() if start is not None else tuple(edges.weights.tolist()),
        trace=trace,
        ggn_along_top=ggn,
        projected=edges.projected,
        loss=loss,
        num_params=operator.shape[0],
        num_samples=total,
        num_batches=len(batches),
        batch_size=round(total / len(batches)),
        dataset_size=size,
        small_batch=small_batch,
        matrix=matrix,
        norm_mode=norm_mode if normalises_over_batches(model) else None,
        coupled=norm_mode == "train" and normalises_over_batches(model),
        momentum=group_value(optimizer, "momentum"),
        nesterov=group_value(optimizer, "nesterov") > 0,
        weight_decay=group_value(optimizer, "weight_decay"),
        adam=adam,
        converged=edges.converged,
        num_products=operator.num_products,
        seconds=time.perf_counter() - began,
        gradient_norm=_mean_norm(operator),
        clip_norm=clip_norm,
        kinked=piecewise_linear(loss_fn),
        top_vectors=tuple(vectors),
    )


@dataclass(frozen=True)
class _Search:
    num_eigenpairs: int
    tol: float
    max_products: int
    generator: torch.Generator
    sampling: float  # 1/n - 1/N: what the n samples at hand have of one sample's variance


@dataclass(frozen=True)
class _Edges:
    largest: Measured
    smallest: Measured
    noise: DirectionalNoise  # along the top vector
    projected: ProjectedCurvature
    axes: Tensor  # (P, m) Ritz vectors; the first is the top eigenvector
    weights: Tensor  # (m,) their squared overlaps with the start
    converged: bool


def _edges(
    operator: BatchedOperator, search: _Search, start: Tensor | None, tracking: bool
) -> _Edges:
    """Both ends of the spectrum and their noise, corrected for the samples being a subsample."""
    size = operator.shape[0]
    k = max(1, min(search.num_eigenpairs, size // 2))
    pairs = top_eigenpairs(
        operator,
        k,
        which="both" if size > 1 else "largest",
        settle="largest" if tracking else None,
        tol=search.tol,
        max_steps=min(size, max(search.max_products, 2 * k)),
        start=start,
        with_subspace=True,
        generator=search.generator,
    )
    space = pairs.subspace
    assert space is not None
    noise = directional_noise(operator, space.axes[:, 0].contiguous(), others=space.axes[:, 1:])
    below = None
    if not tracking and size > 1:
        bottom, rest = space.axes[:, -1].contiguous(), space.axes[:, :-1]
        below = directional_noise(operator, bottom, others=rest)
    projected = ProjectedCurvature(
        values=space.values.cpu().numpy(),
        matrices=space.matrices.cpu().numpy(),
        samples=operator.weights,
        leak_largest=noise.outside,
        leak_smallest=Measured(math.nan) if below is None else below.outside,
    )
    smallest = Measured(float(pairs.values[-1]), float(pairs.residuals[-1]))
    if below is not None:
        smallest = _of_the_whole(smallest, projected.second_order("smallest"), below, search)
    largest = Measured(float(pairs.values[0]), float(pairs.residuals[0]))
    return _Edges(
        largest=_of_the_whole(largest, projected.second_order(), noise, search),
        smallest=smallest,
        noise=noise,
        projected=projected,
        axes=space.axes,
        weights=space.weights,
        converged=pairs.converged,
    )


def _start(vectors: Sequence[Tensor], gradient: Tensor, *, tracking: bool) -> Tensor | None:
    """Where to start: an earlier top eigenvector, if any, with some of the gradient.

    Without one, tracking starts at the gradient, and a full report anywhere.

    The old eigenvector may have been overtaken; alone it would converge to the wrong eigenvalue at
    once. The gradient leans towards all the top ones.
    """
    length = gradient.norm()
    if not vectors:
        return gradient if tracking and length > 0 else None
    return vectors[0] if length == 0 else vectors[0] + _GRADIENT_SHARE * gradient / length


def _mean_norm(operator: CurvatureMatrix) -> float:
    """Mean norm of the batches' gradients."""
    norms = torch.stack([gradient.norm() for gradient in operator.batch_gradients()])
    return float(norms.mean())


def _of_the_whole(
    edge: Measured, kappa: float, noise: DirectionalNoise, search: _Search
) -> Measured:
    """``edge`` without what the samples at hand, a batch of the whole, add to it.

    Its error is the Lanczos residual and the sampling error along the edge's own vector.
    """
    limit = 0.5 * abs(edge)  # assumed: beyond it the second order says nothing
    shift = max(-limit, min(kappa * search.sampling, limit))
    error = math.hypot(edge.stderr, math.sqrt(noise.parallel * search.sampling))
    return Measured(edge - shift, error)


def _adam_curvature(
    operator: CurvatureMatrix,
    model: nn.Module,
    optimizer: Optimizer,
    ratios: Tensor | None,
    search: _Search,
    start_vectors: Sequence[Tensor],
    size: int,
    *,
    tracking: bool,
) -> tuple[AdamCurvature, Tensor]:
    """Edges of ``D^-1/2 H D^-1/2`` and how ``D`` stretches with the batch size."""
    moments = gradient_moments(operator, dataset_size=size)
    count = len(operator.samples)
    batch_size = sum(operator.samples) / count
    inverse = max(1 / batch_size - 1 / size, 0.0)
    state = second_moments(model, optimizer)
    centred = group_value(optimizer, "centered") > 0
    here = moments.second_moment(1 / inverse if inverse > 0 else math.inf, centred=centred)
    second_moment = here
    if state is not None:
        # A young average is of few gradients, some near zero by chance; the batches at hand are
        # as many more.
        averaged, age, fraction = state
        second_moment = fraction * (age * averaged + count * here) / (age + count)
    eps = group_value(optimizer, "eps", default=_ADAM_EPS)
    metric = second_moment.sqrt() + eps
    scale = metric.rsqrt() if ratios is None else (ratios / metric).sqrt()
    preconditioned = PreconditionedOperator(operator, scale)
    start = _start(start_vectors, scale * mean_gradient(operator), tracking=tracking)
    edges = _edges(preconditioned, search, start, tracking=True)

    def moments_of(numbers: Sequence[int]) -> GradientMoments:
        return gradient_moments(operator, dataset_size=size, only=numbers)

    halves: list[GradientMoments] = []
    rests: list[GradientMoments] = []
    if not tracking and count >= MIN_GROUPS:
        halves = [moments_of(range(first, count, 2)) for first in (0, 1)]
        for group in jackknife_groups(count):
            rests.append(moments_of(sorted(set(range(count)) - set(group.tolist()))))
    known = 0.0 if state is None else state.age / (state.age + count)  # share of v not in doubt
    sizes = torch.logspace(0, math.log10(size), _ADAM_GRID, dtype=torch.float64).tolist()
    metrics, errors, without = [], [], []

    def on_axes(v: Tensor) -> npt.NDArray[np.float64]:
        stretch = (v.sqrt() + eps) / metric
        product = (edges.axes.T @ (stretch.unsqueeze(1) * edges.axes)).double()
        result: npt.NDArray[np.float64] = product.cpu().numpy()
        return result

    def seen_by(
        part: GradientMoments, v: Tensor, there: Tensor, b: float
    ) -> npt.NDArray[np.float64]:
        """The metric of ``v``, had only ``part`` of the batches been there."""
        seen = part.second_moment(b, centred=centred)
        ratio = torch.where(there > 0, seen / there, torch.ones_like(there))
        return on_axes(v * (known + (1 - known) * ratio))

    for other in sizes:
        share = max(1 / other - 1 / size, 0.0)
        b = 1 / share if share > 0 else math.inf
        there = moments.second_moment(b, centred=centred)
        stretched = second_moment * torch.where(here > 0, there / here, torch.ones_like(here))

        optimism, error = selection_bias(
            edges.projected.values, [seen_by(half, stretched, there, b) for half in halves]
        )
        metrics.append(on_axes(stretched) * optimism)
        errors.append(error)
        without.append([seen_by(rest, stretched, there, b) * optimism for rest in rests])
    return AdamCurvature(
        largest=edges.largest,
        parallel=edges.noise.parallel,
        orthogonal=edges.noise.orthogonal,
        batch_size=round(batch_size),
        beta1=beta1(optimizer),
        decoupled_decay=decoupled_decay(optimizer),
        converged=edges.converged,
        source="gradients" if state is None else "state",
        optimizer="rmsprop" if optimizer_kind(optimizer) == "rmsprop" else "adam",
        batch_sizes=tuple(sizes),
        projected=edges.projected,
        metrics=np.stack(metrics),
        metric_errors=tuple(errors),
        metrics_without=np.array(without) if rests else None,
    ), edges.axes[:, 0].clone()


def _ggn_along(
    vector: Tensor,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: list[Any],
    norm_mode: NormMode,
    ratios: Tensor | None,
) -> Measured:
    """``v' G v`` with its residual ``|G v - (v' G v) v|``; one product, if the loss has halves."""
    if not isinstance(loss_fn, SupervisedLoss):
        return Measured(math.nan)
    operator: BatchedOperator = GGNOperator(model, loss_fn, batches, norm_mode=norm_mode)
    if ratios is not None:
        operator = PreconditionedOperator(operator, ratios.sqrt())
    unit = vector.contiguous()
    product = operator @ unit
    value = torch.dot(product.double(), unit.double())
    return Measured(float(value), float((product - value.to(unit.dtype) * unit).norm()))


def _small_batch(
    matrix: Matrix,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: list[Any],
    norm_mode: NormMode,
    ratios: Tensor | None,
    count: int,
    top: Tensor,
    largest: float,
    generator: torch.Generator,
) -> tuple[int, Measured] | None:
    """Mean largest eigenvalue of ``count`` random batches of 4; None if they cannot be cut.

    ``v' H_B v`` along the ``top`` eigenvector ``v`` of the mean fluctuates with it, about the mean
    ``largest``: taken off, less scatter remains, unless the batches are too small for that.
    """
    try:
        whole = join(batches)
    except TypeError:
        return None
    total = count_samples(whole)
    if count == 0 or total < 2 * _SMALL_BATCH:
        return None
    values, along = [], []
    unit = top.contiguous()
    for _ in range(count):
        rows = torch.randperm(total, generator=generator, device=generator.device)[:_SMALL_BATCH]
        batch = [take(whole, rows.cpu())]
        operator: BatchedOperator = _operator(matrix, model, loss_fn, batch, norm_mode)
        if ratios is not None:
            operator = PreconditionedOperator(operator, ratios.sqrt())
        steps = min(operator.shape[0], 20)
        pairs = top_eigenpairs(operator, tol=1e-2, max_steps=steps, generator=generator)
        values.append(pairs.values[0])
        along.append(torch.dot((operator @ unit).double(), unit.double()))
    plain = torch.stack(values)
    controlled = plain - torch.stack(along) + largest
    chosen = min(plain, controlled, key=lambda terms: float(terms.std()))
    return _SMALL_BATCH, Measured(float(chosen.mean()), float(chosen.std()) / math.sqrt(count))


def _operator(
    matrix: Matrix,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: list[Any],
    norm_mode: NormMode,
) -> CurvatureMatrix:
    if matrix == "hessian":
        return HessianOperator(model, loss_fn, batches, norm_mode=norm_mode)
    if matrix == "ggn":
        halves: SupervisedLoss = loss_fn  # type: ignore[assignment]  # GGNOperator checks it
        return GGNOperator(model, halves, batches, norm_mode=norm_mode)
    msg = f"matrix must be 'hessian' or 'ggn', got {matrix!r}"
    raise ValueError(msg)


def _disjoint(batches: list[Any], batch_size: int | None) -> list[Any]:
    """At least two batches, of ``batch_size`` if given."""
    total = sum(count_samples(batch) for batch in batches)
    if total < 2:
        msg = "curvature noise needs at least two samples, got 1"
        raise ValueError(msg)
    if batch_size is not None:
        halved = total // 2 < batch_size <= total  # the noise needs two batches
        return recut(batches, total // 2 if halved else batch_size)
    if len(batches) == 1:
        return recut(batches, max(1, total // 4))
    return batches


def _population(dataset_size: int | None, total: int) -> int:
    if dataset_size is not None and dataset_size < total:
        msg = f"dataset_size must be at least the {total} samples given, got {dataset_size}"
        raise ValueError(msg)
    return total if dataset_size is None else dataset_size
