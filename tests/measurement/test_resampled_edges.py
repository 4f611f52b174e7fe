"""Edges of resampled batches, against closed forms of small matrices."""

import math

import numpy as np
import pytest

from batchlr.measurement.resampled_edges import ResampledEdges

DRAWS = 400  # resampled batches behind each figure
ENDS = ["largest", "smallest"]


def symmetric(count, size, seed, scale=1.0):
    """``count`` random symmetric deviations ``(count, size, size)``."""
    draws = scale * np.random.default_rng(seed).normal(size=(count, size, size))
    return draws + draws.transpose(0, 2, 1)


def coupled(strengths):
    """Deviations of two axes that have nothing but a coupling."""
    return np.array([[[0.0, c], [c, 0.0]] for c in strengths])


@pytest.mark.parametrize("end", ENDS)
def test_one_axis_alone_scatters_but_is_not_moved_on_average(end):
    """With many batches its distance is normal, of variance ``sum d^2 / b``."""
    deviations = np.random.default_rng(0).normal(size=(300, 1, 1))
    edges = ResampledEdges(np.array([5.0]), deviations, samples=1.0)
    assert edges.mean_shift(0.01, end) == pytest.approx((0.0, 0.0), abs=1e-12)
    spread = math.sqrt(0.01 * float((deviations**2).sum()))
    quantiles = [edges.shift_quantile(0.01, end, q)[0] for q in (0.1587, 0.5, 0.8413)]
    # Three standard errors of quantiles of 400 normal draws: 1.5 and 1.25 / sqrt(400).
    assert quantiles == pytest.approx([-spread, 0.0, spread], abs=0.23 * spread)
    error = edges.shift_quantile(0.01, end, 0.5)[1]
    assert error == pytest.approx(spread / math.sqrt(300), rel=0.15)


@pytest.mark.parametrize(("inverse", "quantile"), [(1.0, 1.0), (1 / 16, 1.0), (1e-4, 1.2816)])
def test_a_batch_is_the_sum_of_as_many_deviations_as_give_it_its_samples(inverse, quantile):
    """One of 16 samples or fewer is one of them, here of one size; of many the sum is normal."""
    deviations = np.array([[[1.0]], [[-1.0]]] * 100)
    edges = ResampledEdges(np.array([5.0]), deviations, samples=16.0)
    found, _ = edges.shift_quantile(inverse, "largest", 0.9)
    spread = math.sqrt(200 * inverse)
    # Three standard errors of that quantile of 400 draws; of two values, of their mean.
    assert found == pytest.approx(quantile * spread, abs=(0.26 if quantile > 1 else 0.15) * spread)


@pytest.mark.parametrize("inverse", [0.003, 0.1, 1.0])
@pytest.mark.parametrize("end", ENDS)
def test_two_coupled_axes_repel_each_other_by_the_closed_form(end, inverse):
    """``sqrt((gap/2)^2 + x^2) - gap/2`` in the mean over a normal coupling ``x``."""
    deviations = coupled(np.random.default_rng(1).normal(size=200))
    edges = ResampledEdges(np.array([3.0, 1.0]), deviations, samples=1.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x = nodes * math.sqrt(inverse * float((deviations[:, 0, 1] ** 2).sum()))
    want = float((np.sqrt(1 + x**2) - 1) @ weights) / math.sqrt(2 * math.pi)
    shift, error = edges.mean_shift(inverse, end)
    # Of the resampling; and of the table, straight in the logarithm between factors of two.
    assert abs(shift - want) < 4 * error + 0.02 * want
    assert 0 < error < 0.15 * want


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("end", ENDS)
def test_large_batches_move_by_the_second_order_in_proportion_to_1_over_b(end, seed):
    values = np.array([4.0, 1.0, -1.0, -3.0])
    deviations = symmetric(40, 4, seed)
    edges = ResampledEdges(values, deviations, samples=8.0)
    row = 0 if end == "largest" else 3
    others = [j for j in range(4) if j != row]
    variances = (deviations[:, row, others] ** 2).sum(0)
    want = 1e-9 * float((variances / abs(values[row] - values[others])).sum())
    shift, error = edges.mean_shift(1e-9, end)
    assert abs(shift - want) < 4 * error
    assert error < 0.1 * want
    tenth = edges.mean_shift(1e-10, end)
    assert tenth == pytest.approx((shift / 10, error / 10), rel=1e-9)


def test_an_edge_at_zero_moves_by_the_second_order_while_the_noise_is_below_the_gap():
    """And by the noise itself, ``|x|``, where that is above: the table must begin far below."""
    deviations = coupled(np.random.default_rng(2).normal(size=200, scale=50.0))
    edges = ResampledEdges(np.array([1.0, 0.0]), deviations, samples=1.0)
    variance = float((deviations[:, 0, 1] ** 2).sum())  # of the coupling in a batch of one
    small, error = edges.mean_shift(1e-9, "smallest")
    assert abs(small - 1e-9 * variance) < 4 * error
    assert error < 0.1 * small
    large, error = edges.mean_shift(1.0, "smallest")
    expected = math.sqrt(2 / math.pi * variance) - 0.5  # less half the gap
    assert abs(large - expected) < 4 * error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("end", ENDS)
def test_shifts_grow_with_the_noise_and_never_point_inwards(end, seed):
    edges = ResampledEdges(np.array([2.0, 0.5, -1.0]), symmetric(6, 3, seed, 3.0), samples=16.0)
    shifts = [edges.mean_shift(inverse, end)[0] for inverse in np.geomspace(1e-8, 1.0, 60)]
    assert shifts[0] > 0
    assert (np.diff(shifts) >= 0).all()


@pytest.mark.parametrize("inverse", [1e-7, 1e-3, 0.3])
def test_the_ends_are_each_other_s_mirror_image(inverse):
    values, deviations = np.array([3.0, 1.0, -0.5]), symmetric(12, 3, seed=5)
    edges = ResampledEdges(values, deviations, samples=4.0)
    mirrored = ResampledEdges(-values[::-1], -deviations[:, ::-1, ::-1], samples=4.0)
    for end, other in (ENDS, ENDS[::-1]):
        assert mirrored.mean_shift(inverse, end) == pytest.approx(
            edges.mean_shift(inverse, other), rel=1e-6
        )
        for quantile in (0.1, 0.9):
            assert mirrored.shift_quantile(inverse, end, quantile) == pytest.approx(
                edges.shift_quantile(inverse, other, quantile), rel=1e-6
            )


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_distances_have_the_unit_of_the_matrix(unit):
    values, deviations = np.array([3.0, 1.0, -0.5]), symmetric(12, 3, seed=6)
    plain = ResampledEdges(values, deviations, samples=4.0)
    scaled = ResampledEdges(unit * values, unit * deviations, samples=4.0)
    for inverse in (1e-7, 1e-3, 0.3):
        expected = np.array(plain.mean_shift(inverse, "largest")) * unit
        assert scaled.mean_shift(inverse, "largest") == pytest.approx(expected, rel=1e-6)


def test_without_deviations_nothing_moves():
    edges = ResampledEdges(np.array([3.0, 1.0]), np.zeros((5, 2, 2)), samples=8.0)
    for end in ENDS:
        assert edges.mean_shift(0.1, end) == (0.0, 0.0)
        assert edges.shift_quantile(0.1, end, 0.9) == (0.0, 0.0)


def test_of_few_batches_the_error_is_theirs_not_that_of_the_draws():
    """Resampling 4 batches 400 times does not make 400 of them."""
    edges = ResampledEdges(np.array([5.0]), np.array([[[1.0]], [[-1.0]]] * 2), samples=1.0)
    _, error = edges.shift_quantile(0.01, "largest", 0.5)
    # The draws' standard deviation is sqrt(0.01 * 4), known to 1 / sqrt(2 * 400).
    assert error == pytest.approx(0.2 / math.sqrt(4), rel=4 / math.sqrt(2 * DRAWS))


def test_the_order_of_calls_does_not_matter():
    values, deviations = np.array([3.0, 1.0, -0.5]), symmetric(12, 3, seed=7)
    calls = [(end, inverse) for end in ENDS for inverse in (0.2, 1e-6)]
    once = ResampledEdges(values, deviations, samples=4.0)
    forth = {call: once.mean_shift(call[1], call[0]) for call in calls}
    again = ResampledEdges(values, deviations, samples=4.0)
    back = {call: again.mean_shift(call[1], call[0]) for call in reversed(calls)}
    assert forth == back
