"""When the controller measures, what it applies, and that it leaves everything else alone."""

import copy
import io
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from batchlr.controller import CurvatureController
from batchlr.curvature import track_curvature
from batchlr.learning_rates import balanced_momentum, heavy_ball, max_sgd_lr
from batchlr.measurement.optimizer_state import get_momentum
from batchlr.on_the_fly.learned_step_size import learn_step_size
from batchlr.on_the_fly.rate_filter import RateFilter
from batchlr.on_the_fly.update_curvature import CdatEdge, update_curvature
from batchlr.operators import HessianOperator, supervised
from batchlr.policies import POLICIES
from batchlr.schedulers import BatchAwareLR
from batchlr.tracker import CurvatureTracker

MSE = supervised(nn.MSELoss())
CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())
BATCH = 16


def controller_of(scheduler, loss_fn, **options):
    """A controller that applies the limit at once, up and down, unless told otherwise."""
    return CurvatureController(scheduler, loss_fn, **{"start": 1.0, "drop": 0.0} | options)


def linear_problem(kind=torch.optim.SGD, shape=None, **options):
    """Linear regression in 6 dimensions: model, optimizer, scheduler and 4 batches of 32."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([2.0, 1.0, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
    x = torch.randn(128, 6, generator=generator, dtype=torch.float64) * scales
    y = torch.randn(128, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = kind(model.parameters(), lr=1.0, **options)
    scheduler = BatchAwareLR(optimizer, 1.0, shape, batch_size=BATCH)
    return model, optimizer, scheduler, list(zip(x.split(32), y.split(32), strict=True))


def step(model, optimizer, scheduler, batch, loss_fn=MSE):
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()
    scheduler.step()


def updates_of(controller, problem, steps):
    """What `maybe_update` returned in a correct loop of ``steps`` steps, nothing left out."""
    model, optimizer, scheduler, batches = problem
    updates = []
    for k in range(steps):
        updates.append(controller.maybe_update(model, batches))
        step(model, optimizer, scheduler, batches[k % len(batches)])
    return updates


def dense_hessians(batches):
    """``2 x^T x / n`` ``(K, 7, 7)`` of each batch, the bias included."""
    x = torch.stack([batch[0] for batch in batches])
    x = torch.cat([x, torch.ones(*x.shape[:2], 1, dtype=x.dtype)], dim=2)
    return 2 * x.transpose(1, 2) @ x / x.shape[1]


def second_moment_radius(batches, lr, momentum, weight_decay):
    """Growth per step of all second moments of weight and velocity at batch size 16 of 128."""
    hessians = dense_hessians(batches).numpy()
    size, unit = 7, np.eye(7)
    mean = hessians.mean(0) + weight_decay * unit
    deviations = hessians - hessians.mean(0)
    step = np.block([[unit - lr * mean, -lr * momentum * unit], [mean, momentum * unit]])
    total = np.kron(step, step)
    for deviation in deviations:
        moved = np.zeros((2 * size, 2 * size))
        moved[:size, :size], moved[size:, :size] = -lr * deviation, deviation
        total += 32 / (len(hessians) - 1) * (1 / BATCH - 1 / 128) * np.kron(moved, moved)
    return np.abs(np.linalg.eigvals(total)).max()


# --- what is applied -----------------------------------------------------------------------------


@pytest.mark.parametrize("safety", [1.0, 0.4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_first_peak_is_safety_times_the_limit(safety, momentum):
    problem = linear_problem(momentum=momentum, weight_decay=0.01)
    model, optimizer, scheduler, batches = problem
    options = {"safety": safety, "dataset_size": 128, "tol": 1e-6, "policy": "mean_square"}
    controller = controller_of(scheduler, MSE, **options)
    update = controller.maybe_update(model, batches)
    largest = float(torch.linalg.eigvalsh(dense_hessians(batches).mean(0))[-1])
    want = update.report.max_lr(BATCH, momentum=momentum, rule="top-direction").value
    assert update.bound.value == want
    noise = update.report.noise.total * (1 / BATCH - 1 / 128) / largest
    closed = max_sgd_lr(largest, noise, momentum=momentum, weight_decay=0.01)
    assert want == pytest.approx(closed, rel=1e-6)
    assert scheduler.peak == pytest.approx(safety * want, rel=1e-9)
    assert optimizer.param_groups[0]["lr"] == scheduler.peak == update.peak
    assert update.largest_eigenvalue == pytest.approx(largest, rel=1e-9)
    assert math.isnan(update.smallest_eigenvalue)  # it is not looked for
    assert (update.step, update.momentum, update.failure) == (0, momentum, None)
    assert update.bound.batch_size == BATCH


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_edge_is_the_limit_of_a_batch_twice_as_large(kind):
    model, _, scheduler, batches = linear_problem(kind)
    controller = controller_of(scheduler, MSE, dataset_size=128, policy="edge", rollback=False)
    update = controller.maybe_update(model, batches)
    want = update.report.max_lr(2 * BATCH, optimizer=update.bound.optimizer, rule="top-direction")
    assert update.bound == replace(want, batch_size=BATCH)
    cautious = update.report.max_lr(BATCH, optimizer=want.optimizer, rule="top-direction")
    assert cautious.value < update.peak == pytest.approx(want.value, rel=1e-12)


def test_until_the_loss_has_settled_the_edge_is_the_mean_square_limit():
    model, optimizer, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, every_steps=1, dataset_size=128, policy="edge")
    sizes = []
    for loss in (2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0):
        update = controller.maybe_update(model, batches)
        limits = [update.report.max_lr(k * BATCH, rule="top-direction").value for k in (1, 2)]
        sizes.append(1 + limits.index(update.bound.value))
        optimizer.zero_grad()
        MSE(model, batches[0]).backward()
        controller.observe(torch.tensor(loss))
    assert sizes == [1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("rollback", [True, False])
@pytest.mark.parametrize(
    ("jump", "allowance"), [([9.0] * 10, 1), ([1.0] * 10, 2)], ids=["jump", "quiet"]
)
def test_an_edge_that_was_not_borne_is_the_mean_square_limit_from_then_on(
    jump, allowance, rollback
):
    model, optimizer, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, dataset_size=128, policy="edge", rollback=rollback)
    controller.maybe_update(model, batches)
    optimizer.zero_grad()
    MSE(model, batches[0]).backward()
    for loss in [2.0] * 10 + [1.0] * 40 + jump + [1.0] * 40:
        controller.observe(torch.tensor(loss))
    controller.every_steps = 1
    update = controller.maybe_update(model, batches)
    want = update.report.max_lr(allowance * BATCH, rule="top-direction").value
    assert update.bound.value == pytest.approx(want, rel=1e-12)


def test_the_edge_of_large_batches_is_that_of_the_full_batch():
    model, optimizer, _, batches = linear_problem()
    scheduler = BatchAwareLR(optimizer, 1.0, batch_size=100)
    controller = controller_of(scheduler, MSE, dataset_size=128, policy="edge", rollback=False)
    update = controller.maybe_update(model, batches)
    assert update.bound.value == update.report.max_lr(128, rule="top-direction").value


def test_the_shape_goes_on_under_the_new_peak():
    problem = linear_problem(momentum=0.9, shape=lambda o: CosineAnnealingLR(o, 10))
    controller = controller_of(problem[2], MSE)
    updates_of(controller, problem, 5)
    _, optimizer, scheduler, _ = problem
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * scheduler.peak, rel=1e-12)


def test_adam_is_measured_in_its_own_metric():
    problem = linear_problem(torch.optim.Adam, betas=(0.8, 0.99))
    controller = controller_of(problem[2], MSE, tol=1e-6)
    first, *_, last = [u for u in updates_of(controller, problem, 9) if u is not None]
    assert first.report.adam.source == "gradients"
    assert last.report.adam.source == "state"
    for update in (first, last):
        assert (update.bound.optimizer, update.bound.momentum) == ("adam", 0.8)
        assert update.largest_eigenvalue == update.report.adam.largest
        assert update.momentum == 0.8
    assert first.peak == pytest.approx(
        first.report.max_lr(BATCH, optimizer="adam", momentum=0.8, rule="top-direction").value,
        rel=1e-12,
    )


def test_rmsprop_gets_the_rate_of_its_own_law():
    problem = linear_problem(torch.optim.RMSprop, momentum=0.5)
    controller = controller_of(problem[2], MSE, tol=1e-6)
    first = updates_of(controller, problem, 3)[0]
    assert (first.bound.optimizer, first.bound.momentum, first.momentum) == ("rmsprop", 0.5, 0.5)
    assert first.largest_eigenvalue == first.report.adam.largest
    adam = first.report.max_lr(BATCH, optimizer="adam", momentum=0.5, rule="top-direction")
    assert first.peak == pytest.approx(0.5 * adam.value, rel=1e-12)  # 1 - momentum


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 1e3])
def test_active_clipping_is_a_reason_for_distrust(clip_norm):
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, clip_norm=clip_norm)
    update = controller.maybe_update(model, batches)
    clipped = [reason for reason in update.bound.reasons if "clipping" in reason]
    assert len(clipped) == (clip_norm == 1e-3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_adjusting_momentum_balances_noise_and_curvature(kind):
    problem = linear_problem(kind)
    model, optimizer, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, adjust_momentum=True)
    update = controller.maybe_update(model, batches)
    part = update.report.adam or update.report
    variance = (update.report.adam or update.report.noise).total
    inverse = update.report.inverse_effective_batch_size(BATCH)
    want = balanced_momentum(part.largest, variance * inverse / part.largest)
    assert 0 < want < 0.95
    assert get_momentum(optimizer) == update.momentum == update.bound.momentum == want
    if kind is torch.optim.Adam:
        assert optimizer.param_groups[0]["betas"] == (want, 0.999)
    assert scheduler.peak == pytest.approx(update.bound.value, rel=1e-12)


def test_momentum_is_left_alone_by_default():
    problem = linear_problem(momentum=0.3)
    controller = controller_of(problem[2], MSE)
    updates_of(controller, problem, 3)
    assert get_momentum(problem[1]) == 0.3


def test_get_momentum_of_an_optimizer_without_one():
    weight = nn.Parameter(torch.ones(1))
    assert get_momentum(torch.optim.Adagrad([weight])) == 0.0
    assert get_momentum(torch.optim.SGD([weight], momentum=0.5)) == 0.5
    assert get_momentum(torch.optim.AdamW([weight], betas=(0.7, 0.9))) == 0.7


class Stretched(nn.Module):
    """``|factor w|^2 / 2``, whose curvature ``factor^2`` a test may change at will."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.factor = 1.0

    def limit(self):
        return 2 / self.factor**2


def stretched_loss(model, batch):
    return 0.5 * (model.factor * model.w * batch).square().sum(1).mean()


def stretched_run(factors, **options):
    """Peaks and limits when measured at every step on a curvature that jumps as told."""
    model = Stretched()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = BatchAwareLR(optimizer, 7.0)
    controller = controller_of(scheduler, stretched_loss, every_steps=1, **options)
    batches = [torch.ones(3, 2, dtype=torch.float64) for _ in range(4)]
    peaks = []
    for factor in factors:
        model.factor = factor
        with torch.no_grad():
            model.w.mul_(1.0)  # products are recorded anew when weights change
        update = controller.maybe_update(model, batches)
        peaks.append((update.peak, model.limit()))
    return peaks


def test_a_lower_limit_applies_at_once_and_a_higher_one_step_by_step():
    peaks = stretched_run([1.0, 10.0, 1.0, 1.0, 1.0, 1.0], growth=3.0)
    first, low, *rising = [peak for peak, _ in peaks]
    assert first == pytest.approx(2.0, rel=1e-9)
    assert low == pytest.approx(0.02, rel=0.05)  # the filter keeps a little of the old one
    estimate, seen = RateFilter(), []
    for step, limit in enumerate([2.0, 0.02, 2.0, 2.0, 2.0]):
        doubt = estimate.doubt
        seen.append(estimate.update(step, limit, 0.0))
        if step > 1:  # beyond the error of the last estimate, or to a quarter of the last two
            low = min(limit, max(low * 3 * math.exp(doubt), min(seen[-2:]) / 4))
            assert rising[step - 2] == pytest.approx(low, rel=1e-9)


@pytest.mark.parametrize("safety", [1.0, 0.5])
@pytest.mark.parametrize("growth", [1.1, 1.5, 4.0])
def test_peaks_follow_the_filtered_limit_as_fast_as_allowed(safety, growth):
    factors = np.exp(np.random.default_rng(0).normal(size=40))
    peaks = stretched_run(factors, safety=safety, growth=growth)
    estimate = RateFilter()
    want, before = math.inf, 0.0
    for step, (peak, limit) in enumerate(peaks):
        most = growth * math.exp(estimate.doubt) * want
        aim = safety * estimate.update(step, limit, 0.0)
        want = min(aim, max(most, min(aim, before) / 4))
        before = aim
        assert peak == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "at_once"),
    [(torch.optim.Adam, 1.0), (torch.optim.RMSprop, 1.0), (torch.optim.SGD, 2.0)],
)
def test_adam_s_peak_rises_as_far_as_two_limits_in_a_row_show(kind, at_once):
    """Adam's limit goes with the gradient over the curvature, SGD's with one over the curvature."""
    model = Stretched()
    scheduler = BatchAwareLR(kind(model.parameters(), lr=1.0), 7.0)
    controller = controller_of(scheduler, stretched_loss, every_steps=1, growth=100.0)
    batches = [torch.ones(3, 2, dtype=torch.float64) for _ in range(4)]
    peaks = []
    for size, factor in [(1.0, 1.0), (2.0, 0.5**0.5), (2.0, 0.5**0.5)]:
        model.factor = factor
        with torch.no_grad():
            model.w.fill_(size)
        peaks.append(controller.maybe_update(model, batches).peak)
    first, once, again = peaks
    assert once == pytest.approx(at_once * first, rel=0.02)  # the filter keeps a little
    assert again == pytest.approx(2 * first, rel=0.02)


def shaped_run(shares, limits, **options):
    """Peaks, and rates applied, where the shape and the limit are as told at every step."""
    model = Stretched()
    scheduler = BatchAwareLR(
        torch.optim.SGD(model.parameters(), lr=1.0),
        7.0,
        lambda optimizer: LambdaLR(optimizer, lambda step: shares[min(step, len(shares) - 1)]),
    )
    controller = controller_of(scheduler, stretched_loss, every_steps=1, growth=100.0, **options)
    batches = [torch.ones(3, 2, dtype=torch.float64) for _ in range(4)]
    found = []
    for limit in limits:
        model.factor = (2 / limit) ** 0.5
        with torch.no_grad():
            model.w.mul_(1.0)
        peak = controller.maybe_update(model, batches).peak
        found.append((peak, scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_curvature_that_follows_a_falling_rate_does_not_lower_the_peak():
    shares = [1.0, 1.0, 0.5, 0.2, 0.1]
    limits = [1.0, 1.0, 0.5, 0.2, 0.1]
    peaks = [peak for peak, _ in shaped_run(shares, limits)]
    assert peaks == pytest.approx([1.0] * 5, rel=0.05)  # the filter lags a little
    plain = [peak for peak, _ in shaped_run([1.0] * 5, limits)]
    assert plain[-1] == pytest.approx(0.1, rel=0.05)


def test_curvature_that_rises_beyond_a_falling_rate_lowers_it():
    *_, (peak, rate) = shaped_run([1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 0.1, 0.1])
    assert rate == pytest.approx(0.1, rel=0.05)
    assert peak == pytest.approx(0.2, rel=0.05)


def test_a_rate_that_rises_again_begins_at_the_limit_last_measured():
    """Known at the rise at once, measured or not."""
    model = Stretched()
    shares = [1.0, 1.0, 0.2, 0.2, 1.0]
    scheduler = BatchAwareLR(
        torch.optim.SGD(model.parameters(), lr=1.0),
        7.0,
        lambda optimizer: LambdaLR(optimizer, lambda step: shares[step]),
    )
    controller = controller_of(scheduler, stretched_loss, every_steps=1)
    batches = [torch.ones(3, 2, dtype=torch.float64) for _ in range(4)]
    for limit in [1.0, 1.0, 0.2, 0.2]:
        model.factor = (2 / limit) ** 0.5
        with torch.no_grad():
            model.w.mul_(1.0)
        held = controller.maybe_update(model, batches).peak
        scheduler.optimizer.step()
        scheduler.step()
    assert held == pytest.approx(1.0, rel=0.05)
    controller.every_steps = 100
    assert controller.maybe_update(model, batches) is None
    assert scheduler.peak == pytest.approx(0.2, rel=0.05)


def test_the_first_limit_is_not_held_back_by_the_scheduler_s_peak():
    ((peak, limit),) = stretched_run([0.1])  # from 7 to 200 at once
    assert peak == pytest.approx(limit, rel=1e-9) == pytest.approx(200, rel=1e-9)


def test_the_peak_starts_at_a_share_of_the_first_limit():
    ((peak, limit),) = stretched_run([0.1], start=0.25)
    assert peak == pytest.approx(0.25 * limit, rel=1e-9)


def test_the_peak_falls_step_by_step_too():
    # A limit a hundred times lower, of which the filter believes nearly all.
    peaks = [peak for peak, _ in stretched_run([1.0, 10.0, 10.0, 10.0], drop=0.5)]
    assert peaks == pytest.approx([2.0, 1.0, 0.5, 0.25], rel=1e-9)


def test_unequal_groups_keep_their_ratios():
    model, _, _, batches = linear_problem()
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = BatchAwareLR(optimizer, 1.0, batch_size=BATCH)
    controller = controller_of(scheduler, MSE, tol=1e-6)
    update = controller.maybe_update(model, batches)
    expected = track_curvature(
        CurvatureTracker(tol=1e-6, with_noise=True),
        model,
        MSE,
        batches,
        dataset_size=2**31,
        optimizer=optimizer,
    )
    assert update.largest_eigenvalue == pytest.approx(expected.largest, rel=1e-6)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([scheduler.peak, 0.1 * scheduler.peak], rel=1e-14)


class Adapted(nn.Module):
    """A frozen layer, and beside it a low-rank one whose second factor begins at zero."""

    def __init__(self, generator):
        super().__init__()
        self.frozen = nn.Linear(20, 30).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, 20, generator=generator) / 20**0.5)
        self.up = nn.Parameter(torch.zeros(30, 4))
        self.head = nn.Linear(30, 3).requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(x) + x @ self.down.T @ self.up.T))


class BegunAtZero(nn.Module):
    """A branch and a head that begin at zero."""

    def __init__(self, generator):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20))
        self.head = nn.Linear(20, 3)
        for layer in (self.branch[2], self.head):
            nn.init.zeros_(layer.weight)

    def forward(self, x):
        return self.head(x + self.branch(x))


@pytest.mark.parametrize(("kind", "share"), [(Adapted, 1 / 3), (BegunAtZero, 1 / 10)])
def test_weights_that_begin_at_zero_are_trained_in_a_short_run_of_adam(kind, share):
    """At first most of what Adam divides by is zero, and later limits are far above the first."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = kind(generator)
    x = torch.randn(512, 20, generator=generator)
    y = (x @ torch.randn(20, 3, generator=generator)).argmax(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0)
    scheduler = BatchAwareLR(optimizer, 1.0, lambda o: CosineAnnealingLR(o, 100))
    controller = CurvatureController(
        scheduler, CROSS_ENTROPY, total_steps=100, batch_size=32, dataset_size=512
    )
    before = CROSS_ENTROPY(model, (x, y)).item()
    for _ in range(100):
        rows = torch.randperm(512, generator=generator)
        controller.maybe_update(model, lambda rows=rows: [(x[i], y[i]) for i in rows[:64].chunk(4)])
        optimizer.zero_grad()
        loss = CROSS_ENTROPY(model, (x[rows[:32]], y[rows[:32]]))
        loss.backward()
        optimizer.step()
        scheduler.step()
        controller.observe(loss.detach())
    assert CROSS_ENTROPY(model, (x, y)).item() < share * before


def test_a_quadratic_is_trained_to_its_minimum_at_the_limit():
    problem = linear_problem(momentum=0.9, shape=lambda o: CosineAnnealingLR(o, 300))
    model, _, _, batches = problem
    controller = controller_of(problem[2], MSE, total_steps=300)
    updates_of(controller, problem, 300)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    x1 = torch.cat([x, torch.ones(128, 1, dtype=x.dtype)], dim=1)
    best = float((x1 @ torch.linalg.lstsq(x1, y).solution - y).square().mean())
    with torch.no_grad():
        assert float(MSE(model, (x, y))) < best * 1.01


# --- when it is measured -------------------------------------------------------------------------


def steps_measured(controller, problem, steps):
    return [
        k for k, update in enumerate(updates_of(controller, problem, steps)) if update is not None
    ]


def test_milestones_come_first_and_the_rest_by_need_within_the_budget():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, total_steps=300)
    assert steps_measured(controller, problem, 300) == [0, 1, 2, 4, 8, 20, 50, 124]  # dear
    problem = linear_problem()
    generous = controller_of(problem[2], MSE, total_steps=60, max_overhead=1e9)
    assert len(steps_measured(generous, problem, 60)) > 10


@pytest.mark.parametrize("max_overhead", [0.3, 0.5, 2.0])
def test_the_budget_is_kept_and_reported(max_overhead):
    problem = linear_problem()
    controller = controller_of(
        problem[2], MSE, total_steps=400, max_overhead=max_overhead, batch_size=128
    )
    updates = [update for update in updates_of(controller, problem, 400) if update is not None]
    costs = [4.0 + 3.0 * update.num_products for update in updates]  # 128 samples are one batch
    assert controller.cadence.spent == pytest.approx(sum(costs), rel=1e-12)
    assert controller.overhead == sum(costs) / 400
    assert updates[-1].overhead == pytest.approx(sum(costs) / (updates[-1].step + 1), rel=1e-12)
    assert controller.overhead <= max_overhead


def test_due_tells_what_comes_next():
    problem = linear_problem()
    model, optimizer, scheduler, batches = problem
    controller = controller_of(scheduler, MSE)
    for _ in range(12):
        due = controller.due
        assert (controller.maybe_update(model, batches) is not None) == due
        step(model, optimizer, scheduler, batches[0])


def test_batches_are_made_only_when_a_measurement_is_due():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE)
    controller = controller_of(scheduler, MSE, total_steps=9)
    calls = []

    def make():
        calls.append(len(calls))
        return batches

    results = [controller.maybe_update(model, make) for _ in range(9)]
    assert len(calls) == sum(result is not None for result in results) == 5  # 0, 1, 2, 4, 8


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "function"])
def test_batches_come_in_any_common_form(form):
    model, _, scheduler, batches = linear_problem()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    given = {
        "tuple": (x, y),
        "list": batches,
        "dict": {"x": x, "y": y},
        "function": lambda: (x, y),
    }[form]
    update = controller_of(scheduler, MSE).maybe_update(model, given)
    assert update.report.num_samples == 128
    assert update.report.num_batches == 4


def test_the_batch_size_is_given_or_the_scheduler_s_or_that_of_the_batches():
    for given, of_scheduler, expected in ((8, 16, 8), (None, 16, 16), (None, None, 32)):
        model, optimizer, _, batches = linear_problem()
        scheduler = BatchAwareLR(optimizer, 1.0, batch_size=of_scheduler)
        controller = controller_of(scheduler, MSE, batch_size=given)
        assert controller.maybe_update(model, batches).bound.batch_size == expected


def test_a_warm_start_saves_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (64,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = BatchAwareLR(optimizer, 1.0, lambda o: LinearLR(o, 0.01, 0.01), batch_size=64)
    controller = controller_of(scheduler, CROSS_ENTROPY, every_steps=1, tol=0.03)
    costs = []
    for _ in range(9):
        update = controller.maybe_update(model, (x, y))
        if update is not None:
            costs.append(update.report.num_products)
        step(model, optimizer, scheduler, (x, y), CROSS_ENTROPY)
    assert len(costs) == 9
    assert max(costs[1:]) <= costs[0]
    assert sum(costs[1:]) < 0.8 * 8 * costs[0]
    assert controller.num_products == sum(costs)
    assert controller.seconds > 0


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("apply", "count"), [(True, 1), (False, 0)])
def test_a_loss_with_kinks_is_pointed_out_to_who_is_steered_by_it(caplog, apply, count):
    *_, scheduler, _ = linear_problem()
    with caplog.at_level(logging.WARNING, logger="batchlr"):
        CurvatureController(scheduler, supervised(nn.L1Loss()), apply=apply)
        CurvatureController(scheduler, supervised(nn.HuberLoss()), apply=apply)
    assert len(caplog.records) == count
    assert all("L1Loss is piecewise linear" in r.getMessage() for r in caplog.records)


def test_a_failed_measurement_keeps_the_last_good_rate_and_says_so(caplog):
    model, optimizer, scheduler, batches = linear_problem(momentum=0.5)
    controller = controller_of(scheduler, MSE, every_steps=1, rollback=False)
    good = controller.maybe_update(model, batches)
    weight = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with caplog.at_level(logging.WARNING, logger="batchlr"):
        update = controller.maybe_update(model, batches)
    assert update.failure.startswith("the loss is nan")
    assert (update.bound, update.report) == (None, None)
    assert (update.peak, update.momentum, update.step) == (good.peak, 0.5, 1)
    assert math.isnan(update.largest_eigenvalue)
    assert math.isnan(update.smallest_eigenvalue)
    assert scheduler.peak == good.peak == optimizer.param_groups[0]["lr"]
    assert [record.message for record in caplog.records] == [
        f"step 1: keeping the last good rate: {update.failure}"
    ]
    with torch.no_grad():
        model.weight.copy_(weight)
    again = controller.maybe_update(model, batches)
    assert again.failure is None
    assert again.peak == pytest.approx(good.peak, rel=0.01)  # to Lanczos' tolerance


def test_a_failed_measurement_is_charged_what_it_took():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, concave_from(2), every_steps=1)
    controller.maybe_update(model, batches)
    before, spent = controller.num_products, controller.cadence.spent
    update = controller.maybe_update(model, batches)
    assert "nothing limits the rate" in update.failure
    assert update.num_products == controller.num_products - before >= 1
    assert update.seconds > 0
    graphs = 4.0 * 128 / BATCH
    products = 3.0 * update.num_products * 128 / BATCH
    assert controller.cadence.spent - spent == pytest.approx(graphs + products)


def test_products_before_a_failure_are_counted(monkeypatch):
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, every_steps=1)
    controller.maybe_update(model, batches)
    before = controller.num_products
    multiply, calls = HessianOperator.batch_products, []

    def overflowing(self, vector):
        calls.append(vector)
        for product in multiply(self, vector):
            yield product * (math.inf if len(calls) == 2 else 1.0)

    monkeypatch.setattr(HessianOperator, "batch_products", overflowing)
    update = controller.maybe_update(model, batches)
    assert "not finite" in update.failure
    assert update.num_products == controller.num_products - before == 1  # of those that ended


def concave_from(measurement):
    """The mean square, and its negative from the given measurement on."""
    begun = []

    def loss_fn(model, batch):
        begun.append(batch)
        sign = -1 if len(begun) > (measurement - 1) * 4 else 1
        return sign * MSE(model, batch)

    return loss_fn


def test_a_loss_that_raises_is_a_failure_too():
    model, _, scheduler, batches = linear_problem()
    broken = False

    def loss_fn(model, batch):
        if broken:
            msg = "loss overflowed"
            raise OverflowError(msg)
        return MSE(model, batch)

    controller = controller_of(scheduler, loss_fn)
    controller.maybe_update(model, batches)
    broken = True
    assert controller.maybe_update(model, batches).failure == "loss overflowed"


def concave(model, batch):
    return -MSE(model, batch)


def test_without_positive_curvature_the_last_good_rate_stays():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE)
    good = controller.maybe_update(model, batches)
    controller.loss_fn = concave
    update = controller.maybe_update(model, batches)
    assert "largest must be positive and finite" in update.failure
    assert scheduler.peak == good.peak


def test_the_very_first_failure_is_raised():
    model, _, scheduler, batches = linear_problem()
    with torch.no_grad():
        model.weight.fill_(math.inf)
    controller = controller_of(scheduler, MSE)
    with pytest.raises(ArithmeticError, match=r"the loss is (inf|nan) on the batches given"):
        controller.maybe_update(model, batches)
    assert scheduler.peak == 1.0
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert controller.maybe_update(model, batches).step == 0  # it may be tried again


def test_without_positive_curvature_there_is_no_first_rate():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, concave)
    with pytest.raises(ArithmeticError, match="largest must be positive and finite, got "):
        controller.maybe_update(model, batches)
    assert scheduler.peak == 1.0


def test_a_mere_observer_reports_even_its_first_failure(caplog):
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, concave, apply=False)
    with caplog.at_level(logging.WARNING, logger="batchlr"):
        update = controller.maybe_update(model, batches)
    assert update.failure.startswith("largest must be positive and finite, got ")
    assert (update.peak, update.bound) == (1.0, None)
    assert len(caplog.records) == 1
    controller.loss_fn = MSE
    assert controller.maybe_update(model, batches).bound.value > 0
    assert scheduler.peak == 1.0


def test_a_mistake_is_an_error_for_an_observer_too():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, apply=False, dataset_size=100)
    with pytest.raises(ValueError, match="dataset_size must be at least the 128 samples given"):
        controller.maybe_update(model, batches)


# --- a controller that does not apply ------------------------------------------------------------


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 5),
    )


def trained_conv_net(kind, *, observed):
    model = conv_net()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, 1, 8, 8, generator=generator)
    y = torch.randint(5, (96,), generator=generator)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.05, **options)
    scheduler = BatchAwareLR(optimizer, 0.05, lambda o: CosineAnnealingLR(o, 10), batch_size=24)
    controller = controller_of(scheduler, CROSS_ENTROPY, every_steps=1, apply=False)
    updates = []
    torch.manual_seed(11)
    for k in range(10):
        rows = slice(24 * (k % 4), 24 * (k % 4) + 24)
        if observed:
            updates.append(controller.maybe_update(model, (x, y)))
        step(model, optimizer, scheduler, (x[rows], y[rows]), CROSS_ENTROPY)
    return model, optimizer, scheduler, torch.get_rng_state(), updates


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_observing_leaves_a_run_bit_identical(kind):
    model, optimizer, scheduler, random_state, updates = trained_conv_net(kind, observed=True)
    twin, twin_optimizer, twin_scheduler, twin_random_state, _ = trained_conv_net(
        kind, observed=False
    )
    assert len([u for u in updates if u is not None]) == 10
    assert all(u.bound.value > 0 and u.peak == 0.05 for u in updates)
    for (name, tensor), (_, other) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, other), name  # weights and buffers
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
        state, twin_state = optimizer.state[parameter], twin_optimizer.state[other]
        assert state.keys() == twin_state.keys()
        assert all(torch.equal(state[key], twin_state[key]) for key in state)
    assert torch.equal(random_state, twin_random_state)
    assert scheduler.state_dict() == twin_scheduler.state_dict()


# --- the paper's policies ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_published_step_size_is_applied_as_it_is(policy):
    problem = linear_problem(momentum=0.9, weight_decay=0.1)
    model, optimizer, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, policy=policy)
    assert controller.sets_momentum
    update = controller.maybe_update(model, batches)
    learned = learn_step_size(
        model,
        HessianOperator(model, MSE, batches),
        policy=policy,
        generator=torch.Generator().manual_seed(0),
    )
    step = learned.step_size
    assert update.learned.step_size == step
    assert (update.peak, update.momentum) == (step.lr, step.momentum)
    assert scheduler.peak == optimizer.param_groups[0]["lr"] == step.lr
    assert get_momentum(optimizer) == step.momentum
    assert (update.bound, update.report, update.failure) == (None, None, None)
    assert update.largest_eigenvalue == learned.largest
    assert update.smallest_eigenvalue == learned.smallest
    assert update.num_products == controller.num_products == 7  # weights, so all there are
    assert update.seconds == controller.seconds > 0


def test_polyak_s_pair_is_that_of_the_exact_extremes():
    """Seven steps resolve all seven eigenvalues, and none of them is heavy."""
    model, _, scheduler, batches = linear_problem()
    update = controller_of(scheduler, MSE, policy="paper_momentum").maybe_update(model, batches)
    x = torch.cat([batch[0] for batch in batches])
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    values = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    assert max(update.learned.weights) < 0.5
    want = heavy_ball(float(values[-1]), float(values[0]))
    assert (update.peak, update.momentum) == pytest.approx((want.lr, want.momentum), rel=1e-9)


def test_a_published_rate_may_grow_at_once_and_is_not_limited():
    peaks = stretched_run([10.0, 1.0, 0.1], policy="paper_sgd")
    assert [peak for peak, _ in peaks] == pytest.approx([0.01, 1.0, 100.0], rel=1e-9)


@pytest.mark.parametrize("policy", ["mean_square", "paper_sgd"])
def test_a_cadence_replaces_the_dense_measurements(policy):
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, policy=policy, every_steps=5)
    assert steps_measured(controller, problem, 17) == [0, 5, 10, 15]


def test_without_a_cadence_a_policy_goes_by_need_too():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, policy="paper_sgd", total_steps=300)
    assert steps_measured(controller, problem, 65) == [0, 1, 2, 4, 8, 20, 50]


def test_a_policy_that_fails_keeps_rate_and_momentum(caplog):
    problem = linear_problem()
    model, optimizer, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, policy="paper_nesterov")
    good = controller.maybe_update(model, batches)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with caplog.at_level(logging.WARNING, logger="batchlr"):
        update = controller.maybe_update(model, batches)
    assert update.failure.startswith("the loss is nan")
    assert (update.peak, update.momentum) == (good.peak, good.momentum)
    assert (scheduler.peak, get_momentum(optimizer)) == (good.peak, good.momentum)
    assert (update.learned, update.num_products) == (None, 0)
    assert math.isnan(update.largest_eigenvalue)
    assert math.isnan(update.smallest_eigenvalue)
    assert len(caplog.records) == 1


def flat(model, batch):
    return model.weight.sum() * 0.0 + model.weight.square().sum() * 0.0


def test_a_policy_without_curvature_has_no_first_rate():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, flat, policy="paper_sgd")
    with pytest.raises(ArithmeticError, match="all Ritz values are 0"):
        controller.maybe_update(model, batches)
    assert scheduler.peak == 1.0


def test_a_policy_that_only_observes_changes_nothing():
    problem = linear_problem(momentum=0.3)
    model, optimizer, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, policy="paper_momentum", apply=False)
    assert not controller.sets_momentum
    update = controller.maybe_update(model, batches)
    assert update.learned.step_size.momentum > 0
    assert (update.peak, update.momentum) == (scheduler.peak, get_momentum(optimizer)) == (1.0, 0.3)


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_resumed_policy_goes_on_bit_for_bit(cut):
    def build():
        problem = linear_problem(momentum=0.9)
        options = {"policy": "paper_nesterov", "every_steps": 3, "max_products": 4}
        return problem, controller_of(problem[2], MSE, **options)

    problem, controller = build()
    updates_of(controller, problem, cut)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (*problem[:3], controller)], file)
    expected = updates_of(controller, problem, 12 - cut)
    file.seek(0)
    resumed, other = build()
    for part, state in zip((*resumed[:3], other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    got = updates_of(other, resumed, 12 - cut)
    shown = [
        [u and (u.step, u.peak, u.momentum, u.learned.weights) for u in us]
        for us in (got, expected)
    ]
    assert shown[0] == shown[1]
    assert any(update is not None for update in got)
    assert torch.equal(resumed[0].weight, problem[0].weight)


# --- heavy ball, and the edge along the step -----------------------------------------------------


def spiked_problem(num_samples=4096, noise=0.0):
    """Regression on features of a narrow bulk and five outliers; its Hessian's usable edges."""
    generator = torch.Generator().manual_seed(0)
    curvatures = torch.full((60,), 1e-4, dtype=torch.float64)
    curvatures[:5] = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    x = torch.randn(num_samples, 60, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x).Q * num_samples**0.5 * (curvatures / 2).sqrt()
    y = noise * torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(60, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    scheduler = BatchAwareLR(optimizer, 1.0, batch_size=num_samples)
    return model, optimizer, scheduler, list(zip(x.chunk(4), y.chunk(4), strict=True))


def test_heavy_ball_is_polyak_s_pair_of_the_outliers_where_there_is_no_noise():
    model, optimizer, scheduler, batches = spiked_problem()
    controller = controller_of(scheduler, MSE, policy="heavy_ball", dataset_size=4096, tol=1e-3)
    update = controller.maybe_update(model, batches)
    pair = heavy_ball(8.0, 0.5)
    assert update.momentum == get_momentum(optimizer) == pytest.approx(pair.momentum, rel=1e-3)
    assert update.peak == pytest.approx(pair.lr, rel=1e-2)
    assert controller.num_products == update.num_products > update.report.num_products


def test_heavy_ball_s_rate_is_within_the_limit_of_small_batches():
    """Batches of one: noise, not curvature, limits; both rates are at Polyak's momentum."""
    model, _, scheduler, batches = spiked_problem()
    options = {"batch_size": 1, "dataset_size": 4096, "tol": 1e-3}
    controller = controller_of(scheduler, MSE, policy="heavy_ball", **options)
    update = controller.maybe_update(model, batches)
    pair = heavy_ball(8.0, 0.5)
    limit = update.report.max_lr(
        1, optimizer="sgd", momentum=update.momentum, rule="top-direction"
    ).value
    assert update.momentum == pytest.approx(pair.momentum, rel=1e-3)
    assert update.peak == pytest.approx(limit)
    assert limit < 0.5 * pair.lr


def test_a_rate_moves_with_the_momentum_it_is_for():
    """Where momentum rises the peak falls at once, however slowly it may fall otherwise."""
    model, optimizer, scheduler, batches = spiked_problem()
    options = {"batch_size": 1, "dataset_size": 4096, "every_steps": 1, "drop": 0.9}
    controller = controller_of(scheduler, MSE, policy="heavy_ball", **options)
    before = controller.maybe_update(model, batches)
    optimizer.param_groups[0]["momentum"] = 0.0  # by somebody else, and the limit there
    slow = before.report.max_lr(1, optimizer="sgd", momentum=0.0, rule="top-direction").value
    scheduler.set_peak(slow)
    after = controller.maybe_update(model, batches)
    assert after.momentum == pytest.approx(before.momentum, rel=0.1)
    assert before.peak < 0.8 * slow
    assert after.peak < 1.1 * before.peak


def test_cdat_applies_the_edge_along_the_step_at_one_product():
    model, optimizer, scheduler, batches = linear_problem(momentum=0.9)
    controller = controller_of(scheduler, MSE, policy="cdat", every_steps=1)
    averages = CdatEdge()
    for k in range(3):
        expected = averages.update(
            update_curvature(model, HessianOperator(model, MSE, batches), optimizer)
        )
        update = controller.maybe_update(model, batches)
        assert update.peak == scheduler.peak == pytest.approx(expected, rel=1e-12)
        assert (update.momentum, update.num_products, controller.num_products) == (0.9, 1, k + 1)
        assert (update.bound, update.report, update.learned) == (None, None, None)
        assert update.along.num_samples == 128
        step(model, optimizer, scheduler, batches[k])


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]
)
def test_cdat_trains_a_quadratic(kind):
    problem = linear_problem(kind)
    model, _, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, policy="cdat", every_steps=1)
    before = sum(float(MSE(model, batch).detach()) for batch in batches)
    updates_of(controller, problem, 60)
    assert sum(float(MSE(model, batch).detach()) for batch in batches) < 0.5 * before


def test_cdat_keeps_its_rate_where_no_step_descends():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, policy="cdat", every_steps=1)
    good = controller.maybe_update(model, batches)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    update = controller.maybe_update(model, batches)
    assert "must be finite" in update.failure
    assert update.peak == good.peak


@pytest.mark.parametrize("policy", ["heavy_ball", "cdat"])
def test_a_resumed_run_of_either_goes_on_bit_for_bit(policy):
    def run(cut):
        problem = linear_problem(momentum=0.5)
        model, optimizer, scheduler, batches = problem
        controller = controller_of(scheduler, MSE, policy=policy, every_steps=2)
        for k in range(7):
            if k == cut:
                saved = copy.deepcopy((scheduler.state_dict(), controller.state_dict()))
                scheduler = BatchAwareLR(optimizer, 1.0, None, batch_size=BATCH)
                controller = controller_of(scheduler, MSE, policy=policy, every_steps=2)
                scheduler.load_state_dict(saved[0])
                controller.load_state_dict(saved[1])
            controller.maybe_update(model, batches)
            step(model, optimizer, scheduler, batches[k % len(batches)])
        return model.weight, scheduler.peak, get_momentum(optimizer), controller.num_products

    whole, cut = run(None), run(3)
    assert torch.equal(whole[0], cut[0])
    assert whole[1:] == cut[1:]


# --- losses and batch sizes -----------------------------------------------------------------------


def test_a_jump_of_the_loss_halves_the_rate_and_asks_for_a_measurement():
    problem = linear_problem()
    model, optimizer, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, total_steps=1000)
    peak = controller.maybe_update(model, batches).peak
    losses = [1.0] * 10 + [1.5] * 10
    spikes, measured = [], []
    for loss in losses:
        spikes.append(controller.observe(torch.tensor(loss)))
        measured.append(controller.maybe_update(model, batches) is not None)
    assert spikes == [None] * 19 + ["slowed"]
    assert measured[18:] == [False, True]  # before the step that follows
    assert scheduler.peak == pytest.approx(peak / 2, rel=0.1)
    assert optimizer.param_groups[0]["lr"] == scheduler.peak
    for _ in range(40):  # quiet again
        controller.observe(torch.tensor(1.0))
    assert scheduler.peak == pytest.approx(peak, rel=0.1)


def test_a_destroyed_network_goes_back_before_it_is_measured():
    problem = linear_problem()
    model, _, scheduler, batches = problem
    controller = controller_of(scheduler, MSE, every_steps=1, total_steps=1000)
    events = poisoned_run(controller, problem, range(22))
    assert not any(events)
    good = model.bias.detach().clone()
    controller.observe(MSE(model, batches[0]))
    update = controller.maybe_update(model, batches)
    assert update.failure is None
    assert model.weight.isfinite().all()
    assert not torch.equal(model.bias, good)  # of some steps before
    assert controller.rescue() is None


@pytest.mark.parametrize("options", [{"apply": False}, {"policy": "paper_sgd"}])
def test_a_controller_that_does_not_steer_keeps_no_snapshots(options):
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, **options)
    poisoned_run(controller, problem, range(30))
    assert "sure" not in controller.state_dict()["guard"]
    assert problem[0].weight.isnan().all()


def left_plateau(factor):
    """Peak and limit behind a plateau whose curvature is ``factor`` times as large."""
    model, _, scheduler, batches = linear_problem()
    sharpness = 1.0

    def loss_fn(model, batch):
        return sharpness * MSE(model, batch)

    controller = controller_of(scheduler, loss_fn, total_steps=10_000, tol=1e-6)
    limit = controller.maybe_update(model, batches).bound.value
    start = model.weight.detach().clone()
    events = []
    for loss in [2.3, 2.3, 2.3, math.nan, 2.3, 2.3]:
        with torch.no_grad():
            model.weight.add_(0.1)
        events.append(controller.observe(torch.tensor(loss)))
        if loss != loss:
            assert torch.equal(model.weight, start)
            assert scheduler.peak == pytest.approx(limit / 4, rel=1e-9)
    assert [event for event in events if event] == ["undone"]
    assert controller.due
    update = controller.maybe_update(model, batches)
    assert update.bound.value > limit / 4
    assert update.peak == pytest.approx(limit / 4, rel=1e-9)  # the ceiling
    assert controller.observe(torch.tensor(1.0)) == "recovered"
    assert controller.due
    sharpness = factor
    update = controller.maybe_update(model, batches)
    return update.peak, update.bound.value, limit / 4


def test_behind_a_plateau_the_rate_starts_anew_at_half_the_limit():
    peak, limit, ceiling = left_plateau(10.0)
    assert peak == pytest.approx(limit / 2, rel=1e-6)
    assert peak < ceiling


def test_it_starts_no_higher_than_what_led_off_the_plateau():
    peak, limit, ceiling = left_plateau(1.0)
    assert peak == pytest.approx(ceiling, rel=1e-6)
    assert peak < limit / 2


def test_another_batch_size_moves_the_ceiling_too():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, dataset_size=128)
    controller.maybe_update(model, batches)
    for loss in [2.3, 2.3, 2.3, math.nan]:
        controller.observe(torch.tensor(loss))
    before = scheduler.peak
    controller.set_batch_size(4)
    after = scheduler.peak
    controller.observe(torch.tensor(2.3))
    assert scheduler.peak == after < before


def test_rollback_can_be_switched_off():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, rollback=False)
    assert "undone" not in poisoned_run(controller, problem, range(40))
    assert problem[0].weight.isnan().all()


@pytest.mark.parametrize("options", [{"apply": False}, {"policy": "paper_sgd"}])
def test_a_controller_that_does_not_steer_does_not_back_off(options):
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, **options)
    controller.maybe_update(model, batches)
    peak = scheduler.peak
    assert not any(controller.observe(torch.tensor(loss)) for loss in [1.0] * 10 + [9.0] * 10)
    assert scheduler.peak == peak


@pytest.mark.parametrize(
    ("policy", "rollback", "times"),
    [("mean_square", True, 1), ("edge", True, 1), ("edge", False, 2)],  # True: not settled yet
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_another_batch_size_gets_its_own_limit_at_once(kind, policy, rollback, times):
    model, _, scheduler, batches = linear_problem(kind)
    options = {"dataset_size": 128, "total_steps": 1000, "policy": policy, "rollback": rollback}
    controller = controller_of(scheduler, MSE, **options)
    update = controller.maybe_update(model, batches)
    controller.set_batch_size(4)
    want = update.report.max_lr(4 * times, optimizer=update.bound.optimizer, rule="top-direction")
    assert scheduler.peak == pytest.approx(want.value, rel=1e-9)
    assert scheduler.batch_size == controller.batch_size == 4
    assert controller.due  # soon after
    assert controller.maybe_update(model, batches).bound.batch_size == 4


def test_another_batch_size_is_measured_before_the_next_step():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, dataset_size=128, total_steps=1000)
    while len(steps_measured(controller, problem, 1)) or controller.due:
        pass  # up to a step that nothing is due before
    controller.set_batch_size(4)
    assert controller.due


def test_layers_set_free_in_mid_run_get_a_tracker_of_their_own():
    problem = linear_problem()
    model, _, scheduler, batches = problem
    controller = controller_of(scheduler, MSE)
    model.bias.requires_grad_(False)
    assert controller.maybe_update(model, batches).failure is None
    model.bias.requires_grad_(True)
    assert controller.maybe_update(model, batches).failure is None


@pytest.mark.parametrize("max_products", [1, 2])
def test_few_products_are_enough_for_a_controller(max_products):
    model, _, scheduler, batches = linear_problem()
    update = controller_of(scheduler, MSE, max_products=max_products).maybe_update(model, batches)
    assert update.num_products <= max_products + 1  # and one for the noise


def test_a_batch_size_cannot_change_before_the_first_measurement():
    controller = controller_of(linear_problem()[2], MSE)
    with pytest.raises(ValueError, match="nothing was measured yet"):
        controller.set_batch_size(4)


def test_a_batch_size_changes_after_resuming_as_it_would_have():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, dataset_size=128)
    controller.maybe_update(model, batches)
    file = io.BytesIO()
    torch.save((scheduler.state_dict(), controller.state_dict()), file)
    file.seek(0)
    _, _, other_scheduler, _ = linear_problem()
    other = controller_of(other_scheduler, MSE, dataset_size=128)
    for part, state in zip(
        (other_scheduler, other), torch.load(file, weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    for one in (controller, other):
        one.set_batch_size(4)
    assert other_scheduler.peak == scheduler.peak


def test_a_controller_that_only_measures_takes_any_batch_size_and_length():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(
        scheduler, MSE, dataset_size=128, batch_size=8, apply=False, total_steps=100
    )
    peak = scheduler.peak
    controller.set_batch_size(16, total_steps=60)
    assert (controller.batch_size, controller.cadence.total_steps) == (16, 60)
    assert controller.maybe_update(model, batches).bound.batch_size == 16
    controller.set_batch_size(32)
    assert (controller.batch_size, controller.cadence.total_steps) == (32, 60)
    assert scheduler.peak == peak


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_an_illegal_batch_size_or_length_changes_nothing(apply, measured):
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(
        scheduler, MSE, dataset_size=128, batch_size=8, apply=apply, total_steps=100
    )
    if measured:
        controller.maybe_update(model, batches)
    before, peak = controller.state_dict()["cadence"], scheduler.peak
    for size, steps, words in [
        (-5, None, r"batch_size must lie in \[1, 128\], got -5"),
        (129, 50, r"batch_size must lie in \[1, 128\], got 129"),
        (16, -3, "total_steps must be positive, or None, got -3"),
        (16, 0, "total_steps must be positive, or None, got 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            controller.set_batch_size(size, total_steps=steps)
    if apply and not measured:
        with pytest.raises(ValueError, match="nothing was measured yet"):
            controller.set_batch_size(16, total_steps=50)
    assert (controller.batch_size, controller.cadence.total_steps) == (8, 100)
    assert (controller.state_dict()["cadence"], scheduler.peak) == (before, peak)


def test_processes_agree_on_what_the_first_decided():
    first, second = (linear_problem(momentum=0.9) for _ in range(2))
    leader, follower = (
        controller_of(problem[2], MSE, total_steps=50, adjust_momentum=True)
        for problem in (first, second)
    )
    leader.maybe_update(first[0], first[3])
    follower.maybe_update(second[0], [(2 * x, y) for x, y in second[3]])
    assert second[2].peak != first[2].peak
    said = []
    leader.agree(lambda value: said.append(value) or value)
    follower.agree(lambda value: said.pop(0))
    assert said == []
    assert second[2].peak == first[2].peak
    assert get_momentum(second[1]) == get_momentum(first[1])
    assert follower.cadence == leader.cadence
    assert isinstance(follower.cadence.interval, int)
    assert follower.due == leader.due


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("cut", [1, 5, 8, 9])
def test_a_resumed_controller_goes_on_bit_for_bit(kind, cut):
    def build():
        problem = linear_problem(kind, shape=lambda o: CosineAnnealingLR(o, 30))
        controller = controller_of(
            problem[2],
            MSE,
            total_steps=30,
            max_overhead=5.0,
            generator=torch.Generator().manual_seed(7),
        )
        return problem, controller

    problem, controller = build()
    updates_of(controller, problem, cut)
    parts = dict(zip(("model", "optimizer", "scheduler"), problem, strict=False))
    file = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save(states | {"controller": controller.state_dict()}, file)
    expected = updates_of(controller, problem, 30 - cut)

    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed, resumed_controller = build()
    for name, part in zip(("model", "optimizer", "scheduler"), resumed, strict=False):
        part.load_state_dict(states[name])
    resumed_controller.load_state_dict(states["controller"])
    got = updates_of(resumed_controller, resumed, 30 - cut)
    # `updates_of` starts over with the first batch, in both runs alike.
    assert [u and (u.step, u.peak, u.bound) for u in got] == [
        u and (u.step, u.peak, u.bound) for u in expected
    ]
    assert torch.equal(resumed[0].weight, problem[0].weight)
    assert resumed_controller.num_products == controller.num_products


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("cut", [3, 12, 20, 21, 24])
def test_a_controller_resumed_before_a_rollback_goes_back_to_the_same_bits(kind, cut):
    def build():
        problem = linear_problem(kind, shape=lambda o: CosineAnnealingLR(o, 60))
        return problem, controller_of(problem[2], MSE, total_steps=60, max_overhead=5.0)

    problem, controller = build()
    before = poisoned_run(controller, problem, range(cut))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (*problem[:3], controller)], file)
    expected = poisoned_run(controller, problem, range(cut, 60))
    assert "undone" in before + expected
    file.seek(0)
    resumed, other = build()
    for part, state in zip((*resumed[:3], other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert poisoned_run(other, resumed, range(cut, 60)) == expected
    assert torch.equal(resumed[0].weight, problem[0].weight)
    assert resumed[0].weight.isfinite().all()
    assert resumed[2].peak == problem[2].peak


def poisoned_run(controller, problem, steps):
    """What `observe` returned in each step; step 21 leaves weights that are no numbers."""
    model, optimizer, scheduler, batches = problem
    events = []
    for k in steps:
        controller.maybe_update(model, batches)
        optimizer.zero_grad()
        loss = MSE(model, batches[k % len(batches)])
        loss.backward()
        optimizer.step()
        scheduler.step()
        if k == 21:
            with torch.no_grad():
                model.weight.fill_(math.nan)
        events.append(controller.observe(loss))
    return events


def isotropic_loss(model, batch):
    return 0.5 * (model.weight * batch).square().sum(1).mean()


def test_the_generator_is_part_of_the_state():
    # Where all curvatures are equal and the gradient is zero it starts from a random vector.
    def build():
        model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        scheduler = BatchAwareLR(torch.optim.SGD(model.parameters(), lr=1.0), 1.0)
        return model, controller_of(scheduler, isotropic_loss)

    batches = [torch.ones(2, 6, dtype=torch.float64) for _ in range(4)]
    model, controller = build()
    state = controller.state_dict()
    controller.maybe_update(model, batches)
    twin, resumed = build()
    resumed.load_state_dict(state)
    resumed.maybe_update(twin, batches)
    assert torch.equal(vector_of(resumed), vector_of(controller))
    triplet, other = build()
    other.load_state_dict(state | {"generator": torch.Generator().manual_seed(9).get_state()})
    other.maybe_update(triplet, batches)
    assert not torch.equal(vector_of(other), vector_of(controller))


def vector_of(controller):
    return controller.state_dict()["limit"]["tracker"]["trails"]["largest"]["vector"]


def test_the_state_does_not_change_later():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE)
    poisoned_run(controller, problem, range(3))
    state = controller.state_dict()
    before = copy.deepcopy(state)
    poisoned_run(controller, problem, range(6))
    assert state.keys() == before.keys()
    one, other = (s["limit"]["tracker"]["trails"]["largest"]["vector"] for s in (state, before))
    assert torch.equal(one, other)
    assert torch.equal(state["generator"], before["generator"])
    weights = [s["guard"]["sure"]["tensors"]["w.weight"] for s in (state, before)]
    assert torch.equal(*weights)
    apart = ("limit", "generator", "guard")
    plain = {k: v for k, v in before.items() if k not in apart}
    assert {k: state[k] for k in plain} == plain


def test_who_shows_no_losses_pays_for_no_snapshots():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE)
    updates_of(controller, problem, 2)
    assert "sure" in controller.state_dict()["guard"]
    updates_of(controller, problem, 1)
    assert "sure" not in controller.state_dict()["guard"]


def test_a_cadence_of_one_s_own_is_broken_for_what_has_happened():
    problem = linear_problem()
    controller = controller_of(problem[2], MSE, every_steps=500)
    poisoned_run(controller, problem, range(21))
    assert not controller.due
    events = iter(lambda: poisoned_run(controller, problem, [21]), ["undone"])
    assert len(list(events)) < 10
    model, _, _, batches = problem
    assert controller.due
    assert controller.maybe_update(model, batches).failure is None
    assert not controller.due


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("safety", [0.0, -0.5, 1.1, math.nan])
def test_safety_is_a_fraction(safety):
    with pytest.raises(ValueError, match=rf"safety must lie in \(0, 1\], got {safety}"):
        controller_of(linear_problem()[2], MSE, safety=safety)


@pytest.mark.parametrize("growth", [1.0, 0.5, math.nan])
def test_growth_is_above_one(growth):
    with pytest.raises(ValueError, match=f"growth must be above 1, got {growth}"):
        controller_of(linear_problem()[2], MSE, growth=growth)


@pytest.mark.parametrize("total_steps", [0, -3])
def test_total_steps_are_positive(total_steps):
    with pytest.raises(ValueError, match=f"positive, or None, got {total_steps}"):
        controller_of(linear_problem()[2], MSE, total_steps=total_steps)


@pytest.mark.parametrize("batch_size", [0, 129])
def test_the_batch_is_of_the_data_set(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must lie in \[1, 128\], got {batch_size}"):
        controller_of(linear_problem()[2], MSE, batch_size=batch_size, dataset_size=128)


def test_a_criterion_in_place_of_a_loss_is_refused_at_once():
    with pytest.raises(TypeError, match=r"got the criterion MSELoss, .*batchlr\.supervised"):
        controller_of(linear_problem()[2], nn.MSELoss())


def test_only_a_scheduler_with_a_peak_can_be_steered():
    optimizer = linear_problem()[1]
    for other in (optimizer, CosineAnnealingLR(optimizer, 10)):
        words = f"scheduler must be a BatchAwareLR, got {type(other).__name__}; make one: "
        with pytest.raises(TypeError, match=words):
            controller_of(other, MSE)


def test_a_loss_without_its_tensor_is_refused():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, dataset_size=128)
    controller.maybe_update(model, batches)
    with pytest.raises(TypeError, match=r"must be a tensor \(\), got float: pass it without item"):
        controller.observe(0.5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_of_another_model_is_refused(kind):
    scheduler = linear_problem(kind)[2]
    model, _, _, batches = linear_problem()
    with pytest.raises(
        ValueError, match=r"none of the model's 2 trainable .* model\.parameters\(\)"
    ):
        controller_of(scheduler, MSE, dataset_size=128).maybe_update(model, batches)


@pytest.mark.parametrize("max_overhead", [-0.1, math.nan, math.inf])
def test_the_budget_is_a_finite_share(max_overhead):
    with pytest.raises(
        ValueError, match=f"max_overhead must be finite and at least 0.*{max_overhead}"
    ):
        controller_of(linear_problem()[2], MSE, max_overhead=max_overhead)


def test_rmsprop_s_momentum_is_not_adjusted():
    scheduler = linear_problem(torch.optim.RMSprop)[2]
    with pytest.raises(ValueError, match="adjust_momentum needs SGD or Adam, got RMSprop, which"):
        controller_of(scheduler, MSE, adjust_momentum=True)


def test_an_optimizer_without_a_theory_is_refused_at_the_first_measurement():
    model, _, _, batches = linear_problem()
    scheduler = BatchAwareLR(torch.optim.Adagrad(model.parameters(), lr=1.0), 0.1)
    with pytest.raises(ValueError, match="known for SGD, Adam, AdamW and RMSprop, got Adagrad"):
        controller_of(scheduler, MSE).maybe_update(model, batches)


def test_a_data_set_smaller_than_its_samples_is_refused():
    model, _, scheduler, batches = linear_problem()
    controller = controller_of(scheduler, MSE, dataset_size=100)
    with pytest.raises(ValueError, match="dataset_size must be at least the 128 samples given"):
        controller.maybe_update(model, batches)


@pytest.mark.parametrize("policy", ["paper_sgd", "heavy_ball"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_policy_with_a_momentum_is_for_sgd(kind, policy):
    scheduler = linear_problem(kind)[2]
    words = f"policy {policy} gives a rate and a momentum for SGD, got {kind.__name__}: use SGD, or"
    with pytest.raises(ValueError, match=words):
        controller_of(scheduler, MSE, policy=policy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"policy": "best"},
            "policy must be one of mean_square, edge, heavy_ball, cdat, paper_sgd, .*, got 'best'",
        ),
        (
            {"policy": "paper_sgd", "safety": 0.5},
            "policy paper_sgd is applied as published: safety must be 1, got 0.5",
        ),
        (
            {"policy": "paper_sgd", "adjust_momentum": True},
            "policy paper_sgd sets the momentum itself: leave adjust_momentum False",
        ),
        ({"every_steps": 0}, "every_steps must be at least 1, or None, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        controller_of(linear_problem()[2], MSE, **options)


def test_the_rule_is_the_caller_s_choice():
    problem = linear_problem()
    model, _, scheduler, batches = problem
    controller = controller_of(
        scheduler, MSE, dataset_size=128, rule="mean-square", policy="mean_square"
    )
    update = controller.maybe_update(model, batches)
    assert update.bound == update.report.max_lr(BATCH, rule="mean-square")
