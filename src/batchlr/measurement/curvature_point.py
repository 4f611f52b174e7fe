"""Where a measurement begins: the loss, its gradient and its matrix at one point of training."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from batchlr.gradients.gradient_noise import mean_gradient
from batchlr.measurement.optimizer_state import Optimizer, rate_ratios
from batchlr.operators import GGNOperator, HessianOperator, PreconditionedOperator
from batchlr.operators.base import BatchedOperator
from batchlr.operators.batches import ambiguity, check_batches, count_samples, recut
from batchlr.operators.curvature_matrix import CurvatureMatrix, CurvatureOptions, NormMode
from batchlr.operators.supervised import LossFunction, SupervisedLoss

Matrix = Literal["hessian", "ggn"]


@dataclass(frozen=True)
class CurvaturePoint:
    """One point of training, seen by the batches at hand.

    Made by `at`, which checks what it is given. With unequal rates of parameter groups the matrix
    and the gradient are those in the coordinates ``R^-1/2 w``, in which the rates are equal.
    """

    model: nn.Module
    loss_fn: LossFunction
    batches: list[Any]
    kind: Matrix
    norm_mode: NormMode
    optimizer: Optimizer
    operator: CurvatureMatrix  # in the weights' own coordinates
    ratios: Tensor | None  # (P,) R: the groups' rates over the largest; None if all are equal
    matrix: BatchedOperator  # R^1/2 H R^1/2
    gradient: Tensor  # (P,) R^1/2 g, of the mean loss
    loss: float
    num_samples: int
    dataset_size: int  # N
    options: CurvatureOptions  # of every operator made here

    @property
    def sampling(self) -> float:
        """``1/n - 1/N``: what the ``n`` samples at hand have of one sample's variance."""
        return 1 / self.num_samples - 1 / self.dataset_size

    @property
    def batch_size(self) -> float:
        """Mean size of the batches."""
        return self.num_samples / len(self.batches)

    @classmethod
    def at(
        cls,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Sequence[Any],
        *,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        optimizer: Optimizer = None,
        norm_mode: NormMode = "train",
        matrix: Matrix = "hessian",
        options: CurvatureOptions | None = None,
    ) -> "CurvaturePoint":
        """The point of training where ``model`` is; arguments as of `measure_curvature`.

        ``options`` are those of the operators: how they use memory.

        Raises:
            ValueError: an argument is illegal, or there are fewer than two samples.
            ArithmeticError: the loss is not finite.
        """
        options = {} if options is None else options
        listed = disjoint(batches, batch_size)
        operator = make_operator(matrix, model, loss_fn, listed, norm_mode, options)
        total = sum(operator.samples)
        if dataset_size is not None and not total <= dataset_size < math.inf:
            msg = (
                f"dataset_size must be at least the {total} samples given, got {dataset_size}: a "
                "finite number, where there is no end of data a very large one"
            )
            raise ValueError(msg)
        loss = float(operator.loss())
        if not math.isfinite(loss):
            whole = all(bool(p.isfinite().all()) for p in operator.parameters)
            way_out = (
                "the weights are finite: look at inputs and targets"
                if whole
                else "some weights are not finite, either: go back to earlier ones"
            )
            msg = f"the loss is {loss} on the batches given: curvature has no meaning; {way_out}"
            raise ArithmeticError(msg)
        ratios = rate_ratios(model, optimizer)
        seen: BatchedOperator = operator
        if ratios is not None:
            seen = PreconditionedOperator(operator, ratios.sqrt())
        return cls(
            model=model,
            loss_fn=loss_fn,
            batches=listed,
            kind=matrix,
            norm_mode=norm_mode,
            optimizer=optimizer,
            operator=operator,
            ratios=ratios,
            matrix=seen,
            gradient=mean_gradient(seen),
            loss=loss,
            num_samples=total,
            dataset_size=total if dataset_size is None else dataset_size,
            options=options,
        )

    def batch_gradients(self) -> Iterator[Tensor]:
        """``R^1/2 g_k`` ``(P,)`` of each batch in turn."""
        for gradient in self.operator.batch_gradients():
            yield gradient if self.ratios is None else self.ratios.sqrt() * gradient

    def matrix_of(
        self,
        batches: list[Any],
        kind: Matrix | None = None,
        *,
        expected_products: int | None = None,
    ) -> BatchedOperator:
        """The same matrix of other ``batches``, or of another ``kind``."""
        options = self.options
        if expected_products is not None:
            options = {**options, "expected_products": expected_products}
        operator: BatchedOperator = make_operator(
            kind or self.kind, self.model, self.loss_fn, batches, self.norm_mode, options
        )
        if self.ratios is None:
            return operator
        return PreconditionedOperator(operator, self.ratios.sqrt())


def make_operator(
    matrix: Matrix,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: list[Any],
    norm_mode: NormMode,
    options: CurvatureOptions,
) -> CurvatureMatrix:
    """The matrix of this name.

    Raises:
        ValueError: there is none.
    """
    options = {**options, "norm_mode": norm_mode}
    if matrix == "hessian":
        return HessianOperator(model, loss_fn, batches, **options)
    if matrix == "ggn":
        halves: SupervisedLoss = loss_fn  # type: ignore[assignment]  # GGNOperator checks it
        return GGNOperator(model, halves, batches, **options)
    msg = f"matrix must be 'hessian' or 'ggn', got {matrix!r}"
    raise ValueError(msg)


def disjoint(batches: Sequence[Any], batch_size: int | None) -> list[Any]:
    """At least two batches, of ``batch_size`` if given.

    Raises:
        ValueError: there are fewer than two samples, or ``batch_size`` does not fit.
    """
    batches = check_batches(batches)
    unlike = ambiguity(batches[0])
    if unlike is not None:
        message = (
            f"a batch was counted as {count_samples(batches[0])} samples, but {unlike}: if that is "
            "wrong, put a tensor with one row a sample first, or give batches a class with __len__"
        )
        warnings.warn(message, stacklevel=2)
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
