"""The published step sizes are reproduced, their defects are there, and nonsense is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr.learning_rates import StepSize, heavy_ball
from batchlr.policies import (
    POLICIES,
    paper_momentum,
    paper_momentum_as_published,
    paper_nesterov,
    paper_sgd,
)

# A published log: the largest magnitude is negative, one Ritz value carries the near-zero bulk.
# What lies between is not in the table and does not matter; 5.0 stands for it.
LOGGED_VALUES = [-1448.4733, 5.0, -2.447879, 0.0014475]
LOGGED_WEIGHTS = [1e-4, 9.5e-5, 0.001594, 0.998211]

spectra = st.lists(
    st.tuples(st.floats(1e-3, 1e4), st.sampled_from([-1.0, 1.0]), st.floats(0.01, 1.0)),
    min_size=3,
    max_size=20,
).map(lambda rows: ([v * s for v, s, _ in rows], [w / sum(r[2] for r in rows) for *_, w in rows]))


def test_the_logged_step_size_is_reproduced():
    step = paper_nesterov(LOGGED_VALUES, LOGGED_WEIGHTS)
    assert step.lr == pytest.approx(0.0411093, rel=3e-6)  # as many digits as were logged
    assert step.momentum == pytest.approx(0.9210280, rel=3e-6)


@given(spectra)
def test_nesterov_s_effective_rate_is_between_a_half_and_one(spectrum):
    step = paper_nesterov(*spectrum)
    assert step.lr / (1 - step.momentum) == pytest.approx((1 + step.lr) / 2, rel=1e-9)


@given(spectra, st.floats(1e-3, 1e3))
def test_nesterov_s_rate_does_not_scale_with_curvature_but_polyak_s_does(spectrum, factor):
    values, weights = spectrum
    scaled = [factor * value for value in values]
    step, after = paper_nesterov(values, weights), paper_nesterov(scaled, weights)
    assert after.lr == pytest.approx(step.lr, rel=1e-9)
    step, after = paper_momentum(values, weights), paper_momentum(scaled, weights)
    assert after.lr * factor == pytest.approx(step.lr, rel=1e-9)
    assert after.momentum == pytest.approx(step.momentum, rel=1e-9, abs=1e-12)


@given(spectra)
def test_signs_do_not_matter(spectrum):
    values, weights = spectrum
    for policy in POLICIES.values():
        assert policy(values, weights) == policy([abs(value) for value in values], weights)


@given(spectra)
def test_momenta_are_momenta(spectrum):
    for policy in POLICIES.values():
        step = policy(*spectrum)
        assert step.lr > 0
        assert 0 <= step.momentum < 1


def test_the_heaviest_value_is_deleted_only_above_one_half():
    values = [9.0, 1.0, 0.01]
    assert paper_momentum(values, [0.2, 0.29, 0.51]) == heavy_ball(9.0, 1.0)
    assert paper_momentum(values, [0.2, 0.30, 0.50]) == heavy_ball(9.0, 0.01)


def test_the_largest_counts_even_where_it_is_the_heaviest():
    assert paper_momentum([9.0, 1.0], [0.6, 0.4]) == heavy_ball(9.0, 1.0)


@pytest.mark.parametrize(("smallest", "too_large"), [(0.25, True), (1.0, False), (4.0, False)])
def test_the_published_momentum_has_the_wrong_denominator(smallest, too_large):
    values, weights = [16.0, smallest], [0.5, 0.5]
    intended = paper_momentum(values, weights)
    published = paper_momentum_as_published(values, weights)
    assert published.lr == intended.lr
    root = math.sqrt(smallest)
    assert published.momentum == pytest.approx(((4 - root) / (4 + smallest)) ** 2, rel=1e-12)
    assert (published.momentum > intended.momentum) == too_large


def test_sgd_takes_the_median_magnitude_and_has_no_momentum():
    assert paper_sgd([-4.0, 3.0, 1.0], [0.1, 0.1, 0.8]) == StepSize(2 / 7, 0.0)
    assert paper_sgd([4.0, 3.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.7]) == StepSize(2 / 6, 0.0)
    assert paper_sgd([4.0, 0.0, 0.0], [0.1, 0.1, 0.8]) == StepSize(0.5, 0.0)  # mu = 0 is a rate


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    ("values", "weights", "words"),
    [
        ([], [], "there are no Ritz values: pass those of at least one Lanczos step"),
        ([1.0, 2.0], [1.0], "each Ritz value has one weight, got 2 values, 1 weights"),
        ([1.0, math.nan], [0.5, 0.5], r"Ritz values must be finite, got \[1.0, nan\]"),
        ([1.0, 2.0], [-0.5, 1.5], r"weights must lie in \[0, 1\], got \[-0.5, 1.5\]"),
        ([1.0, 2.0], [math.nan, 0.5], r"weights must lie in \[0, 1\], got \[nan, 0.5\]"),
    ],
)
def test_what_is_no_spectrum_is_refused(policy, values, weights, words):
    with pytest.raises(ValueError, match=words):
        policy(values, weights)


@pytest.mark.parametrize("policy", [paper_momentum, paper_momentum_as_published, paper_nesterov])
def test_without_a_smallest_curvature_there_is_no_momentum(policy):
    with pytest.raises(ArithmeticError, match="mu, the smallest Ritz value left, is 0"):
        policy([2.0, 1.0, 0.0], [0.3, 0.3, 0.4])
    with pytest.raises(ArithmeticError, match=r"no Ritz value is left once those heavier than 0.5"):
        policy([2.0], [1.0])


def test_without_curvature_there_is_no_rate():
    with pytest.raises(ArithmeticError, match="all Ritz values are 0: no curvature limits"):
        paper_sgd([0.0, 0.0], [0.5, 0.5])
