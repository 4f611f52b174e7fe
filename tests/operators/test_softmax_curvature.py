"""The closed form, against the Hessian that autograd makes of torch's own criterion."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from batchlr.operators.batch_weight import criterion_weight
from batchlr.operators.softmax_curvature import softmax_curvature

CLASSES = 4
SHAPES = {"one sample": (CLASSES,), "samples": (6, CLASSES), "positions": (3, CLASSES, 2, 2)}
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
OPTIONS = [
    {"weight": weight, "label_smoothing": smoothing}
    for weight, smoothing in itertools.product((None, WEIGHTS), (0.0, 0.3))
]


def problem(shape, kind, seed=0):
    """Logits, and targets of the kind: indices, indices of which some are ignored, probabilities.

    A third of the logits is large, so that some probabilities are next to 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = logits * torch.where(torch.rand(shape, generator=generator) < 0.33, 8.0, 1.0)
    dim = 1 if len(shape) > 1 else 0
    if kind == "probabilities":
        mixed = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(dim)
        return logits, mixed
    places = [size for axis, size in enumerate(shape) if axis != dim]
    targets = torch.randint(CLASSES, places, generator=generator)
    if kind == "ignored" and targets.numel() > 1:
        targets.view(-1)[::3] = -100
    return logits, targets


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_second_derivative_of_the_mean_loss(shape, kind, options):
    logits, targets = problem(shape, kind)
    criterion = nn.CrossEntropyLoss(**options)
    dense = torch.autograd.functional.hessian(lambda z: criterion(z, targets), logits)
    size = logits.numel()
    if kind == "probabilities" and len(shape) == 1:
        weight = 1.0
    else:
        weight = criterion_weight(criterion, targets)
    multiply = softmax_curvature(criterion, logits, targets, weight)
    columns = [multiply(e.view(shape)).reshape(-1) for e in torch.eye(size, dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns, 1), dense.reshape(size, size))


def test_the_function_is_the_criterion_with_its_defaults():
    logits, targets = problem((6, CLASSES), "ignored")
    u = torch.randn(6, CLASSES, dtype=torch.float64)
    found = [
        softmax_curvature(criterion, logits, targets, 4.0)(u)
        for criterion in (functional.cross_entropy, nn.CrossEntropyLoss())
    ]
    assert torch.equal(*found)


def test_products_have_the_dtype_of_the_logits():
    logits, targets = problem((6, CLASSES), "indices")
    multiply = softmax_curvature(nn.CrossEntropyLoss(WEIGHTS), logits.float(), targets, 9.0)
    assert multiply(torch.ones(6, CLASSES)).dtype == torch.float32


class Focal(nn.CrossEntropyLoss):
    """A relative with a curvature of its own."""


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), Focal(), partial(functional.cross_entropy, label_smoothing=0.1)]
)
def test_of_any_other_criterion_there_is_no_closed_form(criterion):
    assert softmax_curvature(criterion, *problem((6, CLASSES), "indices"), 6.0) is None
