"""Batches seen on a few axes, against samples, brute-force draws and dense eigensolvers."""

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlr.mean_square import CurvatureSpread, Dynamics, mean_square_limit
from batchlr.measured import Measured
from batchlr.projected_curvature import ProjectedCurvature
from reports import projected_curvature

NO_LEAK = Measured(0.0, 0.0)


def of_samples(hessians, sizes, **changes):
    """Batches of ``sizes`` from Hessians ``(N, m, m)`` of samples, on the axes of their mean."""
    hessians = hessians[: sum(sizes)]
    values, vectors = np.linalg.eigh(hessians.mean(0))
    seen = vectors[:, ::-1].T @ hessians @ vectors[:, ::-1]
    matrices = [part.mean(0) for part in np.split(seen, np.cumsum(sizes)[:-1])]
    options = {"leak_largest": NO_LEAK, "leak_smallest": NO_LEAK} | changes
    return ProjectedCurvature(values[::-1], np.stack(matrices), tuple(sizes), **options)


def gaussian_samples(count, mean, noise, rng):
    """Symmetric matrices of the given mean whose entries have standard deviation ``noise``."""
    draws = rng.normal(size=(count, *np.shape(mean)))
    return mean + noise * (draws + draws.transpose(0, 2, 1)) / math.sqrt(2)


def covariance(deviations):
    return np.einsum("kij,kab->ijab", deviations, deviations)


# --- deviations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,) * 12, (3, 3, 3, 3), (5, 4, 2, 1), (11, 1)])
def test_deviations_have_one_sample_s_covariance_without_bias(sizes):
    """The mean over orders of 12 samples is their covariance with divisor 11."""
    rng = np.random.default_rng(0)
    hessians = gaussian_samples(12, np.diag([3.0, 1.0]), 1.0, rng)
    centred = hessians - hessians.mean(0)
    exact = covariance(centred / math.sqrt(11))
    estimates = []
    for _ in range(3000):
        parts = np.split(hessians[rng.permutation(12)], np.cumsum(sizes)[:-1])
        matrices = np.stack([part.mean(0) for part in parts])
        batches = ProjectedCurvature(np.array([3.0, 1.0]), matrices, sizes, NO_LEAK, NO_LEAK)
        estimates.append(covariance(batches.deviations))
    error = np.std(estimates, axis=0) / math.sqrt(3000)
    assert np.all(np.abs(np.mean(estimates, axis=0) - exact) <= 4 * error + 1e-12)


def test_deviations_of_single_samples_are_exact():
    rng = np.random.default_rng(1)
    hessians = gaussian_samples(9, np.diag([3.0, 1.0, 0.0]), 1.0, rng)
    batches = of_samples(hessians, (1,) * 9)
    values = [np.sort(np.linalg.eigvalsh(d)) for d in batches.deviations * math.sqrt(8)]
    want = [np.sort(np.linalg.eigvalsh(h - hessians.mean(0))) for h in hessians]
    assert np.allclose(values, want, atol=1e-12)


# --- the second order ----------------------------------------------------------------------------


def test_the_second_order_sums_each_axis_at_its_gap():
    batches = projected_curvature(
        [5.0, 3.0, 1.0, -2.0],
        {(0, 0): 7.0, (0, 1): 4.0, (0, 2): 2.0, (0, 3): 3.0, (1, 3): 6.0, (3, 3): 9.0},
        leak_largest=Measured(10.0, 1.0),
        leak_smallest=Measured(8.0, 1.0),
    )
    assert batches.second_order() == pytest.approx(4 / 2 + 2 / 4 + 3 / 7 + 10 / 5, rel=1e-12)
    want = -(3 / 7 + 6 / 5 + 8 / 2)
    assert batches.second_order("smallest") == pytest.approx(want, rel=1e-12)


def test_an_end_that_is_not_on_its_side_of_zero_has_no_second_order():
    convex = projected_curvature([5.0, 1.0], {(0, 1): 4.0}, leak_smallest=Measured(8.0))
    assert convex.second_order("smallest") == 0.0
    concave = projected_curvature([-1.0, -5.0], {(0, 1): 4.0}, leak_largest=Measured(8.0))
    assert concave.second_order() == 0.0
    assert concave.second_order("smallest") == pytest.approx(-4 / 4)


def test_copies_of_an_edge_do_not_repel_it():
    batches = projected_curvature([5.0, 4.96, 1.0], {(0, 1): 4.0, (0, 2): 2.0})
    assert batches.second_order() == pytest.approx(2 / 4, rel=1e-12)


def test_a_leak_that_was_not_measured_is_left_out():
    batches = projected_curvature(
        [5.0, -1.0], {(0, 1): 4.0}, leak_smallest=Measured(math.nan, math.nan)
    )
    assert batches.second_order("smallest") == pytest.approx(-4 / 6)
    assert math.isfinite(batches.edge_at(0.1, "smallest").stderr)


# --- edges at any batch size ---------------------------------------------------------------------

ENTRIES = {(0, 0): 9.0, (0, 1): 6.0, (0, 2): 4.0, (1, 1): 5.0, (1, 2): 2.0, (2, 2): 3.0}


def spread_out(**options):
    return projected_curvature([4.0, 1.0, -2.0], ENTRIES, **{"num_batches": 60} | options)


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_in_large_batches_edges_move_by_the_second_order(end):
    batches = spread_out(leak_largest=Measured(5.0, 0.5), leak_smallest=Measured(5.0, 0.5))
    for inverse in (1e-6, 1e-4):
        moved = batches.edge_at(inverse, end)
        want = abs(batches.second_order(end)) * inverse
        # Three standard errors of 400 draws; the next order is the noise over the gap squared.
        assert abs(moved - want) < 3 * moved.stderr + 0.01 * want


@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("inverse", [0.01, 0.1, 1.0])
def test_edges_are_those_of_gaussian_matrices_where_batches_are_many(end, inverse):
    batches = spread_out()
    rng = np.random.default_rng(0)
    noise = np.zeros((20_000, 3, 3))
    for (i, j), variance in ENTRIES.items():
        noise[:, i, j] = noise[:, j, i] = rng.normal(size=20_000) * math.sqrt(variance * inverse)
    values = np.linalg.eigvalsh(np.diag(batches.values) + noise)
    along = noise[:, 0, 0] if end == "largest" else noise[:, 2, 2]
    drawn = values[:, -1] - 4.0 if end == "largest" else -2.0 - values[:, 0]
    first = along if end == "largest" else -along
    moved = batches.edge_at(inverse, end)
    # Three standard errors, and 3 % for the table and the finite number of batches.
    assert abs(moved - (drawn - first).mean()) < 3 * moved.stderr + 0.03 * moved
    for quantile in (0.1, 0.5, 0.9):
        at = batches.edge_at(inverse, end, quantile=quantile)
        # Of 60 batches, resampled one by one here; between 0.1 and 0.9 a quantile's standard error
        # is below twice that of the mean.
        assert abs(at - np.quantile(drawn, quantile)) < 4 * drawn.std() / math.sqrt(60)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-2, 1e3),
    leak=st.floats(0, 100),
    inverses=st.tuples(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0)),
    end=st.sampled_from(["largest", "smallest"]),
)
def test_smaller_batches_never_move_an_edge_less(seed, scale, leak, inverses, end):
    batches = projected_curvature(
        [2.0, 1.9, -1.0],
        {entry: scale * variance for entry, variance in ENTRIES.items()},
        leak_largest=Measured(leak, 0.0),
        leak_smallest=Measured(leak, 0.0),
        seed=seed,
    )
    low, high = (batches.edge_at(inverse, end) for inverse in sorted(inverses))
    assert 0 <= low <= high * (1 + 1e-12)


def test_the_whole_data_set_moves_nothing():
    batches = spread_out(leak_largest=Measured(5.0, 0.5))
    for end in ("largest", "smallest"):
        for quantile in (None, 0.5):
            moved = batches.edge_at(0.0, end, quantile=quantile)
            assert (moved, moved.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("edge", [0.0, -1e-12])
def test_an_end_next_to_zero_leaves_the_other_alone(edge):
    batches = projected_curvature([4.0, edge], {(0, 0): 9.0, (0, 1): 6.0})
    other = projected_curvature([4.0, -0.001], {(0, 0): 9.0, (0, 1): 6.0})
    assert batches.edge_at(0.1) == pytest.approx(other.edge_at(0.1), rel=0.01)
    assert math.isfinite(batches.edge_at(0.1, "smallest"))


def test_the_error_of_the_leak_counts():
    batches = spread_out(leak_largest=Measured(5.0, 0.5))
    sure = replace(batches, leak_largest=Measured(5.0, 0.0))
    with_error, without = batches.edge_at(0.1), sure.edge_at(0.1)
    assert with_error == without
    assert with_error.stderr == pytest.approx(math.hypot(without.stderr, 0.5 * 0.1 / 4.0))


def test_the_same_question_has_the_same_answer():
    one, two = spread_out(), spread_out()
    assert one.edge_at(0.3) == one.edge_at(0.3) == two.edge_at(0.3)
    assert one.edge_at(0.3, quantile=0.9) == two.edge_at(0.3, quantile=0.9)


# --- the mean-square limit -----------------------------------------------------------------------


def limit_of(batches, inverse=0.1, *, dynamics=None, largest=None, sampling=0.0):
    largest = float(batches.values[0]) if largest is None else largest
    return batches.mean_square(
        dynamics or Dynamics(0.9), inverse, largest=largest, sampling=sampling
    )


def test_the_limit_is_that_of_the_deviations_at_the_batch_size():
    batches = projected_curvature([4.0, 1.0, 0.5], ENTRIES, leak_largest=Measured(3.0, 0.0))
    rate = limit_of(batches)
    spread = CurvatureSpread(
        np.array([4.0, 1.0, 0.5]), batches.deviations, scale=0.1, leak=3.0 * 0.1 / 4.0
    )
    limit = mean_square_limit(Dynamics(0.9), spread)
    assert (rate.lr, rate.noiseless) == (limit.lr, limit.noiseless)
    assert rate.exponent == pytest.approx(1 / limit.steepness)


def test_flat_and_negative_directions_count_as_outside():
    noise = {(0, 0): 9.0, (0, 1): 6.0, (0, 2): 4.0, (0, 3): 2.0, (2, 3): 50.0, (3, 3): 50.0}
    batches = projected_curvature([4.0, 1.0, 0.01, -1.0], noise, leak_largest=Measured(3.0, 0.0))
    kept = {entry: noise[entry] for entry in ((0, 0), (0, 1))}
    # The same draws serve the first entries, and the limit knows variances only.
    fewer = projected_curvature([4.0, 1.0], kept, leak_largest=Measured(3.0 + 4.0 + 2.0, 0.0))
    assert limit_of(batches).lr == pytest.approx(limit_of(fewer).lr, rel=1e-7)


def test_the_exponent_is_the_slope_in_the_effective_batch_size():
    batches = spread_out(leak_largest=Measured(3.0, 0.0))
    for inverse in (1e-3, 0.03, 1.0):
        low, high = (limit_of(batches, inverse * factor).lr for factor in (0.999, 1.001))
        slope = -math.log(high / low) / math.log(1.001 / 0.999)
        assert limit_of(batches, inverse).exponent == pytest.approx(slope, abs=2e-3)


def test_the_largest_eigenvalue_is_that_of_the_whole():
    batches = projected_curvature([4.0, 1.0], {})
    assert limit_of(batches, largest=3.0, dynamics=Dynamics()).lr == pytest.approx(2 / 3)
    assert limit_of(batches, largest=3.0, dynamics=Dynamics()).error == 0.0
    assert limit_of(batches, largest=0.5, dynamics=Dynamics()).lr == pytest.approx(2 / 1)


@pytest.mark.parametrize("largest", [0.0, -1.0])
def test_without_positive_curvature_there_is_no_limit(largest):
    batches = projected_curvature([largest, largest - 1], {})
    with pytest.raises(ValueError, match="curvatures must be positive and finite, got"):
        limit_of(batches, largest=largest)


@pytest.mark.parametrize("num_batches", [8, 30])
@pytest.mark.parametrize(("inverse", "sampling"), [(0.3, 0.0), (0.003, 0.02), (0.05, 0.01)])
def test_the_error_is_the_scatter_over_repetitions(num_batches, inverse, sampling):
    """Batches drawn afresh of Gaussian matrices whose mean and covariance are known.

    Noise goes with curvature, as in least squares: where a direction's noise outgrows its curvature
    errors of first order mean little.
    """
    rng = np.random.default_rng(0)
    size, root = 10, np.diag([2.0, 1.4, 1.0])
    logs, errors = [], []
    for _ in range(150):
        centre = root @ gaussian_samples(1, np.eye(3), math.sqrt(sampling) / 2, rng)[0] @ root
        noise = gaussian_samples(num_batches, np.zeros((3, 3)), 0.5 / math.sqrt(size), rng)
        # The mean has its own, known sampling error.
        matrices = centre + root @ (noise - noise.mean(0)) @ root
        values, vectors = np.linalg.eigh(centre)
        seen = vectors[:, ::-1].T @ matrices @ vectors[:, ::-1]
        batches = ProjectedCurvature(values[::-1], seen, (size,) * num_batches, NO_LEAK, NO_LEAK)
        rate = limit_of(batches, inverse, sampling=sampling)
        logs.append(math.log(rate.lr))
        errors.append(rate.error)
    # The scatter of 150 is good to 6 %; the error from few batches is biased low, by the share of
    # a large term in its own estimate.
    assert np.mean(errors) == pytest.approx(np.std(logs), rel=0.35)


def test_the_leak_s_error_counts_with_its_share():
    sure = projected_curvature([4.0], {}, leak_largest=Measured(300.0, 0.0))
    unsure = projected_curvature([4.0], {}, leak_largest=Measured(300.0, 60.0))
    assert limit_of(sure).error == 0.0
    assert limit_of(unsure).error == pytest.approx(0.2)  # the rate is inverse to a leak alone


def test_two_batches_admit_how_little_they_know():
    """The variance from two has one degree of freedom: an error of sqrt(2)."""
    batches = projected_curvature([0.01], {(0, 0): 9.0}, num_batches=2)
    assert limit_of(batches, 1.0).error == pytest.approx(math.sqrt(2), rel=0.01)


# --- another metric ------------------------------------------------------------------------------


def positive(size, seed):
    x = np.random.default_rng(seed).normal(size=(size, size))
    return np.eye(size) + 0.3 * x @ x.T


@pytest.mark.parametrize("seed", range(3))
def test_another_metric_has_the_generalised_eigenvalues(seed):
    metric = positive(3, seed)
    batches = spread_out(leak_largest=Measured(5.0, 0.5), leak_smallest=Measured(7.0, 0.7))
    turned = batches.in_metric(metric)
    values, vectors = scipy.linalg.eigh(np.diag(batches.values), metric)
    assert turned.values == pytest.approx(values[::-1], rel=1e-12)
    axes = vectors[:, ::-1]
    want = axes.T @ batches.matrices @ axes
    signs = np.sign(turned.matrices[0, 0] * want[0, 0])  # an eigenvector's sign is free
    assert turned.matrices == pytest.approx(want * np.outer(signs, signs), abs=1e-11)
    assert turned.matrices.mean(0) == pytest.approx(np.diag(values[::-1]), abs=1e-12)
    assert turned.samples == batches.samples
    top = metric[0, 0] ** 2
    assert (turned.leak_largest, turned.leak_largest.stderr) == (5.0 / top, 0.5 / top)


def test_the_identity_changes_nothing():
    batches = spread_out(leak_largest=Measured(5.0, 0.5), leak_smallest=Measured(7.0, 0.7))
    same = batches.in_metric(np.eye(3))
    assert same.values == pytest.approx(batches.values, rel=1e-14)
    assert np.abs(same.matrices) == pytest.approx(np.abs(batches.matrices), abs=1e-13)
    assert limit_of(same) == pytest.approx(limit_of(batches), rel=1e-8)
    assert str(same.leak_largest) == str(batches.leak_largest)


def test_a_multiple_of_the_metric_divides_every_curvature():
    batches = projected_curvature(
        [4.0, 1.0], {(0, 0): 9.0, (0, 1): 6.0}, leak_largest=Measured(8.0, 1)
    )
    half = batches.in_metric(2 * np.eye(2))
    assert half.values == pytest.approx([2.0, 0.5])
    assert half.leak_largest == 2.0
    assert limit_of(half).lr == pytest.approx(2 * limit_of(batches).lr, rel=1e-8)


# --- as a value ----------------------------------------------------------------------------------


def test_equality_is_of_every_number():
    batches = spread_out(leak_largest=Measured(5.0, 0.5), leak_smallest=Measured(math.nan))
    assert batches == spread_out(leak_largest=Measured(5.0, 0.5), leak_smallest=Measured(math.nan))
    other = batches.matrices.copy()
    other[0, 0, 0] += 1e-12
    for changes in (
        {"values": batches.values + 1e-12},
        {"matrices": other},
        {"samples": (99, *batches.samples[1:])},
        {"leak_largest": Measured(5.0, 0.6)},
        {"leak_smallest": Measured(1.0)},
    ):
        assert batches != replace(batches, **changes)
    assert batches != 5


def test_it_holds_arrays_and_has_no_hash():
    with pytest.raises(TypeError, match="unhashable type: 'ProjectedCurvature'"):
        hash(spread_out())
    with pytest.raises(FrozenInstanceError):
        spread_out().samples = ()
