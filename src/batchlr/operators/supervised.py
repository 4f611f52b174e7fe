"""Losses in the form ``loss_fn(model, batch) -> scalar``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional

from batchlr.operators.batch_weight import criterion_weight, reduction
from batchlr.operators.softmax_curvature import softmax_curvature

LossFunction = Callable[[nn.Module, Any], Tensor]

# What the two entries of a dict batch are called in the data sets and collators people use.
_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values", "input_ids")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")

_KINKED_MODULES = (
    nn.L1Loss,
    nn.HingeEmbeddingLoss,
    nn.MultiLabelMarginLoss,
)
_KINKED_FUNCTIONS = (
    functional.l1_loss,
    functional.hinge_embedding_loss,
    functional.multi_margin_loss,  # of p = 1, its default
    functional.multilabel_margin_loss,
)


@final
class SupervisedLoss:
    """Mean loss of ``criterion(model(x), y)`` over a batch; build it with `supervised`.

    It also exposes the two halves the Gauss-Newton matrix needs: ``outputs(model, batch)``, the
    network's outputs, and ``loss(outputs, batch)``, the criterion on top of them.
    """

    def __init__(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        weight: Callable[[Any], float | Tensor] | None = None,
    ) -> None:
        self._reduction = reduction(criterion)
        if self._reduction not in ("mean", "batchmean", "sum"):
            msg = (
                f"the criterion has reduction={self._reduction!r}; a loss must be one number: "
                "use reduction='mean' or reduction='sum'"
            )
            raise ValueError(msg)
        self.criterion = criterion
        self._weight = weight

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of ``batch``, a scalar."""
        return self.loss(self.outputs(model, batch), batch)

    def batch_weight(self, batch: Any) -> float:
        """What the mean over ``batch`` is over; see `criterion_weight`."""
        if self._weight is not None:
            return float(self._weight(batch))
        return criterion_weight(self.criterion, split_batch(batch)[1])

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
        """``criterion(outputs, y)``, with ``y`` brought to the outputs' device; a mean."""
        _, targets = split_batch(batch)
        value = self.criterion(outputs, targets.to(outputs.device))
        return value / self.batch_weight(batch) if self._reduction == "sum" else value

    def curvature(self, outputs: Tensor, batch: Any) -> Callable[[Tensor], Tensor] | None:
        """``u -> S u``, `loss`'s Hessian in the outputs, where it is known in closed form."""
        _, targets = split_batch(batch)
        by_mean = self._reduction != "sum"
        weight = criterion_weight(self.criterion, targets) if by_mean else self.batch_weight(batch)
        return softmax_curvature(self.criterion, outputs, targets.to(outputs.device), weight)


def supervised(
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    weight: Callable[[Any], float | Tensor] | None = None,
) -> SupervisedLoss:
    """A loss function of ``(model, batch)`` for batches ``(x, y)`` or dicts holding the two.

    It is the *mean* loss also where the criterion has ``reduction="sum"``: the sum is divided by
    what the mean would divide by. Curvature and rates are those of the mean; a loop that descends
    the sum itself divides its rate by that weight.

    Args:
        criterion: a module or function of outputs and targets that returns a mean or a sum.
        weight: of a batch, what the criterion's mean over it is over (tokens that count, say).
            Torch's criteria need none: class weights and ignored targets are taken from them. Any
            other is taken to be a mean over samples.

    Raises:
        ValueError: the criterion has ``reduction="none"``.
    """
    return SupervisedLoss(criterion, weight=weight)


def check_loss_function(loss_fn: object) -> None:
    """Refuse what cannot be called as ``loss_fn(model, batch)``, so far as one can tell.

    Raises:
        TypeError: it is one of torch's criteria, functions of outputs and targets, or no function.
    """
    bare = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    name = str(getattr(bare, "__name__", type(bare).__name__))
    expected = "loss_fn must be a function of (model, batch) that returns the mean loss"
    if not callable(loss_fn):
        msg = f"{expected}, got {name}"
        raise TypeError(msg)
    is_functional = getattr(bare, "__module__", None) == functional.__name__
    if is_functional or isinstance(bare, nn.modules.loss._Loss):
        msg = (
            f"{expected}, got the criterion {name}, a function of outputs and targets: pass "
            "batchlr.supervised(criterion)"
        )
        raise TypeError(msg)


def piecewise_linear(loss_fn: LossFunction) -> str | None:
    """Name of the criterion if it is one of torch's piecewise-linear ones, else None.

    The second derivative of such a loss says nothing of its kinks. Only a loss from `supervised`
    shows its criterion. Losses with linear tails (Huber) are not among them.
    """
    criterion: Any = loss_fn.criterion if isinstance(loss_fn, SupervisedLoss) else None
    criterion = criterion.func if isinstance(criterion, partial) else criterion
    hinge = isinstance(criterion, nn.MultiMarginLoss) and criterion.p == 1
    if hinge or isinstance(criterion, _KINKED_MODULES) or criterion in _KINKED_FUNCTIONS:
        return str(getattr(criterion, "__name__", type(criterion).__name__))
    return None


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an ``(x, y)`` pair or of a dict with the usual names.

    Raises:
        TypeError: the batch is neither, or these are no tensors.
    """
    if isinstance(batch, Mapping):
        inputs = [key for key in _INPUT_KEYS if key in batch]
        targets = [key for key in _TARGET_KEYS if key in batch]
        if len(inputs) == 1 and len(targets) == 1:
            return _tensors(batch[inputs[0]], batch[targets[0]])
        msg = (
            f"a dict batch needs one of {_INPUT_KEYS} and one of {_TARGET_KEYS}, got keys "
            f"{sorted(map(str, batch))}; otherwise write your own loss_fn(model, batch)"
        )
        raise TypeError(msg)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return _tensors(batch[0], batch[1])
    entries = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    if isinstance(batch, Tensor):
        entries = " (one batch [x, y] as the list of batches? pass [(x, y)])"
    msg = (
        f"expected a batch (x, y) or a dict, got {type(batch).__name__}{entries}; "
        "otherwise write your own loss_fn(model, batch)"
    )
    raise TypeError(msg)


def _tensors(inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The two, if they can be brought to a device as tensors and packed sequences can."""
    for name, given in (("inputs", inputs), ("targets", targets)):
        if not hasattr(given, "to"):
            msg = (
                f"{name} must be a tensor, got {type(given).__name__}; make it one, or write your "
                "own loss_fn(model, batch)"
            )
            raise TypeError(msg)
    return inputs, targets
