"""What counts as a lost network, and what does not."""

import itertools
import math

import numpy as np
import pytest
import torch

from batchlr.on_the_fly.collapse import CollapseDetector


def gradients(norm, silent=0, of=4):
    """``of`` tensors, ``silent`` of them zero, whose norms together are ``norm``."""
    loud = of - silent
    each = norm / math.sqrt(loud) if loud else 0.0
    return [torch.tensor([each, 0.0]) for _ in range(loud)] + [torch.zeros(3)] * silent


def show(detector, losses, norms=None, silent=0):
    """Whether each look taken in these steps found the network lost."""
    norms = norms or [1.0] * len(losses)
    looks = [
        detector.observe(torch.tensor(loss), gradients(norm, silent))
        for loss, norm in zip(losses, norms, strict=True)
    ]
    return [look.lost for look in looks if look is not None]


def test_a_falling_loss_is_quiet_whatever_its_gradients():
    detector = CollapseDetector()
    assert show(detector, [2.3, 2.3, 2.0, 1.5], [1, 1, 20, 400]) == [False, False]
    assert detector.learnt


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_on_a_plateau_loss_and_gradient_jump_together(scale):
    for loss, norm, lost in [(2.7, 4.0, True), (2.7, 2.0, False), (2.4, 9.0, False)]:
        detector = CollapseDetector()
        show(detector, [2.3 * scale] * 6, [scale] * 6)
        assert show(detector, [2.3 * scale, loss * scale], [scale, norm * scale]) == [lost]


def test_a_gradient_that_grows_without_harm_counts_from_then_on():
    detector = CollapseDetector()
    show(detector, [2.3] * 4, [1, 1, 9, 9])
    assert show(detector, [2.7, 2.7], [20, 20]) == [False]


@pytest.mark.parametrize(("loss", "lost"), [(2.3, True), (5.0, True), (2.24, True), (2.2, False)])
def test_a_leap_is_a_collapse_where_the_loss_has_not_moved(loss, lost):
    detector = CollapseDetector()
    show(detector, [2.3] * 4)
    looks = [
        detector.observe(torch.tensor(loss), gradients(1.0), change=torch.tensor(change))
        for change in (0.7, 0.1)
    ]
    assert looks[0] is None
    assert looks[1].lost == lost


@pytest.mark.parametrize("change", [0.69, math.nan, math.inf])
def test_what_is_no_leap(change):
    detector = CollapseDetector()
    show(detector, [2.3] * 4)
    assert detector.observe(torch.tensor(2.3), gradients(1.0), change=torch.tensor(change)) is None
    assert not detector.observe(torch.tensor(2.3), gradients(1.0)).lost


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_what_was_learnt_may_be_forgotten_for_a_while_but_worse_is_lost(scale):
    for loss, lost in [(2.5, False), (2.6, True)]:
        detector = CollapseDetector()
        show(detector, [2.3 * scale] * 4 + [1.0 * scale] * 2)
        assert show(detector, [loss * scale] * 2, [50 * scale] * 2) == [lost]


def test_losses_far_below_one_may_rise_by_more_than_a_tenth():
    detector = CollapseDetector()
    show(detector, [0.05] * 4 + [0.01] * 2)
    assert show(detector, [0.14] * 2) == [False]


def test_what_was_learnt_and_is_forgotten_for_good_is_lost():
    detector = CollapseDetector()
    show(detector, [2.3, 2.3, 2.0, 2.0])
    assert show(detector, [2.3] * 4) == [False, False]
    assert show(detector, [2.2, 2.2]) == [False]  # not for good
    assert show(detector, [2.29] * 6) == [False, False, True]
    assert show(CollapseDetector(), [2.3] * 20) == [False] * 10  # nothing to forget


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 231.0])
def test_a_loss_beyond_all_bounds_is_lost_at_any_time(loss):
    for earlier in ([], [2.3, 2.3], [2.3, 2.3, 1.0, 1.0]):
        detector = CollapseDetector()
        show(detector, earlier)
        if earlier or not math.isfinite(loss):
            assert show(detector, [2.3, loss]) == [True]


@pytest.mark.parametrize(("first", "loss"), [(2.3, 7.0), (0.01, 3.1), (-5.0, 16.0)])
def test_so_is_a_mean_of_three_times_the_first_loss_or_of_three(first, loss):
    for mean, lost in [(loss, True), (0.9 * loss, False)]:
        detector = CollapseDetector()
        show(detector, [first] * 6)
        assert show(detector, [mean, mean]) == [lost]


@pytest.mark.parametrize("steep", [0.0, 0.2])
def test_a_descent_is_no_noise(steep):
    detector = CollapseDetector()
    losses = [2.3 - steep * max(0, step - 4) for step in range(10)]
    assert not any(show(detector, [2.3] * 2 + losses))
    assert show(detector, [2.9, 3.0]) == [steep > 0]  # well above the first, as it had learnt


def test_the_scatter_of_a_jump_is_no_noise():
    """Losses of VGG-11 with batch norm at batch 1024 (`no_tuning.py`), which did not come back."""
    detector = CollapseDetector()
    falling = [2.31, 2.30, 2.26, 2.22, 2.11, 1.90, 1.66, 1.42]
    assert show(detector, falling) == [False] * 4
    noise, freedom = detector.squares, detector.freedom
    looks = [detector.observe(torch.tensor(loss), gradients(5.0)) for loss in (2.16, 3.16)]
    assert (looks[1].lost, looks[1].sound) == (False, False)  # not yet, but nothing to go back to
    assert (detector.squares, detector.freedom) == (noise, freedom)
    assert show(detector, [3.11, 2.61]) == [True]


def test_a_level_that_has_risen_is_noisy_again_from_the_next_look_on():
    detector = CollapseDetector()
    show(detector, [2.30, 2.31] * 3 + [1.60, 1.55])
    freedom = detector.freedom
    looks = [detector.observe(torch.tensor(loss), gradients(1.0)) for loss in [1.9, 1.91] * 2]
    assert [look.sound for look in looks if look is not None] == [False, True]
    assert detector.freedom == freedom + 1


def test_where_nothing_learnt_is_left_a_look_is_not_sound():
    """Be it by noise, and long before the loss is back at the first one for good."""
    detector = CollapseDetector()
    show(detector, [2.30, 2.31] * 3 + [1.60, 1.55])
    levels = [2.1, 2.1, 2.0]  # by a tenth down is 2.07
    looks = [
        detector.observe(torch.tensor(level), gradients(1.0)) for level in levels for _ in range(2)
    ]
    seen = [look for look in looks if look is not None]
    assert [look.sound for look in seen] == [False, False, True]
    assert not any(look.lost for look in seen)


@pytest.mark.parametrize(("loss", "settled"), [(2.3, False), (2.1, False), (2.0, True)])
def test_what_time_alone_settles_is_still_down_by_a_tenth(loss, settled):
    detector = CollapseDetector()
    show(detector, [2.3] * 4 + [2.0] * 4)
    assert detector.learnt
    looks = [detector.observe(torch.tensor(loss), gradients(1.0)) for _ in range(16)]
    assert [look for look in looks if look][-1].settled == settled


def test_before_the_noise_is_known_a_jump_is_none():
    detector = CollapseDetector()
    show(detector, [2.3] * 4)
    assert show(detector, [2.3, 2.7], [1.0, 4.0]) == [False]


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_never_a_collapse(spread, seed):
    """Losses of single samples about a constant mean, and gradients as large as they are."""
    rng = np.random.default_rng(seed)
    shape = 1 / spread**2
    losses = rng.gamma(shape, 1 / shape, size=400)
    assert not any(show(CollapseDetector(), losses.tolist(), (losses**0.5).tolist()))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_slow_regression_on_noise_is_none(batch_size):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth, weights = 0.3 * rng.normal(size=10), np.zeros(10)
        detector = CollapseDetector()
        for _ in range(200):
            x = rng.normal(size=(batch_size, 10))
            residual = x @ weights - x @ truth - rng.normal(size=batch_size)
            gradient = 2 * x.T @ residual / batch_size
            weights -= 0.002 * gradient
            look = detector.observe(torch.tensor((residual**2).mean()), [torch.tensor(gradient)])
            assert look is None or not look.lost


def test_a_gradient_that_overflows_alone_is_not():
    """Steps with such gradients are skipped by scalers of half precision."""
    detector = CollapseDetector()
    assert show(detector, [2.3, 2.3, 2.3, 2.3], [math.inf, 1, math.nan, 1]) == [False, False]
    assert detector.largest == pytest.approx(1.0)


def test_most_weights_without_gradient_are_a_dead_network():
    detector = CollapseDetector()
    show(detector, [2.3, 2.3])
    assert show(detector, [2.3, 2.3], silent=2) == [False]  # half of four
    assert show(detector, [2.3, 2.3], silent=3) == [True]
    assert show(detector, [2.3, 2.3], silent=4) == [True]


def test_one_step_without_gradient_is_chance():
    detector = CollapseDetector()
    show(detector, [2.3, 2.3])
    detector.observe(torch.tensor(2.3), gradients(1.0, silent=4))
    assert not detector.observe(torch.tensor(2.3), gradients(1.0)).lost


def test_a_loss_fitted_to_zero_has_no_gradient_either():
    detector = CollapseDetector()
    show(detector, [2.3, 2.3, 0.5, 0.5])
    assert show(detector, [0.0, 0.0], silent=4) == [False]


def test_a_network_silent_from_the_start_is_meant_to_be():
    detector = CollapseDetector()
    assert show(detector, [2.3] * 6, silent=3) == [False] * 3


def test_behind_weights_that_begin_at_zero_the_first_step_is_silent():
    """And it is again when the network has been taken back to where it began."""
    detector = CollapseDetector()
    detector.observe(torch.tensor(2.3), gradients(1.0, silent=3))
    assert not detector.observe(torch.tensor(2.3), gradients(1.0)).lost
    detector.restart()
    detector.observe(torch.tensor(2.3), gradients(1.0, silent=3))
    assert not detector.observe(torch.tensor(2.3), gradients(1.0)).lost
    assert show(detector, [2.3, 2.3], silent=3) == [True]  # it has died


def test_a_single_step_behind_a_return_is_not_silent():
    detector = CollapseDetector()
    detector.observe(torch.tensor(2.3), gradients(1.0, silent=3))
    assert not detector.observe(torch.tensor(2.3), gradients(1.0)).lost
    detector.within = 1
    detector.restart()
    assert show(detector, [2.3], silent=3) == [False]
    assert show(detector, [2.3], silent=3) == [True]


def test_without_gradients_losses_are_enough():
    detector = CollapseDetector()
    looks = [detector.observe(torch.tensor(loss), []) for loss in (2.3, 2.3, 2.3, math.nan)]
    assert [look.lost for look in looks if look] == [False, True]


def test_looks_grow_apart_with_the_run_and_can_be_made_close():
    detector = CollapseDetector()
    steps = [k for k in range(1, 200) if show(detector, [2.3])]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[:8] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 10
    detector.within = 1
    assert len(show(detector, [2.3] * 5)) == 5


def test_what_is_not_yet_looked_at_can_be_urgent():
    detector = CollapseDetector()
    show(detector, [2.3] * 160)
    assert not detector.urgent
    detector.observe(torch.tensor(2.3), gradients(1.0))
    assert not detector.urgent
    detector.observe(torch.tensor(math.nan), gradients(1.0))
    assert detector.urgent
    assert detector.look().lost


def test_processes_see_what_the_first_sees():
    first, second = CollapseDetector(), CollapseDetector()
    said = []
    for loss, other in [(2.3, 2.3), (2.3, 2.4), (1.0, math.nan), (1.0, math.nan)]:
        one = first.observe(torch.tensor(loss), gradients(1.0), lambda v: said.append(v) or v)
        two = second.observe(torch.tensor(other), gradients(2.0), lambda _: said.pop(0))
        assert one == two
        assert said == []
    assert (first.first, first.largest, first.learnt) == (second.first, second.largest, 4)


def test_the_state_goes_round_between_two_looks():
    detector, other = CollapseDetector(), CollapseDetector()
    show(detector, [2.3] * 7)
    state = detector.state_dict()
    other.load_state_dict(state)
    assert other.pending is not state["pending"]
    assert show(detector, [9.0], [9.0]) == show(other, [9.0], [9.0]) == [True]


def test_losses_keep_no_graph():
    detector = CollapseDetector()
    weight = torch.ones((), requires_grad=True)
    detector.observe(weight * 2, [torch.ones(2, requires_grad=True)])
    assert not detector.pending[0].requires_grad
