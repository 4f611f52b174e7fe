"""Scaling rules against the limits and the optimizer behaviour they stand for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr.learning_rates import max_sgd_lr
from batchlr.scaling_rules import (
    AdamSettings,
    BatchStage,
    batch_growth_for_decay,
    rescale_adam,
    rescale_lr,
)

sizes = st.floats(1.0, 1e6)
decay_rates = st.floats(0.1, 0.999)
RULES = ("linear", "sqrt", "saturating", "none")


def rescale(rule, lr, old, new, critical=300.0):
    critical_batch_size = critical if rule == "saturating" else None
    return rescale_lr(lr, old, new, rule=rule, critical_batch_size=critical_batch_size)


def exponent(batch_size, critical):
    """``d ln lr / d ln B`` of the saturating rule by central differences."""
    step = 1e-4
    high = rescale("saturating", 1.0, batch_size, batch_size * math.exp(step), critical)
    low = rescale("saturating", 1.0, batch_size, batch_size * math.exp(-step), critical)
    return math.log(high / low) / (2.0 * step)


# --- learning rate -----------------------------------------------------------------------------


@given(old=sizes, middle=sizes, new=sizes, rule=st.sampled_from(RULES))
def test_rescaling_composes_and_undoes_itself(old, middle, new, rule):
    direct = rescale(rule, 0.1, old, new)
    by_stages = rescale(rule, rescale(rule, 0.1, old, middle), middle, new)
    assert by_stages == pytest.approx(direct, rel=1e-12)
    assert rescale(rule, direct, new, old) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("saturating", 16 / 7), ("none", 1.0)]
)
def test_fourfold_batch_from_a_third_of_the_critical_size(rule, factor):
    assert rescale(rule, 0.5, 100, 400, critical=300) == pytest.approx(0.5 * factor, rel=1e-14)


@given(
    largest=st.floats(0.01, 100.0),
    total_variance=st.floats(0.0, 1e3),
    momentum=st.floats(0.0, 0.95),
    old=sizes,
    new=sizes,
)
def test_saturating_rule_carries_the_stability_limit(largest, total_variance, momentum, old, new):
    amplification = (1.0 + momentum) / (1.0 - momentum)
    critical = amplification * total_variance / largest**2

    def limit(batch_size):
        return max_sgd_lr(largest, total_variance / (batch_size * largest), momentum=momentum)

    assert rescale("saturating", limit(old), old, new, critical) == pytest.approx(
        limit(new), rel=1e-12
    )


def test_saturating_rate_at_the_critical_size_is_half_its_limit():
    largest, critical = 5.0, 64.0
    at_critical = rescale("saturating", 2.0 / largest, 1e18, critical, critical)
    assert at_critical == pytest.approx(1.0 / largest, rel=1e-12)


@given(batch_size=st.floats(1.0, 1e5), critical=st.floats(1.0, 1e5))
def test_saturating_exponent_is_the_critical_share(batch_size, critical):
    expected = critical / (batch_size + critical)
    assert exponent(batch_size, critical) == pytest.approx(expected, abs=1e-7)


def test_saturating_rule_is_linear_far_below_the_critical_size_and_flat_far_above():
    assert exponent(1.0, 1e6) == pytest.approx(1.0, abs=1e-5)
    assert exponent(64.0, 64.0) == pytest.approx(0.5, abs=1e-7)
    assert exponent(1e6, 1.0) == pytest.approx(0.0, abs=1e-5)


def test_without_noise_the_saturating_rule_keeps_the_rate():
    assert rescale("saturating", 0.1, 8, 1024, critical=0.0) == 0.1


# --- Adam --------------------------------------------------------------------------------------


def test_adam_defaults_are_those_of_the_optimizer():
    assert rescale_adam(1e-3, 64, 64) == AdamSettings(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)


@given(beta1=decay_rates, beta2=decay_rates, old=sizes, new=sizes)
def test_adam_decay_rates_stay_legal_and_forget_equally_per_sample(beta1, beta2, old, new):
    settings = rescale_adam(1e-3, old, new, betas=(beta1, beta2))
    for before, after in zip((beta1, beta2), settings.betas, strict=True):
        assert 0.0 <= after < 1.0
        if after > 1e-300:  # a smaller power keeps no digits
            assert math.log(after) / new == pytest.approx(math.log(before) / old, rel=1e-6)


@given(beta=st.floats(0.99, 0.9999), ratio=st.floats(0.25, 4.0))
def test_adam_decay_rates_agree_with_the_linear_form_to_first_order(beta, ratio):
    beta1, _ = rescale_adam(1e-3, 1.0, ratio, betas=(beta, beta)).betas
    second_order = (ratio * (1.0 - beta)) ** 2 + ratio * (1.0 - beta) ** 2
    assert 1.0 - beta1 == pytest.approx(ratio * (1.0 - beta), abs=second_order)


def adam_spread(settings, num_steps, batch_size, rng, num_coordinates=2000):
    """Standard deviation of Adam's displacement on pure gradient noise."""
    (beta1, beta2), m, v, w = settings.betas, 0.0, 0.0, np.zeros(num_coordinates)
    for step in range(1, num_steps + 1):
        gradient = rng.normal(size=num_coordinates) / math.sqrt(batch_size)
        m = beta1 * m + (1.0 - beta1) * gradient
        v = beta2 * v + (1.0 - beta2) * gradient**2
        scale = np.sqrt(v / (1.0 - beta2**step)) + settings.eps
        w = w - settings.lr * m / (1.0 - beta1**step) / scale
    return w.std()


def test_rescaled_adam_diffuses_equally_after_equal_samples():
    rng = np.random.default_rng(0)
    eps = 0.5  # as large as the noise itself, so that its rule matters
    small = AdamSettings(lr=1e-3, betas=(0.9, 0.99), eps=eps)
    large = rescale_adam(small.lr, 1, 4, betas=small.betas, eps=small.eps)
    spread = adam_spread(small, 2000, 1, rng)
    assert adam_spread(large, 500, 4, rng) == pytest.approx(spread, rel=0.06)  # sampling: 2.2 %
    unscaled_eps = AdamSettings(large.lr, large.betas, eps)
    assert adam_spread(unscaled_eps, 500, 4, rng) < 0.85 * spread


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("function", [rescale_lr, rescale_adam])
@pytest.mark.parametrize("name", ["lr", "old", "new"])
def test_rates_and_sizes_must_be_positive(function, name, value):
    arguments = {"lr": 0.1, "old": 8.0, "new": 16.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        function(**arguments)


def test_saturating_rule_needs_the_critical_batch_size():
    with pytest.raises(
        ValueError, match=r"belongs to rule='saturating'.*got critical_batch_size=None"
    ):
        rescale_lr(0.1, 8, 16, rule="saturating")


@pytest.mark.parametrize("rule", ["linear", "sqrt", "none"])
def test_other_rules_refuse_a_critical_batch_size(rule):
    with pytest.raises(ValueError, match=f"and to no other, got .*=64 with rule='{rule}'"):
        rescale_lr(0.1, 8, 16, rule=rule, critical_batch_size=64)


@pytest.mark.parametrize("critical", [-1.0, math.inf, math.nan])
def test_critical_batch_size_must_be_finite_and_not_negative(critical):
    with pytest.raises(
        ValueError,
        match=f"critical_batch_size must be finite and at least 0, got {critical}: .*use",
    ):
        rescale_lr(0.1, 8, 16, rule="saturating", critical_batch_size=critical)


def test_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="one of 'linear', 'sqrt', 'saturating', 'none', got 'cubic'"
    ):
        rescale_lr(0.1, 8, 16, rule="cubic")


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)])
def test_adam_decay_rates_must_be_fractions(betas):
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\), got \("):
        rescale_adam(1e-3, 8, 16, betas=betas)


@pytest.mark.parametrize("eps", [-1e-8, math.inf, math.nan])
def test_adam_eps_must_be_finite_and_not_negative(eps):
    with pytest.raises(ValueError, match=f"eps must be finite and at least 0, got {eps}"):
        rescale_adam(1e-3, 8, 16, eps=eps)


# --- a larger batch in place of a lower rate ----------------------------------------------------


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8), st.integers(1, 32), st.integers(1, 64)
)
def test_growth_keeps_the_ratio_of_rate_to_batch_size(factors, units, growth):
    size = 4 * units
    most = size * growth
    stages = batch_growth_for_decay(factors, size, max_batch_size=most, multiple_of=4)
    for factor, stage in zip(factors, stages, strict=True):
        assert stage.lr_factor / stage.batch_size == pytest.approx(factor / size)
        assert size <= stage.batch_size <= most
        assert stage.batch_size % 4 == 0
        if stage.batch_size <= most - 4:  # the rate falls by what rounding leaves, and no more
            assert stage.lr_factor * (stage.batch_size + 4) > stage.batch_size * (1 - 1e-6)


def test_growth_has_the_paper_s_noise_scale():
    first, *rest = batch_growth_for_decay([1.0, 0.2, 0.04, 0.008], 128, max_batch_size=5120)
    assert (first.batch_size, first.lr_factor) == (128, 1.0)
    assert [(stage.batch_size, stage.lr_factor) for stage in rest] == [
        (640, 1.0),
        (3200, 1.0),
        (5120, pytest.approx(0.32)),
    ]


def test_a_warm_up_leaves_the_batch_as_it_is():
    assert batch_growth_for_decay([2.0], 128, max_batch_size=512) == [BatchStage(128, 2.0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.0], 64, 128, 1), "lr_factor must be positive and finite, got 0"),
        (([1.0], 64, 32, 1), "not above max_batch_size 32"),
        (([1.0], 60, 128, 8), "batch_size 60 must be a multiple of 8"),
        (([1.0], 64, 128, 0), "multiple_of must be positive and finite, got 0"),
    ],
)
def test_growth_that_does_not_fit_is_refused(arguments, words):
    factors, size, most, unit = arguments
    with pytest.raises(ValueError, match=words):
        batch_growth_for_decay(factors, size, max_batch_size=most, multiple_of=unit)
