import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr import SurgeLaw, fit_surge_law
from batchlr.surge import sign_descent_lr, surge_law_of_moments

MEANS, STDS = (0.02, 0.05, 0.01), (1.0, 2.0, 0.5)
HESSIAN = ((2.0, 0.3, 0.1), (0.3, 1.0, 0.2), (0.1, 0.2, 0.5))


def test_the_law_of_known_moments():
    law = surge_law_of_moments(MEANS, STDS, HESSIAN)
    assert law.peak_batch_size == pytest.approx(9478.9434)
    assert law.max_lr == pytest.approx(0.0205302, rel=1e-5)


@pytest.mark.parametrize(("size", "lr"), [(16, 0.00168164), (4096, 0.0157855), (1e12, 0.0170213)])
def test_exact_rates_of_sign_descent(size, lr):
    assert sign_descent_lr(size, MEANS, STDS, HESSIAN) == pytest.approx(lr, rel=1e-5)


def test_sign_descent_on_samples_drawn():
    """No smaller loss on average at half or twice the rate, by a second-order Taylor series."""
    generator = np.random.default_rng(0)
    size, hessian = 400, np.array(HESSIAN)
    gradients = generator.normal(MEANS, np.array(STDS) / math.sqrt(size), (400_000, 3))
    signs = np.sign(gradients)
    along = (signs @ np.array(MEANS)).mean()
    curvature = np.einsum("ni,ij,nj->n", signs, hessian, signs).mean()
    found = sign_descent_lr(size, MEANS, STDS, HESSIAN)
    assert found == pytest.approx(along / curvature, rel=0.02)


def test_where_noise_dominates_the_law_and_the_exact_rate_agree():
    law = surge_law_of_moments(MEANS, STDS, HESSIAN)
    assert law.lr(16) == pytest.approx(sign_descent_lr(16, MEANS, STDS, HESSIAN), rel=0.01)


@given(st.floats(1e-5, 1.0), st.floats(1.0, 1e6), st.floats(1.01, 1e3))
def test_the_law_is_symmetric_about_its_peak_and_highest_there(max_lr, peak, ratio):
    law = SurgeLaw(max_lr, peak)
    assert law.lr(peak) == pytest.approx(max_lr)
    assert law.lr(peak * ratio) == pytest.approx(law.lr(peak / ratio))
    assert law.lr(peak * ratio) < max_lr
    step = 1e-4
    slope = math.log(law.lr(peak * ratio * (1 + step)) / law.lr(peak * ratio)) / math.log1p(step)
    assert law.exponent(peak * ratio) == pytest.approx(slope, abs=1e-4)


def test_far_below_the_peak_rates_rise_as_the_square_root():
    law = SurgeLaw(0.01, 1e9)
    assert law.lr(400) / law.lr(100) == pytest.approx(2.0, rel=1e-5)


@given(st.floats(1e-5, 1.0), st.floats(8.0, 1e5))
def test_a_fit_finds_the_law_its_rates_are_from(max_lr, peak):
    law = SurgeLaw(max_lr, peak)
    sizes = (16, 256, 4096, 65536)
    found = fit_surge_law(sizes, [law.lr(size) for size in sizes])
    assert found.max_lr == pytest.approx(max_lr, rel=1e-6)
    assert found.peak_batch_size == pytest.approx(peak, rel=1e-6)


def test_a_fit_of_rates_known_to_ten_percent_is_near():
    law, generator = SurgeLaw(0.01, 1000.0), np.random.default_rng(0)
    sizes = [32 * 2**k for k in range(10)]
    rates = [law.lr(size) * math.exp(0.1 * generator.normal()) for size in sizes]
    found = fit_surge_law(sizes, rates)
    assert found.max_lr == pytest.approx(0.01, rel=0.1)
    assert found.peak_batch_size == pytest.approx(1000.0, rel=0.3)


@pytest.mark.parametrize(
    ("sizes", "rates", "words"),
    [
        ([1, 2], [1.0], "2 batch sizes and 1 rates"),
        ([64, 64], [1.0, 2.0], r"two or more batch sizes, got \[64\]"),
        ([64, 0], [1.0, 2.0], "batch_size must be positive and finite, got 0"),
        ([64, 128], [1.0, -2.0], "rate must be positive and finite, got -2.0"),
        ([64, 256], [1.0, 4.0], "rise as a square root or faster: no peak fits"),
        ([16, 32, 64], [0.001 * b**0.5 for b in (16, 32, 64)], "rise as a square root or faster"),
        ([16, 32, 64], [0.003 * b**0.5 for b in (16, 32, 64)], "rise as a square root or faster"),
        ([64, 256], [4.0, 1.0], "fall as its inverse or faster: no peak fits"),
    ],
)
def test_rates_without_a_peak_are_refused(sizes, rates, words):
    with pytest.raises(ValueError, match=words):
        fit_surge_law(sizes, rates)


def test_moments_without_a_peak_are_refused():
    with pytest.raises(ValueError, match="rates rise as the square root"):
        surge_law_of_moments([0.1, -0.1], [1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]])
    with pytest.raises(ValueError, match="no step is best"):
        sign_descent_lr(1e6, [0.1, -0.1], [1.0, 1.0], [[1.0, 2.0], [2.0, 1.0]])


@pytest.mark.parametrize("size", [0, -1, math.inf, math.nan])
def test_a_batch_size_is_positive(size):
    for rate in (SurgeLaw(0.1, 10).lr, SurgeLaw(0.1, 10).exponent):
        with pytest.raises(ValueError, match="batch_size must be positive and finite"):
            rate(size)
    with pytest.raises(ValueError, match="batch_size must be positive and finite"):
        sign_descent_lr(size, MEANS, STDS, HESSIAN)


def test_a_standard_deviation_is_positive():
    with pytest.raises(ValueError, match="std must be positive and finite, got 0"):
        surge_law_of_moments([0.1], [0.0], [[1.0]])


@pytest.mark.parametrize(("max_lr", "peak"), [(0.0, 64.0), (0.1, -1.0), (math.nan, 64.0)])
def test_a_law_has_a_positive_peak(max_lr, peak):
    with pytest.raises(ValueError, match="must be positive and finite"):
        SurgeLaw(max_lr=max_lr, peak_batch_size=peak)
