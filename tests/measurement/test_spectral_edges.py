"""Both ends with their noise, for batches whose matrices are given."""

import math

import numpy as np
import pytest
import torch

from batchlr.measured import Measured
from batchlr.measurement.spectral_edges import EdgeSearch, followed_edges
from batchlr.tracker import CurvatureTracker
from cases import BatchMatrices
from test_lanczos import generator, with_spectrum

SIZE = 24
SPECTRUM = torch.cat([torch.linspace(-1, 1, SIZE - 3), torch.tensor([-6.0, 4.0, 10.0])]).double()


def batches(noise, *, seed=0, count=8):
    """Matrices ``(K, P, P)`` with a mean of the spectrum, and that mean."""
    mean = with_spectrum(SPECTRUM, seed)
    draws = torch.randn(count, SIZE, SIZE, dtype=torch.float64, generator=generator(seed))
    draws = noise * (draws + draws.transpose(1, 2))
    return mean + draws - draws.mean(0), mean


def run(matrices, sampling=0.0, *, tol=1e-8, largest_only=False, start=None):
    """What a search finds, and the operator, which counts; batches are of one sample."""
    operator = BatchMatrices(matrices, [1] * len(matrices))
    search = EdgeSearch(num_eigenpairs=1, tol=tol, max_products=SIZE, generator=generator(3))
    edges = search.run(operator, sampling, gradients=None, largest_only=largest_only, start=start)
    return edges, operator


@pytest.mark.parametrize("seed", range(4))
def test_of_all_samples_the_ends_are_those_of_the_mean(seed):
    matrices, mean = batches(0.1, seed=seed)
    edges, _ = run(matrices)
    low, high = torch.linalg.eigvalsh(mean)[[0, -1]].tolist()
    assert edges.largest == pytest.approx(high, rel=1e-9)
    assert edges.smallest == pytest.approx(low, rel=1e-9)
    assert edges.converged
    # Only the search has an error where there is nothing else to sample.
    assert abs(edges.largest - high) <= edges.largest.stderr < 1e-6
    assert abs(edges.smallest - low) <= edges.smallest.stderr < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_samples_push_both_ends_outwards_by_the_second_order(seed):
    """``sum_j v_j / (lambda - lambda_j)``, ``v_j`` the variance of the entry between."""
    matrices, mean = batches(0.1, seed=seed, count=64)
    sampling = 1e-3
    values, vectors = np.linalg.eigh(mean.numpy())
    turned = vectors.T @ (matrices - mean).numpy() @ vectors
    variances = (turned**2).sum(0) / 63  # of a batch of one sample
    plain, _ = run(matrices)
    edges, _ = run(matrices, sampling)
    for end, row in ((edges.largest, -1), (edges.smallest, 0)):
        others = np.arange(SIZE) != row % SIZE
        kappa = (variances[row, others] / (values[row] - values[others])).sum()
        assert values[row] - end == pytest.approx(kappa * sampling, rel=0.05)
        assert end.stderr == pytest.approx(math.sqrt(variances[row, row] * sampling), rel=0.05)
    assert plain.smallest < edges.smallest < edges.largest < plain.largest


def test_the_shift_is_never_more_than_half_the_edge():
    matrices, mean = batches(5.0)
    edges, _ = run(matrices, sampling=1.0)
    low, high = torch.linalg.eigvalsh(mean)[[0, -1]].tolist()
    assert edges.largest == pytest.approx(high / 2)
    assert edges.smallest == pytest.approx(low / 2)


def test_only_the_largest_costs_less_and_leaves_the_smallest_unknown():
    matrices, mean = batches(0.1)
    start = torch.linalg.eigh(mean).eigenvectors[:, -1] + 1e-4  # settles the largest at once
    both, dear = run(matrices, tol=1e-3, start=start)
    largest, cheap = run(matrices, tol=1e-3, start=start, largest_only=True)
    assert cheap.num_products < dear.num_products - 2  # two at most are of the noise
    assert float(largest.largest) == pytest.approx(float(both.largest), rel=1e-3)
    assert float(torch.linalg.eigvalsh(mean)[-1]) == pytest.approx(float(largest.largest), rel=1e-3)
    assert math.isnan(largest.projected.leak_smallest)
    assert not math.isnan(both.projected.leak_smallest)


@pytest.mark.parametrize("start", [torch.zeros(SIZE), torch.full((SIZE,), math.nan)])
def test_a_start_that_leads_nowhere_is_a_random_one(start):
    matrices, _ = batches(0.1)
    edges, _ = run(matrices, start=start.double())
    expected, _ = run(matrices)
    assert edges.largest == expected.largest
    assert torch.equal(edges.weights, expected.weights)


def test_axes_begin_with_the_top_vector_and_weights_are_overlaps_with_the_start():
    matrices, mean = batches(0.1)
    vectors = torch.linalg.eigh(mean).eigenvectors
    start = vectors[:, -1] + 2 * vectors[:, 0]
    edges, _ = run(matrices, start=start, largest_only=True)
    top = edges.axes.vector(0)
    assert abs(float(top @ vectors[:, -1])) == pytest.approx(1.0)
    assert edges.weights[[0, -1]].tolist() == pytest.approx([0.2, 0.8])


def test_a_matrix_of_one_entry_has_one_end():
    matrices = torch.tensor([[[3.0]], [[5.0]]], dtype=torch.float64)
    edges, _ = run(matrices)
    assert edges.largest == 4.0
    assert edges.noise.parallel == pytest.approx(2.0)  # variance of 3 and 5


def test_a_followed_edge_is_the_searched_one():
    matrices, mean = batches(0.1)
    tracker = CurvatureTracker(tol=1e-6, max_run=SIZE, with_noise=True)
    gradient = torch.ones(SIZE, dtype=torch.float64)
    sampling = 1e-3
    followed = followed_edges(tracker, BatchMatrices(matrices, [1] * 8), gradient, sampling)
    searched, _ = run(matrices, sampling)
    assert followed.converged
    assert float(followed.largest) == pytest.approx(float(searched.largest), rel=1e-4)
    assert followed.noise.parallel == pytest.approx(float(searched.noise.parallel), rel=1e-3)
    assert math.isnan(followed.smallest)
    assert isinstance(followed.smallest, Measured)
    assert float(followed.largest) < float(torch.linalg.eigvalsh(mean)[-1])
