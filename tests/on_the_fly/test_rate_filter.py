"""The filter of measured rates: exact cases, noise, and change."""

import math

import numpy as np
import pytest

from batchlr.on_the_fly.rate_filter import RateFilter


def test_the_first_measurement_is_believed():
    assert RateFilter().update(0, 0.3, 0.5) == pytest.approx(0.3, rel=1e-15)


def test_a_filter_without_a_measurement_has_no_rate():
    assert math.isnan(RateFilter().rate)


def test_measurements_at_one_step_are_averaged_by_their_errors():
    estimate = RateFilter()
    estimate.update(10, 1.0, 0.2)
    got = estimate.update(10, math.e, 0.4)
    assert math.log(got) == pytest.approx(0.04 / (0.04 + 0.16), rel=1e-12)
    assert estimate.variance == pytest.approx(1 / (1 / 0.04 + 1 / 0.16), rel=1e-12)


def test_noise_is_averaged_out():
    draws = np.random.default_rng(0).normal(scale=0.5, size=200)
    estimate = RateFilter()
    rates = [estimate.update(10_000 + k, math.exp(draw), 0.5) for k, draw in enumerate(draws)]
    assert np.std(np.log(rates[50:])) < 0.1


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_change_early_in_the_run_is_followed_at_once(factor):
    estimate = RateFilter()
    estimate.update(0, 1.0, 0.1)
    assert estimate.update(1, factor, 0.1) == pytest.approx(factor, rel=0.15)


def test_a_long_pause_makes_new_measurements_count_for_more():
    def after(pause):
        estimate = RateFilter()
        estimate.update(100, 1.0, 0.3)
        return estimate.update(100 + pause, 2.0, 0.3)

    assert after(1) < after(10) < after(100) < after(1000) < 2.0


def test_errors_are_believed_within_bounds():
    sure, unsure = RateFilter(), RateFilter()
    sure.update(0, 1.0, 0.0)
    unsure.update(0, 1.0, math.inf)
    assert (sure.variance, unsure.variance) == pytest.approx((0.05**2, 1.0))


def test_scaling_moves_the_estimate_only():
    estimate = RateFilter()
    estimate.update(0, 1.0, 0.2)
    before = estimate.variance
    estimate.scale(3.0)
    assert (estimate.rate, estimate.variance) == (pytest.approx(3.0), before)


def test_the_state_goes_round():
    estimate, other = RateFilter(), RateFilter()
    estimate.update(7, 0.4, 0.2)
    other.load_state_dict(estimate.state_dict())
    assert other == estimate
