"""Measuring curvature at one point of training: where the theory meets the tensors."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchlr.adam_curvature import AdamCurvature
from batchlr.adam_measurement import AdamMeasurement
from batchlr.curvature_noise import CurvatureNoise, directional_noise
from batchlr.curvature_point import CurvaturePoint, Matrix
from batchlr.curvature_report import CurvatureReport
from batchlr.lanczos import default_generator, first_vector, top_eigenpairs
from batchlr.measured import Measured
from batchlr.operators.batches import count_samples, join, take
from batchlr.operators.curvature_matrix import NormMode, normalises_over_batches
from batchlr.operators.supervised import LossFunction, SupervisedLoss, piecewise_linear
from batchlr.optimizer_state import Optimizer, group_value, optimizer_kind
from batchlr.spectral_edges import EdgeSearch, SpectralEdges, followed_edges
from batchlr.trace import estimate_trace
from batchlr.tracker import CurvatureTracker

_FEWEST_SMALL = 4  # assumed: fewer of them are too few to estimate an error from
_SMALL_BATCH = 4  # assumed: small enough to lie below most critical sizes, and batch norm's 2
_UNKNOWN = Measured(math.nan)
_TRACE_PROBES = 4  # assumed: it only feeds laws given for comparison


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
    generator: torch.Generator | None = None,
) -> CurvatureReport:
    """Extremal curvature of the mean loss, how it fluctuates between batches, and what follows.

    Weights, ``.grad``, buffers, flags and global random state are bit-identical afterwards. Costs
    one Lanczos run (10-40 products) and ten products for noise, trace and Gauss-Newton share; Adam
    or RMSprop take another run and one more.

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
        matrix: ``"ggn"`` needs a loss from `supervised`. Its rates know the directions that single
            batches curve along (`outlying_directions`, nine products of each matrix measured).
        num_eigenpairs: at each end; further ones sharpen ``kappa``.
        tol: relative residual at which Lanczos stops.
        max_products: of one Lanczos run.
        num_small_batches: batches of 4 whose largest eigenvalues lead the law for small batches,
            at most; together they take a quarter of the samples or are four. 0 leaves them out.
        clip_norm: at which training clips the gradient's norm, if it does; the report's rates then
            say whether it is active at the batches' size. It changes no number.
        generator: for start vectors and subsamples; without one the seed is 0.

    Raises:
        ValueError: an argument is illegal, or there are fewer than two samples.
        ArithmeticError: loss, gradients or products are not finite.
    """
    began = time.perf_counter()
    _check_clip_norm(clip_norm)
    with_adam = optimizer_kind(optimizer) != "sgd"
    generator = default_generator(generator)
    point = CurvaturePoint.at(
        model,
        loss_fn,
        batches,
        batch_size=batch_size,
        dataset_size=dataset_size,
        optimizer=optimizer,
        norm_mode=norm_mode,
        matrix=matrix,
    )
    search = EdgeSearch(num_eigenpairs, tol, max_products, generator)
    definite = matrix == "ggn"
    edges = search.run(
        point.matrix,
        point.sampling,
        gradients=point.batch_gradients() if definite else None,
        largest_only=False,
    )
    probe = first_vector(point.operator, None, generator)
    noise = directional_noise(point.matrix, probe)
    ends = edges.axes[:, [0, -1]].contiguous() if point.matrix.shape[0] > 1 else edges.axes
    trace = estimate_trace(
        point.matrix, num_probes=_TRACE_PROBES, vectors=ends, generator=generator
    ).trace
    ggn = _ggn_along(edges.axes[:, 0], point)
    small_batch = _small_batch(point, num_small_batches, edges, generator)
    adam = None
    if with_adam:
        measured = AdamMeasurement(point)
        preconditioned = search.run(
            measured.matrix,
            point.sampling,
            gradients=measured.batch_gradients() if definite else None,
            largest_only=True,
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
    )


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
        along = measured.direction(preconditioned.axes[:, 0])
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
        coupled=point.norm_mode == "train" and normalises,
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


def _ggn_along(vector: Tensor, point: CurvaturePoint) -> Measured:
    """``v' G v`` with its residual ``|G v - (v' G v) v|``; one product, if the loss has halves."""
    if not isinstance(point.loss_fn, SupervisedLoss):
        return Measured(math.nan)
    unit = vector.contiguous()
    product = point.matrix_of(point.batches, "ggn") @ unit
    value = torch.dot(product.double(), unit.double())
    return Measured(float(value), float((product - value.to(unit.dtype) * unit).norm()))


def _small_batch(
    point: CurvaturePoint, count: int, edges: SpectralEdges, generator: torch.Generator
) -> tuple[int, Measured] | None:
    """Mean largest eigenvalue of ``count`` random batches of 4; None if they cannot be cut.

    ``v' H_B v`` along the top eigenvector ``v`` of the mean fluctuates with it, about a known
    mean: taken off, less scatter remains, unless the batches are too small for that.
    """
    try:
        whole = join(point.batches)
    except TypeError:
        return None
    total = count_samples(whole)
    if count == 0 or total < 2 * _SMALL_BATCH:
        return None
    count = min(count, max(_FEWEST_SMALL, total // (4 * _SMALL_BATCH)))
    values, along = [], []
    unit = edges.axes[:, 0].contiguous()
    for _ in range(count):
        rows = torch.randperm(total, generator=generator, device=generator.device)[:_SMALL_BATCH]
        matrix = point.matrix_of([take(whole, rows.cpu())])
        steps = min(matrix.shape[0], 20)
        pairs = top_eigenpairs(matrix, tol=1e-2, max_steps=steps, generator=generator)
        values.append(pairs.values[0])
        along.append(torch.dot((matrix @ unit).double(), unit.double()))
    plain = torch.stack(values)
    controlled = plain - torch.stack(along) + float(edges.projected.values[0])
    chosen = min(plain, controlled, key=lambda terms: float(terms.std()))
    return _SMALL_BATCH, Measured(float(chosen.mean()), float(chosen.std()) / math.sqrt(count))


def _check_clip_norm(clip_norm: float | None) -> None:
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        msg = f"clip_norm must be positive and finite, got {clip_norm}; None is no clipping"
        raise ValueError(msg)
