"""Peaks change exactly and runs resume bit for bit, whatever the shape."""

import copy
import io
import json
import math
import pickle
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from batchlr.curvature_noise import CurvatureNoise
from batchlr.curvature_report import CurvatureReport
from batchlr.measured import Measured
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.schedulers import BatchAwareLR, _as_in
from reports import projected_curvature

STEPS = 20


def half_life(step):
    return 0.5 ** (step / 4)


def sequential(optimizer):
    warm_up = LinearLR(optimizer, 0.1, 1.0, total_iters=5)
    return SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, STEPS - 5)], [5])


def chained(optimizer):
    return ChainedScheduler([LinearLR(optimizer, 0.1, 1.0, 5), ExponentialLR(optimizer, 0.9)])


def warm_up_then_steps(optimizer):
    warm_up = LinearLR(optimizer, 0.1, 1.0, total_iters=10)
    return SequentialLR(optimizer, [warm_up, MultiStepLR(optimizer, [2, 5])], [10])


SHAPES = {
    "constant": None,
    "cosine_to_a_floor": lambda o: CosineAnnealingLR(o, STEPS, eta_min=0.1),
    "warm_up_then_cosine": sequential,
    "one_cycle": lambda o: OneCycleLR(o, 1.0, total_steps=STEPS + 1),
    "warm_restarts": lambda o: CosineAnnealingWarmRestarts(o, 7),
    "lambda": lambda o: LambdaLR(o, half_life),
    "multi_step": lambda o: MultiStepLR(o, [5, 10]),
    "chained": chained,
    "polynomial": lambda o: PolynomialLR(o, STEPS, power=2.0),
}


def make_optimizer(rates=(0.2,), kind=torch.optim.SGD, *, tensor=False):
    """One parameter group per rate; each parameter has a gradient, so that steps do something."""
    groups = []
    for rate in rates:
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.full((2,), 0.5)
        groups.append({"params": [weight], "lr": torch.tensor(rate) if tensor else rate})
    return kind(groups)


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def run(optimizer, scheduler, steps):
    """The rates used at each of ``steps`` steps of a correct loop."""
    used = []
    for _ in range(steps):
        used.append(rates_of(optimizer))
        assert [float(rate) for rate in scheduler.get_last_lr()] == used[-1]
        optimizer.step()
        scheduler.step()
    return used


def saved(state):
    """``state`` through a file that may hold tensors and plain data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
all_kinds = pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
all_groups = pytest.mark.parametrize("rates", [(0.2,), (0.2, 0.02)], ids=["1group", "2groups"])
ROUNDING = {False: 1e-14, True: 1e-6}  # of a rate kept as a float, or as a float32 tensor


# --- the rates -----------------------------------------------------------------------------------


@all_shapes
@all_kinds
@all_groups
def test_rates_are_those_of_the_torch_scheduler_at_that_peak(shape, tensor, rates):
    optimizer = make_optimizer(rates, tensor=tensor)
    used = run(optimizer, BatchAwareLR(optimizer, peak=1.0, shape=shape), STEPS)
    plain = make_optimizer((1.0,))
    scheduler = LambdaLR(plain, lambda _: 1.0) if shape is None else shape(plain)
    reference = [rate for (rate,) in run(plain, scheduler, STEPS)]
    for group, rate in enumerate(rates):
        want = [r * rate / max(rates) for r in reference]
        assert [u[group] for u in used] == pytest.approx(want, rel=ROUNDING[tensor], abs=1e-15)


@all_shapes
@all_kinds
@all_groups
@pytest.mark.parametrize("change_at", [0, 3, 7, STEPS - 1])
def test_a_changed_peak_scales_all_later_rates_and_nothing_else(shape, tensor, rates, change_at):
    optimizer = make_optimizer(rates, tensor=tensor)
    reference = run(optimizer, BatchAwareLR(optimizer, peak=0.5, shape=shape), STEPS)
    optimizer = make_optimizer(rates, tensor=tensor)
    scheduler = BatchAwareLR(optimizer, peak=0.5, shape=shape)
    used = run(optimizer, scheduler, change_at)
    scheduler.set_peak(0.125)
    used += run(optimizer, scheduler, STEPS - change_at)
    factors = [1.0 if step < change_at else 0.25 for step in range(STEPS)]  # a power of 2: exact
    assert used == [[f * rate for rate in old] for f, old in zip(factors, reference, strict=True)]


def test_a_new_peak_takes_effect_at_once():
    optimizer = make_optimizer((0.2, 0.05))
    scheduler = BatchAwareLR(optimizer, peak=1.0, shape=sequential)
    scheduler.set_peak(3.0)
    assert scheduler.peak == 3.0
    assert rates_of(optimizer) == pytest.approx([0.3, 0.075], rel=1e-15)
    assert scheduler.get_last_lr() == rates_of(optimizer)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [3.0, 0.75]
    assert scheduler.base_lrs == [3.0, 0.75]
    assert scheduler.multipliers == pytest.approx([0.1, 0.1])


def test_a_tensor_rate_stays_the_same_tensor():
    optimizer = make_optimizer((0.2,), torch.optim.AdamW, tensor=True)
    rate = optimizer.param_groups[0]["lr"]
    scheduler = BatchAwareLR(optimizer, peak=1.0, shape=sequential)
    run(optimizer, scheduler, 3)
    scheduler.set_peak(0.5)
    scheduler.load_state_dict(scheduler.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate  # what compiled and captured steps hold on to


def test_the_optimizer_s_own_rates_only_give_the_ratios():
    for rates in ((1.0, 0.25, 0.0), (4e-3, 1e-3, 0.0)):
        optimizer = make_optimizer(rates)
        BatchAwareLR(optimizer, peak=0.8)
        assert rates_of(optimizer) == pytest.approx([0.8, 0.2, 0.0], rel=1e-15)


def test_momentum_is_left_to_the_optimizer():
    optimizer = make_optimizer()
    optimizer.param_groups[0]["momentum"] = 0.7
    scheduler = BatchAwareLR(optimizer, peak=0.1, shape=SHAPES["one_cycle"])
    run(optimizer, scheduler, 5)
    assert optimizer.param_groups[0]["momentum"] == 0.7


def test_it_is_a_torch_scheduler():
    optimizer = make_optimizer()
    scheduler = BatchAwareLR(optimizer, peak=0.1)
    assert isinstance(scheduler, LRScheduler)
    assert scheduler.optimizer is optimizer
    assert scheduler.last_epoch == 0
    run(optimizer, scheduler, 3)
    assert scheduler.last_epoch == 3


def test_stepping_before_the_optimizer_warns_as_torch_does():
    scheduler = BatchAwareLR(make_optimizer(), peak=0.1, shape=sequential)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()


# --- resuming ------------------------------------------------------------------------------------


@all_shapes
@all_kinds
@all_groups
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_resumed_run_goes_on_bit_for_bit(shape, tensor, rates, optimizer_first):
    def build():
        optimizer = make_optimizer(rates, torch.optim.AdamW, tensor=tensor)
        return optimizer, BatchAwareLR(optimizer, peak=0.3, shape=shape, batch_size=32)

    optimizer, scheduler = build()
    run(optimizer, scheduler, 3)
    scheduler.set_peak(0.7)
    run(optimizer, scheduler, 5)
    weights = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    states = saved({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    expected = run(optimizer, scheduler, STEPS - 8)

    resumed, resumed_scheduler = build()
    for group, weight in zip(resumed.param_groups, weights, strict=True):
        group["params"][0].data.copy_(weight)
    parts = {"optimizer": resumed, "scheduler": resumed_scheduler}
    for name in sorted(parts, reverse=not optimizer_first):
        parts[name].load_state_dict(states[name])
    assert rates_of(resumed) == expected[0]  # before any step
    assert resumed_scheduler.peak == 0.7
    assert run(resumed, resumed_scheduler, STEPS - 8) == expected
    for ours, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


@all_shapes
def test_the_state_is_plain_data_and_does_not_change_later(shape):
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(plain(v) for v in value)
        return value is None or type(value) in (bool, int, float, str)

    optimizer = make_optimizer()
    scheduler = BatchAwareLR(optimizer, peak=0.3, shape=shape)
    run(optimizer, scheduler, 4)
    state = scheduler.state_dict()
    before = copy.deepcopy(state)
    run(optimizer, scheduler, 8)
    assert plain(state)
    assert state == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_goes_on_with_its_own_optimizer(copied, name):
    optimizer = make_optimizer((0.2, 0.02))
    scheduler = BatchAwareLR(optimizer, peak=0.3, shape=SHAPES[name])
    run(optimizer, scheduler, 6)
    twin = copied(scheduler)
    twin.set_peak(0.6)
    assert scheduler.peak == 0.3  # the original does not notice
    expected = [[2 * rate for rate in used] for used in run(optimizer, scheduler, 9)]
    for parameter in (p for group in twin.optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros(2)
    assert run(twin.optimizer, twin, 9) == expected


# --- another batch size --------------------------------------------------------------------------


def make_report(**changes):
    report = CurvatureReport(
        largest=Measured(2.0, 0.1),
        smallest=Measured(-0.5, 0.1),
        noise=CurvatureNoise(Measured(6.0, 0.5), Measured(10.0, 0.5), Measured(math.nan)),
        kappa=6.0,
        kappa_smallest=-1.0,
        ritz_values=(2.0, -0.5),
        ritz_weights=(),
        trace=Measured(math.nan),
        ggn_along_top=Measured(math.nan),
        loss=1.0,
        num_params=10,
        num_samples=1000,
        num_batches=10,
        batch_size=100,
        dataset_size=10_000,
        small_batch=None,
        matrix="hessian",
        norm_mode=None,
        coupled=False,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        adam=None,
        converged=True,
        num_products=20,
        seconds=0.1,
        projected=projected_curvature([2.0, -0.5], {(0, 0): 6.0, (0, 1): 10.0}),
    )
    return replace(report, **changes)


ADAM = AdamCurvature(
    largest=Measured(50.0, 1.0),
    parallel=Measured(900.0, 50.0),
    orthogonal=Measured(1600.0, 50.0),
    batch_size=100,
    beta1=0.9,
    decoupled_decay=0.0,
    converged=True,
    source="gradients",
    batch_sizes=(1.0, 100.0, 10_000.0),
    projected=projected_curvature([50.0], {(0, 0): 2500.0}),
    metrics=np.array([10.0, 1.0, 0.5]).reshape(-1, 1, 1),
    optimism=(1.0,) * 3,
)


@pytest.mark.parametrize(("rule", "peak"), [("linear", 0.8), ("sqrt", 0.4), ("none", 0.2)])
def test_a_named_rule_carries_the_peak_to_another_batch_size(rule, peak):
    optimizer = make_optimizer((0.2, 0.02))
    scheduler = BatchAwareLR(optimizer, peak=0.2, shape=sequential, batch_size=64)
    used = run(optimizer, scheduler, 2)[-1]
    scheduler.set_batch_size(256, rule=rule)
    assert (scheduler.peak, scheduler.batch_size) == (pytest.approx(peak, rel=1e-15), 256)
    assert rates_of(optimizer)[1] == pytest.approx(rates_of(optimizer)[0] / 10, rel=1e-14)
    assert rates_of(optimizer)[0] > used[0]  # the shape goes on from where it was


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (torch.optim.SGD, "sgd"),
        (torch.optim.Adam, "adam"),
        (torch.optim.AdamW, "adam"),
        (torch.optim.RMSprop, "rmsprop"),
    ],
)
def test_a_report_carries_the_peak_as_its_own_limit_of_the_optimizer(kind, name):
    report = make_report(adam=ADAM)
    optimizer = make_optimizer((1.0,), kind)
    scheduler = BatchAwareLR(optimizer, peak=0.01, batch_size=32)
    scheduler.set_batch_size(512, report=report)
    own = {"optimizer": name, "momentum": 0.9 if name == "adam" else 0.0}
    old, new = (report.max_lr(size, **own).value for size in (32, 512))
    assert scheduler.peak == pytest.approx(0.01 * new / old, rel=1e-15)
    other = "adam" if name == "sgd" else "sgd"
    scheduler.set_batch_size(32, report=report, optimizer=other)
    old, new = (report.max_lr(size, optimizer=other).value for size in (512, 32))
    assert rates_of(optimizer)[0] == scheduler.peak
    assert scheduler.batch_size == 32
    assert scheduler.peak != pytest.approx(0.01)  # the two optimizers have different laws


def test_a_report_without_momentum_is_read_at_the_optimizer_s():
    report = make_report(momentum=0.0)
    optimizer = make_optimizer()
    optimizer.param_groups[0]["momentum"] = 0.9
    scheduler = BatchAwareLR(optimizer, peak=0.01, batch_size=32)
    scheduler.set_batch_size(512, report=report)
    old, new = (report.max_lr(size, momentum=0.9).value for size in (32, 512))
    assert scheduler.peak == pytest.approx(0.01 * new / old, rel=1e-15)
    plain = [report.max_lr(size).value for size in (32, 512)]
    assert new / old > 2 * plain[1] / plain[0]


def test_there_and_back_again_is_the_same_peak():
    scheduler = BatchAwareLR(make_optimizer(), peak=0.1, batch_size=32)
    for size in (512, 32):
        scheduler.set_batch_size(size, report=make_report())
    assert scheduler.peak == pytest.approx(0.1, rel=1e-14)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [0.0, -1.0, math.inf, math.nan])
def test_a_peak_must_be_positive_and_finite(peak):
    with pytest.raises(ValueError, match=f"peak must be positive and finite, got {peak}"):
        BatchAwareLR(make_optimizer(), peak=peak)
    scheduler = BatchAwareLR(make_optimizer(), peak=0.5)
    with pytest.raises(ValueError, match=f"peak must be positive and finite, got {peak}"):
        scheduler.set_peak(peak)
    with pytest.raises(ValueError, match=f"factor must be positive and finite, got {peak}"):
        scheduler.rescale(peak, batch_size=64)
    assert scheduler.peak == 0.5


def test_rates_that_are_all_zero_give_no_ratios():
    with pytest.raises(ValueError, match=r"rates \[0.0, 0.0\] give no ratios .* any positive"):
        BatchAwareLR(make_optimizer((0.0, 0.0)), peak=0.1)


def test_steps_are_counted_not_given():
    scheduler = BatchAwareLR(make_optimizer(), peak=0.1)
    with pytest.raises(ValueError, match=r"counts its own steps; call .* without an epoch, got 3"):
        scheduler.step(3)


def test_it_may_come_second_in_a_sequence():
    optimizer = make_optimizer()
    cosine = BatchAwareLR(optimizer, 0.5, lambda o: CosineAnnealingLR(o, 10))
    sequence = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 3), cosine], [3])
    alone = make_optimizer()
    expected = run(alone, BatchAwareLR(alone, 0.5, lambda o: CosineAnnealingLR(o, 10)), 8)
    assert run(optimizer, sequence, 11)[3:] == expected


def test_the_step_that_old_sequences_count_is_the_next_one():
    optimizer = make_optimizer()
    scheduler = BatchAwareLR(optimizer, 0.5, lambda o: CosineAnnealingLR(o, 10))
    optimizer.step()
    scheduler.step(1)
    assert scheduler.last_epoch == 1
    assert rates_of(optimizer)[0] == pytest.approx(0.25 * (1 + math.cos(math.pi / 10)))


@pytest.mark.parametrize("shape", [*SHAPES.values(), warm_up_then_steps])
@pytest.mark.parametrize("through", [saved, lambda state: json.loads(json.dumps(state))])
def test_a_state_goes_through_files_of_either_kind(shape, through):
    optimizer = make_optimizer()
    scheduler = BatchAwareLR(optimizer, 0.3, shape)
    run(optimizer, scheduler, 3)
    state = through(scheduler.state_dict())
    resumed = make_optimizer()
    other = BatchAwareLR(resumed, 0.3, shape)
    other.load_state_dict(state)
    assert run(resumed, other, STEPS - 3) == run(optimizer, scheduler, STEPS - 3)


def test_a_batch_size_cannot_change_from_an_unknown_one():
    scheduler = BatchAwareLR(make_optimizer(), peak=0.1)
    with pytest.raises(ValueError, match="present batch size is unknown: construct with"):
        scheduler.set_batch_size(64, rule="linear")


def test_a_batch_size_changes_by_a_report_or_a_rule():
    scheduler = BatchAwareLR(make_optimizer(), peak=0.1, batch_size=32)
    with pytest.raises(ValueError, match="pass either a measured report or a rule"):
        scheduler.set_batch_size(64)
    with pytest.raises(ValueError, match="pass either a measured report or a rule"):
        scheduler.set_batch_size(64, report=make_report(), rule="linear")
    with pytest.raises(ValueError, match="rule must be one of"):
        scheduler.set_batch_size(64, rule="cubic")
    with pytest.raises(ValueError, match="Adam's curvature was not measured"):
        scheduler.set_batch_size(64, report=make_report(), optimizer="adam")
    assert (scheduler.peak, scheduler.batch_size) == (0.1, 32)


def test_a_state_of_another_number_of_groups_is_refused():
    state = BatchAwareLR(make_optimizer((1.0, 0.1)), peak=0.1).state_dict()
    scheduler = BatchAwareLR(make_optimizer(), peak=0.2)
    with pytest.raises(ValueError, match="state has 2 parameter groups, the optimizer 1"):
        scheduler.load_state_dict(state)
    assert scheduler.peak == 0.2


def test_a_state_with_a_shape_needs_a_scheduler_with_one():
    bare = BatchAwareLR(make_optimizer(), peak=0.1)
    shaped = BatchAwareLR(make_optimizer(), peak=0.2, shape=sequential)
    with pytest.raises(ValueError, match="only the state has a shape"):
        bare.load_state_dict(shaped.state_dict())
    with pytest.raises(ValueError, match="only this scheduler has a shape"):
        shaped.load_state_dict(bare.state_dict())
    assert (bare.peak, shaped.peak) == (0.1, 0.2)


def test_a_scheduler_in_place_of_its_maker_is_refused():
    optimizer = make_optimizer()
    shape = CosineAnnealingLR(make_optimizer(), STEPS)
    words = r"a function that makes the scheduler, got a CosineAnnealingLR: pass lambda o: Cosine"
    with pytest.raises(TypeError, match=words):
        BatchAwareLR(optimizer, 1.0, shape)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_dict_with_a_default_comes_back_as_one():
    own = defaultdict(int, {1: 2})
    restored = _as_in(own, {"1": 3})
    assert (dict(restored), restored["none"], own) == ({1: 3}, 0, {1: 2})
