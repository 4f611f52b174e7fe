"""When measurements fall, and that their cost stays within the budget."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr.on_the_fly.cadence import Cadence


def steps_measured(cadence, steps, cost=1.0, change=lambda step: 0.0, error=0.0):
    measured = []
    for step in range(steps):
        if cadence.due(step):
            measured.append(step)
            cadence.measured(step, cost, change(step), error)
    return measured


@pytest.mark.parametrize(
    ("total", "milestones"),
    [
        (60, [0, 1, 2, 4, 8, 16, 32]),
        (2048, [0, 1, 2, 4, 8, 32, 128, 512]),  # 4 apart: four more, the last at the end
        (10**5, [0, 1, 2, 4, 8, 32, 128, 512, 2048, 8192, 32768]),
        (None, [0, *(2**k for k in range(11))]),
    ],
)
def test_without_a_budget_only_milestones_are_left(total, milestones):
    assert steps_measured(Cadence(total, max_overhead=0.0), total or 2000) == milestones


def test_milestones_lie_as_far_apart_as_the_budget_asks():
    # 1,000 for 26 measurements or so at a factor 2, for fewer at a higher price.
    for cost, count in [(10.0, 15), (100.0, 10)]:
        cadence = Cadence(20_000, max_overhead=0.05)
        measured = steps_measured(cadence, 20_000, cost)
        assert len([step for step in measured if step <= 8]) == 5
        assert len(measured) >= count
        assert cadence.spent <= 1000


def test_with_money_to_burn_a_steady_limit_is_measured_ever_more_rarely():
    measured = steps_measured(Cadence(1000, max_overhead=1e9), 1000)
    gaps = [after - before for before, after in itertools.pairwise(measured)]
    assert max(gaps) == 100  # a tenth of the run
    assert gaps[-1] > gaps[0] == 1


def test_a_moving_limit_is_measured_at_every_step_if_it_can_be_afforded():
    cadence = Cadence(100, max_overhead=1e9)
    assert steps_measured(cadence, 100, change=lambda step: 0.5) == list(range(100))


def test_a_change_within_its_error_is_none():
    noisy = steps_measured(Cadence(100, max_overhead=1e9), 100, change=lambda s: 0.5, error=0.6)
    assert noisy == steps_measured(Cadence(100, max_overhead=1e9), 100)


@given(
    total=st.one_of(st.none(), st.integers(1, 3000)),
    share=st.floats(0.0, 0.5),
    cost=st.floats(0.1, 50.0),
    moving=st.booleans(),
)
def test_only_milestones_exceed_the_budget(total, share, cost, moving):
    steps = total or 3000
    cadence = Cadence(total, share)
    measured = steps_measured(cadence, steps, cost, change=lambda step: float(moving))
    milestones = len(steps_measured(Cadence(total, 0.0), steps))
    assert len(measured) >= milestones
    # The budget, or as few as may be; an open-ended run cannot set its later milestones aside.
    least = milestones * cost
    assert cadence.spent <= (max(share * steps, least) if total else share * steps + least) + cost


def test_a_quarter_of_the_budget_may_be_spent_in_advance():
    cadence = Cadence(1000, max_overhead=0.1)
    measured = steps_measured(cadence, 1000, cost=5.0, change=lambda step: 1.0)
    assert sum(step < 10 for step in measured) == 6  # 25 of 100, and a milestone
    assert cadence.spent <= 100
    open_ended = Cadence(None, max_overhead=0.1)
    assert sum(step < 10 for step in steps_measured(open_ended, 1000, 5.0, lambda step: 1.0)) == 5


def test_looking_soon_measures_before_the_next_step():
    cadence = Cadence(1000, max_overhead=0.0)
    cadence.measured(500, 1.0, 0.0)
    assert not cadence.due(501)
    cadence.look_soon(500)
    assert cadence.due(501)


def test_the_state_goes_round():
    cadence = Cadence(300, 0.2)
    steps_measured(cadence, 57, 2.0, lambda step: step % 3)
    other = Cadence()
    other.load_state_dict(cadence.state_dict())
    assert other == cadence
    assert math.isfinite(cadence.next)


@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 255, 256])
def test_the_next_milestone_lies_ahead(step):
    cadence = Cadence(max_overhead=0.0)
    cadence.measured(step, 1.0, 0.0)
    assert cadence.next > step
    assert cadence.next <= 2 * max(step, 0.5)
