"""Directions of single batches, against matrices whose every batch is known."""

import numpy as np
import pytest
import torch

from batchlr.lanczos import top_eigenpairs
from batchlr.mean_square import CurvatureSpread, Dynamics, mean_square_limit
from batchlr.measured import Measured
from batchlr.measurement.outlying_directions import widened
from batchlr.measurement.projected_curvature import ProjectedCurvature
from batchlr.measurement.spectral_edges import EdgeSearch
from cases import BatchMatrices

SIZE = 60
HARD = 3  # the batch with a direction of its own, which is the last axis


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def memorised(num_batches=8, strength=3.0, counts=None):
    """Positive semi-definite matrices of shared axes, and one that curves where no other does."""
    spectrum = torch.linspace(2.0, 0.01, SIZE - 1, dtype=torch.float64)
    factors = 1 + 0.1 * torch.randn(num_batches, SIZE - 1, generator=generator()).double()
    diagonals = torch.zeros(num_batches, SIZE, dtype=torch.float64)
    diagonals[:, :-1] = spectrum * factors
    diagonals[HARD, -1] = strength
    return BatchMatrices(torch.diag_embed(diagonals), counts or (4,) * num_batches)


def coupled(num_batches=6, size=20):
    """Positive semi-definite matrices with no axis in common."""
    roots = torch.randn(num_batches, size, size, generator=generator(1), dtype=torch.float64)
    return BatchMatrices(roots @ roots.transpose(1, 2) / size, tuple(range(2, 2 + num_batches)))


def gradients_of(operator, seed=2):
    size = operator.shape[0]
    draws = torch.randn(len(operator.samples), size, generator=generator(seed)).double()
    return [matrix @ draw for matrix, draw in zip(operator.matrices, draws, strict=True)]


def space_of(operator, max_steps=5):
    return top_eigenpairs(operator, max_steps=max_steps, with_subspace=True).subspace


def test_the_direction_that_only_one_batch_has_is_found():
    operator = memorised(num_batches=40, strength=20.0)
    seen = space_of(operator)
    wide = widened(seen, operator, gradients_of(operator), count=2)
    own = torch.eye(SIZE, dtype=torch.float64)[-1]
    assert (seen.axes.T @ own).norm() < 0.6
    assert (wide.subspace.axes.T @ own).norm() > 0.95


def test_the_space_is_that_of_the_matrices_on_its_axes():
    operator = coupled()
    seen = space_of(operator)
    wide = widened(seen, operator, gradients_of(operator), count=3)
    space, axes = wide.subspace, wide.subspace.axes
    assert axes.shape == (20, 8)
    assert torch.allclose(axes.T @ axes, torch.eye(8).double(), atol=1e-10)
    assert torch.allclose(space.matrices, axes.T @ operator.matrices @ axes, atol=1e-10)
    assert torch.allclose(torch.diag(space.values), axes.T @ operator.mean @ axes, atol=1e-10)
    assert (space.values.diff() <= 0).all()
    # what was there before is still in it
    assert torch.allclose(axes @ (axes.T @ seen.axes), seen.axes, atol=1e-10)
    assert float(space.weights.sum()) == pytest.approx(float(seen.weights.sum()))


def test_leaks_are_what_leaves_the_added_directions():
    operator = coupled()
    seen = space_of(operator)
    wide = widened(seen, operator, gradients_of(operator), count=3)
    axes = wide.subspace.axes
    outside = torch.eye(20).double() - axes @ axes.T
    new = torch.linalg.svd(axes - seen.axes @ (seen.axes.T @ axes)).U[:, :3]
    counts = torch.tensor(operator.samples).double()
    deviations = operator.matrices - operator.mean
    covariance = torch.einsum("k,kij,kjl->il", counts, deviations @ outside, deviations)
    total = torch.trace(new.T @ covariance @ new) / (len(counts) - 1)
    assert float(wide.leaks.sum()) == pytest.approx(float(total))


def test_the_curvature_of_the_axes_before_is_kept_apart():
    operator = memorised()
    seen = space_of(operator)
    wide = widened(seen, operator, gradients_of(operator), count=1)
    assert float(wide.before.sum()) == pytest.approx(float(seen.values.sum()))


def test_it_costs_a_product_and_one_for_each_direction():
    operator = coupled()
    seen = space_of(operator)
    spent = operator.num_products
    wide = widened(seen, operator, gradients_of(operator), count=4)
    assert wide.subspace.axes.shape[1] == seen.axes.shape[1] + 4
    assert operator.num_products == spent + 1 + 4
    spent = operator.num_products
    widened(wide.subspace, operator, gradients_of(operator), count=0)
    assert operator.num_products == spent


def test_nothing_is_added_to_a_space_that_has_everything():
    operator = coupled(size=5)
    seen = space_of(operator)
    wide = widened(seen, operator, gradients_of(operator))
    assert torch.allclose(wide.subspace.values, seen.values, rtol=1e-12)
    assert torch.equal(wide.leaks, torch.zeros(5).double())


def test_batches_that_agree_add_one_direction():
    one = coupled(num_batches=1).matrices[0]
    operator = BatchMatrices(torch.stack([one, one, one]), (2, 2, 2))
    seen = space_of(operator)
    wide = widened(seen, operator, [one[0]] * 3)
    assert wide.subspace.axes.shape[1] == seen.axes.shape[1] + 1
    assert float(wide.leaks.max()) == pytest.approx(0.0, abs=1e-10)


def test_batches_without_a_gradient_add_nothing():
    operator = coupled()
    seen = space_of(operator)
    wide = widened(seen, operator, [torch.zeros(20).double()] * 6)
    assert wide.subspace.axes.shape == seen.axes.shape


def test_the_limit_is_that_of_all_directions():
    """One sample learnt by heart limits the rate, though its share of the mean is in the bulk."""
    operator = memorised(num_batches=40, strength=40.0, counts=(1,) * 40)

    def limit(space, leaks):
        values = space.values.numpy()
        projected = ProjectedCurvature(
            values, space.matrices.numpy(), operator.weights, Measured(0.0), Measured(0.0), leaks
        )
        return projected.mean_square(
            Dynamics(), 0.25, largest=values[0], population=40, with_error=False
        ).lr

    seen = space_of(operator)
    wide = widened(seen, operator, gradients_of(operator), count=4)
    leaks = wide.leaks.numpy()
    matrices = operator.matrices.numpy()
    deviations = np.sqrt(1 / 39) * (matrices - matrices.mean(0))
    exact = mean_square_limit(
        Dynamics(), CurvatureSpread(np.diag(matrices.mean(0)), deviations, scale=0.25)
    ).lr
    assert limit(seen, None) > 1.5 * exact
    assert limit(wide.subspace, leaks) == pytest.approx(exact, rel=0.02)


def test_a_top_that_only_the_wider_space_has():
    """Lanczos was stopped before it saw the largest eigenvalue; a batch's own direction is it."""
    diagonals = torch.linspace(1.0, 0.1, SIZE, dtype=torch.float64).repeat(4, 1)
    diagonals[:, :-1] *= 1 + 0.3 * torch.rand(4, SIZE - 1, generator=generator()).double()
    diagonals[HARD, -1] = 40.0
    operator = BatchMatrices(torch.diag_embed(diagonals), (4,) * 4)
    search = EdgeSearch(1, 1e-3, 2, generator())
    gradients = [torch.zeros(SIZE).double() for _ in range(4)]
    gradients[HARD][-1] = 1.0
    gradients[HARD][0] = 0.1
    edges = search.run(operator, 0.0, gradients=gradients, largest_only=True)
    projected = edges.projected
    assert projected.values[0] == pytest.approx(float(edges.largest))
    assert float(edges.largest) > 9.0
    assert edges.largest.stderr > 1.0  # the search said less, and that is no small matter
    assert projected.leaks is not None
    assert np.isfinite(projected.leaks).all()
    assert projected.leaks[0] == float(projected.leak_largest)
    assert projected.leaks.min() >= 0
