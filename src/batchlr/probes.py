"""Single numbers to watch while training, at a gradient and a product a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchlr.lanczos import default_generator
from batchlr.learning_rates import max_sgd_lr
from batchlr.measured import Measured, ratio_of_means
from batchlr.operators import HessianOperator
from batchlr.operators.batches import check_batches
from batchlr.operators.curvature_matrix import NormMode
from batchlr.operators.supervised import LossFunction
from batchlr.operators.unsharded import unsharding


@dataclass(frozen=True)
class BatchSharpness:
    """Curvature of each batch's loss along its own gradient (Andreyev & Beneventano 2024).

    arXiv:2412.20553 finds that SGD without momentum drives it to about ``2 / lr``. Unit:
    loss / parameter^2, that is 1 / (learning rate of SGD). Standard errors are over the batches.
    """

    value: Measured  # E[g_B' H_B g_B] / E[|g_B|^2], biased by O(1 / num_batches)
    mean_ratio: Measured  # E[g_B' H_B g_B / |g_B|^2], unbiased
    batch_size: int  # mean number of samples of the batches
    num_batches: int
    num_products: int

    def edge_lr(self, momentum: float = 0.0) -> tuple[float, float]:
        """Rates at which ``value`` is where training settles: at small and at large batches.

        ``2 (1 - m) / value`` where batch noise dominates, ``2 (1 + m) / value`` where curvature
        does (arXiv:2604.14108); without momentum they are one. An observation on trajectories, not
        a limit of stability: `max_sgd_lr` joins the two regimes.

        Args:
            momentum: ``m`` of heavy-ball SGD, in [0, 1).

        Raises:
            ValueError: ``value`` is not positive, or ``momentum`` is out of range.
        """
        large = max_sgd_lr(float(self.value), momentum=momentum)
        return (1.0 - momentum) / (1.0 + momentum) * large, large


@unsharding
def batch_sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Sequence[Any],
    *,
    norm_mode: NormMode = "train",
    generator: torch.Generator | None = None,
) -> BatchSharpness:
    """Sharpness of the batches along their own gradients, at one gradient and product each.

    Weights, ``.grad``, buffers, flags and global random state are bit-identical afterwards; one
    batch's graph is in memory at a time. Weight decay is left out.

    Args:
        model: see `HessianOperator`.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        batches: each counts alike, whatever its size, so let them be of the size trained with.
            Below four the errors say little; of a single one they are NaN.
        norm_mode: ``"train"`` measures the loss a training step descends.
        generator: seeds the dropout masks, one a batch; without one the seed is 0.

    Raises:
        TypeError: a single batch was given where a list is expected.
        ValueError: there are no batches, or the model or the loss is unfit (`HessianOperator`).
        ArithmeticError: a batch's gradient or product is not finite, or a gradient is zero, which
            has no direction to measure along.
    """
    generator = default_generator(generator)
    curvatures, squares, samples = [], [], 0
    for index, batch in enumerate(check_batches(batches)):
        operator = HessianOperator(
            model, loss_fn, [batch], norm_mode=norm_mode, generator=generator
        )
        (gradient,) = operator.batch_gradients()
        curvature, square = _along(gradient, operator @ gradient)
        if not (math.isfinite(curvature) and 0 < square < math.inf):
            msg = (
                f"batch {index} has gradient norm {math.sqrt(square):.3g} and g'Hg {curvature:.3g};"
                " sharpness needs a finite product and a gradient that is finite and not zero"
            )
            raise ArithmeticError(msg)
        curvatures.append(curvature)
        squares.append(square)
        samples += sum(operator.samples)
    return _sharpness(
        torch.tensor(curvatures, dtype=torch.float64),
        torch.tensor(squares, dtype=torch.float64),
        batch_size=round(samples / len(squares)),
    )


def _along(gradient: Tensor, product: Tensor) -> tuple[float, float]:
    """``g'Hg`` and ``|g|^2``, summed in double precision."""
    exact = gradient.double()
    return float(exact @ product.double()), float(exact @ exact)


def _sharpness(curvatures: Tensor, squares: Tensor, *, batch_size: int) -> BatchSharpness:
    """Both means from ``g'Hg`` and ``|g|^2`` ``(K,)``."""
    count = len(squares)
    ratios = curvatures / squares
    return BatchSharpness(
        value=ratio_of_means(curvatures.tolist(), squares.tolist()),
        mean_ratio=Measured(float(ratios.mean()), _standard_error(ratios)),
        batch_size=batch_size,
        num_batches=count,
        num_products=count,
    )


def _standard_error(terms: Tensor) -> float:
    return float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else math.nan
