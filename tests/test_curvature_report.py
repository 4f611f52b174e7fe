"""What a report claims: its formulas, its intervals, its warnings, and stability itself."""

import functools
import itertools
import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import t as student
from torch import nn
from torch.func import functional_call, grad, vmap

from batchlr.curvature import measure_curvature
from batchlr.curvature_noise import CurvatureNoise
from batchlr.curvature_report import CurvatureReport
from batchlr.learning_rates import max_adam_lr, max_sgd_lr
from batchlr.mean_square import Dynamics
from batchlr.measured import Measured
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.operators import supervised
from reports import projected_curvature

SIZES = np.geomspace(1, 1e4, 41)
EVERY_SAMPLE = {"num_batches": 10_000, "batch_size": 1}  # the noise is known, not estimated
STRETCH = (0.1 + 90 / SIZES) ** 0.5  # 1 at 100; eps and noise


def in_two_directions(stretch):
    """Metrics that stretch the first axis as given and the second one as much."""
    return np.einsum("g,ij->gij", stretch, np.eye(2))


ADAM = AdamCurvature(
    largest=Measured(50.0, 1.5),
    parallel=Measured(900.0, 50.0),
    orthogonal=Measured(1600.0, 40.0),
    batch_size=100,
    beta1=0.8,
    decoupled_decay=0.0,
    converged=True,
    source="gradients",
    batch_sizes=tuple(SIZES),
    projected=projected_curvature(
        [50.0, 20.0],
        {(0, 0): 900.0, (0, 1): 1200.0},
        num_batches=50,
        leak_largest=Measured(400.0, 20.0),
    ),
    metrics=in_two_directions(STRETCH),
    optimism=(1.0,) * len(SIZES),
)

# Variances of a sample that agree with `make_report`: 60 along the top, 100 across, kappa = 80.
PROJECTED = projected_curvature(
    [2.0, 1.0, -0.5],
    {(0, 0): 60.0, (0, 1): 60.0, (1, 1): 3.0},
    num_batches=50,
    leak_largest=Measured(40.0, 4.0),
    leak_smallest=Measured(5.0, 0.5),
)


def make_report(**changes):
    report = CurvatureReport(
        largest=Measured(2.0, 0.1),
        smallest=Measured(-0.5, 0.02),
        noise=CurvatureNoise(Measured(60.0, 5.0), Measured(100.0, 4.0), Measured(1.5, 0.1)),
        kappa=80.0,
        kappa_smallest=-10.0,
        ritz_values=(2.0, 1.0, -0.5),
        ritz_weights=(0.2, 0.5, 0.3),
        trace=Measured(12.0, 0.5),
        ggn_along_top=Measured(1.9, 0.3),
        loss=1.0,
        num_params=10,
        num_samples=5000,
        num_batches=50,
        batch_size=100,
        dataset_size=10_000,
        small_batch=None,
        matrix="hessian",
        norm_mode=None,
        coupled=False,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        adam=ADAM,
        converged=True,
        num_products=20,
        seconds=0.125,
        projected=PROJECTED,
    )
    return replace(report, **changes)


def test_the_made_report_agrees_with_itself():
    report = make_report()
    projected = report.projected
    assert projected.second_order() == pytest.approx(report.kappa)
    assert projected.second_order("smallest") == pytest.approx(report.kappa_smallest)
    across = (projected.deviations[:, 0] ** 2).sum(0)
    assert across[0] == pytest.approx(report.noise.parallel)
    assert across[1:].sum() + projected.leak_largest == pytest.approx(report.noise.orthogonal)


def one_direction(**changes):
    """A report whose noise has all of its variance along the top: there the formula is exact."""
    flat = projected_curvature([2.0], {(0, 0): 160.0}, **EVERY_SAMPLE)
    return make_report(projected=flat, **changes)


def second_order_report(**changes):
    """Noise that leaves all measured directions: there the second order is all there is."""
    flat = projected_curvature(
        [2.0, -0.5], {}, leak_largest=Measured(160.0, 0.0), leak_smallest=Measured(5.0, 0.0)
    )
    return make_report(projected=flat, **changes)


@st.composite
def reports(draw):
    """Reports of positive curvature with any amount of noise."""
    largest = draw(st.floats(1e-3, 1e3))
    second = draw(st.floats(0, 1.0))
    variances = {
        entry: draw(st.floats(0, 1e4)) * largest**2 for entry in ((0, 0), (0, 1), (1, 1), (2, 2))
    }
    leaks = [Measured(draw(st.floats(0, 1e4)) * largest**2, 0.0) for _ in range(2)]
    smallest = -draw(st.just(0.0) | st.floats(1e-6, 1)) * largest
    projected = projected_curvature(
        [largest, second * largest, min(smallest, second * largest)],
        variances,
        leak_largest=leaks[0],
        leak_smallest=leaks[1],
        seed=draw(st.integers(0, 100)),
    )
    small = draw(st.none() | st.floats(1, 1e3))
    return make_report(
        largest=Measured(largest, 0.1 * largest),
        noise=CurvatureNoise(
            Measured(variances[0, 0]), Measured(variances[0, 1] + leaks[0]), Measured(math.nan)
        ),
        kappa=projected.second_order(),
        smallest=Measured(smallest, 0.0),
        kappa_smallest=projected.second_order("smallest"),
        small_batch=None if small is None else (4, Measured(small * largest, 0.1 * largest)),
        dataset_size=draw(st.sampled_from([10_000, 2**31])),
        weight_decay=draw(st.sampled_from([0.0, 0.1 * largest])),
        momentum=draw(st.sampled_from([0.0, 0.9])),
        projected=projected,
    )


# --- the formulas --------------------------------------------------------------------------------


each_size = pytest.mark.parametrize("batch_size", [1, 32, 500, 10_000])


@each_size
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.5}, {"nesterov": True}])
def test_the_top_direction_s_rule_is_the_closed_form(batch_size, momentum, changes):
    report = make_report(**changes)
    noise = 160.0 * (1 / batch_size - 1e-4) / 2.0
    want = max_sgd_lr(2.0, noise, momentum=momentum, **changes)
    limit = report.max_lr(batch_size, momentum=momentum, rule="top-direction")
    assert limit.value == float(limit) == pytest.approx(want, rel=1e-14)
    assert (limit.batch_size, limit.optimizer, limit.momentum, limit.rule) == (
        batch_size,
        "sgd",
        momentum,
        "top-direction",
    )


@each_size
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_by_default_one_direction_has_the_closed_form_of_its_optimizer(
    batch_size, momentum, nesterov
):
    noise = 160.0 * (1 / batch_size - 1e-4) / 2.0
    want = max_sgd_lr(2.0, noise, momentum=momentum, nesterov=nesterov)
    limit = one_direction(nesterov=nesterov).max_lr(batch_size, momentum=momentum)
    assert limit.value == pytest.approx(want, rel=1e-8)  # of the search
    assert limit.rule == "mean-square"


@each_size
@pytest.mark.parametrize("changes", [{}, {"nesterov": True}, {"weight_decay": 0.5}])
def test_by_default_all_measured_directions_count_together(batch_size, changes):
    report = make_report(momentum=0.9, **changes)
    dynamics = Dynamics(0.9, **changes)
    inverse = 1 / batch_size - 1e-4
    want = report.projected.mean_square(dynamics, inverse, largest=2.0, population=10_000)
    assert report.max_lr(batch_size).value == want.lr
    # Directions that noise couples to the top hold the rate below that of the top's own noise.
    plain = report.projected.mean_square(
        dynamics, inverse, largest=2.0, population=10_000, with_error=False
    )
    alone = max_sgd_lr(2.0, 60.0 * inverse / 2, momentum=0.9, **changes)
    tolerance = 0.1 if "weight_decay" in changes else 1e-8  # there the formula is on the safe side
    assert plain.lr <= alone * (1 + tolerance)
    assert want.lr == pytest.approx(plain.lr, rel=0.1)  # corrected for what 50 batches know


@each_size
def test_adam_s_top_direction_is_that_of_the_stretched_metric(batch_size):
    stretch = (0.1 + 90 / batch_size) ** 0.5
    noise = 2500 * (1 / batch_size - 1e-4) / (50 * stretch)
    limit = make_report().max_lr(batch_size, optimizer="adam", rule="top-direction")
    want = max_adam_lr(50 / stretch, noise, beta1=0.8)
    assert limit.value == pytest.approx(want, rel=1e-3)  # interpolated
    assert limit.momentum == 0.8


def one_direction_of_adam(**changes):
    flat = projected_curvature([50.0], {(0, 0): 2500.0}, **EVERY_SAMPLE)
    return replace(ADAM, projected=flat, metrics=STRETCH.reshape(-1, 1, 1), **changes)


@each_size
@pytest.mark.parametrize("decay", [0.0, 2.0])
@pytest.mark.parametrize("rule", ["mean-square", "top-direction"])
def test_adamw_s_limit_along_one_direction_is_its_closed_form(batch_size, decay, rule):
    stretch = (0.1 + 90 / batch_size) ** 0.5
    noise = 2500 * (1 / batch_size - 1e-4) / (50 * stretch)
    report = make_report(adam=one_direction_of_adam(decoupled_decay=decay))
    limit = report.max_lr(batch_size, optimizer="adam", rule=rule)
    want = max_adam_lr(50 / stretch, noise, beta1=0.8, weight_decay=decay)
    assert limit.value == pytest.approx(want, rel=1e-3)  # interpolated


@each_size
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", ["mean-square", "top-direction"])
def test_rmsprop_s_limit_is_sgd_s_in_adam_s_metric(batch_size, momentum, rule):
    stretch = (0.1 + 90 / batch_size) ** 0.5
    noise = 2500 * (1 / batch_size - 1e-4) / (50 * stretch)
    report = make_report(adam=one_direction_of_adam())
    limit = report.max_lr(batch_size, optimizer="rmsprop", momentum=momentum, rule=rule)
    want = max_sgd_lr(50 / stretch, noise, momentum=momentum)
    assert limit.value == pytest.approx(want, rel=1e-3)  # interpolated
    for adam in (ADAM, one_direction_of_adam()):
        report = make_report(adam=adam)
        rmsprop, average = (
            report.max_lr(batch_size, optimizer=name, momentum=momentum, rule=rule)
            for name in ("rmsprop", "adam")
        )
        # A sum of gradients is 1 / (1 - momentum) times their average: a factor, and no more.
        assert rmsprop.value == pytest.approx((1 - momentum) * average.value, rel=1e-8)
        assert rmsprop.exponent == pytest.approx(average.exponent, abs=1e-6)
        assert (rmsprop.regime, rmsprop.reasons) == (average.regime, average.reasons)
        assert rmsprop.high / rmsprop.low == pytest.approx(average.high / average.low, rel=1e-6)
    assert limit.optimizer == "rmsprop"


def test_rmsprop_s_paper_rule_is_adam_s():
    report = make_report()
    adam, rmsprop = (report.max_lr(40, optimizer=o, rule="paper") for o in ("adam", "rmsprop"))
    assert rmsprop == replace(adam, optimizer="rmsprop", momentum=0.0)


@each_size
def test_the_paper_s_rules_divide_by_the_batch_s_largest_eigenvalue(batch_size):
    report = second_order_report(weight_decay=0.5)
    largest = 2 + 80 * (1 / batch_size - 1e-4)
    assert report.largest_at(batch_size) == pytest.approx(largest, rel=1e-14)
    sgd, adam = (
        report.max_lr(batch_size, optimizer=name, rule="paper") for name in ("sgd", "adam")
    )
    assert sgd.value == pytest.approx(2 / (largest + 0.5), rel=1e-14)
    assert adam.value == pytest.approx(2 / math.sqrt(largest), rel=1e-14)


def test_momentum_is_by_default_that_measured_with():
    measured = make_report(momentum=0.7)
    assert measured.max_lr(32).momentum == 0.7
    assert measured.max_lr(32, optimizer="adam").momentum == 0.8
    assert measured.max_lr(32, optimizer="adam", momentum=0.5).momentum == 0.5
    without = make_report(momentum=0.7, adam=None)
    assert without.max_lr(32, optimizer="adam", rule="paper").momentum == 0.9
    assert measured.max_lr(32, optimizer="rmsprop").momentum == 0.0
    rmsprop = make_report(adam=replace(ADAM, optimizer="rmsprop"))
    assert rmsprop.max_lr(32, optimizer="rmsprop").momentum == 0.8
    assert rmsprop.max_lr(32, optimizer="adam").momentum == 0.9


def test_a_bound_is_frozen_and_is_its_value():
    limit = make_report().max_lr(32)
    assert 2 * float(limit) == 2 * limit.value
    with pytest.raises(FrozenInstanceError):
        limit.value = 1.0


# --- the law between batch sizes -----------------------------------------------------------------


@given(report=reports())
def test_the_critical_size_is_where_the_second_order_doubles_the_largest_eigenvalue(report):
    critical = report.critical_batch_size
    assert 0 <= critical < report.dataset_size
    if critical >= 1:
        inverse = report.inverse_effective_batch_size(critical)
        assert report.kappa * inverse == pytest.approx(report.largest, rel=1e-9)


def test_the_paper_s_rate_at_the_critical_size_is_one_over_the_largest_eigenvalue():
    report = second_order_report()
    limit = report.max_lr(report.critical_batch_size, rule="paper")
    assert limit.value == pytest.approx(1 / report.largest, rel=1e-12)
    assert report.critical_batch_size == pytest.approx(40 / (1 + 40 / 10_000), rel=1e-14)


@settings(max_examples=40, deadline=None)
@given(report=reports(), small=st.integers(1, 10_000), factor=st.floats(1, 100))
def test_larger_batches_have_less_extreme_curvature_and_larger_rates(report, small, factor):
    large = min(round(small * factor), 10_000)
    slack = 1e-12 * report.largest_at(1)
    assert report.largest - slack <= report.largest_at(large) <= report.largest_at(small) + slack
    assert report.smallest_at(small) - slack <= report.smallest_at(large)
    assert report.smallest_at(large) <= report.smallest + slack
    for rule, accuracy in (("mean-square", 1e-8), ("top-direction", 1e-12), ("paper", 1e-12)):
        rates = [report.max_lr(size, rule=rule).value for size in (small, large)]
        assert rates[0] <= rates[1] * (1 + accuracy)


def test_where_the_wigner_edge_sets_in_the_lower_end_does_not_jump():
    noise = {(2, 2): 10.0, (1, 2): 3.0, (1, 1): 40.0}
    projected = projected_curvature([1.0, 0.0, -1.0], noise, leak_smallest=Measured(2.0, 0.0))
    report = make_report(
        largest=Measured(1.0, 0.1),
        smallest=Measured(-1.0, 0.0),
        projected=projected,
        kappa_smallest=projected.second_order("smallest"),
    )
    sizes = np.unique(np.geomspace(1, 10_000, 200).astype(int))
    smallest = [report.smallest_at(int(size)) for size in sizes]
    assert np.all(np.diff(smallest) >= 0)


def test_far_above_the_critical_size_the_law_is_the_second_order():
    report = make_report(dataset_size=2**31)
    for size in (4_000, 40_000):
        shift = report.largest_at(size) - report.largest
        # 400 draws of a square: 7 %; and the next order, of the noise over the gap.
        assert shift == pytest.approx(80 / size, rel=0.2)


def test_below_the_batches_measured_the_excess_goes_to_that_of_small_batches():
    report = second_order_report(small_batch=(4, Measured(12.0, 0.5)))
    law = second_order_report()
    assert report.largest_at(100) == law.largest_at(100)  # that size itself
    assert report.largest_at(400) == law.largest_at(400)
    assert report.largest_at(99.999) == pytest.approx(law.largest_at(100), rel=1e-4)
    assert report.largest_at(4) == pytest.approx(12.0, rel=1e-12)
    assert report.largest_at(4).stderr == pytest.approx(math.hypot(0.5, 0.1), rel=1e-12)
    assert report.largest_at(20) == pytest.approx(
        2 + math.sqrt(10 * (law.largest_at(100) - 2)), rel=1e-12
    )  # the middle of a power law
    assert report.largest_at(1) == pytest.approx(2 + 10 * 2, rel=1e-12)  # like B^-1/2 below
    low = second_order_report(small_batch=(4, Measured(1.0, 0.5)))
    assert low.largest_at(4) == pytest.approx(law.largest_at(100))  # never below the law there
    median = report.largest_at(20, quantile=0.5)
    assert median == law.largest_at(20, quantile=0.5)  # small batches lead the mean alone


def test_batches_measured_as_small_as_the_small_ones_need_no_other():
    report = second_order_report(small_batch=(4, Measured(12.0, 0.5)), batch_size=4)
    assert report.largest_at(2) == second_order_report().largest_at(2)


def test_far_below_its_critical_size_the_lower_end_follows_the_wigner_edge():
    report = second_order_report()
    inverse = 1 / 5 - 1e-4  # critical: 20
    assert report.smallest_at(5) == pytest.approx(-2 * math.sqrt(0.5 * 10 * inverse), rel=1e-14)
    assert report.smallest_at(100) == pytest.approx(-0.5 - 10 * (1 / 100 - 1e-4), rel=1e-14)
    join = 1 / (0.05 + 1e-4)
    assert report.smallest_at(join * (1 - 1e-9)) == pytest.approx(-1.0, rel=1e-8)
    assert report.smallest_at(join * (1 + 1e-9)) == pytest.approx(-1.0, rel=1e-8)
    convex = make_report(
        smallest=Measured(0.25, 0.0),
        kappa_smallest=0.0,
        projected=projected_curvature([2.0, 0.25], {}, leak_largest=Measured(40.0, 4.0)),
    )
    assert convex.smallest_at(1) == 0.25


@pytest.mark.parametrize(("quantile", "deviations"), [(0.1587, -1), (0.5, 0), (0.8413, 1)])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_quantiles_of_an_extreme_that_noise_moves_alone_are_normal(end, quantile, deviations):
    """Noise of one axis, which neither neighbours repel nor other axes mix with."""
    axis = {"largest": 0, "smallest": 1}[end]
    flat = projected_curvature([2.0, -0.5], {(axis, axis): 16.0}, num_batches=50)
    report = make_report(projected=flat, kappa=0.0, kappa_smallest=0.0)
    function = report.largest_at if end == "largest" else report.smallest_at
    spread = math.sqrt(16.0 * (1 / 1000 - 1e-4))
    wanted = [2.0, -0.5][axis] + deviations * spread
    # Three standard errors of a quantile of 400 normal draws: 1.5 / sqrt(400).
    assert function(1000, quantile=quantile) == pytest.approx(wanted, abs=0.23 * spread)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, None])
def test_where_the_wigner_edge_sets_in_quantiles_do_not_jump(quantile):
    along = projected_curvature([2.0, -0.5], {(1, 1): 4.0}, leak_smallest=Measured(5.0, 0.5))
    report = make_report(projected=along, kappa_smallest=-10.0)
    join = 1 / (0.05 + 1e-4)
    below, above = (
        report.smallest_at(join * factor, quantile=quantile) for factor in (1 - 1e-9, 1 + 1e-9)
    )
    assert below == pytest.approx(above, rel=1e-7)


@settings(max_examples=40, deadline=None)
@given(report=reports(), size=st.integers(1, 10_000))
def test_quantiles_rise(report, size):
    for function in (report.largest_at, report.smallest_at):
        values = [function(size, quantile=q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)]
        slack = 1e-12 * max(abs(value) for value in values)
        assert all(a <= b + slack for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, math.nan])
def test_a_quantile_outside_zero_to_one_is_refused(quantile):
    for function in (make_report().largest_at, make_report().smallest_at):
        with pytest.raises(ValueError, match=rf"quantile must lie in \(0, 1\), got {quantile}"):
            function(32, quantile=quantile)


# --- exponent and regime -------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("batch_size", [1.5, 30, 300, 9000])
def test_nesterov_s_top_direction_has_exponent_interval_and_share_of_its_own(
    momentum, weight_decay, batch_size
):
    """Without momentum those of the heavy ball, which is the same; else those of differences."""
    options = {"momentum": momentum, "rule": "top-direction"}
    report = make_report(nesterov=True, weight_decay=weight_decay)
    limit = report.max_lr(batch_size, **options)
    assert limit.exponent == pytest.approx(
        numerical_exponent(report, batch_size, **options), abs=1e-4
    )
    assert limit.low < limit.value < limit.high
    if momentum == 0 and weight_decay == 0:
        plain = make_report().max_lr(batch_size, **options)
        assert (limit.low, limit.high) == pytest.approx((plain.low, plain.high), rel=1e-6)
        assert limit.regime == plain.regime


def numerical_exponent(report, batch_size, **options):
    low, high = batch_size * (1 - 1e-3), batch_size * (1 + 1e-3)
    rates = [report.max_lr(size, **options).value for size in (low, high)]
    return math.log(rates[1] / rates[0]) / math.log(high / low)


OPTIONS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "rule": "top-direction"},
    {"rule": "paper"},
    {"rule": "paper", "optimizer": "adam"},
    {"optimizer": "adam"},
    {"optimizer": "adam", "rule": "top-direction"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("batch_size", [1.5, 3, 7, 30, 300, 3000, 9000])
def test_the_exponent_is_the_slope_of_the_rate(options, weight_decay, batch_size):
    made = {"paper": second_order_report, "mean-square": one_direction}
    report = made.get(options.get("rule", "mean-square"), make_report)(weight_decay=weight_decay)
    exponent = report.max_lr(batch_size, **options).exponent
    # Some are differences over 10 % either way; Adam's of an interpolation.
    difference = "optimizer" in options or options.get("rule") == "paper"
    assert exponent == pytest.approx(
        numerical_exponent(report, batch_size, **options), abs=0.02 if difference else 1e-4
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [3, 300, 9000])
def test_the_exponent_is_nearly_that_of_a_rate_corrected_for_bias(momentum, batch_size):
    report = make_report()  # of 50 batches, and their correction of 1 %
    exponent = report.max_lr(batch_size, momentum=momentum).exponent
    slope = numerical_exponent(report, batch_size, momentum=momentum)
    assert exponent == pytest.approx(slope, abs=0.03)  # the correction varies with B, too


def test_rates_are_linear_in_small_batches_and_saturate_in_large_ones():
    tiny = projected_curvature([1e-3], {(0, 0): 160.0}, leak_largest=Measured(160.0, 0.0))
    flat = make_report(largest=Measured(1e-3, 0), dataset_size=2**31, projected=tiny)
    steep = make_report(dataset_size=2**31)
    for rule in ("mean-square", "top-direction", "paper"):
        small = flat.max_lr(1, rule=rule)
        assert small.exponent == pytest.approx(1, abs=5e-4)  # a difference of 1e-4
        assert small.regime == "noise"
        assert flat.max_lr(2, rule=rule).value == pytest.approx(2 * small.value, rel=1e-4)
        large = steep.max_lr(2**31, rule=rule)
        assert large.exponent == pytest.approx(0, abs=1e-6)
        assert large.regime == "curvature"
        assert large.value == pytest.approx(2 / 2.0, rel=1e-6)


def test_momentum_moves_the_linear_regime_to_larger_batches():
    report = make_report()
    plain, heavy = (report.max_lr(300, momentum=m) for m in (0.0, 0.9))
    assert plain.exponent < 1 / 3 < 2 / 3 < heavy.exponent
    assert (plain.regime, heavy.regime) == ("curvature", "noise")


def test_the_paper_s_adam_rate_goes_like_the_root_of_small_batches():
    tiny = projected_curvature([1e-3], {}, leak_largest=Measured(160.0, 0.0))
    report = make_report(largest=Measured(1e-3, 0), projected=tiny)
    small = report.max_lr(1, optimizer="adam", rule="paper")
    assert small.exponent == pytest.approx(0.5, abs=1e-3)
    assert small.regime == "noise"
    assert report.max_lr(4, optimizer="adam", rule="paper").value == pytest.approx(
        2 * small.value, rel=1e-3
    )


def test_adam_s_rate_rises_peaks_and_falls_where_gradients_are_noise():
    # D ~ B^-1/2 throughout: the square root, a maximum where noise and curvature limit the rate
    # alike, and a fall like 1/sqrt(B).
    metrics = ((100 / SIZES) ** 0.5).reshape(-1, 1, 1)
    adam = replace(one_direction_of_adam(), metrics=metrics)
    report = make_report(adam=adam, dataset_size=2**31)

    def at(size):
        return report.max_lr(size, optimizer="adam")

    peak = 9 * 2500 / 50**2  # (1 + beta1) / (1 - beta1) times noise over curvature squared
    assert at(peak).exponent == pytest.approx(0, abs=0.01)
    assert (at(1).regime, at(peak).regime, at(5000).regime) == ("noise", "transition", "curvature")
    assert at(5000).exponent == pytest.approx(-0.5, abs=0.01)
    for size in (peak / 4, 4 * peak):
        assert at(size).value == pytest.approx(0.8 * at(peak).value, rel=0.01)


@pytest.mark.parametrize(
    ("share", "regime"),
    [(0.30, "curvature"), (0.36, "transition"), (0.64, "transition"), (0.70, "noise")],
)
@pytest.mark.parametrize("rule", ["mean-square", "top-direction", "paper"])
def test_the_regime_is_named_after_what_limits_the_rate(share, regime, rule):
    inverse = 1 / 100 - 1e-4
    shift = 2.0 * share / (1 - share)  # in the unit of lambda_1 = 2
    half = Measured(shift / inverse)  # r1 = c1 = half of lambda_1 times the shift, times b
    noise = {
        "mean-square": projected_curvature([2.0], {(0, 0): 2 * half}),
        "paper": projected_curvature([2.0], {}, leak_largest=Measured(2 * half, 0.0)),
    }
    report = make_report(
        noise=CurvatureNoise(half, half, Measured(math.nan)),
        kappa=shift / inverse,
        projected=noise.get(rule, PROJECTED),
    )
    assert report.max_lr(100, rule=rule).regime == regime


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("rule") == "top-direction"])
@pytest.mark.parametrize("batch_size", [4, 64, 1000, 10_000])
def test_intervals_are_those_of_independent_gaussian_errors(options, batch_size):
    report = make_report(num_batches=10**6)
    rng = np.random.default_rng(0)

    def redrawn(part):
        changes = {
            f.name: Measured(rng.normal(value, value.stderr), value.stderr)
            for f in fields(part)
            if isinstance(value := getattr(part, f.name), Measured) and f.name != "smallest"
        }
        return replace(part, **changes)

    rates = []
    for _ in range(2000):
        again = replace(redrawn(report), noise=redrawn(report.noise), adam=redrawn(report.adam))
        rates.append(again.max_lr(batch_size, **options).value)
    limit = report.max_lr(batch_size, **options)
    low, high = np.quantile(np.log(rates), [0.05, 0.95])
    width = math.log(limit.high / limit.low)
    # 2,000 draws give a quantile distance to 2 %; errors of 5 % are nearly linear.
    assert width == pytest.approx(high - low, rel=0.08)
    assert limit.low * limit.high == pytest.approx(limit.value**2, rel=1e-12)


def test_the_paper_s_intervals_know_the_errors_of_curvature_and_of_its_shift():
    report = second_order_report(num_batches=10**6)
    limit = report.max_lr(40, rule="paper")
    shift = 80 * (1 / 40 - 1e-4)
    error = math.hypot(0.1, shift * 4.0 / 100.0) / (2 + shift)
    assert math.log(limit.high / limit.value) == pytest.approx(1.645 * error, rel=1e-3)
    adam = report.max_lr(40, rule="paper", optimizer="adam")
    assert math.log(adam.high / adam.value) == pytest.approx(1.645 * error / 2, rel=1e-3)


@pytest.mark.parametrize(("num_batches", "accuracy"), [(2, 0.12), (3, 0.02), (4, 3e-3), (30, 1e-5)])
def test_few_batches_widen_the_interval_like_student_s_t(num_batches, accuracy):
    few, many = (
        math.log(limit.high / limit.value)
        for limit in (
            make_report(num_batches=k).max_lr(32, rule="top-direction")
            for k in (num_batches, 10**6)
        )
    )
    exact = student.ppf(0.95, num_batches - 1) / student.ppf(0.95, 10**6 - 1)
    assert few / many == pytest.approx(exact, rel=accuracy)


@pytest.mark.parametrize(("num_batches", "freedom"), [(2, 1), (3, 2), (4, 3), (8, 7), (50, 7)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_default_s_interval_has_the_freedom_of_its_eight_groups(
    num_batches, freedom, optimizer
):
    report = make_report(num_batches=num_batches)
    limit = report.max_lr(100, optimizer=optimizer)
    adam = optimizer == "adam"
    projected = report.adam.projected if adam else report.projected
    dynamics = Dynamics(0.8, averaged=True) if adam else Dynamics()
    rate = projected.mean_square(
        dynamics,
        1 / 100 - 1e-4,
        largest=float(projected.values[0]),
        population=10_000,
    )
    assert limit.value == pytest.approx(rate.lr, rel=1e-7)
    accuracy = {1: 0.12, 2: 0.02}.get(freedom, 4e-3)  # of the quantile's expansion
    want = student.ppf(0.95, freedom) * rate.error
    assert math.log(rate.ends[0] / limit.low) == pytest.approx(want, rel=accuracy)
    assert math.log(limit.high / rate.ends[1]) == pytest.approx(want, rel=accuracy)


@pytest.mark.parametrize("batch_size", [100, 200, 5000])
def test_an_interval_of_adam_reaches_back_to_the_metric_uncorrected(batch_size):
    """Between the sizes of the table the correction is interpolated in the size's logarithm."""
    factors = tuple(1 + 0.1 * math.log(size) for size in SIZES)
    sure, unsure = (
        make_report(adam=replace(ADAM, optimism=f)).max_lr(batch_size, optimizer="adam")
        for f in ((1.0,) * len(SIZES), factors)
    )
    assert (unsure.value, unsure.high) == (sure.value, sure.high)
    assert sure.low / unsure.low == pytest.approx(1 + 0.1 * math.log(batch_size), rel=1e-9)
    alone = replace(make_report(), adam=replace(ADAM, optimism=factors))
    assert alone.max_lr(batch_size) == make_report().max_lr(batch_size)  # of Adam's alone


def test_an_overwhelming_error_leaves_a_finite_interval():
    limit = make_report(largest=Measured(1e-6, 1e6)).max_lr(10_000, rule="top-direction")
    assert 0 < limit.low < 1e-15 * limit.value
    assert 1e15 * limit.value < limit.high < math.inf


def test_an_error_beyond_all_bounds_gives_a_wide_interval_of_numbers():
    report = make_report(largest=Measured(1e-6, 1e6), num_batches=2)
    unsure = projected_curvature([2.0], {}, num_batches=2, leak_largest=Measured(1.0, 1e6))
    limits = (
        report.max_lr(32, rule="top-direction"),
        make_report(projected=unsure, num_batches=2).max_lr(1, momentum=0.99),
    )
    for limit in limits:
        assert 0 < limit.low < 1e-20 * limit.value
        assert 1e20 * limit.value < limit.high < math.inf


def test_an_unknown_error_counts_as_none():
    unknown = CurvatureNoise(Measured(60.0), Measured(100.0), Measured(math.nan))
    report = make_report(largest=Measured(2.0), noise=unknown)
    limit = report.max_lr(32, rule="top-direction")
    assert limit.low == limit.value == limit.high
    # What is resampled has an error of its own, and the default's is that of its batches.
    paper = second_order_report(largest=Measured(2.0), noise=unknown).max_lr(32, rule="paper")
    assert paper.low == paper.value == paper.high


# --- when not to believe it ----------------------------------------------------------------------


def test_a_sound_measurement_is_reliable():
    for options in OPTIONS:
        limit = make_report().max_lr(100, **options)
        assert limit.reliable
        assert limit.reasons == ()


UNSETTLED = "the largest eigenvalue did not converge: allow more products"
NORMALISED = {"coupled": True, "norm_mode": "train"}
UNRELIABLE = [
    ({"converged": False}, 100, {}, UNSETTLED),
    ({"adam": replace(ADAM, converged=False)}, 100, {"optimizer": "adam"}, UNSETTLED),
    ({}, 39, {"rule": "paper"}, "batch below the critical size 39.8: the second-order law oversh"),
    ({"num_samples": 20}, 100, {}, "measured on 20 samples, fewer than the critical batch size 39"),
    ({"num_batches": 3}, 100, {}, "the noise rests on 3 batches: pass 4 or more"),
    ({}, 2501, {"optimizer": "adam"}, "Adam's curvature near the full batch is a lower bound"),
    (NORMALISED, 24, {}, "train-mode normalisation was measured on batches of 100"),
    (NORMALISED, 401, {}, "train-mode normalisation was measured on batches of 100"),
    ({"coupled": True}, 24, {}, "samples of a batch interact in the loss, which was measured on"),
    ({}, 2501, {"optimizer": "rmsprop"}, "Adam's curvature near the full batch is a lower bound"),
    (
        {"clip_norm": 1.0, "gradient_norm": 2.345},
        100,
        {},
        "gradient clipping at 1.0 is active: batch gradients have norm 2.35; clipped steps are sh",
    ),
    ({"kinked": "L1Loss"}, 100, {}, "L1Loss is piecewise linear: its kinks limit the step and ha"),
]


@pytest.mark.parametrize("rule", ["mean-square", "top-direction"])
def test_adam_s_rate_rests_on_its_own_matrix_alone(rule):
    options = {"optimizer": "adam", "rule": rule}
    assert make_report(converged=False).max_lr(100, **options).reliable
    unsettled = make_report(adam=replace(ADAM, converged=False)).max_lr(100, **options)
    assert not unsettled.reliable


@pytest.mark.parametrize(("changes", "batch_size", "options", "words"), UNRELIABLE)
def test_every_doubt_has_its_reason(changes, batch_size, options, words):
    limit = make_report(**changes).max_lr(batch_size, **options)
    assert not limit.reliable
    assert len(limit.reasons) == 1
    assert limit.reasons[0].startswith(words)


def test_doubts_do_not_spread_to_what_they_do_not_touch():
    assert make_report().max_lr(39).reliable  # the mean-square rate has no critical size
    assert make_report(coupled=True).max_lr(25).reliable
    assert make_report(coupled=True).max_lr(400).reliable
    assert make_report(adam=replace(ADAM, converged=False)).max_lr(100).reliable
    assert make_report(converged=False).max_lr(100, optimizer="adam").reliable
    for gradient_norm in (1.0, 0.5, math.nan):
        assert make_report(clip_norm=1.0, gradient_norm=gradient_norm).max_lr(100).reliable
    assert make_report(gradient_norm=1e9).max_lr(100).reliable  # without clipping
    doubts = make_report(converged=False, num_batches=2, coupled=True).max_lr(1, rule="paper")
    assert len(doubts.reasons) == 4


def test_where_samples_interact_there_is_no_end_of_other_batches():
    """All samples measured: batches of means of them have little left to say, others have."""
    everything = {"num_samples": 5000, "dataset_size": 5000}
    known, endless = (
        make_report(coupled=coupled, **everything).max_lr(100, momentum=0.9)
        for coupled in (False, True)
    )
    assert endless.high / endless.low > known.high / known.low > 1
    assert endless.value > known.value


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [0, -1, 0.5, 10_001, math.nan])
def test_a_batch_size_outside_the_data_set_is_refused(batch_size):
    report = make_report()
    for function in (report.max_lr, report.largest_at, report.smallest_at):
        with pytest.raises(
            ValueError, match=rf"batch_size must lie in \[1, 10000\].*got {batch_size}; if there"
        ):
            function(batch_size)


@pytest.mark.parametrize("largest", [0.0, -1.0])
@pytest.mark.parametrize("rule", ["mean-square", "top-direction", "paper"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_without_positive_curvature_there_is_no_rate(largest, optimizer, rule):
    projected = projected_curvature([largest, largest - 1], {})
    report = make_report(
        largest=Measured(largest, 0.1),
        kappa=0.0,
        projected=projected,
        adam=replace(ADAM, largest=Measured(largest), projected=projected),
    )
    with pytest.raises(
        ValueError, match=r"largest must be positive and finite.*no stability limit"
    ):
        report.max_lr(32, optimizer=optimizer, rule=rule)
    assert math.isnan(report.critical_batch_size)
    assert report.largest_at(32) == largest


def test_adam_must_have_been_measured():
    report = make_report(adam=None)
    with pytest.raises(
        ValueError, match="Adam's curvature was not measured; pass optimizer='adam'"
    ):
        report.max_lr(32, optimizer="adam")
    assert report.max_lr(32, optimizer="adam", rule="paper").value > 0


def test_unknown_names_and_momenta_are_refused():
    report = make_report()
    with pytest.raises(ValueError, match="must be 'sgd', 'adam' or 'rmsprop', got 'lion'"):
        report.max_lr(32, optimizer="lion")
    with pytest.raises(
        ValueError, match="rule must be one of 'mean-square', 'top-direction', 'paper', got"
    ):
        report.max_lr(32, rule="linear")
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        report.max_lr(32, momentum=1.0)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        report.max_lr(32, optimizer="adam", momentum=1.0)
    for rule in ("top-direction", "paper"):
        with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
            report.max_lr(32, optimizer="adam", momentum=1.0, rule=rule)


# --- on disk -------------------------------------------------------------------------------------


def same(one, two):
    """Equality of reports in which NaN equals NaN and standard errors count."""
    if isinstance(one, Measured):
        return (
            isinstance(two, Measured)
            and same(float(one), float(two))
            and same(one.stderr, two.stderr)
        )
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two, equal_nan=True)
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, float):
        return one == two or (math.isnan(one) and math.isnan(two))
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(two) and all(
            same(getattr(one, f.name), getattr(two, f.name)) for f in fields(one)
        )
    return type(one) is type(two) and one == two


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        make_report(
            adam=None, small_batch=(4, Measured(12.5, 0.5)), norm_mode="train", coupled=True
        ),
        make_report(adam=replace(ADAM, optimizer="rmsprop"), clip_norm=0.5, gradient_norm=0.7),
        make_report(kinked="L1Loss"),
        make_report(
            kappa_smallest=math.nan,
            noise=CurvatureNoise(Measured(1 / 3, math.nan), Measured(0.0, 0.0), Measured(math.nan)),
        ),
    ],
    ids=["adam", "sgd", "rmsprop, clipped", "kinked", "nan"],
)
def test_a_report_comes_back_from_disk_as_it_was(report, tmp_path):
    path = tmp_path / "deep" / "report.json"
    report.save(path)
    loaded = CurvatureReport.load(path)
    assert same(loaded, report)
    for options in OPTIONS:
        if report.adam is not None or options.get("optimizer") != "adam":
            assert loaded.max_lr(32, **options) == report.max_lr(32, **options)
    assert same(loaded.largest_at(32), report.largest_at(32))
    assert {file.name for file in path.parent.iterdir()} == {"report.json", "report.npz"}


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    report = make_report(
        dataset_size=np.int64(10_000), clip_norm=np.float32(0.5), gradient_norm=1.0
    )
    report.save(tmp_path / "report.json")
    assert CurvatureReport.load(tmp_path / "report.json") == report


def test_a_measured_report_comes_back_too(tmp_path):
    report = measured_report()
    report.save(tmp_path / "measured")
    assert same(CurvatureReport.load(tmp_path / "measured"), report)


def test_dots_in_a_name_are_part_of_it(tmp_path):
    for step in (100, 200):
        make_report(num_products=step).save(tmp_path / f"step.{step}")
    assert (tmp_path / "step.100.json").exists()
    assert CurvatureReport.load(tmp_path / "step.100").num_products == 100
    assert CurvatureReport.load(str(tmp_path / "step.200.json")).num_products == 200


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_missing_file_is_named(suffix, tmp_path):
    make_report().save(tmp_path / "report")
    (tmp_path / f"report{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"report\{suffix}"):
        CurvatureReport.load(tmp_path / "report")


def damage(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "truncated": lambda p: p.write_text(p.read_text()[:200]),
    "not text": lambda p: p.write_bytes(bytes(range(256))),
    "empty": lambda p: p.write_text(""),
    "a list": lambda p: p.write_text("[1, 2]"),
    "another format": lambda p: damage(p, lambda c: c.update(format=1)),
    "no format": lambda p: damage(p, lambda c: c.pop("format")),
    "a field missing": lambda p: damage(p, lambda c: c.pop("kappa")),
    "a field too many": lambda p: damage(p, lambda c: c.update(color="red")),
    "a word for a number": lambda p: damage(p, lambda c: c.update(largest="large")),
    "empty arrays": lambda p: p.with_suffix(".npz").write_bytes(b""),
    "garbled arrays": lambda p: p.with_suffix(".npz").write_bytes(b"not an archive at all"),
    "truncated arrays": lambda p: p.with_suffix(".npz").write_bytes(
        p.with_suffix(".npz").read_bytes()[:300]
    ),
    "other arrays": lambda p: np.savez(p.with_suffix(".npz"), other=np.zeros(3)),
}


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_report_is_refused_by_name(how, tmp_path):
    path = tmp_path / "report.json"
    make_report().save(path)
    how(path)
    with pytest.raises(ValueError, match=r"report\.json is not a CurvatureReport of format 5: "):
        CurvatureReport.load(path)


# --- do intervals from a subsample hold the value of all the data? -------------------------------

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


@functools.cache
def trained_network():
    """A small network after 3 epochs on the digits, with the data it was trained on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.data / 16), torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    for rows in itertools.chain.from_iterable(
        torch.randperm(len(x), generator=generator).split(64) for _ in range(3)
    ):
        optimizer.zero_grad()
        CROSS_ENTROPY(model, (x[rows], y[rows])).backward()
        optimizer.step()
    return model, x, y


@functools.cache
def measured_report():
    model, x, y = trained_network()
    return measure_curvature(model, CROSS_ENTROPY, [(x[:200], y[:200])], num_small_batches=2)


@functools.cache
def exact_curvature():
    """``lambda_1``, ``r1 + c1`` over all samples, by `torch.func` on single samples."""
    model, x, y = trained_network()
    parameters = dict(model.named_parameters())
    shapes = [p.shape for p in parameters.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])

    def loss(weights, x_i, y_i):
        pieces = weights.split([shape.numel() for shape in shapes])
        named = {n: v.view(s) for n, v, s in zip(parameters, pieces, shapes, strict=True)}
        output = functional_call(model, named, (x_i.unsqueeze(0),))
        return nn.functional.cross_entropy(output, y_i.unsqueeze(0))

    def product(vector):  # (N, P)
        def slope(weights, x_i, y_i):
            return grad(loss)(weights, x_i, y_i) @ vector

        return vmap(grad(slope), in_dims=(None, 0, 0))(flat, x, y)

    whole = LinearOperator(
        (len(flat),) * 2,
        matvec=lambda v: product(torch.from_numpy(v.reshape(-1).copy())).mean(0).numpy(),
        dtype=np.float64,
    )
    values, vectors = eigsh(whole, k=1, which="LA", tol=1e-6, v0=np.ones(len(flat)))
    products = product(torch.from_numpy(vectors[:, 0].copy()))
    deviations = products - products.mean(0)
    return float(values[0]), float(deviations.square().sum() / (len(x) - 1))


def coverage(repetitions, seed):
    """Shares of intervals from 256 samples in 8 batches that hold the exact rate."""
    model, x, y = trained_network()
    largest, noise = exact_curvature()
    generator = torch.Generator().manual_seed(seed)
    asked = list(itertools.product((8, 64, 512), (0.0, 0.9)))
    held = np.zeros(len(asked))
    for _ in range(repetitions):
        rows = torch.randperm(len(x), generator=generator)[:256]
        report = measure_curvature(
            model,
            CROSS_ENTROPY,
            [(x[rows], y[rows])],
            batch_size=32,
            dataset_size=len(x),
            optimizer="sgd",
            num_small_batches=0,
            tol=1e-2,
        )
        for k, (batch_size, momentum) in enumerate(asked):
            inverse = 1 / batch_size - 1 / len(x)
            exact = max_sgd_lr(largest, noise * inverse / largest, momentum=momentum)
            limit = report.max_lr(batch_size, momentum=momentum, rule="top-direction")
            held[k] += limit.low <= exact <= limit.high
    return dict(zip(asked, held / repetitions, strict=True))


def test_most_intervals_from_a_subsample_hold_the_rate_of_all_the_data():
    shares = coverage(repetitions=16, seed=0)
    # Over 450 repetitions 87 % (82 % to 94 % by batch size and momentum); 16 tell it to 9 %.
    assert np.mean(list(shares.values())) >= 0.70
    assert min(shares.values()) >= 0.55


@pytest.mark.slow
def test_nearly_nine_in_ten_intervals_hold_the_rate_of_all_the_data():
    shares = coverage(repetitions=200, seed=1)
    assert 0.82 <= np.mean(list(shares.values())) <= 0.95
    assert min(shares.values()) >= 0.78


def exact_least_squares_limit(x, momentum, batch_size):
    """By bisection on the radius of all second moments."""
    low, high = 0.0, 2 * (1 + momentum) / float(np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    for _ in range(30):
        middle = (low + high) / 2
        stable = second_moment_radius(x, middle, momentum, batch_size) < 1
        low, high = (middle, high) if stable else (low, middle)
    return low


def default_coverage(repetitions, seed):
    """As `coverage`, of the limit in all directions: 1,024 samples in three, 256 measured."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1024, 3)) * [1.5, 1.2, 0.7]
    asked = list(itertools.product((4, 32, 256), (0.0, 0.9)))
    exact = [exact_least_squares_limit(x, momentum, size) for size, momentum in asked]
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    held = np.zeros(len(asked))
    for _ in range(repetitions):
        part = torch.from_numpy(x[rng.permutation(1024)[:256]])
        report = measure_curvature(
            model,
            half_mse,
            [(part, torch.zeros(256, 1, dtype=torch.float64))],
            batch_size=16,
            dataset_size=1024,
            optimizer="sgd",
            num_small_batches=0,
        )
        for k, (size, momentum) in enumerate(asked):
            limit = report.max_lr(size, momentum=momentum)
            held[k] += limit.low <= exact[k] <= limit.high
    return dict(zip(asked, held / repetitions, strict=True))


def test_most_default_intervals_hold_the_exact_limit_in_many_directions():
    shares = default_coverage(repetitions=16, seed=0)
    # Nominally 90 %; 16 repetitions tell a share to 8 %.
    assert np.mean(list(shares.values())) >= 0.74
    assert min(shares.values()) >= 0.60


@pytest.mark.slow
def test_nearly_nine_in_ten_default_intervals_hold_the_exact_limit_in_many_directions():
    shares = default_coverage(repetitions=200, seed=1)
    # 200 repetitions tell a share to 2 %.
    assert np.mean(list(shares.values())) >= 0.83
    assert min(shares.values()) >= 0.78


# --- and is it where training stops being stable? ------------------------------------------------


def half_mse(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


@functools.cache
def least_squares(seed=0):
    """Features of a consistent linear problem (the target is zero), and its report."""
    features = np.random.default_rng(seed).normal(size=(256, 5)) * [2, 1, 0.7, 0.5, 0.3]
    x = torch.from_numpy(features)
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    y = torch.zeros(256, 1, dtype=torch.float64)
    return x, measure_curvature(model, half_mse, [(x, y)], batch_size=2, optimizer="sgd")


def second_moment_radius(x, lr, momentum, batch_size):
    """Growth per step of all second moments of weights and velocities, in exact expectation."""
    size = x.shape[1]
    hessians = np.einsum("ni,nj->nij", x, x)
    mean, deviations = hessians.mean(0), hessians - hessians.mean(0)
    unit = np.eye(size)
    step = np.block([[unit - lr * mean, -lr * momentum * unit], [mean, momentum * unit]])
    change = np.zeros((len(x), 2 * size, 2 * size))
    change[:, :size, :size] = -lr * deviations
    change[:, size:, :size] = deviations
    covariance = np.einsum("nij,nkl->ikjl", change, change).reshape(4 * size**2, 4 * size**2)
    share = (1 / batch_size - 1 / len(x)) / (len(x) - 1)
    return np.abs(np.linalg.eigvals(np.kron(step, step) + share * covariance)).max()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_second_moments_shrink_just_below_the_rate_and_grow_above(seed, momentum, batch_size):
    x, report = least_squares(seed)
    limit = report.max_lr(batch_size, momentum=momentum).value
    # Batches of two are not samples one by one: their variance is good to 15 %, the rate to half.
    assert second_moment_radius(x.numpy(), 0.93 * limit, momentum, batch_size) < 1
    assert second_moment_radius(x.numpy(), 1.08 * limit, momentum, batch_size) > 1


@functools.cache
def least_squares_sample_by_sample():
    """The same features, and a report whose batches are single samples."""
    x, _ = least_squares()
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    zeros = torch.zeros(256, 1, dtype=torch.float64)
    options = {"batch_size": 1, "optimizer": "sgd", "max_products": 5, "tol": 1e-9}
    return x, measure_curvature(model, half_mse, [(x, zeros)], **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [1, 4, 64, 250])
def test_from_every_sample_the_rate_is_the_exact_limit(batch_size, momentum):
    x, report = least_squares_sample_by_sample()
    limit = report.max_lr(batch_size, momentum=momentum).value
    exact = exact_least_squares_limit(x.numpy(), momentum, batch_size)
    assert limit == pytest.approx(exact, rel=1e-6)  # the search and the bisection


def mean_squares_of_replicas(lr, momentum, batch_size, *, replicas, steps):
    """Mean of ``|w|^2`` over independent runs of `torch.optim.SGD`, at the start and at the end."""
    x, _ = least_squares()
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(replicas, 5, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], lr=lr, momentum=momentum)
    start = float(weights.detach().square().sum(1).mean())
    for _ in range(steps):
        ranks = torch.rand(replicas, len(x), generator=generator)
        batch = x[ranks.topk(batch_size, dim=1).indices]  # (replicas, batch_size, 5)
        optimizer.zero_grad()
        outputs = torch.einsum("rbi,ri->rb", batch, weights)
        (0.5 * outputs.square().mean(1)).sum().backward()  # each run has its own mean loss
        optimizer.step()
    return start, float(weights.detach().square().sum(1).mean())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("batch_size", "replicas"), [(4, 1500), (64, 100)])
def test_training_contracts_below_the_rate_and_diverges_above(momentum, batch_size, replicas):
    _, report = least_squares()
    limit = report.max_lr(batch_size, momentum=momentum).value
    steps = 100
    start, end = mean_squares_of_replicas(
        0.8 * limit, momentum, batch_size, replicas=replicas, steps=steps
    )
    assert end < 0.2 * start
    start, end = mean_squares_of_replicas(
        1.5 * limit, momentum, batch_size, replicas=replicas, steps=steps
    )
    assert end > 3 * start  # in expectation 35 times at batch size 4, but rare runs carry it


# In print --------------------------------------------------------------------------------------


def test_a_report_prints_extremes_with_errors_and_a_table_of_rates():
    report = make_report(dataset_size=1000, adam=ADAM)
    top, ends, critical, _, heads, *rows = str(report).splitlines()
    assert f"{report.num_params} parameters, {report.num_samples} of 1000 samples" in top
    assert ends == (
        "largest eigenvalue 2 +- 0.1, smallest -0.5 +- 0.02, "
        "largest with adam's preconditioner 50 +- 1.5"
    )
    assert critical == f"critical batch size {report.critical_batch_size:.3g}"
    for optimizer in ("sgd, momentum", "adam, beta1"):
        assert optimizer in heads
    for size, row in zip((4, 16, 64, 256), rows, strict=False):
        words = row.replace(" * ", " ").split()
        sgd, adam = report.max_lr(size), report.max_lr(size, optimizer="adam")
        assert words[:2] == [str(size), f"{sgd.value:.3g}"]
        assert words[2:6] == [f"{sgd.low:.2g}", "to", f"{sgd.high:.2g}", f"{adam.value:.3g}"]


def test_what_was_not_measured_is_not_printed():
    followed = make_report(smallest=Measured(math.nan), adam=ADAM)
    assert "sgd" not in str(followed)
    assert "smallest" not in str(followed)
    assert "adam, beta1 0.8" in str(followed)
    plain = make_report(smallest=Measured(math.nan), adam=None)
    assert "sgd, momentum" in str(plain)
    assert "adam" not in str(plain)


def test_a_report_of_few_samples_prints_one_row():
    rows = str(make_report(dataset_size=3)).splitlines()[5:]
    assert [row.split()[0] for row in rows if not row.startswith("*")] == ["3"]


@pytest.mark.parametrize("largest", [0.0, -1.0, math.nan])
def test_without_curvature_a_report_prints_no_rates(largest):
    text = str(make_report(largest=Measured(largest), adam=None))
    assert text.endswith("\n\nno curvature limits the rate")
    assert "critical batch size" not in text


def test_no_array_is_shown():
    """What a console echoes stays on a screen, whatever the number of batches and axes."""
    assert len(repr(make_report(adam=replace(ADAM, batch_sizes=(), optimism=())))) < 1500
    assert "matrices" not in repr(PROJECTED)
