"""A peak is held while the shape falls, and only then."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr.on_the_fly.falling_shape import FallingShape

POSITIVE = st.floats(1e-6, 1e6)


def falling(limit, share, crest=1.0):
    """At ``share`` of the peak whose limit was ``limit`` at the crest."""
    shape = FallingShape()
    shape.see(crest)
    shape.limit_of_peak(limit)
    shape.see(share * crest)
    return shape


@given(known=POSITIVE, share=st.floats(0.001, 0.999), between=st.floats(0, 1))
def test_a_limit_between_the_rate_and_the_peak_s_says_nothing(known, share, between):
    limit = known * share ** (1 - between)
    assert falling(known, share).limit_of_peak(limit) == pytest.approx(known, rel=1e-12)


@given(known=POSITIVE, share=st.floats(0.01, 0.99), below=st.floats(0.01, 0.99))
def test_below_the_rate_applied_it_lowers_the_peak_to_where_the_rate_is_the_limit(
    known, share, below
):
    limit = below * share * known
    peak = falling(known, share).limit_of_peak(limit)
    assert peak * share == pytest.approx(limit, rel=1e-12)
    assert peak < known


@given(known=POSITIVE, share=st.floats(0.01, 0.99), above=st.floats(1, 100))
def test_above_the_peak_s_it_counts(known, share, above):
    assert falling(known, share).limit_of_peak(above * known) == above * known


@given(limits=st.lists(POSITIVE, min_size=1), crest=st.floats(0.1, 10))
def test_at_the_crest_every_limit_counts(limits, crest):
    """As in a warm-up, and under a constant."""
    shape = FallingShape()
    for number, limit in enumerate(limits, start=1):
        assert not shape.see(crest * number / len(limits))
        assert shape.limit_of_peak(limit) == limit


@given(crest=st.floats(0.1, 10))
def test_shares_are_of_the_crest(crest):
    shape = falling(1.0, 0.5, crest)
    assert shape.limit_of_peak(0.25) == pytest.approx(0.5, rel=1e-12)


def test_what_was_held_may_be_held_on():
    shape = falling(1.0, 0.5)
    assert shape.limit_of_peak(0.6) == 1.0
    shape.see(0.1)
    assert shape.limit_of_peak(0.2) == 1.0


def test_behind_a_rise_every_limit_counts_for_good():
    shape = falling(1.0, 0.2)
    assert shape.limit_of_peak(0.3) == 1.0
    assert not shape.see(0.1)
    assert shape.see(0.15)
    assert shape.limit_of_peak(0.3) == 0.3
    assert not shape.see(0.05)  # it rises for the first time but once
    assert not shape.see(0.9)
    assert shape.limit_of_peak(0.1) == 0.1


def test_rounding_is_no_rise():
    shape = falling(1.0, 0.2)
    assert not shape.see(0.2 * (1 + 1e-9))
    assert shape.limit_of_peak(0.3) == 1.0


def test_a_first_limit_counts_below_the_crest_too():
    shape = FallingShape()
    shape.see(1.0)
    shape.see(0.5)
    assert shape.limit_of_peak(0.4) == 0.4


def test_what_is_forgotten_is_not_held():
    shape = falling(1.0, 0.5)
    shape.forget()
    assert shape.limit_of_peak(0.6) == 0.6


def test_what_is_held_goes_over_to_another_setting():
    shape = falling(1.0, 0.5)
    shape.scale(3.0)
    assert shape.limit_of_peak(2.0) == 3.0


def test_a_shape_that_ends_at_zero_is_no_division():
    shape = falling(1.0, 0.0)
    assert shape.limit_of_peak(0.3) == 0.3


@pytest.mark.parametrize("shares", [[0.5], [1.0, 0.5], [1.0, 0.5, 0.7]])
def test_the_state_is_all_of_it(shares):
    shape, copy = falling(2.0, 0.9), FallingShape()
    for share in shares:
        shape.see(share)
    copy.load_state_dict(json.loads(json.dumps(shape.state_dict())))
    for share, limit in [(0.4, 1.0), (0.3, 0.1), (0.6, 1.0)]:
        assert shape.see(share) == copy.see(share)
        assert shape.limit_of_peak(limit) == copy.limit_of_peak(limit)
    assert not math.isnan(copy.limit)
