"""Mean-square limits against the full recursion of all second moments of weight and velocity."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlr.learning_rates import max_adam_lr, max_sgd_lr
from batchlr.mean_square import (
    CurvatureSpread,
    Dynamics,
    loop_gain,
    mean_square_limit,
    mean_square_lr,
)

# The search stops at steps of 1e-7, and a secant's next error is a product of two. Beside a pole
# rounding is amplified: the response there is good to 1e-16 over the distance.
LIMIT = 1e-8
BESIDE_A_POLE = 1e-7
# Difference quotients in Limit are one-sided, with a step of 1e-4 of what they vary over.
SENSITIVITY = 1e-3

DYNAMICS = {
    "plain": Dynamics(),
    "heavy ball": Dynamics(0.9),
    "nesterov": Dynamics(0.8, nesterov=True),
    "coupled decay": Dynamics(0.5, weight_decay=0.3),
    "nesterov, coupled decay": Dynamics(0.5, nesterov=True, weight_decay=0.2),
    "averaged": Dynamics(0.9, averaged=True),
    "averaged, decoupled decay": Dynamics(0.8, averaged=True, decoupled_decay=0.05),
    "heavy ball, decoupled decay": Dynamics(0.6, decoupled_decay=0.1),
}

each_dynamics = pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)


def step_matrix(dynamics, hessian, lr):
    """``(w, v) -> (w, v)`` ``(2d, 2d)`` of one optimizer step, as PyTorch has it."""
    size = len(hessian)
    unit, zero = np.eye(size), np.zeros((size, size))
    gradient = np.c_[hessian + dynamics.weight_decay * unit, zero]
    dampening = 1 - dynamics.momentum if dynamics.averaged else 1.0
    velocity = dynamics.momentum * np.c_[zero, unit] + dampening * gradient
    step = gradient + dynamics.momentum * velocity if dynamics.nesterov else velocity
    weight = (1 - lr * dynamics.decoupled_decay) * np.c_[unit, zero] - lr * step
    return np.r_[weight, velocity]


def radius(dynamics, spread, lr):
    """Growth per step of ``E z z'``, ``z = (w, v)``, by the dense operator on all of it."""
    mean = step_matrix(dynamics, np.diag(spread.curvatures), lr)
    total = np.kron(mean, mean)
    for deviation in spread.deviations:
        moved = step_matrix(dynamics, np.diag(spread.curvatures) + deviation, lr) - mean
        total = total + spread.scale * np.kron(moved, moved)
    return np.abs(np.linalg.eigvals(total)).max()


def random_spread(size, seed, *, definite, count=6, noise=1.0):
    """Curvatures between 0.2 and 3 and deviations of about ``noise`` times the top one."""
    rng = np.random.default_rng(seed)
    curvatures = np.sort(rng.uniform(0.2, 3.0, size))[::-1].copy()
    if definite:  # of samples x x', as in least squares
        x = rng.normal(size=(count, size))
        matrices = x[:, :, None] * x[:, None, :]
        deviations = matrices - matrices.mean(0)
    else:
        gaussian = rng.normal(size=(count, size, size))
        deviations = (gaussian + gaussian.transpose(0, 2, 1)) / 2
    scale = noise * curvatures[0] ** 2 / (deviations**2).sum() * size
    return CurvatureSpread(curvatures, deviations, scale=scale)


# --- one direction: closed forms -----------------------------------------------------------------


def one_direction(largest, noise, seed=0, count=3):
    """Deviations whose variance is ``largest * noise``, of unequal size and sign."""
    parts = np.random.default_rng(seed).normal(size=count)
    parts *= math.sqrt(largest * noise / (parts**2).sum() / 0.25)
    return CurvatureSpread(np.array([largest]), parts.reshape(-1, 1, 1), scale=0.25)


CURVATURES = st.floats(1e-3, 1e3)
NOISE = st.just(0.0) | st.floats(-10, 2).map(lambda x: 10**x)  # over the curvature
MOMENTA = st.floats(0.0, 0.99)


@given(largest=CURVATURES, noise=NOISE, momentum=MOMENTA)
def test_along_one_direction_the_limit_is_the_heavy_ball_s_closed_form(largest, noise, momentum):
    limit = mean_square_limit(Dynamics(momentum), one_direction(largest, noise * largest))
    assert limit.lr == pytest.approx(
        max_sgd_lr(largest, noise * largest, momentum=momentum), rel=BESIDE_A_POLE
    )
    assert limit.noiseless == pytest.approx(max_sgd_lr(largest, momentum=momentum), rel=1e-14)


@given(largest=CURVATURES, noise=NOISE, momentum=MOMENTA, decay=st.floats(0, 2))
def test_along_one_direction_the_limit_is_nesterov_s_closed_form(largest, noise, momentum, decay):
    dynamics = Dynamics(momentum, nesterov=True, weight_decay=decay * largest)
    limit = mean_square_limit(dynamics, one_direction(largest, noise * largest))
    want = max_sgd_lr(
        largest,
        noise * largest,
        momentum=momentum,
        nesterov=True,
        weight_decay=decay * largest,
    )
    assert limit.lr == pytest.approx(want, rel=BESIDE_A_POLE)


@given(largest=CURVATURES, noise=NOISE, beta1=MOMENTA, decay=st.floats(0, 2))
def test_along_one_direction_the_limit_is_adamw_s_closed_form(largest, noise, beta1, decay):
    dynamics = Dynamics(beta1, averaged=True, decoupled_decay=decay * largest)
    limit = mean_square_limit(dynamics, one_direction(largest, noise * largest))
    want = max_adam_lr(largest, noise * largest, beta1=beta1, weight_decay=decay * largest)
    assert limit.lr == pytest.approx(want, rel=BESIDE_A_POLE)


@given(largest=CURVATURES, noise=NOISE, momentum=MOMENTA, decay=st.floats(0, 2))
def test_with_coupled_decay_the_closed_form_is_on_the_safe_side(largest, noise, momentum, decay):
    dynamics = Dynamics(momentum, weight_decay=decay * largest)
    limit = mean_square_limit(dynamics, one_direction(largest, noise * largest))
    formula = max_sgd_lr(largest, noise * largest, momentum=momentum, weight_decay=decay * largest)
    assert formula <= limit.lr * (1 + BESIDE_A_POLE)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0, 100.0])
def test_away_from_the_pole_the_closed_form_is_met_to_1e_8(noise, momentum):
    limit = mean_square_limit(Dynamics(momentum), one_direction(2.0, noise))
    assert limit.lr == pytest.approx(max_sgd_lr(2.0, noise, momentum=momentum), rel=LIMIT)


@pytest.mark.parametrize("noise", [1e-12, 1e-9, 1e-7, 1e-5, 1e-2])
def test_next_to_no_noise_the_limit_is_next_to_the_noiseless_one(noise):
    """As for a batch that is nearly the whole data set; ``1 - lr / noiseless`` is ``noise / 2``."""
    limit = mean_square_limit(Dynamics(), one_direction(2.0, noise))
    assert limit.lr == pytest.approx(limit.noiseless * (1 - noise / 2), rel=noise**2 + 2e-9)
    assert limit.by_curvature == pytest.approx([-0.5], rel=2 * noise + 2e-3)
    if noise > 1e-8:
        assert limit.steepness == pytest.approx(2 / noise, rel=noise + 2e-3)


def test_directions_that_noise_does_not_couple_do_not_matter():
    deviations = np.array([np.diag([1.5, 0.0, 0.0]), np.diag([0.0, 0.1, 0.0])])
    spread = CurvatureSpread(np.array([2.0, 1.0, 0.5]), deviations)
    want = max_sgd_lr(2.0, 1.5**2 / 2, momentum=0.5)
    assert mean_square_limit(Dynamics(0.5), spread).lr == pytest.approx(want, rel=LIMIT)


# --- many directions: the full recursion ---------------------------------------------------------


@each_dynamics
@pytest.mark.parametrize("definite", [True, False], ids=["definite", "indefinite"])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("noise", [0.03, 3.0])
def test_second_moments_shrink_just_below_the_limit_and_grow_just_above(
    dynamics, definite, size, noise
):
    spread = random_spread(size, seed=size, definite=definite, noise=noise)
    lr = mean_square_limit(dynamics, spread).lr
    assert radius(dynamics, spread, 0.999 * lr) < 1 < radius(dynamics, spread, 1.001 * lr)


@settings(max_examples=60)
@given(
    size=st.integers(2, 3),
    seed=st.integers(0, 10**6),
    definite=st.booleans(),
    noise=st.floats(1e-3, 30),
    momentum=st.floats(0, 0.95),
    kind=st.sampled_from(["heavy ball", "nesterov", "averaged"]),
    coupled=st.sampled_from([0.0, 0.1, 1.0]),
    decoupled=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_the_limit_is_that_of_the_full_recursion_for_any_optimizer(
    size, seed, definite, noise, momentum, kind, coupled, decoupled
):
    dynamics = Dynamics(
        momentum,
        nesterov=kind == "nesterov",
        averaged=kind == "averaged",
        weight_decay=coupled,
        decoupled_decay=decoupled,
    )
    spread = random_spread(size, seed, definite=definite, noise=noise)
    lr = mean_square_limit(dynamics, spread).lr
    assert radius(dynamics, spread, 0.999 * lr) < 1 < radius(dynamics, spread, 1.001 * lr)


@each_dynamics
def test_the_gain_crosses_one_where_the_radius_does(dynamics):
    spread = random_spread(3, seed=1, definite=False)
    lr = mean_square_limit(dynamics, spread).lr
    for factor in (0.3, 0.8, 0.99, 1.01, 1.1):
        if factor * lr < dynamics.noiseless_limit(spread.curvatures[0]):
            stable = loop_gain(dynamics, spread, factor * lr) < 1
            assert stable == (radius(dynamics, spread, factor * lr) < 1) == (factor < 1)


@each_dynamics
def test_the_noiseless_limit_is_where_the_mean_stops_contracting(dynamics):
    curvatures = np.array([3.0, 1.0, 0.2])
    still = CurvatureSpread(curvatures, np.zeros((2, 3, 3)))
    limit = mean_square_limit(dynamics, still)
    assert limit.lr == limit.noiseless == dynamics.noiseless_limit(3.0)
    for factor, stable in ((0.999, True), (1.001, False)):
        matrix = step_matrix(dynamics, np.diag(curvatures), factor * limit.lr)
        assert (np.abs(np.linalg.eigvals(matrix)).max() < 1) == stable


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("size", [2, 5, 10])
def test_plain_sgd_on_least_squares_has_mulayoff_and_michaeli_s_limit(size, batch_size):
    """``2 / lambda_max(C^-1 D)`` of their Theorem 3, from the Hessians of single samples."""
    count = 40
    x = np.random.default_rng(size).normal(size=(count, size)) * np.linspace(1.5, 0.4, size)
    hessians = np.einsum("ni,nj->nij", x, x)
    mean = hessians.mean(0)
    share = (count - batch_size) / (batch_size * (count - 1))
    unit = np.eye(size)
    drift = (np.kron(mean, unit) + np.kron(unit, mean)) / 2
    squares = np.einsum("nij,nkl->ikjl", hessians, hessians).reshape(size**2, size**2) / count
    spread = (1 - share) * np.kron(mean, mean) + share * squares
    want = 2 / np.linalg.eigvals(np.linalg.solve(drift, spread)).real.max()

    values, vectors = np.linalg.eigh(mean)
    axes = vectors[:, ::-1]
    deviations = axes.T @ (hessians - mean) @ axes / math.sqrt(count - 1)
    scale = 1 / batch_size - 1 / count
    limit = mean_square_limit(Dynamics(), CurvatureSpread(values[::-1], deviations, scale=scale))
    # ARPACK's vectors, above 8 directions, are good to 1e-6.
    assert limit.lr == pytest.approx(want, rel=LIMIT if size <= 8 else 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_more_than_eight_directions_have_the_dense_map_s_gain(seed):
    size, lr = 11, 0.2
    dynamics = Dynamics(0.9)
    spread = random_spread(size, seed, definite=seed > 0, noise=0.3)
    response = dynamics.response(spread.curvatures, lr)
    fed = sum(np.kron(deviation, deviation) for deviation in spread.deviations)
    dense = response.reshape(-1, 1) * spread.scale * fed
    want = np.abs(np.linalg.eigvals(dense)).max()
    assert loop_gain(dynamics, spread, lr) == pytest.approx(want, rel=1e-6)  # ARPACK's tolerance


def test_further_directions_without_noise_leave_the_limit_alone():
    """From eight directions to nine the eigensolver changes, and nothing else."""
    few = random_spread(5, seed=3, definite=False)
    curvatures = np.r_[few.curvatures, np.linspace(0.19, 0.1, 7)]
    deviations = np.zeros((6, 12, 12))
    deviations[:, :5, :5] = few.deviations
    many = CurvatureSpread(curvatures, deviations, scale=few.scale)
    for dynamics in (Dynamics(), Dynamics(0.9)):
        one, two = (mean_square_limit(dynamics, spread) for spread in (few, many))
        assert two.lr == pytest.approx(one.lr, rel=1e-6)
        assert two.steepness == pytest.approx(one.steepness, rel=1e-4)
        assert two.by_deviation == pytest.approx(one.by_deviation, abs=1e-4)
        assert two.by_curvature[:5] == pytest.approx(one.by_curvature, abs=1e-4)


@each_dynamics
def test_the_response_is_the_sum_over_the_impulse_s_echo(dynamics):
    curvatures, lr = np.array([3.0, 1.2, 0.4]), 0.1
    impulse = step_matrix(dynamics, np.diag(curvatures), lr) - step_matrix(
        dynamics, np.zeros((3, 3)), lr
    )
    state = impulse[:, :3] / curvatures  # a unit of gradient along each direction
    want = np.zeros((3, 3))
    matrix = step_matrix(dynamics, np.diag(curvatures), lr)
    for _ in range(2000):
        weights = np.diag(state[:3])
        want += np.outer(weights, weights)
        state = matrix @ state
    assert dynamics.response(curvatures, lr) == pytest.approx(want, rel=1e-10)


def test_plain_sgd_s_response_has_a_closed_form():
    h = np.array([3.0, 1.0, 0.1])
    want = 0.2 / (h[:, None] + h - 0.2 * np.outer(h, h))
    assert Dynamics().response(h, 0.2) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "dynamics",
    [Dynamics(), Dynamics(0.9), Dynamics(0.8, nesterov=True), Dynamics(0.9, averaged=True)],
)
def test_flat_directions_respond_as_curvature_goes_to_zero(dynamics):
    tiny = 1e-7
    response = tiny * dynamics.response(np.array([tiny]), 0.3)[0, 0]
    assert dynamics.flat_response(0.3) == pytest.approx(response, rel=1e-4)


# --- what leaves the directions followed ---------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_leak_alone_limits_the_rate_where_its_echo_is_one(momentum):
    silent = np.zeros((3, 2, 2))
    for leak in (0.5, 5.0, 50.0):
        spread = CurvatureSpread(np.array([2.0, 1.0]), silent, leak=leak)
        want = min(2 * (1 - momentum) / leak, 2 * (1 + momentum) / 2.0)
        limit = mean_square_limit(Dynamics(momentum), spread)
        assert limit.lr == pytest.approx(want, rel=LIMIT)
        if limit.lr < limit.noiseless:
            assert limit.steepness == pytest.approx(1, rel=1e-12)
            assert limit.by_deviation == pytest.approx(np.zeros(3))
            assert limit.by_curvature == pytest.approx(np.zeros(2))


def test_an_averaged_leak_has_the_same_effective_rate():
    silent = np.zeros((1, 1, 1))
    spread = CurvatureSpread(np.array([0.01]), silent, leak=4.0)
    assert mean_square_limit(Dynamics(0.9, averaged=True), spread).lr == pytest.approx(2 / 4.0)


def test_a_leak_adds_to_the_gain():
    spread = random_spread(3, seed=0, definite=False)
    leaky = replace(spread, leak=0.7)
    more = loop_gain(Dynamics(0.5), leaky, 0.1) - loop_gain(Dynamics(0.5), spread, 0.1)
    assert more == pytest.approx(0.7 * 0.1 / (2 * 0.5), rel=1e-9)
    assert mean_square_limit(Dynamics(0.5), leaky).lr < mean_square_limit(Dynamics(0.5), spread).lr


# --- sensitivities -------------------------------------------------------------------------------


@each_dynamics
@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_the_steepness_is_the_slope_of_the_gain(dynamics, leak):
    spread = replace(random_spread(3, seed=4, definite=False), leak=leak)
    limit = mean_square_limit(dynamics, spread)
    step = 1e-5
    low, high = (loop_gain(dynamics, spread, limit.lr * (1 + sign * step)) for sign in (-1, 1))
    assert loop_gain(dynamics, spread, limit.lr) == pytest.approx(1, abs=1e-5)
    assert limit.steepness == pytest.approx(math.log(high / low) / (2 * step), rel=SENSITIVITY)


@each_dynamics
@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_the_deviations_shares_sum_to_the_gain_without_the_leak_s(dynamics, leak):
    spread = replace(random_spread(3, seed=4, definite=False), leak=leak)
    limit = mean_square_limit(dynamics, spread)
    outside = leak * dynamics.flat_response(limit.lr)
    assert limit.by_deviation.sum() == pytest.approx(1 - outside, abs=1e-5)


@each_dynamics
def test_a_deviation_s_share_is_what_a_little_more_of_it_adds(dynamics):
    spread = random_spread(3, seed=5, definite=False)
    limit = mean_square_limit(dynamics, spread)
    step = 1e-3
    for index in range(len(spread.deviations)):
        gains = []
        for factor in (1 - step, 1 + step):
            deviations = spread.deviations.copy()
            deviations[index] *= math.sqrt(factor)  # its variance by the factor
            gains.append(loop_gain(dynamics, replace(spread, deviations=deviations), limit.lr))
        slope = (gains[1] - gains[0]) / (2 * step)
        # Of a central difference: its square; and eigenvectors to about 1e-8.
        assert limit.by_deviation[index] == pytest.approx(slope, abs=1e-5)


@each_dynamics
@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_the_limit_moves_with_each_curvature_as_it_says(dynamics, leak):
    spread = replace(random_spread(3, seed=6, definite=False), leak=leak)
    limit = mean_square_limit(dynamics, spread)
    step = 1e-3
    for index in range(3):
        moved = []
        for sign in (-1, 1):
            curvatures = spread.curvatures.copy()
            curvatures[index] += sign * step
            moved.append(mean_square_limit(dynamics, replace(spread, curvatures=curvatures)).lr)
        slope = math.log(moved[1] / moved[0]) / (2 * step)
        scale = np.abs(limit.by_curvature).max()
        assert limit.by_curvature[index] == pytest.approx(slope, abs=SENSITIVITY * scale)


def test_a_batch_of_all_the_data_has_the_noiseless_limit():
    """Many directions, whose deviations count for nothing."""
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(4, 12, 12))
    spread = CurvatureSpread(
        np.linspace(2, 1, 12), deviations + deviations.transpose(0, 2, 1), scale=0.0
    )
    assert mean_square_limit(Dynamics(0.9), spread).lr == pytest.approx(1.9, rel=1e-9)


@each_dynamics
def test_without_noise_only_the_largest_curvature_moves_the_limit(dynamics):
    still = CurvatureSpread(np.array([3.0, 1.0]), np.zeros((2, 2, 2)))
    limit = mean_square_limit(dynamics, still)
    step = 1e-5
    low, high = (dynamics.noiseless_limit(3.0 + sign * step) for sign in (-1, 1))
    assert limit.by_curvature == pytest.approx(
        [math.log(high / low) / (2 * step), 0.0], rel=SENSITIVITY
    )
    assert limit.steepness == math.inf
    assert not limit.by_deviation.any()


# --- scales and order ----------------------------------------------------------------------------


@given(unit=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_the_limit_has_the_unit_of_one_over_curvature(unit, seed):
    spread = random_spread(2, seed, definite=False)
    scaled = CurvatureSpread(
        unit * spread.curvatures, unit * spread.deviations, scale=spread.scale, leak=unit * 0.3
    )
    one = mean_square_limit(Dynamics(0.9), replace(spread, leak=0.3))
    two = mean_square_limit(Dynamics(0.9), scaled)
    assert two.lr * unit == pytest.approx(one.lr, rel=LIMIT)
    assert two.steepness == pytest.approx(one.steepness, rel=1e-5)
    assert two.by_curvature * unit == pytest.approx(one.by_curvature, rel=1e-5)


@given(seed=st.integers(0, 100), factor=st.floats(1.001, 1000), momentum=st.floats(0, 0.95))
@settings(max_examples=40)
def test_more_noise_never_raises_the_limit(seed, factor, momentum):
    spread = random_spread(3, seed, definite=False, noise=0.01)
    louder = replace(spread, scale=factor * spread.scale)
    low, high = (mean_square_limit(Dynamics(momentum), s).lr for s in (louder, spread))
    assert low <= high * (1 + LIMIT)
    assert high <= Dynamics(momentum).noiseless_limit(spread.curvatures[0])


def test_feeding_is_the_mean_of_the_sandwich():
    spread = random_spread(3, seed=0, definite=False)
    x = np.random.default_rng(1).normal(size=(3, 3))
    x = x @ x.T
    want = sum(d @ x @ d for d in spread.deviations) * spread.scale
    assert spread.feed(x) == pytest.approx(want, rel=1e-12)
    assert np.array_equal(spread.feed(x), spread.feed(x).T)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_a_momentum_outside_zero_to_one_is_refused(momentum):
    with pytest.raises(ValueError, match=rf"momentum must lie in \[0, 1\), got {momentum}"):
        Dynamics(momentum)


@pytest.mark.parametrize("decay", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["weight_decay", "decoupled_decay"])
def test_an_illegal_decay_is_refused(name, decay):
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {decay}"):
        Dynamics(**{name: decay})


def test_an_average_has_no_nesterov_step():
    with pytest.raises(ValueError, match="Nesterov's step is defined for SGD's momentum"):
        Dynamics(0.9, nesterov=True, averaged=True)


@pytest.mark.parametrize("curvatures", [[], [0.0], [-1.0], [2.0, 0.0], [2.0, -1.0], [math.inf]])
def test_directions_that_do_not_curve_upwards_are_refused(curvatures):
    size = len(curvatures)
    spread = CurvatureSpread(np.array(curvatures), np.zeros((2, size, size)))
    with pytest.raises(ValueError, match=r"curvatures must be positive and finite, got \["):
        mean_square_limit(Dynamics(), spread)


@pytest.mark.parametrize(
    ("entry", "leak"), [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, -1.0)]
)
def test_numbers_that_are_not_finite_are_refused(entry, leak):
    spread = CurvatureSpread(np.array([1.0]), np.full((2, 1, 1), entry), leak=leak)
    with pytest.raises(ValueError, match="the deviations and the leak must be finite"):
        mean_square_limit(Dynamics(), spread)


@pytest.mark.parametrize("near", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [4, 12])
def test_the_rate_alone_is_that_of_the_limit_to_a_thousandth(size, near):
    for seed in range(4):
        spread = random_spread(size, seed, definite=True)
        for dynamics in (Dynamics(), Dynamics(0.9)):
            limit = mean_square_limit(dynamics, spread)
            alone = mean_square_lr(dynamics, spread, near=near * limit.lr)
            assert alone == pytest.approx(limit.lr, rel=3e-3)


def test_the_rate_alone_is_the_noiseless_one_without_noise():
    spread = CurvatureSpread(np.array([4.0, 1.0]), np.zeros((1, 2, 2)))
    assert mean_square_lr(Dynamics(0.9), spread, near=0.1) == Dynamics(0.9).noiseless_limit(4.0)
    with pytest.raises(ValueError, match="curvatures must be positive and finite, got"):
        mean_square_lr(Dynamics(), CurvatureSpread(np.array([-1.0]), np.zeros((1, 1, 1))), near=1.0)
