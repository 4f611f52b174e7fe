"""How much a batch weighs: what the mean in its loss is a mean over."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from batchlr.operators.batches import count_samples

_Criterion = Callable[[Tensor, Tensor], Tensor]

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, functional.cross_entropy, functional.nll_loss)
_OF_ELEMENTS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.poisson_nll_loss,
    functional.soft_margin_loss,
)


def batch_weight(loss_fn: Callable[..., Any], batch: Any) -> float:
    """What ``loss_fn`` says its mean over ``batch`` is over; the number of samples if it is silent.

    ``loss_fn.batch_weight(batch)`` says it: the number of tokens that are not padding, the sum of
    the samples' weights. Losses from `supervised` know it for torch's criteria.

    Raises:
        ValueError: the weight is negative or not finite.
    """
    own = getattr(loss_fn, "batch_weight", None)
    weight = float(own(batch)) if callable(own) else float(count_samples(batch))
    if not 0 <= weight < float("inf"):
        msg = f"a batch's weight must be finite and not negative, got {weight} from batch_weight"
        raise ValueError(msg)
    return weight


def criterion_weight(criterion: _Criterion, targets: Tensor) -> float:
    """What a torch criterion's mean over ``targets`` divides by.

    Cross-entropy and NLL: the classes' weights, summed over the targets that are not ignored; class
    probabilities count one each. Criteria by element: elements. Any other: samples.
    """
    kind, option = _taken_apart(criterion)
    if _is_one_of(kind, _OF_CLASSES):
        if targets.is_floating_point():
            return targets.numel() / (targets.shape[1] if targets.ndim > 1 else targets.numel())
        kept = targets[targets != option("ignore_index", -100)]
        weights = option("weight", None)
        if weights is None:
            return float(kept.numel())
        return float(weights.double()[kept.to(weights.device)].sum())
    if _is_one_of(kind, _OF_ELEMENTS):
        return float(targets.numel())
    return float(targets.shape[0]) if targets.ndim > 0 else 1.0


def reduction(criterion: _Criterion) -> str:
    """``"mean"``, ``"sum"`` or ``"none"``; a function of no known kind is taken to be a mean."""
    _, option = _taken_apart(criterion)
    return str(option("reduction", "mean"))


def _taken_apart(criterion: _Criterion) -> tuple[Any, Callable[[str, Any], Any]]:
    """The criterion proper, and a function that looks up its options."""
    if isinstance(criterion, partial):
        keywords = criterion.keywords
        return criterion.func, lambda name, default: keywords.get(name, default)
    if isinstance(criterion, nn.Module):
        return criterion, lambda name, default: getattr(criterion, name, default)
    return criterion, lambda name, default: default


def _is_one_of(kind: Any, known: tuple[Any, ...]) -> bool:
    classes = tuple(entry for entry in known if isinstance(entry, type))
    return isinstance(kind, classes) or any(kind is entry for entry in known)
