"""Rates against the exact recursion of second moments, in one dimension and in several."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlr.learning_rates import (
    StepSize,
    heavy_ball,
    max_adam_lr,
    max_sgd_lr,
    min_damping,
    paper_adam_lr,
    paper_sgd_lr,
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
