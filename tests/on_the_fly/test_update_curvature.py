"""Slope and curvature are those along the step the optimizer really makes."""

import copy
import math

import pytest
import torch
from torch import nn

from batchlr.on_the_fly.update_curvature import (
    CdatEdge,
    UpdateCurvature,
    trial_step,
    update_curvature,
)
from batchlr.operators import HessianOperator, supervised

MSE = supervised(nn.MSELoss())
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "heavy ball": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "nesterov, foreach": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "foreach": True},
    ),
    "adam": (torch.optim.Adam, {"eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {}),
}


def problem(name, steps, lr=0.01, ratio=1.0):
    """A linear regression after some steps; model, optimizer, batches and the dense Hessian."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 1, bias=False, dtype=torch.float64), nn.Linear(1, 1, dtype=torch.float64)
    )
    kind, options = OPTIMIZERS[name]
    groups = [
        {"params": model[0].parameters(), "lr": lr},
        {"params": model[1].parameters(), "lr": lr * ratio},
    ]
    optimizer = kind(groups, lr=lr, **options)
    for _ in range(steps):
        descend(model, optimizer, (x, y))
    return model, optimizer, list(zip(x.split(8), y.split(8), strict=True)), (x, y)


def descend(model, optimizer, batch):
    optimizer.zero_grad()
    MSE(model, batch).backward()
    optimizer.step()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_the_trial_step_is_the_next_step_and_touches_nothing(name, steps, ratio):
    model, optimizer, _, whole = problem(name, steps, ratio=ratio)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loss = MSE(model, whole)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, model.parameters())])
    kept = gradient.clone()
    step = trial_step(model, optimizer, gradient)
    assert torch.equal(gradient, kept)
    after = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert str(after) == str(before)
    start = flat(model)
    descend(model, optimizer, whole)
    assert 0.01 * step == pytest.approx(flat(model) - start, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slope_and_curvature_are_derivatives_along_the_step(name):
    model, optimizer, batches, whole = problem(name, 3)
    found = update_curvature(model, HessianOperator(model, MSE, batches), optimizer)
    loss = MSE(model, whole)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, model.parameters())])
    step = trial_step(model, optimizer, gradient)
    start = flat(model)

    def along(rate):
        torch.nn.utils.vector_to_parameters(start + rate * step, model.parameters())
        return MSE(model, whole)

    h = 1e-4 / float(step.norm())
    lower, here, upper = (float(along(rate).detach()) for rate in (-h, 0.0, h))
    assert found.loss == pytest.approx(here)
    assert found.slope == pytest.approx((upper - lower) / (2 * h), rel=1e-6)
    assert found.curvature == pytest.approx((upper - 2 * here + lower) / h**2, rel=1e-4)
    assert found.square == pytest.approx(float(step.square().sum()))
    assert (found.num_samples, found.num_products) == (32, 1)


def test_the_edge_leaves_a_quadratic_loss_where_it_was():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(64, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rate = CdatEdge().update(
        update_curvature(model, HessianOperator(model, MSE, [(x, y)]), optimizer)
    )
    before = float(MSE(model, (x, y)).detach())
    optimizer.param_groups[0]["lr"] = rate
    descend(model, optimizer, (x, y))
    assert float(MSE(model, (x, y)).detach()) == pytest.approx(before, rel=1e-12)


def found(slope, curvature):
    return UpdateCurvature(slope, curvature, 1.0, 1.0, 8, 1)


def test_both_parts_are_averaged_and_signs_are_as_published():
    edge = CdatEdge()
    assert edge.update(found(-3.0, 2.0)) == pytest.approx(3.0)
    assert edge.update(found(5.0, -4.0)) == pytest.approx(2 * 0.9 * 3.0 / (0.9 * 2.0 + 0.1 * 4.0))
    again = CdatEdge()
    again.load_state_dict(edge.state_dict())
    assert again == edge


@pytest.mark.parametrize(("slope", "curvature"), [(1.0, 1.0), (-1.0, 0.0)])
def test_without_descent_or_curvature_there_is_no_rate(slope, curvature):
    with pytest.raises(ArithmeticError, match="both must be positive to give a rate"):
        CdatEdge().update(found(slope, curvature))


def test_figures_that_are_not_finite_are_refused():
    model, optimizer, batches, _ = problem("sgd", 0)
    with torch.no_grad():
        model[0].weight.fill_(math.inf)
    with pytest.raises(ArithmeticError, match="finite"):
        update_curvature(model, HessianOperator(model, MSE, batches), optimizer)
