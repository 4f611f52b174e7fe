"""Which layers are replaced, where, and where not; what they compute is for their own tests."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from batchlr.operators.second_order import CheapSecondDerivatives, torchs_own_layers
from cases import seeded

WORDS = torch.tensor([[0, 2, 1], [1, 1, 3]])
IMAGES = {d: (2, 4, *[5] * d) for d in (1, 2, 3)}
LAYERS = {  # each with the node that torch's own kernel leaves in the graph
    "conv1d": (nn.Conv1d(4, 2, 3), IMAGES[1], "Convolution"),
    "conv2d": (nn.Conv2d(4, 2, 3), IMAGES[2], "Convolution"),
    "conv3d": (nn.Conv3d(4, 2, 3), IMAGES[3], "Convolution"),
    "batch norm": (nn.BatchNorm2d(4), IMAGES[2], "NativeBatchNorm"),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), IMAGES[2], "NativeBatchNorm"),
    "layer norm": (nn.LayerNorm(5), IMAGES[1], "NativeLayerNorm"),
    "embedding": (nn.Embedding(4, 3, sparse=True), None, None),  # the node is the same
    "bags": (nn.EmbeddingBag(4, 3), None, "EmbeddingBag"),
    "weight norm": (weight_norm(nn.Linear(5, 3)), IMAGES[1], "WeightNorm"),
}
each_layer = pytest.mark.parametrize(("layer", "shape", "node"), LAYERS.values(), ids=LAYERS)


def nodes(output):
    """Names of all nodes of a graph."""
    found, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        found.add(type(node).__name__)
        left += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def has(output, node):
    """Whether the graph has torch's own ``node``."""
    return any(name.startswith((node, f"{node}Interface")) for name in nodes(output))


def given(layer, shape):
    with seeded():
        x = WORDS if shape is None else torch.randn(*shape, dtype=torch.float64)
    return layer.double(), x


@each_layer
def test_it_is_replaced_inside_and_nowhere_else(layer, shape, node):
    layer, x = given(layer, shape)

    def is_torchs():
        output = layer(x)
        if node is not None:
            return has(output, node)
        (gradient,) = torch.autograd.grad(output.sum(), layer.parameters())
        return gradient.is_sparse

    seen = [is_torchs()]
    with CheapSecondDerivatives():
        seen.append(is_torchs())
        with torchs_own_layers():
            seen.append(is_torchs())
        seen.append(is_torchs())
    seen.append(is_torchs())
    assert seen == [True, False, True, False, True]


@each_layer
def test_values_and_gradients_are_those_of_torch(layer, shape, node):
    layer, x = given(layer, shape)
    results = []
    for context in (torch.enable_grad(), CheapSecondDerivatives()):
        with context:
            output = layer(x)
        gradients = torch.autograd.grad(output.sin().sum(), layer.parameters())
        dense = [g.to_dense() if g.is_sparse else g for g in gradients]
        results.append((output, *dense))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@each_layer
def test_every_layer_has_a_second_derivative(layer, shape, node):
    """A symmetric one: two products with the Hessian agree, ``u' H v = v' H u``."""
    layer, x = given(layer, shape)
    weights = list(layer.parameters())
    with CheapSecondDerivatives():
        gradients = torch.autograd.grad(layer(x).sin().sum(), weights, create_graph=True)

    def product(vectors):
        return torch.autograd.grad(gradients, weights, vectors, retain_graph=True)

    with seeded(1):
        u, v = ([torch.randn_like(w) for w in weights] for _ in range(2))
    forth, back = (
        sum(float((a * b).sum()) for a, b in zip(one, product(other), strict=True))
        for one, other in ((u, v), (v, u))
    )
    assert abs(forth) > 1e-3
    assert forth == pytest.approx(back, rel=1e-10)


def test_a_suspension_within_another_leaves_the_outer_one():
    layer, x = given(nn.LayerNorm(5), IMAGES[1])
    with CheapSecondDerivatives(), torchs_own_layers():
        with torchs_own_layers():
            pass
        assert has(layer(x), "NativeLayerNorm")


def test_a_suspension_ends_with_an_error():
    layer, x = given(nn.LayerNorm(5), IMAGES[1])
    with CheapSecondDerivatives():
        with pytest.raises(ArithmeticError), torchs_own_layers():
            raise ArithmeticError
        assert not has(layer(x), "NativeLayerNorm")


def test_transforms_of_torch_func_find_torchs_own_layers():
    """They know no rule of ours; the rows of their Jacobian are gradients one by one."""
    layer, x = given(nn.LayerNorm(5), IMAGES[1])
    rows = x.reshape(-1, 5)

    def loss(row):
        return layer(row).sin().sum()

    with CheapSecondDerivatives():
        transformed = torch.func.vmap(torch.func.grad(loss))(rows)
    one_by_one = []
    for row in rows:
        leaf = row.clone().requires_grad_()
        one_by_one += torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(transformed, torch.stack(one_by_one), rtol=1e-10, atol=1e-12)


def test_autocast_is_off_also_where_it_is_entered_inside():
    """The mode knows one type of device: of others it leaves autocast alone."""
    with seeded():
        a, b = torch.randn(2, 8, 8)
    exact = a @ b
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        with CheapSecondDerivatives(device), torch.autocast("cpu", dtype=torch.bfloat16):
            product = a @ b
            assert torch.is_autocast_enabled("cpu")
        assert product.dtype == dtype
        assert torch.equal(product, exact) == (device == "cpu")
    with CheapSecondDerivatives():
        assert torch.equal(a @ b, exact)
        assert not torch.is_autocast_enabled("cpu")


def test_options_reach_the_layers_by_position_and_by_name():
    with seeded():
        x, w, b = torch.randn(2, 4, 9), torch.randn(2, 2, 3), torch.randn(2)
    expected = F.conv1d(x, w, b, 2, 1, 2, 2)
    with CheapSecondDerivatives():
        by_name = F.conv1d(x, w, bias=b, stride=2, padding=1, dilation=2, groups=2)
        assert torch.equal(F.conv1d(x, w, b, 2, 1, 2, 2), expected)
    assert torch.equal(by_name, expected)
