"""The rate that training survives, searched where it is known."""

import copy
import math

import pytest
import torch
from torch import nn

from batchlr.operators import supervised
from batchlr.training.survival import largest_survivable_lr

HALVINGS = 2 ** (1 / 4)  # what the two halvings leave of a factor of two
MSE = supervised(nn.MSELoss())


def linear(curvatures=(4.0, 1.0)):
    """A linear model whose mean squared loss has the Hessian ``diag(curvatures)``."""
    count = len(curvatures)
    x = torch.diag(torch.tensor(curvatures, dtype=torch.float64).mul(count / 2).sqrt())
    model = nn.Linear(count, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model, (x, torch.zeros(count, 1, dtype=torch.float64))


def survivable(**changes):
    model, samples = linear()
    options = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "batch_size": 2,
        "start": 0.5,
        "steps": 60,
        "worst_loss": 0.0,  # growth alone is divergence; by default only what overflows is
    }
    return largest_survivable_lr(model, MSE, samples, **options | changes)


@pytest.mark.parametrize("start", [1e-2, 0.1, 0.49, 0.51, 0.7, 30.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_a_quadratic_it_is_the_limit_known(start, momentum):
    """``2 (1 + m) / lambda_1`` in full batches (Polyak 1964), from either side."""
    limit = 2 * (1 + momentum) / 4.0
    found = survivable(start=start, momentum=momentum, steps=150)
    # In 150 steps a rate 1 % beyond grows by 1.02^240 and more, one 0.1 % beyond hardly does.
    assert found.lr <= 1.01 * limit
    assert limit <= 1.01 * found.diverged
    assert found.diverged / found.lr == pytest.approx(HALVINGS, rel=1e-12)
    steps = abs(math.log2(limit / start))
    assert found.runs <= math.ceil(steps) + 1 + 2 + 1


def test_adam_s_limit_is_searched_with_adam():
    """Far above it leaves the region of small losses; far below it stays."""
    found = survivable(optimizer="adam", momentum=0.9, start=0.1)
    assert 0 < found.lr < found.diverged
    assert found.diverged / found.lr == pytest.approx(HALVINGS, rel=1e-12)


def test_the_first_answer_is_within_the_factor_of_the_start():
    """Rates tried are powers of ``2^(1/4)`` from the start."""
    found = survivable(start=0.3)
    power = 4 * math.log2(found.lr / 0.3)
    assert power == pytest.approx(round(power), abs=1e-9)


def test_a_rate_that_nothing_bounds_is_told():
    """Without a gradient no rate diverges: twelve doublings are tried."""
    model, (x, y) = linear()
    found = largest_survivable_lr(
        model,
        lambda m, batch: 0 * MSE(m, batch),
        (x, y),
        optimizer="sgd",
        momentum=0.0,
        batch_size=2,
        start=1.0,
        steps=5,
    )
    assert found == (2.0**12, math.inf, 13)


def test_divergence_everywhere_is_an_error():
    def loss(model, batch):
        return MSE(model, batch) * math.nan

    model, samples = linear()
    with pytest.raises(
        ArithmeticError, match=r"training diverges at every rate from 0\.5 down to 0\.000122"
    ):
        largest_survivable_lr(
            model, loss, samples, optimizer="sgd", momentum=0.0, batch_size=2, start=0.5, steps=5
        )


@pytest.mark.parametrize("batch_size", [0, 3, -1])
def test_a_batch_that_the_samples_cannot_fill_is_refused(batch_size):
    with pytest.raises(
        ValueError,
        match=rf"batch_size must lie in \[1, 2\], the number of samples, got {batch_size}",
    ):
        survivable(batch_size=batch_size)


def test_a_loss_below_the_worst_is_no_divergence():
    """Above the limit the quadratic grows; where the guess is worse than that it may."""
    strict = survivable(start=0.5, steps=20)
    lenient = survivable(start=0.5, steps=20, worst_loss=1e6)
    # In 20 steps |1 - 4 lr|^40 may grow to 1e6 / 2.5: by a factor of 1.38 a step.
    assert strict.lr == pytest.approx(0.5, rel=0.2)
    assert 0.5 < lenient.lr < 0.7
    assert survivable(steps=20, worst_loss=math.inf).lr >= lenient.lr


def test_model_and_random_state_are_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    samples = (torch.randn(12, 4), torch.randn(12, 1))
    model.train()
    MSE(model, samples).backward()
    kept = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    largest_survivable_lr(
        model, MSE, samples, optimizer="adam", momentum=0.9, batch_size=4, start=0.1, steps=10
    )
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_every_run_sees_the_same_batches_of_an_epoch_without_replacement():
    model, _ = linear((1.0,) * 6)
    seen = []

    def loss(twin, batch):
        seen.append(batch[0][:, 0].tolist())
        return MSE(twin, batch)

    x = torch.arange(6, dtype=torch.float64)[:, None].repeat(1, 6) / 6
    samples = (x, torch.zeros(6, 1, dtype=torch.float64))
    options = {"optimizer": "sgd", "momentum": 0.0, "batch_size": 2, "start": 1e-3, "steps": 6}
    found = largest_survivable_lr(model, loss, samples, **options, seed=1)
    runs = [seen[:6], seen[6:12]]
    assert runs[0] == runs[1]
    for epoch in (runs[0][:3], runs[0][3:]):
        assert sorted(row for batch in epoch for row in batch) == samples[0][:, 0].tolist()
    again = largest_survivable_lr(model, loss, samples, **options, seed=1)
    assert again == found
