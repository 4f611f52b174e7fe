import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from batchlr import AdaScale, BatchAwareLR, GradientScatter, GroupGradients
from batchlr.adascale import adascale_gain

positive = st.floats(1e-3, 1e3)


def scatter_of(size, mean_square, trace, dataset_size=None):
    inverse = 1 / size - (1 / dataset_size if dataset_size else 0)
    return GradientScatter(size, mean_square + trace * inverse, trace, dataset_size=dataset_size)


def scheduled(peak=0.1, shape=None):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    return optimizer, BatchAwareLR(optimizer, peak, shape)


@given(positive, positive, st.integers(1, 64), st.integers(1, 64))
def test_a_gain_lies_between_nothing_and_the_linear_rule(mean_square, trace, base, scale):
    gain = adascale_gain(scatter_of(base * scale, mean_square, trace), base)
    assert 1 - 1e-9 <= gain <= scale * (1 + 1e-9)
    exact = (trace + base * mean_square) / (trace + base * scale * mean_square) * scale
    assert gain == pytest.approx(exact)


def test_signal_alone_gains_nothing_and_noise_alone_all():
    assert adascale_gain(scatter_of(256, 1.0, 0.0), 64) == 1.0
    assert adascale_gain(scatter_of(256, 0.0, 1.0), 64) == 4.0
    assert adascale_gain(GradientScatter(256, 1.0, 512.0), 64) == 4.0  # |G|^2 seen as negative


def test_samples_drawn_without_replacement_leave_no_noise_in_all_of_them():
    # The whole set's gradient is exact: a step of it is worth 1 + noise / signal of the base batch.
    gain = adascale_gain(scatter_of(100, 20.0, 300.0, dataset_size=100), 50)
    assert gain == pytest.approx((20.0 + 300.0 * (1 / 50 - 1 / 100)) / 20.0)


@pytest.mark.parametrize("size", [60, 99, 100])
@pytest.mark.parametrize("mean_square", [0.0, 1e-9])
def test_a_batch_is_worth_no_more_base_batches_than_it_has_the_samples_of(size, mean_square):
    scatter = scatter_of(size, mean_square, 300.0, dataset_size=100)
    assert adascale_gain(scatter, 20) == pytest.approx(size / 20)


@pytest.mark.parametrize(
    ("square_norm", "trace"), [(math.nan, math.nan), (1.0, math.inf), (math.nan, 1.0)]
)
def test_gradients_that_are_not_finite_gain_no_number(square_norm, trace):
    assert math.isnan(adascale_gain(GradientScatter(64, square_norm, trace), 8))


def test_the_shape_goes_at_the_pace_of_the_gain():
    optimizer, scheduler = scheduled(shape=lambda o: StepLR(o, 10))
    adascale = AdaScale(scheduler, 64, smoothing=0.0)
    for _ in range(4):
        adascale.observe(scatter_of(256, 1.0, 256.0))  # worth 2.5
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
        optimizer.step()
        adascale.step()
    assert adascale.progress == 10.0
    assert scheduler.last_epoch == 10
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_the_shape_ends_with_the_base_run():
    optimizer, scheduler = scheduled(shape=lambda o: OneCycleLR(o, 1.0, total_steps=10))
    adascale = AdaScale(scheduler, 64, total_steps=9, smoothing=0.0)
    while adascale.progress < 9:
        adascale.observe(scatter_of(256, 1.0, 256.0))  # worth 2.5: ends at 10
        optimizer.step()
        adascale.step()
    assert adascale.progress == 10.0
    assert scheduler.last_epoch == 9


def test_trace_and_norm_are_averaged_and_not_their_ratio():
    _, scheduler = scheduled()
    adascale = AdaScale(scheduler, 64, smoothing=0.5)
    adascale.observe(scatter_of(256, 1.0, 0.0))
    adascale.observe(scatter_of(256, 0.25, 256.0))
    mean_square, trace = (1 + 2 * 0.25) / 3, 2 * 256.0 / 3
    assert adascale.gain == pytest.approx((mean_square + trace / 64) / (mean_square + trace / 256))


def test_what_is_not_finite_changes_nothing():
    optimizer, scheduler = scheduled()
    adascale = AdaScale(scheduler, 64)
    adascale.observe(scatter_of(256, 1.0, 256.0))
    before = adascale.state_dict()
    adascale.observe(GradientScatter(256, float("nan"), 1.0))
    assert adascale.state_dict() == before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_state_through_json_goes_on_identically():
    def run(adascale, optimizer, steps):
        for step in steps:
            adascale.observe(scatter_of(256, 1.0, 100.0 + step))
            optimizer.step()
            adascale.step()
        return optimizer.param_groups[0]["lr"], adascale.progress

    def build():
        optimizer, scheduler = scheduled(shape=lambda o: CosineAnnealingLR(o, 100))
        return AdaScale(scheduler, 64), optimizer

    first, optimizer = build()
    run(first, optimizer, range(5))
    saved = json.dumps([first.state_dict(), first.scheduler.state_dict()])
    whole = run(first, optimizer, range(5, 9))
    again, other = build()
    state, schedule = json.loads(saved)
    again.load_state_dict(state)
    again.scheduler.load_state_dict(schedule)
    assert run(again, other, range(5, 9)) == whole


def test_digits_at_eight_times_the_batch_with_the_small_ones_rate():
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    inputs = pixels.float() / 16
    base, scale, base_steps = 16, 8, 600

    def train(size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = BatchAwareLR(optimizer, 0.3, lambda o: CosineAnnealingLR(o, base_steps))
        adascale, groups = AdaScale(scheduler, base), GroupGradients(model.parameters())
        generator, steps = torch.Generator().manual_seed(0), 0
        while adascale.progress < base_steps:
            rows = torch.randint(len(labels), (size,), generator=generator)
            optimizer.zero_grad()
            for part in rows.chunk(8):
                loss = nn.functional.cross_entropy(model(inputs[part]), labels[part])
                (loss / 8).backward()
                groups.add()
            adascale.observe(groups.scatter(size))
            optimizer.step()
            adascale.step()
            steps += 1
        with torch.no_grad():
            return (model(inputs).argmax(1) == labels).double().mean().item(), steps

    small, small_steps = train(base)
    large, large_steps = train(base * scale)
    assert small_steps == base_steps
    assert base_steps / scale <= large_steps < base_steps / 2
    assert large > small - 0.01 > 0.95


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base_batch_size": 0}, "base_batch_size must be at least 1, got 0"),
        ({"base_batch_size": 8, "smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_illegal_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdaScale(scheduled()[1], **arguments)


def test_a_batch_below_the_base_is_refused():
    with pytest.raises(ValueError, match=r"base_batch_size must lie in \[1, 32\], got 64"):
        AdaScale(scheduled()[1], 64).observe(scatter_of(32, 1.0, 1.0))
