"""Convolutions with a double backward of their own are torch's convolutions to third order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchlr.operators.linear_pass import linear_pass
from batchlr.operators.second_order import CheapSecondDerivatives, torchs_own_layers
from cases import seeded

LAYERS = {
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding="valid"), (2, 3, 5, 5)),
    "dilated": (lambda: nn.Conv1d(4, 5, 3, dilation=2, bias=False), (3, 4, 9)),
    "pointwise": (lambda: nn.Conv2d(3, 5, 1), (2, 3, 4, 4)),
    "volume": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2)), (2, 2, 4, 5, 6)),
    "padded as named": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 2, 4, 4)),
    "one sample": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
}

each_layer = pytest.mark.parametrize("name", LAYERS)


def derivatives(layer: nn.Module, x: Tensor, order: int) -> list[Tensor]:
    """The output of a curved function of the layer, and products of its derivatives."""
    variables = [x, *layer.parameters()]
    output = layer(x)
    found, scalar = [output], (output.sin() * torch.arange(output.numel()).view_as(output)).sum()
    for k in range(order):
        last = k == order - 1
        gradients = torch.autograd.grad(scalar, variables, create_graph=not last)
        found += gradients
        scalar = sum((g * g.detach().cos()).sum() for g in gradients)
    return found


@each_layer
@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_torchs_own(name, order):
    build, shape = LAYERS[name]
    with seeded():
        layer, x = build().double(), torch.randn(*shape, dtype=torch.float64)
    expected = derivatives(layer, x.requires_grad_(), order)
    with CheapSecondDerivatives():
        actual = derivatives(layer, x, order)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_parts_that_need_no_gradient(frozen):
    build, shape = LAYERS["strided"]
    with seeded():
        layer, x = build().double(), torch.randn(*shape, dtype=torch.float64)
    if frozen == "both":
        layer.requires_grad_(False)
        x.requires_grad_()
    else:
        getattr(layer, frozen).requires_grad_(False)
    variables = [t for t in (x, *layer.parameters()) if t.requires_grad]

    def products():
        scalar = layer(x).sin().sum()
        gradients = torch.autograd.grad(scalar, variables, create_graph=True)
        turned = sum((g * g.detach().cos()).sum() for g in gradients)
        return [*gradients, *torch.autograd.grad(turned, variables)]

    expected = products()
    with CheapSecondDerivatives():
        actual = products()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_linear_pass_computes_the_image_alone():
    with seeded():
        layer, x = nn.Conv2d(2, 3, 3).double(), torch.randn(2, 2, 5, 5).double().requires_grad_()
    with CheapSecondDerivatives():
        output = layer(x)
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, (x, layer.weight), u, create_graph=True)
    tangents = [torch.ones_like(p) for p in pulled]
    options = {"retain_graph": True, "allow_unused": True}
    everything = torch.autograd.grad(pulled, (u, x, layer.weight), tangents, **options)
    with linear_pass():
        image = torch.autograd.grad(pulled, (u, x, layer.weight), tangents, **options)
    expected = F.conv2d(torch.ones_like(x), layer.weight) + F.conv2d(
        x, torch.ones_like(layer.weight)
    )
    torch.testing.assert_close(image[0], expected)
    assert torch.equal(image[0], everything[0])
    assert image[1:] == (None, None)


def test_may_be_suspended():
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5)
    with CheapSecondDerivatives():
        assert "_Convolution" in type(layer(x).grad_fn).__name__
        with torchs_own_layers():
            assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"
        assert "_Convolution" in type(layer(x).grad_fn).__name__
