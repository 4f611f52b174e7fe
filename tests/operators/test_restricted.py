"""Blocks of a curvature matrix are the blocks of the dense one."""

import pytest
import torch
from torch import nn

from batchlr import HessianOperator, RestrictedOperator, layer_blocks
from cases import CASES, Problem
from reference import dense

each_kind = pytest.mark.parametrize("kind", ["hessian", "ggn"])
SOME = ["mlp-tanh", "preresnet-train", "tied", "frozen", "unused", "transformer"]


def positions(problem: Problem, chosen: set[str]) -> torch.Tensor:
    """Where in the whole vector the chosen parameters lie."""
    named = [(n, p) for n, p in problem.model.named_parameters() if p.requires_grad]
    marks = [torch.full((p.numel(),), name in chosen) for name, p in named]
    return torch.cat(marks).nonzero().squeeze(1)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-10 * expected.norm() + 1e-15


@each_kind
@pytest.mark.parametrize("case", SOME)
def test_each_layers_block(case, kind):
    problem = CASES[case]()
    blocks = layer_blocks(problem.operator(kind))
    assert sum(block.shape[0] for block in blocks.values()) == problem.size
    for block in blocks.values():
        rows = positions(problem, set(block.parameter_names))
        v = torch.randn(len(rows), 2, dtype=torch.float64)
        assert_close(block @ v, dense(case, kind)[rows][:, rows] @ v)


@each_kind
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layers.1", {"layers.1.weight", "layers.1.bias"}),
        ("*.bias", {"layers.1.bias", "layers.3.bias", "layers.5.bias"}),
        (["layers.5.weight", "layers.1.bias"], {"layers.5.weight", "layers.1.bias"}),
        ("layers", {f"layers.{k}.{n}" for k in (1, 3, 5) for n in ("weight", "bias")}),
    ],
)
def test_patterns(kind, pattern, names):
    problem = CASES["mlp-tanh"]()
    block = RestrictedOperator(problem.operator(kind), pattern)
    assert set(block.parameter_names) == names
    rows = positions(problem, names)
    v = problem.vectors()
    assert torch.equal(block.restrict(v), v[rows])
    expected = dense("mlp-tanh", kind)[rows][:, rows] @ v[rows]
    assert_close(block @ v[rows], expected)
    mean = sum(
        n * part for n, part in zip(block.weights, block.batch_products(v[rows]), strict=True)
    )
    assert_close(mean / sum(block.weights), expected)
    own = list(block.batch_products(weight * v[rows] for weight in block.weights))
    assert_close(sum(own) / sum(block.weights), expected)
    assert_close(block.restrict(problem.operator(kind) @ block.embed(v[rows])), expected)
    assert torch.equal(block.embed(v[rows])[rows], v[rows])
    assert block.embed(v[rows]).count_nonzero() == len(rows)


@each_kind
def test_blocks_share_the_graphs_of_the_whole(kind):
    problem = CASES["mlp-tanh"]()
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(None))
    operator = problem.operator(kind)
    for block in layer_blocks(operator).values():
        block @ torch.ones(block.shape[0], dtype=torch.float64)
        assert block.num_products == 1
    operator @ problem.vectors()
    assert len(calls) == len(problem.pairs)
    assert operator.num_products == 1


@each_kind
def test_follows_the_model(kind):
    problem = CASES["mlp-tanh"]()
    block = RestrictedOperator(problem.operator(kind), "layers.1")
    v = torch.ones(block.shape[0], dtype=torch.float64)
    before = block @ v
    with torch.no_grad():
        problem.model.layers[3].weight.mul_(2)
    assert not torch.equal(block @ v, before)
    fresh = RestrictedOperator(problem.operator(kind), "layers.1")
    assert torch.equal(block @ v, fresh @ v)


def test_parameters_of_the_model_itself_are_a_layer_without_name():
    problem = CASES["unused"]()
    assert layer_blocks(problem.operator("hessian"))[""].parameter_names == ("spare",)


def test_names_that_look_like_patterns_are_themselves():
    layers = nn.ModuleDict({"a[0]": nn.Linear(1, 1), "a0": nn.Linear(1, 1), "a?": nn.Linear(1, 1)})
    model = nn.Sequential(layers)

    def loss_fn(model, batch):
        return sum(layer(batch) for layer in model[0].values()).square().mean()

    blocks = layer_blocks(HessianOperator(model, loss_fn, [torch.ones(1, 1)]))
    for layer in layers:
        names = (f"0.{layer}.weight", f"0.{layer}.bias")
        assert blocks[f"0.{layer}"].parameter_names == names


def test_describes_itself():
    operator = CASES["mlp-tanh"]().operator("hessian")
    block = RestrictedOperator(operator, "layers.5.bias")
    assert repr(block) == f"RestrictedOperator(P=3 of {operator!r})"
    assert block.samples == operator.samples
    assert block.dtype == torch.float64


class TestRefuses:
    def test_a_name_that_is_none(self):
        operator = CASES["mlp-tanh"]().operator("hessian")
        words = r"no trainable parameter .* 'layers.1.wieght'.*did you mean 'layers.1.weight'"
        with pytest.raises(ValueError, match=words):
            RestrictedOperator(operator, ["layers.1", "layers.1.wieght"])

    def test_no_pattern(self):
        operator = CASES["mlp-tanh"]().operator("hessian")
        with pytest.raises(ValueError, match="patterns is empty"):
            RestrictedOperator(operator, [])

    def test_a_frozen_layer(self):
        problem = CASES["frozen"]()
        first = next(n for n, m in problem.model.named_modules() if isinstance(m, nn.Linear))
        with pytest.raises(ValueError, match="no trainable parameter"):
            RestrictedOperator(problem.operator("hessian"), first)

    def test_a_vector_of_the_whole(self):
        problem = CASES["mlp-tanh"]()
        block = RestrictedOperator(problem.operator("hessian"), "layers.1")
        with pytest.raises(ValueError, match=r"expected a vector \(24,\).*got shape \(51,\)"):
            block @ problem.vectors()
