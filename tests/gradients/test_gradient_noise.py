"""Gradient moments against exact per-sample gradients, and against Adam's own average."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from batchlr.gradients.gradient_noise import (
    GradientMoments,
    gradient_moments,
    mean_gradient,
    rarely_moved,
)
from batchlr.operators import (
    HessianOperator,
    PreconditionedOperator,
    supervised,
)
from cases import BatchMatrices

LOSS = supervised(nn.CrossEntropyLoss())


def problem(num_samples, seed=0):
    """A small network with data, and its per-sample gradients ``(N, P)`` by `torch.func`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (num_samples,), generator=generator)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def loss(parameters, x_i, y_i):
        output = functional_call(model, parameters, (x_i.unsqueeze(0),))
        return nn.functional.cross_entropy(output, y_i.unsqueeze(0))

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return model, x, y, torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def cut(gradients, order, sizes):
    """What `gradient_moments` asks of an operator, from per-sample gradients in a given order."""
    groups = gradients[list(order)[: sum(sizes)]].split(list(sizes))
    return SimpleNamespace(
        weights=tuple(map(float, sizes)),
        batch_gradients=lambda: (group.mean(0) for group in groups),
    )


def close(actual, expected, rtol=1e-12):
    """To rounding, of which differences of squares have their share of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_batches_of_one_sample_give_the_exact_moments():
    model, x, y, gradients = problem(num_samples=20)
    operator = HessianOperator(model, LOSS, list(zip(x.split(1), y.split(1), strict=True)))
    moments = gradient_moments(operator)
    close(moments.variance, gradients.var(0, unbiased=True))
    close(moments.mean_square, gradients.mean(0).square())
    assert operator.num_products == 0


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 1), (3, 3), (2, 2), (2, 1), (1, 1)])
def test_the_mean_over_all_partitions_is_exact_also_for_a_part_of_the_data(sizes):
    _, _, _, gradients = problem(num_samples=6)
    estimates = [
        gradient_moments(cut(gradients, order, sizes), dataset_size=6)
        for order in itertools.permutations(range(6))
    ]
    variance = torch.stack([e.variance for e in estimates]).mean(0)
    mean_square = torch.stack([e.mean_square for e in estimates]).mean(0)
    close(variance, gradients.var(0, unbiased=True))
    close(mean_square, gradients.mean(0).square(), rtol=1e-11)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_second_moment_is_the_mean_square_of_all_batches_of_that_size(batch_size):
    _, _, _, gradients = problem(num_samples=6)
    moments = gradient_moments(cut(gradients, range(6), (2, 2, 2)))
    exact = GradientMoments(moments.mean_square, gradients.var(0, unbiased=True))
    squares = [
        gradients[list(chosen)].mean(0).square()
        for chosen in itertools.combinations(range(6), batch_size)
    ]
    effective = batch_size / (1 - batch_size / 6)
    close(exact.second_moment(effective), torch.stack(squares).mean(0))


def test_second_moment_of_the_whole_data_set_is_that_of_its_gradient():
    _, _, _, gradients = problem(num_samples=6)
    moments = gradient_moments(cut(gradients, range(6), (2, 2, 2)))
    close(moments.second_moment(math.inf), gradients.mean(0).square())


def test_second_moment_is_never_negative():
    moments = GradientMoments(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]))
    assert moments.second_moment(4.0).tolist() == [0.0, 1.5]


def test_the_centred_second_moment_is_the_variance_of_a_batch():
    _, _, _, gradients = problem(num_samples=6)
    moments = gradient_moments(cut(gradients, range(6), (1,) * 6))
    means = [gradients[list(rows)].mean(0) for rows in itertools.combinations(range(6), 2)]
    variance = torch.stack(means).var(0, unbiased=False)  # over all batches of two
    close(moments.second_moment(1 / (1 / 2 - 1 / 6), centred=True), variance)


def test_adam_s_second_moment_tends_to_it():
    model, x, y, _ = problem(num_samples=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.999))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        rows = torch.randperm(64, generator=generator)[:8]
        optimizer.zero_grad()
        LOSS(model, (x[rows], y[rows])).backward()
        optimizer.step()
    correction = 1 - 0.999**2000
    average = torch.cat(
        [optimizer.state[p]["exp_avg_sq"].reshape(-1) / correction for p in model.parameters()]
    )
    batches = [(x[k : k + 1], y[k : k + 1]) for k in range(64)]
    moments = gradient_moments(HessianOperator(model, LOSS, batches))
    expected = moments.second_moment(8 / (1 - 8 / 64))
    # About 1,100 independent squares are averaged, each about as uncertain as it is large.
    assert float((average / expected).log().abs().max()) < 4 / math.sqrt(1100) * math.sqrt(2)


def test_one_batch_is_refused():
    model, x, y, _ = problem(num_samples=6)
    with pytest.raises(ValueError, match="noise of the gradient needs at least two disjoint"):
        gradient_moments(HessianOperator(model, LOSS, [(x, y)]))


def test_batches_of_weight_zero_tell_nothing():
    model, x, y, _ = problem(num_samples=18)
    batches = list(zip(x.split(6), y.split(6), strict=True))
    ignored = x[:6], torch.full((6,), -100)
    expected = gradient_moments(HessianOperator(model, LOSS, batches))
    moments = gradient_moments(HessianOperator(model, LOSS, [batches[0], ignored, *batches[1:]]))
    close(moments.variance, 4 / 3 * expected.variance)  # a quarter of the samples does not count
    close(moments.mean_square, expected.mean_square)
    with pytest.raises(ValueError, match="needs at least two disjoint batches, got 1"):
        gradient_moments(HessianOperator(model, LOSS, [batches[0], ignored]))


def test_coordinates_are_rarely_moved_where_few_batches_have_a_gradient():
    """A weight of a linear layer moves with the batches whose inputs are not all zero there."""
    torch.manual_seed(0)
    x, y = torch.zeros(64, 5), torch.randn(64, 1)
    for column, rows in enumerate([[], [3], range(16), range(0, 64, 8), range(64)]):
        x[list(rows), column] = 1.0
    operator = HessianOperator(
        nn.Linear(5, 1, bias=False),
        supervised(nn.MSELoss()),
        list(zip(x.split(8), y.split(8), strict=True)),
    )
    # Of eight batches 0, 1, 2, 8 and 8 have a gradient; those of a twentieth would be 2.7,
    # of a hundredth 0.6.
    assert rarely_moved(operator, share=0.05).tolist() == [True, True, True, False, False]
    assert rarely_moved(operator, share=0.01).tolist() == [True, False, False, False, False]
    assert rarely_moved(operator, share=0.0).tolist() == [True, False, False, False, False]


def test_of_unlike_batches_the_larger_are_the_more_likely_to_have_a_gradient():
    x = torch.zeros(64, 2)
    x[0, 0] = x[63, 1] = 1.0
    y = torch.ones(64, 1)
    sizes = (2, 2, 60)
    operator = HessianOperator(
        nn.Linear(2, 1, bias=False),
        supervised(nn.MSELoss()),
        list(zip(x.split(sizes), y.split(sizes), strict=True)),
    )
    # One batch of three each; of a fiftieth of the samples 0.04 + 0.04 + 0.70 = 0.78 would have.
    assert rarely_moved(operator, share=0.02).tolist() == [False, False]
    assert rarely_moved(operator, share=0.05).tolist() == [True, True]  # 0.10 + 0.10 + 0.95


def test_what_every_batch_moves_is_not_rare_however_large_they_are():
    x, y = torch.ones(2048, 2), torch.ones(2048, 1)
    x[1:, 0] = 0.0
    batches = list(zip(x.split(512), y.split(512), strict=True))
    operator = HessianOperator(nn.Linear(2, 1, bias=False), supervised(nn.MSELoss()), batches)
    assert rarely_moved(operator, share=0.05).tolist() == [True, False]


def test_batches_whose_targets_are_all_ignored_tell_nothing_of_rarity():
    torch.manual_seed(0)
    x, y = torch.ones(32, 1), torch.full((32,), -100)
    y[:8] = 1  # two of eight batches count
    batches = list(zip(x.split(4), y.split(4), strict=True))
    operator = HessianOperator(nn.Linear(1, 2), supervised(nn.CrossEntropyLoss()), batches)
    assert not any(operator.weights[2:])
    assert not rarely_moved(operator, share=0.05).any()


def test_the_mean_gradient_is_that_of_the_operator_s_coordinates():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 2), supervised(nn.MSELoss())
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    operator = HessianOperator(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    loss = nn.functional.mse_loss(model(x), y)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(mean_gradient(operator), expected)
    scale = torch.arange(8.0)
    scaled = PreconditionedOperator(operator, scale)
    torch.testing.assert_close(mean_gradient(scaled), scale * expected)


def test_only_a_model_has_a_gradient():
    scaled = PreconditionedOperator(BatchMatrices(torch.eye(2).unsqueeze(0), [1]), torch.ones(2))
    with pytest.raises(TypeError, match=r"only a model's curvature matrix.*BatchMatrices"):
        mean_gradient(scaled)
