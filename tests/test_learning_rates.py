"""Rates against the exact recursion of second moments, in one dimension and in several."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlr.learning_rates import (
    StepSize,
    balanced_momentum,
    heavy_ball,
    max_adam_lr,
    max_sgd_lr,
    min_damping,
    paper_adam_lr,
    paper_sgd_lr,
    shrinkage_damping,
    shrinkage_from_weight_decay,
    weight_decay_from_shrinkage,
)
from batchlr.random_matrix import SpikedWigner

curvatures = st.floats(1e-3, 1e3)
momenta = st.floats(0.0, 0.99)
noise_ratios = st.floats(0.0, 100.0)  # noise / largest


def second_moment_map(lr, mean, mean_square, momentum, gain=1):
    """What ``v <- momentum v + gain h w; w <- w - lr v`` does to ``(E w^2, E w v, E v^2)``.

    The curvature ``h`` is drawn afresh each step with the given moments. Works on floats and on
    fractions alike.
    """
    v_v = [gain**2 * mean_square, 2 * momentum * gain * mean, momentum**2]
    w_v = [gain * mean, momentum, 0]  # the old w with the new v
    w_w = [1, 0, 0]
    return [
        [a - 2 * lr * b + lr**2 * c for a, b, c in zip(w_w, w_v, v_v, strict=True)],
        [b - lr * c for b, c in zip(w_v, v_v, strict=True)],
        v_v,
    ]


def fixed_point_determinant(matrix):
    """``det(matrix - 1)``, whose root is where an eigenvalue of the map reaches +1."""
    (a, b, c), (d, e, f), (g, h, i) = [
        [entry - (row == column) for column, entry in enumerate(entries)]
        for row, entries in enumerate(matrix)
    ]
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def spectral_radius(matrix):
    return np.abs(np.linalg.eigvals(np.array(matrix, dtype=float))).max()


# --- one dimension: the limit is exact ---------------------------------------------------------


@given(largest=curvatures, noise_ratio=noise_ratios, momentum=momenta)
def test_sgd_limit_is_a_fixed_point_of_the_second_moments_to_1e_12(largest, noise_ratio, momentum):
    limit = max_sgd_lr(largest, noise_ratio * largest, momentum=momentum)
    mean, variance = Fraction(largest), Fraction(largest) * Fraction(noise_ratio * largest)

    def determinant(lr):  # in exact arithmetic, so that its sign is beyond doubt
        return fixed_point_determinant(
            second_moment_map(lr, mean, mean**2 + variance, Fraction(momentum))
        )

    margin = Fraction(1, 10**12)
    below = determinant(Fraction(limit) * (1 - margin))
    above = determinant(Fraction(limit) * (1 + margin))
    assert below * above < 0


@given(largest=curvatures, noise_ratio=noise_ratios, momentum=momenta)
def test_second_moments_shrink_below_the_sgd_limit_and_grow_above(largest, noise_ratio, momentum):
    limit = max_sgd_lr(largest, noise_ratio * largest, momentum=momentum)
    mean_square = largest**2 * (1.0 + noise_ratio)
    for factor in (0.25, 0.999):
        assert (
            spectral_radius(second_moment_map(factor * limit, largest, mean_square, momentum)) < 1
        )
    for factor in (1.001, 4.0):
        assert (
            spectral_radius(second_moment_map(factor * limit, largest, mean_square, momentum)) > 1
        )


@given(largest=curvatures, noise_ratio=noise_ratios, beta1=momenta)
def test_second_moments_shrink_below_the_adam_limit_and_grow_above(largest, noise_ratio, beta1):
    limit = max_adam_lr(largest, noise_ratio * largest, beta1=beta1)
    moments = largest, largest**2 * (1.0 + noise_ratio)
    below = second_moment_map(0.999 * limit, *moments, beta1, gain=1.0 - beta1)
    above = second_moment_map(1.001 * limit, *moments, beta1, gain=1.0 - beta1)
    assert spectral_radius(below) < 1 < spectral_radius(above)


@given(largest=curvatures, noise_ratio=noise_ratios, momentum=momenta)
def test_adam_limit_is_the_sgd_limit_over_one_minus_momentum(largest, noise_ratio, momentum):
    sgd = max_sgd_lr(largest, noise_ratio * largest, momentum=momentum)
    adam = max_adam_lr(largest, noise_ratio * largest, beta1=momentum)
    assert adam * (1.0 - momentum) == pytest.approx(sgd, rel=1e-14)


@given(largest=curvatures, noise_ratio=noise_ratios, momentum=momenta, decay=st.floats(0.0, 1e3))
def test_weight_decay_is_exact_without_noise_and_safe_with_it(
    largest, noise_ratio, momentum, decay
):
    noise = noise_ratio * largest
    total = largest + decay
    exact = max_sgd_lr(total, noise * largest / total, momentum=momentum)  # same variance s^2
    limit = max_sgd_lr(largest, noise, momentum=momentum, weight_decay=decay)
    assert limit <= exact * (1.0 + 1e-12)
    noise_free = max_sgd_lr(largest, momentum=momentum, weight_decay=decay)
    assert noise_free == pytest.approx(max_sgd_lr(total, momentum=momentum), rel=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_limit_without_and_with_overwhelming_noise(momentum):
    assert max_sgd_lr(3.0, momentum=momentum) == pytest.approx(2.0 * (1.0 + momentum) / 3.0)
    overwhelming = max_sgd_lr(3.0, 1e12, momentum=momentum)
    assert overwhelming == pytest.approx(2.0 * (1.0 - momentum) / 1e12, rel=1e-9)


def test_sgd_limit_at_the_critical_batch_size_is_half_the_noise_free_one():
    largest, kappa = 5.0, 40.0
    critical = kappa / largest
    assert max_sgd_lr(largest, noise=kappa / critical) == 1.0 / largest


def test_adam_limit_without_noise_is_38_over_curvature():
    assert max_adam_lr(2.0) == pytest.approx(19.0)


# --- Nesterov's momentum and AdamW's decay -------------------------------------------------------


def symmetric_square(matrix):
    """What a step ``matrix`` of ``(w, v)`` does to ``(w^2, w v, v^2)``."""
    (a, b), (c, d) = matrix
    return [
        [a * a, 2 * a * b, b * b],
        [a * c, a * d + b * c, b * d],
        [c * c, 2 * c * d, d * d],
    ]


def moments_of(step, mean, deviation):
    """Second moments' map of ``step(curvature)``; two points of equal weight have all it needs.

    ``step`` is linear in the curvature, hence its square quadratic, and mean and variance decide.
    """
    one, two = (symmetric_square(step(mean + sign * deviation)) for sign in (-1, 1))
    return [[(x + y) / 2 for x, y in zip(a, b, strict=True)] for a, b in zip(one, two, strict=True)]


def nesterov_step(lr, momentum, decay):
    """torch.optim.SGD(nesterov=True), written out: g, then the velocity, then g + m v."""

    def step(curvature):
        gradient = curvature + decay  # times w
        return [
            [1 - lr * (gradient + momentum * gradient), -lr * momentum * momentum],
            [gradient, momentum],
        ]

    return step


def adamw_step(lr, beta1, decay):
    """torch.optim.AdamW with a unit preconditioner: decay, then the average, then the step."""

    def step(curvature):
        gain = (1 - beta1) * curvature
        return [[1 - lr * decay - lr * gain, -lr * beta1], [gain, beta1]]

    return step


MOMENTA = (0, 0.1, 0.5, 0.6, 0.9, 0.99)
DEVIATIONS = (0, 0.1, 1, 30)  # of the curvature, relative to its mean
DECAYS = (0, 1e-3, 0.3, 2, 50)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("deviation", DEVIATIONS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_the_limit_is_the_first_fixed_point_of_the_second_moments(kind, momentum, deviation, decay):
    largest = 3.0
    noise = largest * deviation**2
    if kind == "nesterov":
        step = nesterov_step
        limit = max_sgd_lr(largest, noise, momentum=momentum, weight_decay=decay, nesterov=True)
    else:
        step, limit = adamw_step, max_adam_lr(largest, noise, beta1=momentum, weight_decay=decay)
    mean, m, wd = Fraction(largest), Fraction(momentum), Fraction(decay)

    def determinant(lr):  # in exact arithmetic, so that its sign is beyond doubt
        return fixed_point_determinant(
            moments_of(step(lr, m, wd), mean, mean * Fraction(deviation))
        )

    margin = Fraction(1, 10**9)
    below = determinant(Fraction(limit) * (1 - margin))
    assert below * determinant(Fraction(limit) * (1 + margin)) < 0
    for fraction in (0.01, 0.1, 0.5, 0.99):  # the first one: all below is stable
        moments = moments_of(step(fraction * limit, momentum, decay), largest, largest * deviation)
        assert spectral_radius(moments) < 1
    above = moments_of(step(1.01 * limit, momentum, decay), largest, largest * deviation)
    assert spectral_radius(above) > 1


@given(
    momentum=momenta, deviation=st.floats(0, 100), decay=st.floats(0, 1e3), nesterov=st.booleans()
)
def test_the_limit_is_a_fixed_point_between_the_points_of_the_grid_too(
    momentum, deviation, decay, nesterov
):
    options = {"momentum": momentum, "nesterov": True} if nesterov else {"beta1": momentum}
    rate, step = (max_sgd_lr, nesterov_step) if nesterov else (max_adam_lr, adamw_step)
    limit = rate(1.0, deviation**2, weight_decay=decay, **options)

    def determinant(lr):
        exact = step(lr, Fraction(momentum), Fraction(decay))
        return fixed_point_determinant(moments_of(exact, Fraction(1), Fraction(deviation)))

    margin = Fraction(1, 10**9)
    below, above = (determinant(Fraction(limit) * (1 + sign * margin)) for sign in (-1, 1))
    assert below * above < 0


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_the_steps_of_the_recursion_are_torch_s(kind):
    lr, momentum, decay, curvature = 0.3, 0.7, 0.2, 1.7
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    if kind == "nesterov":
        options = {"momentum": momentum, "weight_decay": decay, "nesterov": True}
        optimizer = torch.optim.SGD([w], lr=lr, **options)
        matrix = np.array(nesterov_step(lr, momentum, decay)(curvature))
    else:
        eps = 1e12  # next to which the root of the second moment vanishes: D = eps
        options = {"betas": (momentum, 0.0), "eps": eps, "weight_decay": decay / eps}
        optimizer = torch.optim.AdamW([w], lr=lr * eps, **options)
        matrix = np.array(adamw_step(lr, momentum, decay)(curvature))
    state = np.array([1.0, 0.0])
    for step in range(1, 5):
        before = state
        state = matrix @ state
        if kind == "adamw":  # bias correction stretches the step, not the average
            state[0] = (1 - lr * decay) * before[0] - lr * state[1] / (1 - momentum**step)
        optimizer.zero_grad()
        (0.5 * curvature * w.square()).sum().backward()
        optimizer.step()
        assert w.item() == pytest.approx(state[0], rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_nesterov_s_limit_without_and_with_overwhelming_noise(momentum):
    free = max_sgd_lr(3.0, momentum=momentum, nesterov=True)
    assert free == pytest.approx(2 * (1 + momentum) / (1 + 2 * momentum) / 3, rel=1e-14)
    heavy_ball_limit = max_sgd_lr(3.0, 1e12, momentum=momentum)  # relative difference: 3/1e12
    overwhelmed = max_sgd_lr(3.0, 1e12, momentum=momentum, nesterov=True)
    assert overwhelmed == pytest.approx(heavy_ball_limit, rel=1e-9)


@given(largest=curvatures, noise_ratio=noise_ratios)
def test_without_momentum_nesterov_is_plain_sgd(largest, noise_ratio):
    noise = noise_ratio * largest
    plain = max_sgd_lr(largest, noise)
    assert max_sgd_lr(largest, noise, nesterov=True) == pytest.approx(plain, rel=1e-14)


@given(largest=curvatures, noise_ratio=noise_ratios, beta1=momenta)
def test_a_vanishing_decay_leaves_adam_s_limit(largest, noise_ratio, beta1):
    coupled = max_adam_lr(largest, noise_ratio * largest, beta1=beta1)
    tiny = 1e-14 * largest  # counts (1 + beta1) / (1 - beta1) times, at most 199
    decayed = max_adam_lr(largest, noise_ratio * largest, beta1=beta1, weight_decay=tiny)
    assert decayed == pytest.approx(coupled, rel=1e-10)


@given(largest=curvatures, beta1=momenta, decay=st.floats(0.0, 1e3))
def test_without_noise_decoupled_decay_adds_to_the_inverse_rate(largest, beta1, decay):
    limit = max_adam_lr(largest, beta1=beta1, weight_decay=decay)
    inverse = 1 / max_adam_lr(largest, beta1=beta1) + decay / 2
    assert 1 / limit == pytest.approx(inverse, rel=1e-10)


# --- the paper's rules -------------------------------------------------------------------------


@given(spike=st.floats(1.01, 100.0), weight_decay=st.floats(0.0, 1.0))
def test_sgd_limit_without_momentum_is_the_paper_rule_on_the_batch_outlier(spike, weight_decay):
    outlier = SpikedWigner(noise_std=1.0).outlier(spike)
    paper = paper_sgd_lr(outlier, weight_decay=weight_decay)
    limit = max_sgd_lr(spike, noise=1.0 / spike, weight_decay=weight_decay)
    assert limit == pytest.approx(paper, rel=1e-14)


def test_paper_adam_rate_goes_from_square_root_to_linear_with_damping():
    assert paper_adam_lr(16.0) == 2.0 / math.sqrt(16.0)
    heavy = 1e9
    assert paper_adam_lr(16.0, damping=heavy) == pytest.approx(2.0 * heavy / 16.0, rel=1e-8)
    crossover = 4.0  # the square root of the curvature
    assert paper_adam_lr(16.0, damping=crossover) == 2.0 * paper_adam_lr(16.0)


# --- heavy ball and damping --------------------------------------------------------------------


def heavy_ball_radius(step, curvature):
    """Contraction per step on a quadratic, from the iteration's own matrix."""
    lr, momentum = step.lr, step.momentum
    return spectral_radius([[1.0 - lr * curvature, -lr * momentum], [curvature, momentum]])


@given(smallest=st.floats(0.01, 1.0), condition=st.floats(1.1, 1e3))
def test_heavy_ball_contracts_both_ends_by_the_root_of_its_momentum(smallest, condition):
    step = heavy_ball(smallest * condition, smallest)
    rate = math.sqrt(step.momentum)
    for curvature in (smallest, smallest * condition):  # double roots: accurate to a root of eps
        assert heavy_ball_radius(step, curvature) == pytest.approx(rate, abs=1e-6)
    assert step.lr <= max_sgd_lr(smallest * condition, momentum=step.momentum)


@pytest.mark.parametrize(
    ("lr_factor", "momentum_shift"), [(0.9, 0), (1.1, 0), (1, -0.05), (1, 0.05)]
)
def test_no_neighbour_of_heavy_ball_converges_faster(lr_factor, momentum_shift):
    def worst(step):
        return max(heavy_ball_radius(step, curvature) for curvature in (9.0, 3.0, 1.0))

    best = heavy_ball(9.0, 1.0)
    neighbour = StepSize(best.lr * lr_factor, best.momentum + momentum_shift)
    assert worst(neighbour) > worst(best) + 1e-3


def test_heavy_ball_on_a_single_curvature_lands_in_one_step():
    assert heavy_ball(4.0, 4.0) == StepSize(lr=0.25, momentum=0.0)


def test_min_damping_puts_the_missed_direction_at_its_stability_limit():
    damping = min_damping(lr=0.3, noise=7.0)
    assert 0.3 / damping == pytest.approx(max_sgd_lr(7.0))
    assert min_damping(lr=0.3, noise=0.0) == 0.0


KFAC_GRID = ((16, 16), (8, 32), (4, 64), (2, 128), (1, 256))  # (damping, B) of the paper's code


@pytest.mark.parametrize(("damping", "batch_size"), KFAC_GRID)
def test_min_damping_is_the_authors_grid_at_the_one_kappa_that_fits_any_of_them(
    damping, batch_size
):
    kappa = 512.0  # 2 * damping * B / lr at their lr = 1
    assert min_damping(lr=1.0, noise=kappa / batch_size) == damping


def test_at_the_wigner_edge_min_damping_goes_like_the_root_of_the_batch():
    num_params, sigma = 400, 0.3

    def edge(batch_size):
        return SpikedWigner(noise_std=sigma * math.sqrt(num_params / batch_size)).edges[1]

    scaled = [min_damping(0.1, edge(size)) * math.sqrt(size) for size in (4, 64, 1024)]
    assert scaled == pytest.approx([0.1 * 20 * sigma] * 3, rel=1e-14)


@given(alpha=st.floats(1e-6, 1.0), target=st.floats(1e-6, 1e6))
def test_a_shrunk_matrix_is_the_damped_one_at_a_larger_rate(alpha, target):
    curvature, gradient, lr = 2.5, 0.7, 0.1
    shrunk = lr * gradient / (alpha * curvature + (1 - alpha) * target)
    damped = lr / alpha * gradient / (curvature + shrinkage_damping(alpha, target=target))
    assert damped == pytest.approx(shrunk, rel=1e-12)


@given(alpha=st.floats(1e-6, 1.0), target=st.floats(1e-6, 1e6), weight=st.floats(-10, 10))
def test_a_shrunk_gradient_is_the_decayed_one_at_a_smaller_rate(alpha, target, weight):
    gradient, lr = 0.7, 0.1
    shrunk = lr * (alpha * gradient + (1 - alpha) * target * weight)
    decay = weight_decay_from_shrinkage(alpha, target)
    decayed = lr * alpha * (gradient + decay * weight)
    assert decayed == pytest.approx(shrunk, rel=1e-9, abs=1e-9 * lr * alpha)
    # 1 - alpha has lost digits where alpha is near 1, none of which alpha itself can lose.
    assert shrinkage_from_weight_decay(decay, target) == pytest.approx(alpha, rel=1e-12)


def test_no_shrinkage_is_no_damping_and_no_decay():
    assert shrinkage_damping(1.0) == weight_decay_from_shrinkage(1.0, 3.0) == 0.0
    assert shrinkage_damping(0.5) == 1.0  # towards the identity
    assert shrinkage_from_weight_decay(0.0, 3.0) == 1.0


# --- least squares: the exact limit of Mulayoff & Michaeli 2024 ---------------------------------

NUM_SAMPLES = 60
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SEEDS = range(12)
ISOLATED = (3.0, 1.0, 1.0, 1.0, 1.0)  # standard deviations of the features


def least_squares(scales, seed):
    """Per-sample Hessians ``x x^T`` of Gaussian features, (60, 5, 5)."""
    x = np.random.default_rng(seed).normal(size=(NUM_SAMPLES, len(scales))) * scales
    return np.einsum("ni,nj->nij", x, x)


def mean_kron_square(hessians):
    """Mean of ``H_i kron H_i`` over samples."""
    size = hessians.shape[-1] ** 2
    return np.einsum("nij,nkl->ikjl", hessians, hessians).reshape(size, size) / len(hessians)


def exact_limit(hessians, batch_size):
    """Largest rate at which SGD on batches drawn without replacement is mean-square stable."""
    hessian = hessians.mean(0)
    unit = np.eye(len(hessian))
    share = (NUM_SAMPLES - batch_size) / (batch_size * (NUM_SAMPLES - 1))
    first = (np.kron(hessian, unit) + np.kron(unit, hessian)) / 2.0
    second = (1.0 - share) * np.kron(hessian, hessian) + share * mean_kron_square(hessians)
    return 2.0 / np.linalg.eigvals(np.linalg.solve(first, second)).real.max()


def top_curvature(hessians):
    """``lambda_1``, ``r1`` and ``c1``: the top eigenvalue and its per-sample variances."""
    values, vectors = np.linalg.eigh(hessians.mean(0))
    deviations = (hessians - hessians.mean(0)) @ vectors[:, -1]
    along = (deviations @ vectors[:, -1]) ** 2
    total = (deviations**2).sum(1)
    return values[-1], along.sum() / (NUM_SAMPLES - 1), (total - along).sum() / (NUM_SAMPLES - 1)


def relative_error(hessians, batch_size, *, with_orthogonal):
    """Formula against exact limit; positive is the unsafe side."""
    largest, r1, c1 = top_curvature(hessians)
    variance = (r1 + c1 * with_orthogonal) * (1.0 / batch_size - 1.0 / NUM_SAMPLES)
    return max_sgd_lr(largest, variance / largest) / exact_limit(hessians, batch_size) - 1.0


def test_exact_limit_is_where_the_second_moments_of_single_samples_stop_shrinking():
    hessians = least_squares(ISOLATED, seed=0)
    for factor, stable in ((0.999, True), (1.001, False)):
        steps = np.eye(5) - factor * exact_limit(hessians, batch_size=1) * hessians
        assert (spectral_radius(mean_kron_square(steps)) < 1.0) == stable


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_sgd_limit_is_just_on_the_safe_side_for_an_isolated_curvature(batch_size):
    errors = [
        relative_error(least_squares(ISOLATED, seed), batch_size, with_orthogonal=True)
        for seed in SEEDS
    ]
    assert min(errors) > -0.10  # over 300 seeds: -9.3 % to +0.7 %, positive once, at batch size 1
    assert max(errors) < 0.0


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_limit_from_the_parallel_variance_alone_is_on_the_unsafe_side(batch_size):
    for seed in SEEDS:
        hessians = least_squares(ISOLATED, seed)
        assert relative_error(hessians, batch_size, with_orthogonal=False) > 0.0


def degenerate_errors(batch_size):
    """Errors where the largest of five curvatures stands out by chance only."""
    return [
        relative_error(least_squares((1.0,) * 5, seed), batch_size, with_orthogonal=True)
        for seed in range(60)
    ]


def test_sgd_limit_can_be_unsafe_at_batch_size_1_where_curvature_is_nearly_degenerate():
    assert 0.05 < max(degenerate_errors(batch_size=1)) < 0.40  # over 300 seeds: up to +38 %


@pytest.mark.parametrize("batch_size", [8, 32])
def test_sgd_limit_holds_from_batch_size_8_on_even_where_curvature_is_nearly_degenerate(batch_size):
    errors = degenerate_errors(batch_size)
    assert min(errors) > -0.14  # over 300 seeds: -12.8 % to +0.9 %
    assert max(errors) < 0.01


@pytest.mark.parametrize(("batch_size", "excess"), [(1, 0.2), (4, 0.04)])
def test_paper_rule_on_the_mean_batch_curvature_is_optimistic(batch_size, excess):
    rng = np.random.default_rng(0)
    for seed in range(4):
        hessians = least_squares(ISOLATED, seed)
        batches = [
            hessians[rng.choice(NUM_SAMPLES, batch_size, replace=False)].mean(0) for _ in range(600)
        ]
        mean_largest = np.linalg.eigvalsh(batches)[:, -1].mean()
        assert paper_sgd_lr(mean_largest) > (1.0 + excess) * exact_limit(hessians, batch_size)


# --- refusals ----------------------------------------------------------------------------------

RATES = [max_sgd_lr, max_adam_lr, paper_sgd_lr, paper_adam_lr]


@pytest.mark.parametrize("rate", [*RATES, lambda largest: heavy_ball(largest, 1.0)])
@pytest.mark.parametrize("largest", [0.0, -3.0, math.inf, math.nan])
def test_no_rate_without_positive_curvature(rate, largest):
    with pytest.raises(
        ValueError,
        match=f"largest must be positive and finite, got {largest}: there is no stability limit",
    ):
        rate(largest)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (max_sgd_lr, "noise"),
        (max_sgd_lr, "weight_decay"),
        (max_adam_lr, "noise"),
        (paper_sgd_lr, "weight_decay"),
        (paper_adam_lr, "damping"),
    ],
)
def test_negative_or_infinite_corrections_are_refused(function, name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
        function(1.0, **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_momentum_must_be_a_fraction(value):
    with pytest.raises(ValueError, match=rf"momentum must lie in \[0, 1\), got {value}"):
        max_sgd_lr(1.0, momentum=value)
    with pytest.raises(ValueError, match=rf"beta1 must lie in \[0, 1\), got {value}"):
        max_adam_lr(1.0, beta1=value)


@pytest.mark.parametrize("smallest", [0.0, -1.0, 5.0, math.nan])
def test_heavy_ball_needs_a_smallest_curvature_between_zero_and_the_largest(smallest):
    with pytest.raises(ValueError, match=rf"smallest must lie in \(0, 4.0\], got {smallest}: take"):
        heavy_ball(4.0, smallest)


def test_min_damping_refuses_negative_arguments():
    with pytest.raises(ValueError, match=r"lr must be finite and at least 0, got -1.0"):
        min_damping(-1.0, 1.0)
    with pytest.raises(ValueError, match=r"noise must be finite and at least 0, got -1.0"):
        min_damping(1.0, -1.0)


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.5, math.nan])
def test_shrinkage_outside_its_range_is_refused(alpha):
    for function in (shrinkage_damping, lambda a: weight_decay_from_shrinkage(a, 1.0)):
        with pytest.raises(ValueError, match=rf"alpha must lie in \(0, 1\], got {alpha}: 1 keeps"):
            function(alpha)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_decay_needs_a_positive_target_to_be_a_shrinkage(target):
    with pytest.raises(
        ValueError, match=f"target must be positive and finite, got {target}: it sets the decay"
    ):
        shrinkage_from_weight_decay(1.0, target)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_shrinkage_s_other_arguments_are_finite_and_not_negative(value):
    with pytest.raises(ValueError, match=f"target must be finite and at least 0, got {value}"):
        shrinkage_damping(0.5, target=value)
    with pytest.raises(
        ValueError, match=f"weight_decay must be finite and at least 0, got {value}"
    ):
        shrinkage_from_weight_decay(value, 1.0)
    with pytest.raises(
        ValueError, match=f"weight_decay must be finite and at least 0, got {value}"
    ):
        max_adam_lr(1.0, weight_decay=value)


# Balanced momentum ---------------------------------------------------------------------------


@given(curvatures, noise_ratios, momenta)
def test_at_the_balanced_momentum_curvature_and_noise_limit_alike(largest, ratio, limit):
    noise = ratio * largest
    momentum = balanced_momentum(largest, noise, limit=limit)
    assert 0 <= momentum <= limit
    counted = (1 + momentum) / (1 - momentum) * noise
    if 0 < momentum < limit:
        assert counted == pytest.approx(largest, rel=1e-9)
    elif momentum == 0:
        assert counted >= largest * (1 - 1e-9) or limit == 0
    else:  # more momentum is what it would take
        assert counted <= largest * (1 + 1e-9)


@given(curvatures, st.floats(0.06, 100.0), momenta)
def test_no_other_momentum_makes_steps_more_than_twice_as_large(largest, ratio, other):
    noise = ratio * largest
    momentum = balanced_momentum(largest, noise, limit=0.99)
    balanced, effective = (
        max_sgd_lr(largest, noise, momentum=m) / (1 - m) for m in (momentum, other)
    )
    assert effective <= 2 * balanced * (1 + 1e-9)


def test_balanced_momentum_s_arguments_are_checked():
    with pytest.raises(ValueError, match=r"limit must lie in \[0, 1\), got 1\.0"):
        balanced_momentum(1.0, 0.1, limit=1.0)
    with pytest.raises(ValueError, match="noise must be finite and at least 0, got -1"):
        balanced_momentum(1.0, -1)
    with pytest.raises(ValueError, match="largest must be positive and finite, got 0: there is"):
        balanced_momentum(0, 0.1)
