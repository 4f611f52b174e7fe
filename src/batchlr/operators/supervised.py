"""Losses in the form ``loss_fn(model, batch) -> scalar``."""

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional

LossFunction = Callable[[nn.Module, Any], Tensor]

# What the two entries of a dict batch are called in the data sets and collators people use.
_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values", "input_ids")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")

_KINKED_MODULES = (
    nn.L1Loss,
    nn.HingeEmbeddingLoss,
    nn.MarginRankingLoss,
    nn.MultiLabelMarginLoss,
    nn.TripletMarginLoss,  # in distances, which it compares like a hinge
)
_KINKED_FUNCTIONS = (
    functional.l1_loss,
    functional.hinge_embedding_loss,
    functional.margin_ranking_loss,
    functional.multi_margin_loss,  # of p = 1, its default
    functional.multilabel_margin_loss,
    functional.triplet_margin_loss,
)


@final
class SupervisedLoss:
    """Mean loss of ``criterion(model(x), y)`` over a batch; build it with `supervised`.

    It also exposes the two halves the Gauss-Newton matrix needs: ``outputs(model, batch)``, the
    network's outputs, and ``loss(outputs, batch)``, the criterion on top of them.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        reduction = getattr(criterion, "reduction", "mean")
        if reduction != "mean":
            msg = (
                f"the criterion has reduction={reduction!r}; curvature and learning rates are "
                "those of the mean loss: use reduction='mean'"
            )
            raise ValueError(msg)
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of ``batch``, a scalar."""
        return self.loss(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """``model(x)``, with ``x`` brought to the model's device."""
        inputs, _ = split_batch(batch)
        parameter = next(model.parameters(), None)
        outputs = model(inputs if parameter is None else inputs.to(parameter.device))
        if not isinstance(outputs, Tensor):
            msg = (
                f"the model returned {type(outputs).__name__} where a tensor was expected; "
                "write your own loss_fn(model, batch)"
            )
            raise TypeError(msg)
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """``criterion(outputs, y)``, with ``y`` brought to the outputs' device."""
        _, targets = split_batch(batch)
        return self.criterion(outputs, targets.to(outputs.device))


def supervised(criterion: Callable[[Tensor, Tensor], Tensor]) -> SupervisedLoss:
    """A loss function of ``(model, batch)`` for batches ``(x, y)`` or dicts holding the two.

    Raises:
        ValueError: the criterion has a ``reduction`` other than ``"mean"``.
    """
    return SupervisedLoss(criterion)


def piecewise_linear(loss_fn: LossFunction) -> str | None:
    """Name of the criterion if it is one of torch's piecewise-linear ones, else None.

    The second derivative of such a loss says nothing of its kinks. Only a loss from `supervised`
    shows its criterion. Losses with linear tails (Huber) are not among them.
    """
    criterion = loss_fn.criterion if isinstance(loss_fn, SupervisedLoss) else None
    hinge = isinstance(criterion, nn.MultiMarginLoss) and criterion.p == 1
    if hinge or isinstance(criterion, _KINKED_MODULES) or criterion in _KINKED_FUNCTIONS:
        return str(getattr(criterion, "__name__", type(criterion).__name__))
    return None


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an ``(x, y)`` pair or of a dict with the usual names.

    Raises:
        TypeError: the batch is neither.
    """
    if isinstance(batch, Mapping):
        inputs = [key for key in _INPUT_KEYS if key in batch]
        targets = [key for key in _TARGET_KEYS if key in batch]
        if len(inputs) == 1 and len(targets) == 1:
            return batch[inputs[0]], batch[targets[0]]
        msg = (
            f"a dict batch needs one of {_INPUT_KEYS} and one of {_TARGET_KEYS}, got keys "
            f"{sorted(map(str, batch))}; otherwise write your own loss_fn(model, batch)"
        )
        raise TypeError(msg)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    msg = (
        f"expected a batch (x, y) or a dict, got {type(batch).__name__}; "
        "otherwise write your own loss_fn(model, batch)"
    )
    raise TypeError(msg)
