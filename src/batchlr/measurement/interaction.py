"""Whether the samples of a batch interact in the loss, as in contrastive ones."""

import math

import torch

from batchlr.measurement.curvature_point import CurvaturePoint, make_operator
from batchlr.operators.batch_weight import batch_weight
from batchlr.operators.batches import count_samples, cut, take

_LEAST, _FEW = 4, 8  # assumed: samples that are run together, and in pairs
_ROUNDING = 1e-6  # assumed: losses that differ by more are of other random numbers
_APART = 0.05  # assumed: more than it makes which tokens of few samples are padding


def samples_interact(point: CurvaturePoint) -> bool:
    """Whether a few samples have another mean loss together than in pairs.

    Where the loss draws random numbers (dropout, a VAE) that cannot be told; the answer is no then.
    Costs three passes over eight samples.
    """
    try:
        few = take(max(point.batches, key=count_samples), slice(0, _FEW))
    except TypeError:
        return False
    count = count_samples(few)
    if count < _LEAST or batch_weight(point.loss_fn, few) == 0:
        return False

    def loss(seed: int, size: int) -> float:
        operator = make_operator(
            "hessian",
            point.model,
            point.loss_fn,
            cut(few, size),
            point.norm_mode,
            {"generator": torch.Generator().manual_seed(seed)},
        )
        return float(operator.loss())

    together = loss(0, count)
    if not math.isclose(together, loss(1, count), rel_tol=_ROUNDING):
        return False
    return not math.isclose(together, loss(0, 2), rel_tol=_APART)
