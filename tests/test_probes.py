"""Batch sharpness against dense Hessians by plain autograd, and what it leaves untouched."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import reference
from batchlr import supervised
from batchlr.learning_rates import max_sgd_lr
from batchlr.probes import BatchSharpness, batch_sharpness
from cases import CASES, Problem, conv_net

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


def measure(problem, **options):
    loss_fn = supervised(problem.criterion)
    if problem.norm_mode is not None:
        options = {"norm_mode": problem.norm_mode} | options
    return batch_sharpness(problem.model, loss_fn, problem.batches, **options)


def one_batch(problem, pair):
    """The problem with this batch alone."""
    return Problem(problem.model, problem.criterion, [pair], problem.norm_mode, problem.form)


def dense_terms(problem):
    """``g'Hg`` and ``|g|^2`` ``(K,)`` of each batch."""
    terms = []
    for pair in problem.pairs:
        alone = one_batch(problem, pair)
        gradient, hessian = reference.gradients(alone)[0], reference.dense_hessian(alone)
        terms.append((float(gradient @ hessian @ gradient), float(gradient @ gradient)))
    return np.array(terms).T


@pytest.mark.parametrize("case", ["mlp-tanh", "norms-train", "norms-eval", "tied", "frozen"])
def test_sharpness_is_that_of_the_batches_dense_hessians(case):
    problem = CASES[case]()
    curvatures, squares = dense_terms(problem)
    sharpness = measure(problem)
    count = len(problem.pairs)
    # Both sides sum the same float64 numbers in another order.
    assert sharpness.value == pytest.approx(curvatures.sum() / squares.sum(), rel=1e-10)
    assert sharpness.mean_ratio == pytest.approx((curvatures / squares).mean(), rel=1e-10)
    error = (curvatures / squares).std(ddof=1) / math.sqrt(count)
    assert sharpness.mean_ratio.stderr == pytest.approx(error, rel=1e-8)
    total = sum(len(x) for x, _ in problem.pairs)
    assert sharpness.batch_size == round(total / count)
    assert (sharpness.num_batches, sharpness.num_products) == (count, count)


class Line(nn.Module):
    """A weight per coordinate; a batch is its own diagonal Hessian."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, diagonal):
        return 0.5 * (diagonal.mean(0) * self.weights.square()).sum()


def line_sharpness(diagonals, weights=(1.0, 1.0)):
    model = Line(list(weights))
    batches = [torch.as_tensor(d, dtype=torch.float64).unsqueeze(0) for d in diagonals]
    return batch_sharpness(model, lambda m, b: m(b), batches)


def test_on_a_known_quadratic_both_ratios_are_closed_forms():
    sharpness = line_sharpness([(1.0, 1.0), (2.0, 4.0)])
    # g = d w, g'Hg = sum d^3, |g|^2 = sum d^2 at w = 1.
    assert sharpness.value == pytest.approx((2 + 72) / (2 + 20), rel=1e-14)
    assert sharpness.mean_ratio == pytest.approx((1 + 72 / 20) / 2, rel=1e-14)


def test_standard_errors_are_the_scatter_of_repeated_measurements():
    rng = np.random.default_rng(0)
    draws = [line_sharpness(rng.gamma(4.0, size=(30, 2))) for _ in range(80)]
    for name in ("value", "mean_ratio"):
        numbers = [getattr(draw, name) for draw in draws]
        claimed = math.sqrt(np.mean([number.stderr**2 for number in numbers]))
        # A standard deviation from 80 draws is known to 8 %; the delta method at 30 to 7 % more.
        assert claimed == pytest.approx(np.std(numbers, ddof=1), rel=0.25)


def test_a_single_batch_has_no_error():
    sharpness = line_sharpness([(2.0, 2.0)])
    assert (float(sharpness.value), float(sharpness.mean_ratio)) == pytest.approx((2.0, 2.0))
    assert math.isnan(sharpness.value.stderr)
    assert math.isnan(sharpness.mean_ratio.stderr)


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4) for n in sizes]


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_bit_identical(norm_mode, training):
    model = conv_net().train(training)
    batches = images(6, 6)
    CROSS_ENTROPY(model, batches[0]).backward()

    def everything():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return (
            {name: t.detach().numpy().tobytes() for name, t in tensors.items()},
            {name: p.grad.numpy().tobytes() for name, p in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
            torch.get_rng_state().numpy().tobytes(),
        )

    before = everything()
    with torch.no_grad():  # as a user's evaluation loop might
        sharpness = batch_sharpness(model, CROSS_ENTROPY, batches, norm_mode=norm_mode)
    assert math.isfinite(sharpness.value)
    assert everything() == before


def test_dropout_masks_differ_between_batches_and_come_from_the_generator():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4))
    twice = [(torch.ones(5, 8), torch.arange(5) % 4)] * 2
    sharpness = batch_sharpness(model, CROSS_ENTROPY, twice)
    assert sharpness.mean_ratio.stderr > 1e-3 * sharpness.mean_ratio  # one mask would give 0
    assert batch_sharpness(model, CROSS_ENTROPY, twice) == sharpness
    seeded = torch.Generator().manual_seed(5)
    assert batch_sharpness(model, CROSS_ENTROPY, twice, generator=seeded) != sharpness


def test_edge_rates_are_two_over_sharpness_with_momentum_against_and_for():
    sharpness = line_sharpness([(4.0, 4.0), (4.0, 4.0)])
    assert sharpness.edge_lr() == pytest.approx((0.5, 0.5))
    assert sharpness.edge_lr(0.9) == pytest.approx((0.05, 0.95))
    assert sharpness.edge_lr(momentum=0.9)[1] == max_sgd_lr(4.0, momentum=0.9)


def test_edge_rates_need_positive_sharpness_and_a_legal_momentum():
    sharpness = line_sharpness([(-4.0, -4.0)])
    with pytest.raises(ValueError, match=r"largest must be positive and finite, got -4.0: there"):
        sharpness.edge_lr()
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        line_sharpness([(4.0, 4.0)]).edge_lr(1.0)


def test_a_gradient_of_zero_or_beyond_numbers_is_an_arithmetic_error():
    with pytest.raises(ArithmeticError, match="batch 1 has gradient norm 0 and g'Hg 0; sharpness"):
        line_sharpness([(1.0, 1.0), (0.0, 0.0)])
    with pytest.raises(ArithmeticError, match="batch 0 has gradient norm nan and g'Hg nan; sharp"):
        line_sharpness([(math.nan, 1.0)])
    with pytest.raises(ArithmeticError, match="needs a finite product and a gradient that is fin"):
        line_sharpness([(1e200, 1.0)])


def test_batches_are_a_list_of_at_least_one():
    with pytest.raises(TypeError, match="batches must be a list of batches, got one tuple"):
        batch_sharpness(conv_net(), CROSS_ENTROPY, images(4)[0])
    with pytest.raises(ValueError, match="batches is empty; pass at least one batch"):
        batch_sharpness(conv_net(), CROSS_ENTROPY, [])


def test_the_result_is_frozen():
    sharpness = line_sharpness([(1.0, 1.0)])
    assert isinstance(sharpness, BatchSharpness)
    with pytest.raises(AttributeError, match="cannot assign"):
        sharpness.value = 1.0
