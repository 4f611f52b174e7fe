import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchlr
from batchlr.operators import second_order as module
from batchlr.operators.linear_pass import linear_pass
from batchlr.operators.second_order import CheapSecondDerivatives
from cases import seeded

SHAPES = {  # of the input, and how many of its dimensions are normalised
    "vectors": ((6, 3), 1),
    "sequences": ((4, 5, 3), 1),
    "images": ((2, 3, 4, 5), 3),
    "one row": ((7,), 1),
}


def inputs(shape, dims):
    with seeded():
        x = 2 + 3 * torch.randn(*shape, dtype=torch.float64)
        weight, bias = torch.randn(2, *shape[len(shape) - dims :], dtype=torch.float64)
    return [t.requires_grad_() for t in (x, weight, bias)]


def gradients(x, weight, bias, **options):
    """Output and gradients of a curved function of it by input, weight and bias."""
    shape = x.shape[1:] if weight is None else weight.shape
    output = F.layer_norm(x, shape, weight, bias, **options)
    variables = [t for t in (x, weight, bias) if t is not None]
    return output, variables, torch.autograd.grad(output.sin().sum(), variables, create_graph=True)


def derivatives(x, weight, bias, **options):
    """The output, the gradient and a product with the Hessian."""
    output, variables, found = gradients(x, weight, bias, **options)
    turned = sum((g * g.detach().cos()).sum() for g in found)
    return output, *found, *torch.autograd.grad(turned, variables)


@pytest.mark.parametrize(("shape", "dims"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_equals_the_fused_kernel_to_second_order(shape, dims, affine, eps):
    x, weight, bias = inputs(shape, dims)
    if affine == "none" and len(shape) - dims != 1:
        dims = len(shape) - 1
    weight = weight if affine != "none" or len(shape) == 1 else None
    bias = bias if affine == "both" else None
    expected = derivatives(x, weight, bias, eps=eps)
    with CheapSecondDerivatives():
        actual = derivatives(x, weight, bias, eps=eps)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_a_product_with_some_of_the_tangents_only(chosen):
    x, weight, bias = inputs((4, 5, 3), 1)
    results = []
    for ours in (False, True):
        with CheapSecondDerivatives() if ours else torch.enable_grad():
            _, variables, found = gradients(x, weight, bias)
        some = [found[j] for j in chosen]
        cotangents = [g.detach().cos() for g in some]
        results.append(torch.autograd.grad(some, variables, cotangents, retain_graph=True))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_linear_pass_gives_the_image_of_the_tangents():
    x, weight, bias = inputs((4, 5, 3), 1)
    cotangent = torch.zeros_like(x, requires_grad=True)
    tangents = [t.detach().cos() for t in (x, weight, bias)]
    images = []
    for ours in (False, True):
        with CheapSecondDerivatives() if ours else torch.enable_grad():
            output = F.layer_norm(x, (3,), weight, bias)
            pulled = torch.autograd.grad(output, (x, weight, bias), cotangent, create_graph=True)
        with linear_pass():
            images += torch.autograd.grad(pulled, cotangent, tangents)
    torch.testing.assert_close(images[1], images[0], rtol=1e-9, atol=1e-11)


def elementary(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def third(norm):
    """Derivatives of the length of a gradient, and theirs."""
    variables = inputs((4, 3), 1)
    slope = torch.autograd.grad(norm(*variables).sin().sum(), variables, create_graph=True)
    length = sum(g.square().sum() for g in slope)
    second = torch.autograd.grad(length, variables, create_graph=True)
    turned = sum(g.sin().sum() for g in second)
    return [*second, *torch.autograd.grad(turned, variables)]


def test_third_derivatives_are_those_of_the_elementary_operations():
    expected = third(elementary)
    with CheapSecondDerivatives():
        actual = third(lambda x, w, b: F.layer_norm(x, (3,), w, b))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_reaches_the_layers_of_a_transformer(monkeypatch):
    seen = []

    def spy(input, *args, **kwargs):
        seen.append(input.shape)
        return original(input, *args, **kwargs)

    original = module._OWN[F.layer_norm]
    monkeypatch.setitem(module._OWN, F.layer_norm, spy)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    loss = batchlr.supervised(nn.MSELoss())
    operator = batchlr.HessianOperator(layer, loss, [(x, torch.zeros_like(x))])
    operator @ torch.ones(operator.shape[0])
    assert seen == [x.shape] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_torchs_own(dtype):
    x = inputs((4, 3), 1)[0].detach().to(dtype)
    expected = F.layer_norm(x, (3,))
    with CheapSecondDerivatives():
        actual = F.layer_norm(x, (3,))
        mixed = F.layer_norm(x, (3,), torch.ones(3), torch.zeros(3))
    assert torch.equal(actual, expected)
    assert torch.equal(mixed, F.layer_norm(x, (3,), torch.ones(3), torch.zeros(3)))


def test_an_input_without_rows_is_torchs_own():
    with CheapSecondDerivatives():
        assert F.layer_norm(torch.zeros(0, 3), (3,)).shape == (0, 3)


class Mapped(nn.Module):
    """Layer norm inside a transform of ``torch.func``, one sample at a time."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4, dtype=torch.float64)
        self.last = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return torch.func.vmap(lambda row: self.last(self.norm(row).tanh()))(x)


def test_a_model_may_use_transforms_itself():
    with seeded():
        model = Mapped()
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    loss = batchlr.supervised(F.mse_loss)
    operator = batchlr.HessianOperator(model, loss, [(x, y)])
    names, weights = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([w.detach().flatten() for w in weights])

    def of(vector):
        cut = vector.split([w.numel() for w in weights])
        parts = [part.view_as(w) for part, w in zip(cut, weights, strict=True)]
        own = dict(zip(names, parts, strict=True))
        hidden = F.layer_norm(x, (4,), own["norm.weight"], own["norm.bias"]).tanh()
        return F.mse_loss(F.linear(hidden, own["last.weight"], own["last.bias"]), y)

    dense = torch.autograd.functional.hessian(of, flat)
    vector = torch.randn(flat.numel(), dtype=torch.float64)
    torch.testing.assert_close(operator @ vector, dense @ vector)
