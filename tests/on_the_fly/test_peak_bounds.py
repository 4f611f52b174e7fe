"""The peak stays between its neighbours and comes to its aim."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr.on_the_fly.peak_bounds import PeakBounds

POSITIVE = st.floats(1e-9, 1e9)
BOUNDS = st.builds(
    PeakBounds,
    safety=st.floats(0.01, 1),
    start=st.floats(0.01, 1),
    growth=st.floats(1.01, 10),
    drop=st.floats(0, 0.99),
)


@given(bounds=BOUNDS, limit=POSITIVE, last=POSITIVE)
def test_a_step_stays_within_its_bounds(bounds, limit, last):
    peak = bounds.peak(limit, last)
    assert bounds.drop * last <= peak <= bounds.growth * last
    aim = bounds.safety * limit
    if bounds.drop * last <= aim <= bounds.growth * last:
        assert peak == aim


@given(bounds=BOUNDS, last=POSITIVE, doubt=st.floats(0, 2))
def test_a_doubtful_peak_may_have_been_too_low_by_its_error(bounds, last, doubt):
    assert bounds.peak(math.inf, last, doubt) == pytest.approx(
        bounds.growth * last * math.exp(doubt), rel=1e-12
    )
    assert bounds.peak(0.0, last, doubt) == bounds.drop * last


@given(bounds=BOUNDS, limit=POSITIVE)
def test_a_steady_limit_is_reached(bounds, limit):
    peak = bounds.peak(limit, None)
    assert peak == pytest.approx(bounds.start * bounds.safety * limit, rel=1e-12)
    for _ in range(1000):
        peak = bounds.peak(limit, peak)
    assert peak == pytest.approx(bounds.safety * limit, rel=1e-12)


@given(bounds=BOUNDS, limit=POSITIVE, last=POSITIVE, before=POSITIVE, doubt=st.floats(0, 2))
def test_two_limits_lift_a_peak_that_is_far_below_both(bounds, limit, last, before, doubt):
    """To a quarter of the lower one, or the share to start at, if that is more than growth."""
    alone = bounds.peak(limit, last, doubt)
    lower = min(bounds.safety * limit, bounds.safety * before)
    lifted = min(0.25, bounds.start) * lower
    assert bounds.peak(limit, last, doubt, before) == max(alone, lifted)


@given(bounds=BOUNDS, limit=POSITIVE, last=POSITIVE, before=POSITIVE, doubt=st.floats(0, 2))
def test_a_rise_to_be_confirmed_goes_as_far_as_both_limits(bounds, limit, last, before, doubt):
    """A fall needs no confirmation."""
    free = bounds.peak(limit, last, doubt, before)
    confirmed = bounds.peak(limit, last, doubt, before, confirmed=True)
    if free <= last:
        assert confirmed == free
    else:
        assert confirmed == min(free, max(last, bounds.safety * before))


def test_before_the_first_peak_there_is_no_limit():
    assert PeakBounds().peak(1.0, None, before=0.1) == PeakBounds().peak(1.0, None)


def test_without_a_lower_bound_it_falls_at_once():
    assert PeakBounds(drop=0.0).peak(1e-6, 1.0) == pytest.approx(1e-6)
    assert PeakBounds().peak(1e-6, 1.0) == 0.5


@pytest.mark.parametrize(
    ("option", "value", "legal"),
    [
        ("safety", 0.0, r"lie in \(0, 1\]"),
        ("safety", 1.1, r"lie in \(0, 1\]"),
        ("safety", math.nan, r"lie in \(0, 1\]"),
        ("start", 0.0, r"lie in \(0, 1\]"),
        ("start", 1.5, r"lie in \(0, 1\]"),
        ("growth", 1.0, "be above 1"),
        ("growth", math.nan, "be above 1"),
        ("drop", 1.0, r"lie in \[0, 1\)"),
        ("drop", -0.1, r"lie in \[0, 1\)"),
        ("drop", math.nan, r"lie in \[0, 1\)"),
    ],
)
def test_what_is_out_of_range_is_refused(option, value, legal):
    with pytest.raises(ValueError, match=f"{option} must {legal}, got {value}"):
        PeakBounds(**{option: value})
