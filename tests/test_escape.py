"""Escape times against exact passage times by quadrature, and against SGD itself."""

import math

import numpy as np
import pytest
from scipy.integrate import cumulative_simpson, simpson
from scipy.linalg import solve_discrete_lyapunov

from batchlr.escape import (
    CurvatureShapedEscape,
    EscapeModel,
    IsotropicEscape,
    LogBarrierEscape,
    SgdNoise,
    log_escape_ratio,
    log_escape_steps,
)

MODELS = [
    IsotropicEscape(barrier=0.25, variance=2.0),
    CurvatureShapedEscape(barrier=0.25, minimum=2.0, saddle=-1.0, share=0.3),
    LogBarrierEscape(loss_minimum=0.1, loss_saddle=0.5, curvature=2.0),
]


def passage_time(slope, temperature, start, end, low, *, at_end=False, points=200_001):
    """Mean time from ``start`` over ``end`` of ``dx = -slope dt + sqrt(2 T) dW``, by quadrature.

    ``T`` may depend on the place; noise counts where a small step begins (Itô), or where it ends.
    """
    x = np.linspace(low, end, points)
    heat = temperature(x) + 0 * x
    phi = cumulative_simpson(slope(x) / heat, x=x, initial=0.0)
    phi -= phi[np.searchsorted(x, start)]  # both exponentials of moderate size
    below = cumulative_simpson(np.exp(-phi) / (1.0 if at_end else heat), x=x, initial=0.0)
    outer = np.exp(phi) * below / (heat if at_end else 1.0)
    return simpson(outer[x >= start], x=x[x >= start])


def double_well(temperature):
    """From one minimum of ``(x^2 - 1)^2 / 4`` to the other."""
    return passage_time(lambda x: x**3 - x, lambda _: temperature, -1.0, 1.0, -2.6)


def kramers(temperature):
    noise = SgdNoise(lr=2 * temperature, batch_size=1)  # T = lr / 2 at unit variance
    steps = log_escape_steps(noise, 1.0, 0.25, minimum=[2.0], saddle=[-1.0])
    return math.exp(steps) * noise.time_per_step


@pytest.mark.parametrize(
    ("temperature", "exact", "excess"),
    [(0.1, 66.2686, 1.2244), (0.05, 729.6707, 1.1066), (0.03, 19485.82, 1.0542)],
)
def test_a_double_well_is_left_in_kramers_time_and_a_little_more(temperature, exact, excess):
    time = double_well(temperature)
    assert time == pytest.approx(exact, rel=1e-6)
    assert time / kramers(temperature) == pytest.approx(excess, abs=1e-4)


def test_kramers_time_of_a_double_well_is_known():
    assert kramers(0.05) == pytest.approx(659.3822923750206, rel=1e-12)


def test_other_directions_enter_by_their_determinants():
    noise = SgdNoise(lr=0.1, batch_size=4)
    alone = log_escape_steps(noise, 1.0, 0.1, minimum=[2.0], saddle=[-1.0])
    beside = log_escape_steps(noise, 1.0, 0.1, minimum=[8.0, 2.0, 3.0], saddle=[3.0, 2.0, -1.0])
    # A channel twice as wide at the saddle as at the minimum halves the time.
    assert beside == pytest.approx(alone - math.log(2), rel=1e-14)


def test_sgd_itself_leaves_the_double_well_in_that_time():
    """At a barrier of 2.5 temperatures, noise of the gradient in batches of 4."""
    lr, variance, batch = 0.05, 16.0, 4
    noise = SgdNoise(lr=lr, batch_size=batch)
    assert noise.temperature(variance) == pytest.approx(0.1)
    rng = np.random.default_rng(0)
    x, steps, done = np.full(1500, -1.0), 0, []
    while len(x):
        steps += 1
        gradient = x**3 - x + math.sqrt(variance / batch) * rng.normal(size=len(x))
        x = x - lr * gradient
        done += [steps] * int((x >= 1.0).sum())
        x = x[x < 1.0]
    # 1,500 exponential times are known to 2.6 %; a rate of 0.05 shortens them by some percent.
    assert np.mean(done) * lr == pytest.approx(double_well(0.1), rel=0.12)


def parabolas(minimum, saddle):
    """Slope, temperature per ``ratio`` and places of two parabolas that meet; their barrier."""
    turn, top = 1.0, 1.0 + minimum / saddle  # the slopes agree at the turn

    def slope(x):
        return np.where(x < turn, minimum * x, saddle * (top - x))

    def heat(x):
        return np.where(x < turn, minimum, saddle) / 2

    barrier = minimum * turn**2 / 2 + saddle * (top - turn) ** 2 / 2
    return slope, heat, top, barrier, minimum * turn**2 / 2 / barrier


@pytest.mark.parametrize(("minimum", "saddle"), [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0)])
def test_noise_of_the_curvatures_shape_has_its_exponent_and_two_prefactors(minimum, saddle):
    slope, heat, top, barrier, share = parabolas(minimum, saddle)
    model = CurvatureShapedEscape(barrier, minimum, -saddle, share)
    far = top + 4.0
    for at_end, curvature in ((True, saddle), (False, minimum)):
        ratios = []
        for ratio in (0.12, 0.06):
            noise = SgdNoise(lr=ratio, batch_size=1)
            exact = passage_time(
                slope, lambda x, r=ratio: r * heat(x), 0.0, far, -3.0, at_end=at_end
            )
            ratios.append(exact / (2 * math.pi / curvature * math.exp(model.log_time(noise))))
        assert ratios == pytest.approx([1.0, 1.0], abs=0.02)


def test_noise_in_proportion_to_the_loss_makes_a_logarithmic_barrier():
    h, saddle, least = 2.0, 1.0, 0.05
    slope, _, top, barrier, _ = parabolas(h, saddle)
    model = LogBarrierEscape(least, least + barrier, curvature=h)

    def loss(x):
        turn = 1.0
        inner = least + h * x**2 / 2
        return np.where(x < turn, inner, least + barrier - saddle * (top - x) ** 2 / 2)

    beyond = top + 0.9 * math.sqrt(2 * (least + barrier) / saddle)
    for k in (4.0, 8.0):  # 1 / (ratio h)
        noise = SgdNoise(lr=1 / (k * h), batch_size=1)
        exact = passage_time(slope, lambda x, n=noise: n.ratio * h * loss(x), 0.0, beyond, -6.0)
        prefactor = 2 * math.pi / math.sqrt(h * saddle)
        # What the model takes for parabolas ends at the turn: a few percent.
        assert exact == pytest.approx(prefactor * math.exp(model.log_time(noise)), rel=0.05)


def test_noise_has_three_units():
    noise = SgdNoise(lr=0.1, batch_size=128, dataset_size=50_000, momentum=0.9)
    larger = SgdNoise(lr=0.5, batch_size=640, momentum=0.9)
    assert noise.smith == pytest.approx(0.1 * (50_000 / 128 - 1) / 0.1)
    assert larger.ratio * 50_000 == pytest.approx(390.625)
    assert SgdNoise(lr=0.1, batch_size=128, momentum=0.9).ratio * 50_000 == pytest.approx(390.625)
    assert noise.temperature(4.0) == pytest.approx(2 * noise.ratio)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_temperature_is_what_sgd_on_a_parabola_settles_at(momentum):
    """``h E w^2 = T``, by the stationary moments of weight and velocity."""
    lr, batch, variance, h = 1e-3, 8, 5.0, 2.0
    move = np.array([[1 - lr * h, -lr * momentum], [h, momentum]])
    kick = np.array([-lr, 1.0]) * math.sqrt(variance / batch)
    moments = solve_discrete_lyapunov(move, np.outer(kick, kick))
    noise = SgdNoise(lr, batch, momentum=momentum)
    assert h * moments[0, 0] == pytest.approx(noise.temperature(variance), rel=0.02)


def test_settings_of_one_temperature_leave_in_one_time_and_fewer_steps_at_larger_rates():
    one, other = SgdNoise(0.01, 1), SgdNoise(0.02, 2)
    for model in MODELS:
        assert model.log_time(one) == pytest.approx(model.log_time(other), rel=1e-14)
        assert log_escape_ratio(model, one, other) == pytest.approx(math.log(2), rel=1e-12)
    steps = [
        log_escape_steps(noise, 1.0, 0.25, minimum=[2.0], saddle=[-1.0]) for noise in (one, other)
    ]
    assert steps[0] - steps[1] == pytest.approx(math.log(2), rel=1e-10)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_ratios_add_up_and_grow_with_the_batch(model):
    sizes = [SgdNoise(0.05, size) for size in (8, 32, 128)]
    first, second, third = sizes
    assert log_escape_ratio(model, second, first) > 0
    total = log_escape_ratio(model, third, second) + log_escape_ratio(model, second, first)
    assert log_escape_ratio(model, third, first) == pytest.approx(total, rel=1e-12)
    assert isinstance(model, EscapeModel)
    assert model.assumes


def test_the_isotropic_ratio_is_the_written_formula():
    model = IsotropicEscape(barrier=0.3, variance=1.7)
    found = log_escape_ratio(model, SgdNoise(0.1, 64), SgdNoise(0.4, 32))
    want = 2 * 0.3 / 1.7 * (64 / 0.1 - 32 / 0.4) + math.log(0.4 / 0.1)
    assert found == pytest.approx(want, rel=1e-13)


def test_settings_are_checked():
    for name in ("lr", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got 0"):
            SgdNoise(**{"lr": 0.1, "batch_size": 8} | {name: 0})
    with pytest.raises(ValueError, match="below dataset_size = 8, got 8: a batch of everything"):
        SgdNoise(0.1, 8, dataset_size=8)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        SgdNoise(0.1, 8, momentum=1.0)
    with pytest.raises(ValueError, match="counts samples: give SgdNoise a dataset_size"):
        _ = SgdNoise(0.1, 8).smith
    with pytest.raises(ValueError, match="variance must be positive and finite, got -1"):
        SgdNoise(0.1, 8).temperature(-1.0)


def test_models_are_checked():
    with pytest.raises(ValueError, match="barrier must be positive and finite, got 0"):
        IsotropicEscape(barrier=0.0, variance=1.0)
    with pytest.raises(ValueError, match="minimum must be positive and finite, got -2"):
        CurvatureShapedEscape(barrier=1.0, minimum=-2.0, saddle=-1.0)
    for saddle, share in ((1.0, 0.5), (-1.0, 1.0)):
        with pytest.raises(ValueError, match=rf"got saddle={saddle} and share={share}"):
            CurvatureShapedEscape(barrier=1.0, minimum=2.0, saddle=saddle, share=share)
    with pytest.raises(ValueError, match=r"above loss_minimum = 1.0 .* got 0.5 and 1"):
        LogBarrierEscape(loss_minimum=1.0, loss_saddle=0.5, curvature=1.0)
    with pytest.raises(ValueError, match=r"num_outliers at least 1, got 2.0 and 0"):
        LogBarrierEscape(loss_minimum=1.0, loss_saddle=2.0, curvature=1.0, num_outliers=0)


@pytest.mark.parametrize(
    ("minimum", "saddle"),
    [
        ([2.0], [1.0]),
        ([2.0, 1.0], [-1.0]),
        ([2.0, 0.0], [-1.0, 1.0]),
        ([2.0, 1.0], [-1.0, 0.0]),
        ([2.0, 1.0], [-1.0, -1.0]),
        ([-2.0], [-1.0]),
        ([], []),
    ],
)
def test_spectra_that_do_not_determine_the_time_are_refused(minimum, saddle):
    noise = SgdNoise(0.1, 8)
    with pytest.raises(ValueError, match="minimum must be all positive eigenvalues and saddle as"):
        log_escape_steps(noise, 1.0, 0.1, minimum=minimum, saddle=saddle)


def test_a_barrier_is_needed():
    with pytest.raises(ValueError, match=r"barrier must be positive and finite, got -0\.1"):
        log_escape_steps(SgdNoise(0.1, 8), 1.0, -0.1, minimum=[1.0], saddle=[-1.0])
