"""Every layer's spectrum is that of its dense block."""

import pytest
import torch

from batchlr import layer_eigenpairs, layer_measures
from cases import CASES
from reference import dense


def blocks(case: str, kind: str) -> dict[str, torch.Tensor]:
    """Dense diagonal blocks of the layers."""
    problem, matrix = CASES[case](), dense(case, kind)
    sizes: dict[str, int] = {}
    for name, parameter in problem.model.named_parameters():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    found, start = {}, 0
    for layer, size in sizes.items():
        found[layer] = matrix[start : start + size, start : start + size]
        start += size
    return found


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("case", ["mlp-tanh", "preresnet-eval"])
def test_both_ends_of_every_layer(case, kind):
    operator = CASES[case]().operator(kind)
    found = layer_eigenpairs(operator, which="both", tol=1e-4)
    expected = blocks(case, kind)
    assert list(found) == list(expected)
    for layer, pairs in found.items():
        values = torch.linalg.eigvalsh(expected[layer])
        ends = torch.stack([values[-1], values[0]])
        assert pairs.converged
        assert ((pairs.values - ends).abs() <= pairs.residuals + 1e-12).all()
    assert operator.num_products == 0


def starts(matrices: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Unit vectors that one generator draws for the layers in turn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        layer: torch.randn(len(matrix), dtype=matrix.dtype, generator=generator)
        for layer, matrix in matrices.items()
    }
    return {layer: vector / vector.norm() for layer, vector in drawn.items()}


@pytest.mark.parametrize("seed", [0, 5])
def test_one_step_is_the_rayleigh_quotient_of_what_the_generator_draws(seed):
    matrices = blocks("mlp-tanh", "hessian")
    operator = CASES["mlp-tanh"]().operator("hessian")
    generator = torch.Generator().manual_seed(seed)
    found = layer_eigenpairs(operator, max_steps=1, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    measures = layer_measures(operator, num_steps=1, num_probes=1, generator=generator)
    for layer, v in starts(matrices, seed).items():
        pairs = found[layer]
        quotient = v @ matrices[layer] @ v
        residual = (matrices[layer] @ v - quotient * v).norm()
        assert (pairs.num_products, pairs.converged) == (1, False)
        torch.testing.assert_close(pairs.values, quotient[None], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(pairs.residuals, residual[None], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(measures[layer].nodes, quotient[None], rtol=1e-10, atol=1e-13)


def test_steps_are_at_most_those_allowed_and_no_more_than_a_layer_has_parameters():
    operator = CASES["mlp-tanh"]().operator("hessian")
    matrices = blocks("mlp-tanh", "hessian")
    for most in (3, 1000):
        found = layer_eigenpairs(operator, tol=1e-12, max_steps=most)
        for layer, pairs in found.items():
            assert pairs.num_products <= min(most, len(matrices[layer]))
            assert pairs.converged == (most == 1000)
    with pytest.raises(ValueError, match="max_steps must be at least the 2 pairs asked for, got 1"):
        layer_eigenpairs(operator, k=2, max_steps=1)


def test_layers_smaller_than_asked_give_what_they_have():
    operator = CASES["mlp-tanh"]().operator("hessian")
    found = layer_eigenpairs(operator, k=10, tol=1e-6)
    assert [len(pairs.values) for pairs in found.values()] == [10, 10, 10]
    both = layer_eigenpairs(CASES["softmax"]().operator("hessian"), k=10, which="both")
    assert [len(pairs.values) for pairs in both.values()] == [14]


def test_measures_have_the_moments_of_the_blocks():
    operator = CASES["mlp-tanh"]().operator("hessian")
    found = layer_measures(operator, num_steps=6, num_probes=30)
    for layer, matrix in blocks("mlp-tanh", "hessian").items():
        measure = found[layer]
        error = 5 * measure.mean_stderr
        assert abs(measure.mean - float(matrix.trace() / len(matrix))) < error
        square = float((matrix @ matrix).trace() / len(matrix))
        assert abs(measure.second_moment - square) < 5 * measure.second_moment_stderr


def test_more_steps_than_a_layer_has_parameters():
    found = layer_measures(CASES["softmax"]().operator("hessian"), num_steps=100, num_probes=1)
    assert all(len(measure.nodes) <= 15 for measure in found.values())


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        layer_measures(CASES["softmax"]().operator("hessian"), num_steps=0, num_probes=1)
