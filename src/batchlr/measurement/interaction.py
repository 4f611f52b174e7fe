"""Whether the samples of a batch interact in the loss, as in contrastive ones."""

import math
from typing import Any

import torch

from batchlr.measurement.curvature_point import CurvaturePoint, make_operator
from batchlr.operators.batch_weight import batch_weight
from batchlr.operators.batches import count_samples, cut, take
from batchlr.operators.curvature_matrix import CurvatureOptions
from batchlr.operators.isolation import couples_samples

_LEAST, _FEW = 4, 8  # assumed: samples that are run together, and in parts
_ROUNDING = 1e-6  # assumed: losses that differ by more are of other random numbers
_OUTSIDE = 1e-3  # assumed: share of the largest, lest rounding look like an interaction


def samples_interact(point: CurvaturePoint) -> bool:
    """Whether norms see the batch, or a few samples' loss together is no mean of that of parts.

    A mean, weighted in any way, lies between the least and the largest of what it is made of:
    single samples, or pairs. An interaction that stays between them is not found, nor one in a
    loss that draws random numbers (dropout, a VAE) or that takes batches of one size only. Costs
    four passes over eight samples.
    """
    if couples_samples(point.model, point.norm_mode):
        return True
    try:
        few = take(max(point.batches, key=count_samples), slice(0, _FEW))
        few = take(few, slice(0, count_samples(few) // 2 * 2))
        if count_samples(few) < _LEAST or batch_weight(point.loss_fn, few) == 0:
            return False
        together = _loss(point, few, seed=0)
        if not math.isclose(together, _loss(point, few, seed=1), rel_tol=_ROUNDING):
            return False
    except (TypeError, ValueError, RuntimeError):  # the loss does not take other batches
        return False
    return any(_is_no_mean(together, _losses(point, cut(few, size))) for size in (1, 2))


def _is_no_mean(together: float, parts: list[float]) -> bool:
    if not parts or not all(map(math.isfinite, parts)):
        return False
    slack = _OUTSIDE * max(abs(together), *map(abs, parts))
    return not min(parts) - slack <= together <= max(parts) + slack


def _losses(point: CurvaturePoint, batches: list[Any]) -> list[float]:
    """Each one's; none where there is nothing to learn from so few samples."""
    try:
        return [_loss(point, batch, seed=0) for batch in batches]
    except (TypeError, ValueError, RuntimeError):
        return []


def _loss(point: CurvaturePoint, batch: Any, *, seed: int) -> float:
    options: CurvatureOptions = {"generator": torch.Generator().manual_seed(seed)}
    operator = make_operator(
        "hessian", point.model, point.loss_fn, [batch], point.norm_mode, options
    )
    return float(operator.loss())
