"""Measuring curvature at one point of training: where the theory meets the tensors."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from batchlr.argument_ranges import require_count, require_non_negative
from batchlr.curvature_noise import CurvatureNoise, directional_noise
from batchlr.curvature_report import CurvatureReport
from batchlr.gradients.gradient_noise import mean_gradient
from batchlr.inner_products import dot, norm
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.lanczos import default_generator, first_vector, top_eigenpairs
from batchlr.measured import Measured
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.measurement.adam_measurement import AdamMeasurement
from batchlr.measurement.curvature_point import CurvaturePoint, Matrix, disjoint, make_operator
from batchlr.measurement.interaction import samples_interact
from batchlr.measurement.memory_plan import UNLIMITED, MemoryShare
from batchlr.measurement.optimizer_state import Optimizer, group_value, optimizer_kind
from batchlr.measurement.report_memory import possible_micro_batches, share_of
from batchlr.measurement.spectral_edges import EdgeSearch, SpectralEdges, followed_edges
from batchlr.operators.batches import pick
from batchlr.operators.curvature_matrix import (
    CurvatureOptions,
    NormMode,
)
from batchlr.operators.isolation import in_full_precision, normalises_over_batches
from batchlr.operators.supervised import LossFunction, SupervisedLoss, piecewise_linear
from batchlr.operators.unsharded import unsharding
from batchlr.trace import estimate_trace
from batchlr.tracker import CurvatureTracker

_FEWEST_SMALL = 4  # assumed: fewer of them are too few to estimate an error from
_SMALL_BATCH = 4  # assumed: small enough to lie below most critical sizes, and batch norm's 2
_SMALL_BATCH_PRODUCTS = 20  # assumed: at most, for the largest eigenvalue of each
_UNKNOWN = Measured(math.nan)
_TRACE_PROBES = 4  # assumed: it only feeds laws given for comparison


@in_full_precision
@unsharding
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
    tol: float = 1e-2,
    max_products: int = 100,
    num_small_batches: int = 16,
    clip_norm: float | None = None,
    memory_budget: int | None = None,
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
) -> CurvatureReport:
    """Extremal curvature of the mean loss, how it fluctuates between batches, and what follows.

    Weights, ``.grad``, buffers, flags and global random state are bit-identical afterwards. Costs
    one Lanczos run (10-40 products) and eight products for noise, trace and Gauss-Newton share;
    Adam or RMSprop take another run and one more.

    Args:
        model: see `HessianOperator`; one sharded by `fully_shard` is taken whole for the while, in
            every process together and on the same batches (`unsharded`).
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
        matrix: ``"ggn"`` needs a loss from `supervised`. Its rates know the directions that single
            batches curve along (`outlying_directions`, nine products of each matrix measured).
        num_eigenpairs: at each end; further ones sharpen ``kappa``.
        tol: relative residual at which Lanczos stops.
        max_products: of one Lanczos run.
        num_small_batches: batches of 4 whose largest eigenvalues lead the law for small batches,
            at most, two at least; together they take a quarter of the samples or are four. 0 leaves
            them out.
        clip_norm: at which training clips the gradient's norm, if it does; the report's rates then
            say whether it is active at the batches' size. It changes no number.
        memory_budget: bytes on the model's device that Krylov vectors, graphs and batches' products
            may take together, beyond what is there (`memory_plan.divide`); by default what is free.
            A small one costs products (a basis that restarts, products made twice), time (graphs
            recorded anew) and, on a CPU, digits (vectors at half precision). What convolutions and
            the allocator need for themselves comes on top.
        micro_batch: run at most that many samples at a time, see `CurvatureMatrix`. By default
            whole batches, or as many as ``memory_budget`` allows, 8 at least, where samples run
            apart have the mean loss that they have together (`possible_micro_batches`).
        generator: for start vectors and subsamples; without one the seed is 0.

    Raises:
        ValueError: an argument is illegal, or there are fewer than two samples.
        MemoryBudgetError: a MemoryError, before any product: ``memory_budget`` is too small.
        ArithmeticError: loss, gradients or products are not finite.
    """
    began = time.perf_counter()
    _check_clip_norm(clip_norm)
    require_count(num_eigenpairs=num_eigenpairs, max_products=max_products)
    _check_small_batches(num_small_batches)
    with_adam = optimizer_kind(optimizer) != "sgd"
    generator = default_generator(generator)
    listed = disjoint(batches, batch_size)
    definite = matrix == "ggn"
    memory, options = UNLIMITED, _options(micro_batch)
    if memory_budget is not None:
        tried: list[int | None] = [micro_batch]
        if micro_batch is None:
            tried = possible_micro_batches(model, loss_fn, listed, norm_mode)
        memory, micro_batch = share_of(
            memory_budget,
            lambda size: make_operator(
                matrix, model, loss_fn, listed, norm_mode, {**_options(size), "keep_graph": True}
            ),
            tried,
            num_eigenpairs=num_eigenpairs,
            max_products=max_products,
            small_batch_products=_SMALL_BATCH_PRODUCTS if num_small_batches else 0,
            with_adam=with_adam,
            definite=definite,
        )
        options = {**_options(micro_batch), "memory_budget": memory.graph_bytes}
    point = CurvaturePoint.at(
        model,
        loss_fn,
        listed,
        dataset_size=dataset_size,
        optimizer=optimizer,
        norm_mode=norm_mode,
        matrix=matrix,
        options=options,
    )
    search = EdgeSearch(num_eigenpairs, tol, max_products, generator, memory)
    gradients = point.batch_gradients() if definite else None
    edges = search.run(point.matrix, point.sampling, gradients=gradients, largest_only=False)
    measured = AdamMeasurement(point) if with_adam else None
    start = None if measured is None else measured.start(edges)
    numbers = [0, edges.axes.count - 1][: point.matrix.shape[0]]
    ends = torch.stack([edges.axes.vector(number) for number in numbers])
    edges = replace(edges, axes=KrylovBasis.of(ends))  # the others' memory is needed
    probe = first_vector(point.operator, None, generator)
    noise = directional_noise(point.matrix, probe, hold=memory.holds(len(listed)))
    values = torch.from_numpy(edges.projected.values[[0, -1]][: len(ends)]).to(probe.device)
    trace = estimate_trace(
        point.matrix, num_probes=_TRACE_PROBES, vectors=ends.T, values=values, generator=generator
    ).trace
    ggn = _ggn_along(ends[0], point)
    small_batch = _small_batch(point, num_small_batches, edges, memory, generator)
    adam = None
    if measured is not None:
        gradients = measured.batch_gradients() if definite else None
        preconditioned = search.run(
            measured.matrix,
            point.sampling,
            gradients=gradients,
            largest_only=True,
            start=measured.gradient if start is None else start,
        )
        adam = measured.curvature(preconditioned, with_doubt=True)
    return _report(
        point,
        edges,
        began,
        adam=adam,
        random_direction=Measured(noise.total, noise.orthogonal.stderr),
        kappa_smallest=edges.projected.second_order("smallest"),
        ritz_weights=tuple(edges.weights.tolist()),
        trace=trace,
        ggn_along_top=ggn,
        small_batch=small_batch,
        clip_norm=clip_norm,
        interacts=samples_interact(point),
    )


@in_full_precision
@unsharding
def track_curvature(
    tracker: CurvatureTracker,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Sequence[Any],
    *,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    optimizer: Optimizer = "sgd",
    norm_mode: NormMode = "train",
    clip_norm: float | None = None,
) -> CurvatureReport:
    """A report of what limits one optimizer's rate, followed from the last one by ``tracker``.

    Costs what an update of the tracker does, two to five products but for the first, and one more
    with Adam or RMSprop: then the tracker follows the preconditioned matrix, and the plain one is
    seen along its top vector only, from below. What `measure_curvature` adds for other batch sizes
    and for comparison (the lower end, small batches, trace, doubt about Adam's metric) is NaN or
    None, and rates hold near the batch size measured.

    Args:
        tracker: of the largest end, ``with_noise``; it goes on from where it was.
        model: and all the rest: see `measure_curvature`.
        loss_fn: likewise.
        batches: likewise.
        batch_size: likewise.
        dataset_size: likewise.
        optimizer: the optimizer, or ``"sgd"``, ``"adam"`` or ``"rmsprop"``; a tracker follows one.
        norm_mode: likewise.
        clip_norm: likewise.

    Raises:
        ValueError: an argument is illegal, or there are fewer than two samples.
        ArithmeticError: loss, gradients or products are not finite.
    """
    began = time.perf_counter()
    _check_clip_norm(clip_norm)
    if optimizer is None:
        msg = "track_curvature follows one optimizer's limit: pass it, or 'sgd', 'adam', 'rmsprop'"
        raise ValueError(msg)
    with_adam = optimizer_kind(optimizer) != "sgd"
    if not tracker.with_noise or tracker.ends != "largest":
        msg = (
            "track_curvature needs CurvatureTracker(ends='largest', with_noise=True), got "
            f"ends={tracker.ends!r}, with_noise={tracker.with_noise}"
        )
        raise ValueError(msg)
    point = CurvaturePoint.at(
        model,
        loss_fn,
        batches,
        batch_size=batch_size,
        dataset_size=dataset_size,
        optimizer=optimizer,
        norm_mode=norm_mode,
    )
    adam = None
    if not with_adam:
        edges = followed_edges(tracker, point.matrix, point.gradient, point.sampling)
    else:
        measured = AdamMeasurement(point)
        preconditioned = followed_edges(tracker, measured.matrix, measured.gradient, point.sampling)
        adam = measured.curvature(preconditioned, with_doubt=False)
        along = measured.direction(preconditioned.axes.vector(0))
        glance = CurvatureTracker(max_products=1, max_run=1, with_noise=True)
        edges = followed_edges(glance, point.matrix, along, point.sampling)
    return _report(point, edges, began, adam=adam, clip_norm=clip_norm)


def _report(
    point: CurvaturePoint,
    edges: SpectralEdges,
    began: float,
    *,
    adam: AdamCurvature | None,
    clip_norm: float | None,
    random_direction: Measured = _UNKNOWN,
    kappa_smallest: float = math.nan,
    ritz_weights: tuple[float, ...] = (),
    trace: Measured = _UNKNOWN,
    ggn_along_top: Measured = _UNKNOWN,
    small_batch: tuple[int, Measured] | None = None,
    interacts: bool = False,
) -> CurvatureReport:
    normalises = normalises_over_batches(point.model)
    norms = torch.stack([gradient.norm() for gradient in point.operator.batch_gradients()])
    return CurvatureReport(
        largest=edges.largest,
        smallest=edges.smallest,
        noise=CurvatureNoise(edges.noise.parallel, edges.noise.orthogonal, random_direction),
        kappa=edges.projected.second_order(),
        kappa_smallest=kappa_smallest,
        ritz_values=tuple(edges.projected.values.tolist()),
        ritz_weights=ritz_weights,
        trace=trace,
        ggn_along_top=ggn_along_top,
        projected=edges.projected,
        loss=point.loss,
        num_params=point.operator.shape[0],
        num_samples=point.num_samples,
        num_batches=len(point.batches),
        batch_size=round(point.batch_size),
        dataset_size=point.dataset_size,
        small_batch=small_batch,
        matrix=point.kind,
        norm_mode=point.norm_mode if normalises else None,
        coupled=interacts or (point.norm_mode == "train" and normalises),
        momentum=group_value(point.optimizer, "momentum"),
        nesterov=group_value(point.optimizer, "nesterov") > 0,
        weight_decay=group_value(point.optimizer, "weight_decay"),
        adam=adam,
        converged=edges.converged,
        num_products=point.operator.num_products,
        seconds=time.perf_counter() - began,
        gradient_norm=float(norms.mean()),
        clip_norm=clip_norm,
        kinked=piecewise_linear(point.loss_fn),
    )


def _options(micro_batch: int | None) -> CurvatureOptions:
    return {} if micro_batch is None else {"micro_batch": micro_batch}


def _ggn_along(vector: Tensor, point: CurvaturePoint) -> Measured:
    """``v' G v`` with its residual ``|G v - (v' G v) v|``; one product, if the loss has halves."""
    if not isinstance(point.loss_fn, SupervisedLoss):
        return Measured(math.nan)
    product = point.matrix_of(point.batches, "ggn", expected_products=1) @ vector
    value = dot(product, vector)
    return Measured(float(value), float(norm(product.sub_(vector, alpha=float(value)))))


def _small_batch(
    point: CurvaturePoint,
    count: int,
    edges: SpectralEdges,
    memory: MemoryShare,
    generator: torch.Generator,
) -> tuple[int, Measured] | None:
    """Mean largest eigenvalue of ``count`` random batches of 4; None if they cannot be cut.

    ``v' H_B v`` along the top eigenvector ``v`` of the mean fluctuates with it, about a known
    mean: taken off, less scatter remains, unless the batches are too small for that.
    """
    if count == 0 or point.num_samples < 2 * _SMALL_BATCH:
        return None
    count = min(count, max(_FEWEST_SMALL, point.num_samples // (4 * _SMALL_BATCH)))
    values, along = [], []
    unit = edges.axes.vector(0)
    for _ in range(count):
        rows = torch.randperm(point.num_samples, generator=generator, device=generator.device)
        try:
            drawn = pick(point.batches, rows[:_SMALL_BATCH].tolist())
        except TypeError:
            return None
        matrix = point.matrix_of([drawn])
        along.append(dot(matrix @ unit, unit))
        pairs = top_eigenpairs(
            matrix,
            tol=1e-2,
            max_steps=min(matrix.shape[0], _SMALL_BATCH_PRODUCTS),
            start=_between(unit, mean_gradient(matrix)),
            basis=memory.basis,
            basis_budget=memory.basis_bytes,
            with_vectors=False,
            generator=generator,
        )
        values.append(pairs.values[0])
    plain = torch.stack(values)
    controlled = plain - torch.stack(along) + float(edges.projected.values[0])
    chosen = min(plain, controlled, key=lambda terms: float(terms.std()))
    return _SMALL_BATCH, Measured(float(chosen.mean()), float(chosen.std()) / math.sqrt(count))


def _between(unit: Tensor, gradient: Tensor) -> Tensor:
    """A start from both, a product or more better than a random one (measured: docs/log.md)."""
    length = float(norm(gradient))
    if not 0 < length < math.inf:
        return unit
    return unit + gradient * (math.copysign(1, float(dot(unit, gradient))) / length)


def _check_small_batches(count: int) -> None:
    require_non_negative(num_small_batches=count)
    if 0 < count < 2:
        msg = f"num_small_batches must be 0, or at least 2 for a standard error, got {count}"
        raise ValueError(msg)


def _check_clip_norm(clip_norm: float | None) -> None:
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        msg = f"clip_norm must be positive and finite, got {clip_norm}; None is no clipping"
        raise ValueError(msg)
