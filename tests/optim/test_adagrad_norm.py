"""AdaGrad-Norm against its definition, and what the published code makes of it."""

import math

import pytest
import torch
from torch import nn

from batchlr import AdaGradNorm, BatchAwareLR, CurvatureController, supervised


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    return model, lambda: nn.functional.mse_loss(model(x), y)


def vector(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_it_is_its_definition_over_all_parameters(weight_decay):
    model, loss = problem()
    parameters = list(model.parameters())
    optimizer = AdaGradNorm(
        [{"params": parameters[:1]}, {"params": parameters[1:]}], 0.5, weight_decay=weight_decay
    )
    weights, accumulator = vector(parameters), 1e-2
    for _ in range(5):
        gradient = vector(torch.autograd.grad(loss(), parameters)) + weight_decay * weights
        accumulator += float(gradient.square().sum())
        weights = weights - 0.5 * gradient / math.sqrt(accumulator)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        torch.testing.assert_close(vector(parameters), weights, rtol=1e-12, atol=1e-12)


def test_splitting_a_parameter_changes_nothing():
    """The published one keeps an accumulator for each row of a weight."""
    values, gradient = torch.randn(6, 3), torch.randn(6, 3)
    whole = nn.Parameter(values.clone())
    rows = [nn.Parameter(row.clone()) for row in values]
    whole.grad = gradient.clone()
    for row, own in zip(rows, gradient, strict=True):
        row.grad = own.clone()
    AdaGradNorm([whole]).step()
    AdaGradNorm(rows).step()
    torch.testing.assert_close(whole.detach(), torch.stack(rows).detach())


def test_groups_have_rates_of_their_own():
    left, right = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    left.grad, right.grad = torch.tensor([3.0]), torch.tensor([4.0])
    groups = [{"params": [left], "lr": 1.0}, {"params": [right], "lr": 0.1}]
    AdaGradNorm(groups, initial_accumulator=1e-12).step()
    assert [left.item(), right.item()] == pytest.approx([-3 / 5, -0.4 / 5])


def test_a_restored_one_goes_on_as_the_first(tmp_path):
    model, loss = problem()
    optimizer = AdaGradNorm(model.parameters(), 0.5)
    scheduler = BatchAwareLR(optimizer, peak=0.5, batch_size=16)
    for step in range(6):
        if step == 3:
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    other, other_loss = problem()
    again = AdaGradNorm(other.parameters(), 7.0)
    weights, kept = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(kept)
    for _ in range(3):
        again.zero_grad()
        other_loss().backward()
        again.step()
    assert torch.equal(vector(other.parameters()), vector(model.parameters()))


def test_a_step_without_gradients_does_nothing():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdaGradNorm([weight])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert weight.tolist() == [1.0, 1.0]
    assert float(optimizer.param_groups[0]["accumulator"]) == 1e-2


def test_half_precision_keeps_its_type():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight.grad = torch.ones(4, dtype=torch.bfloat16)
    AdaGradNorm([weight], initial_accumulator=12.0).step()
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [0.75] * 4


def test_no_limit_is_known_for_it():
    model, _ = problem()
    optimizer = AdaGradNorm(model.parameters())
    scheduler = BatchAwareLR(optimizer, peak=1.0)
    with pytest.raises(ValueError, match="known for SGD, Adam, AdamW and RMSprop, got AdaGradNorm"):
        CurvatureController(scheduler, supervised(nn.MSELoss()), batch_size=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, r"lr must be finite and at least 0, got -1\.0"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and at least 0, got inf"),
        ({"initial_accumulator": 0.0}, r"initial_accumulator must be positive .* got 0\.0"),
    ],
)
def test_illegal_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AdaGradNorm([nn.Parameter(torch.zeros(1))], **options)


def test_a_grad_scaler_leaves_out_what_would_never_leave_the_accumulator():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = AdaGradNorm([weight], initial_accumulator=11.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in [(math.inf, [3.0, 4.0]), (1.0, [2.5, 10 / 3])]:
        optimizer.zero_grad()
        scaler.scale(factor * weight.square().sum() / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == pytest.approx(expected)
    weight.grad = torch.tensor([math.inf, 0.0])
    optimizer.step()
    weight.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert weight[0].isnan()
    assert math.isinf(float(optimizer.param_groups[0]["accumulator"]))
