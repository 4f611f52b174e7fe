"""What counts as a jump of the loss, and the way back."""

import pytest
import torch

from batchlr.on_the_fly.spike_guard import SpikeGuard


def show(guard, *means, noise=0.0, seed=0):
    """Ten losses about each mean; whether each ten were a spike."""
    generator = torch.Generator().manual_seed(seed)
    spiked = []
    for mean in means:
        losses = mean + noise * torch.randn(10, generator=generator, dtype=torch.float64)
        spiked.append(any([guard.observe(loss) for loss in losses]))
    return spiked


def test_a_falling_loss_is_quiet():
    guard = SpikeGuard()
    assert show(guard, 2.3, 2.0, 1.5, 0.4, 0.1) == [False] * 5
    assert guard.factor == 1.0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_jump_by_a_third_of_the_first_loss_halves_the_rate(scale):
    guard = SpikeGuard()
    assert show(guard, 2.0 * scale, 0.5 * scale, 1.2 * scale) == [False, False, True]
    assert guard.factor == 0.5


def test_small_rises_are_left_alone():
    guard = SpikeGuard()
    assert not any(show(guard, 2.0, 0.01, 0.05, 0.3, 0.5))


def test_noise_is_no_jump():
    guard = SpikeGuard()
    assert not any(show(guard, *[2.0] * 50, noise=0.4))


def test_the_rate_comes_back_while_it_is_quiet():
    guard = SpikeGuard()
    show(guard, 2.0, 0.5, 3.0, 2.0)
    assert guard.factor == 0.25
    show(guard, 0.6)
    assert guard.factor == 0.25 * 1.25
    show(guard, *[0.5] * 10)
    assert guard.factor == 1.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_spike(loss):
    guard = SpikeGuard()
    assert show(guard, 1.0, loss) == [False, True]


def test_a_run_that_begins_without_numbers_is_judged_by_those_that_follow():
    guard = SpikeGuard()
    assert show(guard, float("nan"), 2.0, 1.9, 5.0) == [True, False, False, True]


def test_the_state_goes_round_between_two_looks():
    guard, other = SpikeGuard(), SpikeGuard()
    show(guard, 2.0, 0.5)
    for _ in range(4):
        guard.observe(torch.tensor(9.0))
    other.load_state_dict(guard.state_dict())
    for _ in range(6):
        assert guard.observe(torch.tensor(9.0)) == other.observe(torch.tensor(9.0))
    assert guard.factor == other.factor == 0.5


def test_losses_keep_no_graph():
    guard = SpikeGuard()
    weight = torch.ones((), requires_grad=True)
    guard.observe(weight * 2)
    assert not guard.pending[0].requires_grad
