import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchlr.operators import second_order as module
from batchlr.operators.second_order import CheapSecondDerivatives
from cases import seeded

SHAPES = {
    "vectors": (6, 3),
    "sequences": (4, 3, 5),
    "images": (2, 3, 4, 5),
    "volumes": (2, 3, 2, 2, 2),
}


def inputs(shape):
    with seeded():
        x = 2 + 3 * torch.randn(*shape, dtype=torch.float64)
        weight, bias = torch.randn(2, 3, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, weight, bias)]


def derivatives(x, weight, bias, **options):
    """The output, the gradient of a curved function of it and a product with its Hessian."""
    output = F.batch_norm(x, None, None, weight, bias, training=True, **options)
    variables = [t for t in (x, weight, bias) if t is not None]
    scalar = output.sin().sum()
    gradients = torch.autograd.grad(scalar, variables, create_graph=True)
    turned = sum((g * g.detach().cos()).sum() for g in gradients)
    return output, *gradients, *torch.autograd.grad(turned, variables)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_equals_the_fused_kernel_to_second_order(shape, affine, eps):
    x, weight, bias = inputs(shape)
    weight = weight if affine != "none" else None
    bias = bias if affine == "both" else None
    expected = derivatives(x, weight, bias, eps=eps)
    with CheapSecondDerivatives():
        actual = derivatives(x, weight, bias, eps=eps)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_reaches_the_layers_of_a_model(training, monkeypatch):
    seen = []

    def spy(input, *args, **kwargs):
        seen.append(input.shape)
        return original(input, *args, **kwargs)

    original = module._OWN[F.batch_norm]
    monkeypatch.setitem(module._OWN, F.batch_norm, spy)
    x, *_ = inputs(SHAPES["images"])
    layer = nn.BatchNorm2d(3).double().train(training)
    outside = layer(x)
    assert not seen
    with CheapSecondDerivatives():
        inside = layer(x)
    assert seen == [x.shape]
    torch.testing.assert_close(inside, outside)


def test_eval_mode_uses_the_running_statistics():
    x, weight, bias = inputs(SHAPES["images"])
    mean, var = torch.arange(1.0, 4.0).double(), torch.arange(2.0, 5.0).double()
    expected = F.batch_norm(x, mean, var, weight, bias)
    with CheapSecondDerivatives():
        assert torch.equal(F.batch_norm(x, mean, var, weight, bias), expected)


def test_running_statistics_are_not_updated():
    x, *_ = inputs(SHAPES["images"])
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    with CheapSecondDerivatives():
        F.batch_norm(x, mean, var, training=True)
    assert torch.equal(mean, torch.zeros(3).double())
    assert torch.equal(var, torch.ones(3).double())


def test_other_functions_pass_through():
    x, *_ = inputs(SHAPES["vectors"])
    with CheapSecondDerivatives():
        assert torch.equal(F.gelu(x), torch.nn.GELU()(x))
        assert torch.equal(x.mean(dim=0, keepdim=True), x.mean(0, True))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_refuses_one_value_per_channel_as_torch_does(shape):
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(shape))
    with (
        CheapSecondDerivatives(),
        pytest.raises(ValueError, match=r"more than one value per channel.*norm_mode='eval'"),
    ):
        layer(torch.ones(shape))


def instance_norm(x, weight, bias):
    dims = [*range(2, x.ndim)]
    centred = x - x.mean(dims, keepdim=True)
    normal = centred * (centred.square().mean(dims, keepdim=True) + 1e-5).rsqrt()
    shape = [1, -1, *[1] * len(dims)]
    return normal * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("shape", ["sequences", "images"])
def test_instance_norm_is_that_of_the_elementary_operations_to_third_order(shape):
    """For which torch's kernel has no derivative."""
    results = []
    for ours in (False, True):
        variables = inputs(SHAPES[shape])
        with CheapSecondDerivatives() if ours else torch.enable_grad():
            x, weight, bias = variables
            if ours:
                output = F.instance_norm(x, weight=weight, bias=bias)
            else:
                output = instance_norm(x, weight, bias)
            slope = torch.autograd.grad(output.sin().sum(), variables, create_graph=True)
            length = sum(g.square().sum() for g in slope)
            second = torch.autograd.grad(length, variables, create_graph=True)
            turned = sum(g.sin().sum() for g in second)
            results.append([output, *second, *torch.autograd.grad(turned, variables)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_instance_norm_by_running_statistics():
    x, weight, bias = inputs(SHAPES["images"])
    options = (torch.ones(3).double(), torch.full((3,), 2.0).double(), weight, bias, False)
    expected = F.instance_norm(x, *options)
    with CheapSecondDerivatives():
        torch.testing.assert_close(F.instance_norm(x, *options), expected)
