"""Averages as rates: against explicit covariances, simulation by torch, and exact replays."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchlr.averaging import (
    ExponentialAverage,
    UniformAverage,
    effective_lr,
    schedule_from_weights,
    stationary_variance,
    weights_from_schedule,
)

AVERAGES = [
    ExponentialAverage(0.0),
    ExponentialAverage(0.9),
    UniformAverage(1),
    UniformAverage(10),
    UniformAverage(5, spacing=7),
    UniformAverage(2, spacing=30),
]
names = pytest.mark.parametrize("averaging", AVERAGES, ids=str)


def test_the_variance_is_that_a_step_leaves_as_it_is():
    for step in (0.01, 0.3, 1.7):
        variance = stationary_variance(step)
        assert (1 - step) ** 2 * variance + step**2 == pytest.approx(variance, rel=1e-14)


@names
@pytest.mark.parametrize("step", [0.02, 0.2, 1.0, 1.6])
def test_variances_are_those_of_the_explicit_covariance(averaging, step):
    weights = np.array(averaging.weights(3000))
    ages = np.arange(len(weights))
    if step == 1.0:  # 0^0 is 1: independent iterates
        covariance = np.eye(len(weights)) * stationary_variance(step)
    else:
        lags = np.abs(np.subtract.outer(ages, ages))
        covariance = stationary_variance(step) * (1 - step) ** lags
    assert averaging.variance(step) == pytest.approx(weights @ covariance @ weights, rel=1e-9)


@pytest.mark.parametrize(
    ("averaging", "variance", "lr"),
    [
        (UniformAverage(2, spacing=1000), 0.0555556, 0.1052632),
        (UniformAverage(2, spacing=10), 0.0615208, None),
        (ExponentialAverage(0.9), 0.0359231411862991, 0.0693548),
        (UniformAverage(10), 0.06032774144, 0.1137907),
    ],
    ids=str,
)
def test_known_values_at_a_step_of_a_fifth(averaging, variance, lr):
    assert averaging.variance(0.2) == pytest.approx(variance, abs=1e-7)
    if lr is not None:
        assert effective_lr(0.2, 1.0, averaging) == pytest.approx(lr, abs=1e-7)


@names
@pytest.mark.parametrize("lr", [0.003, 0.1, 0.45])
def test_the_effective_rate_scatters_as_the_average(averaging, lr):
    curvature = 4.0
    rate = effective_lr(lr, curvature, averaging)
    assert stationary_variance(rate * curvature) == pytest.approx(
        averaging.variance(lr * curvature), rel=1e-12
    )
    assert rate <= lr * (1 + 1e-12)


@pytest.mark.parametrize("step", [0.05, 0.2, 1.0])
def test_two_distant_iterates_make_nearly_half_the_rate(step):
    rate = effective_lr(step, 1.0, UniformAverage(2, spacing=2000))
    assert rate == pytest.approx(2 * step / (4 - step), rel=1e-12)


def test_rate_and_horizon_of_an_ema_are_resistors_in_parallel():
    for step, horizon in ((1e-3, 1e3), (1e-3, 1e2), (1e-4, 1e5)):
        rate = effective_lr(step, 1.0, ExponentialAverage(1 - 1 / horizon))
        assert 1 / rate == pytest.approx(1 / step + horizon, rel=0.02)  # to first order


def test_long_means_are_a_rate_of_two_over_their_length():
    assert effective_lr(0.5, 1.0, UniformAverage(10_000)) == pytest.approx(2 / 10_001, rel=1e-3)


@pytest.mark.parametrize("step", [1e-9, 1e-12, 1e-16, 1e-200])
def test_small_steps_lose_no_digits(step):
    for averaging in (UniformAverage(10), UniformAverage(10, spacing=3), ExponentialAverage(0.9)):
        assert averaging.variance(step) == pytest.approx(step / 2, rel=1e-7)  # nothing to average


def heavy_ball_variance(step, momentum):
    """Of the iterates, solved from the second moments of weight and velocity."""
    m = momentum
    move = np.array([[1 - step, -m], [step, m]])  # w' = w - v', v' = m v + step (w - c)
    noise = np.outer([step, -step], [step, -step])
    moments = np.linalg.solve(np.eye(4) - np.kron(move, move), noise.ravel())
    return moments[0]


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_is_a_larger_rate_to_first_order(momentum):
    errors = []
    for step in (0.02, 0.01):
        raised = stationary_variance(step * (1 - momentum) / (1 - momentum))
        exact = heavy_ball_variance(step * (1 - momentum), momentum)
        errors.append(abs(raised / exact - 1))
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


def test_the_rate_one_over_t_makes_the_mean_of_the_batch_minima():
    minima = np.random.default_rng(0).normal(size=30)
    weight = 7.0
    for t, minimum in enumerate(minima, 1):
        weight -= (weight - minimum) / t
    assert weight == pytest.approx(minima.mean(), rel=1e-12)


# --- replay --------------------------------------------------------------------------------------


def trained(optimizer_of, average, steps=24, first=0):
    """Weights ``(T + 1, P)`` along a run of a small network, and those averaged from ``first``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = optimizer_of(model.parameters())
    averaged = average(model)
    iterates = [parameters_to_vector(model.parameters()).detach().clone()]
    if first == 0:
        averaged.update_parameters(model)
    for step in range(1, steps + 1):
        x = torch.randn(8, 4, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        if step >= first:
            averaged.update_parameters(model)
        iterates.append(parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(iterates), parameters_to_vector(averaged.module.parameters()).detach()


def replayed(iterates, schedule):
    factors = torch.tensor(schedule, dtype=torch.float64)
    return iterates[0] + factors @ iterates.diff(dim=0)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


@optimizers
def test_torchs_ema_is_a_replay_at_its_schedule(name):
    ema = get_ema_multi_avg_fn(0.8)
    iterates, mean = trained(OPTIMIZERS[name], lambda m: AveragedModel(m, multi_avg_fn=ema))
    schedule = schedule_from_weights(ExponentialAverage(0.8).weights(24))
    # Sums of 25 weights of size 1 in another order; the run moves them by 0.1 to 1.
    torch.testing.assert_close(replayed(iterates, schedule), mean, rtol=0, atol=1e-14)
    assert schedule[:2] == pytest.approx([1 - 0.8**24, 1 - 0.8**23])


@optimizers
def test_torchs_plain_average_is_a_replay_of_linear_decay(name):
    iterates, mean = trained(OPTIMIZERS[name], AveragedModel)
    schedule = schedule_from_weights(UniformAverage(25).weights(24))
    torch.testing.assert_close(replayed(iterates, schedule), mean, rtol=0, atol=1e-14)
    assert schedule == pytest.approx([(25 - j) / 25 for j in range(1, 25)])


def test_two_points_are_a_replay_at_half_the_rate():
    iterates, _ = trained(OPTIMIZERS["sgd"], AveragedModel)
    schedule = schedule_from_weights(UniformAverage(2, spacing=10).weights(24))
    assert schedule == [1.0] * 14 + [0.5] * 10
    mean = (iterates[14] + iterates[24]) / 2
    torch.testing.assert_close(replayed(iterates, schedule), mean, rtol=0, atol=1e-14)


@optimizers
@pytest.mark.parametrize("constant", [0, 5])
def test_an_averaged_model_replays_any_decay(name, constant):
    """The recipe of docs/averaging_and_probes.md."""
    cosine = [(1 + math.cos(math.pi * t / (24 - constant))) / 2 for t in range(24 - constant)]
    schedule = [1.0] * constant + cosine
    weights = weights_from_schedule(schedule)
    first = next(n for n, weight in enumerate(weights) if weight > 0)
    weights = weights[first:]
    totals = list(itertools.accumulate(weights))

    def averaged(model):
        return AveragedModel(
            model, avg_fn=lambda mean, now, n: mean + weights[n] / totals[n] * (now - mean)
        )

    iterates, mean = trained(OPTIMIZERS[name], averaged, first=first)
    torch.testing.assert_close(replayed(iterates, schedule), mean, rtol=0, atol=1e-14)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20).filter(lambda w: sum(w) > 0.1))
def test_schedules_and_weights_undo_each_other(weights):
    weights = [w / math.fsum(weights) for w in weights]
    schedule = schedule_from_weights(weights)
    assert len(schedule) == len(weights) - 1
    assert weights_from_schedule(schedule) == pytest.approx(weights, abs=1e-12)


@names
def test_weights_are_those_of_an_average(averaging):
    weights = averaging.weights(40)
    assert len(weights) == 41
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    assert min(weights) >= 0.0
    assert weights[-1] > 0.0  # the last iterate is in all of them


# --- the caller's mistakes -----------------------------------------------------------------------


def test_steps_beyond_stability_have_no_stationary_variance():
    for step in (0.0, 2.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"step must lie in \(0, 2\), got {step}: it is"):
            stationary_variance(step)
    with pytest.raises(ValueError, match=r"step must lie in \(0, 2\), got 3.0"):
        effective_lr(1.0, 3.0, ExponentialAverage(0.9))


def test_averages_have_legal_lengths():
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\), got {decay}"):
            ExponentialAverage(decay)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        UniformAverage(0)
    with pytest.raises(ValueError, match="spacing must be at least 1, got 0"):
        UniformAverage(2, spacing=0)
    with pytest.raises(ValueError, match="num_updates must be at least 18 for this average, got 1"):
        UniformAverage(4, spacing=6).weights(17)
    with pytest.raises(ValueError, match="num_updates must be at least 0 for this average, got -1"):
        ExponentialAverage(0.9).weights(-1)


def test_weights_and_schedules_are_checked():
    with pytest.raises(ValueError, match=r"weights must be at least 0 .* -0.5 and a sum of 1.0"):
        schedule_from_weights([1.5, -0.5])
    with pytest.raises(ValueError, match=r"sum to 1, got a least one of 0.5 and a sum of 1.5"):
        schedule_from_weights([0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="weights must be at least 0 and sum to 1"):
        schedule_from_weights([])
    for schedule in ([], [0.5, 0.7], [1.2, 1.0], [0.5, -0.1], [math.nan]):
        with pytest.raises(ValueError, match="schedule must not be empty, begin at 1 or less"):
            weights_from_schedule(schedule)
