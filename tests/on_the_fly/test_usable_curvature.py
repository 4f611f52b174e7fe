"""What stands out of the bulk is found, whatever carries the bulk's mass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlr.on_the_fly.usable_curvature import usable_edges
from batchlr.operators import DenseOperator
from batchlr.slq import stochastic_lanczos_quadrature


def measured(eigenvalues, steps=40, seed=0):
    """Ritz values and weights of a random symmetric matrix with the given spectrum."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    measure = stochastic_lanczos_quadrature(
        DenseOperator(matrix), num_steps=steps, num_probes=1, generator=generator
    )
    return measure.nodes.tolist(), measure.weights.tolist()


def semicircle(size, radius):
    """Quantiles of Wigner's semicircle of the given radius."""
    grid = np.linspace(-1, 1, 20_001)
    mass = 0.5 + (grid * np.sqrt(1 - grid**2) + np.arcsin(grid)) / np.pi
    return radius * np.interp((np.arange(size) + 0.5) / size, mass, grid)


@pytest.mark.parametrize("radius", [1e-3, 0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_outliers_of_a_resolved_bulk_are_found(radius, seed):
    """A bulk wide enough for many Ritz values, none of which carries half of the mass."""
    outliers = [1.0, 4.0, 9.0, 25.0, -3.0]
    values, weights = measured(np.concatenate([semicircle(795, radius), outliers]), seed=seed)
    if radius == 0.2:
        assert max(weights) < 0.5
    largest, smallest = usable_edges(values, weights)
    assert (largest, smallest) == (pytest.approx(25.0, rel=1e-6), pytest.approx(1.0, rel=1e-3))


def test_a_bulk_alone_has_no_lower_edge():
    values, weights = measured(semicircle(300, 1.0))
    assert usable_edges(values, weights) == (max(values), max(values))


def test_the_lower_edge_is_no_less_than_the_floor():
    values, weights = [0.0, 1e-4, 9.0], [0.99, 0.005, 0.005]
    assert usable_edges(values, weights) == (9.0, 1e-4)
    assert usable_edges(values, weights, floor=1e-2) == (9.0, 1e-2)
    assert usable_edges(values, weights, floor=20.0) == (9.0, 9.0)


def test_negative_outliers_do_not_count():
    assert usable_edges([-5.0, 0.0, 2.0, 8.0], [1e-3, 0.997, 1e-3, 1e-3]) == (8.0, 2.0)


spectra = st.lists(
    st.tuples(st.floats(-10, 10), st.floats(1e-6, 1)), min_size=1, max_size=20
).filter(lambda rows: max(value for value, _ in rows) > 1e-3)


@given(spectra, st.floats(1e-3, 1e3), st.randoms())
def test_edges_scale_with_the_matrix_and_know_no_order(rows, factor, random):
    found = usable_edges(*zip(*rows, strict=True))
    assert 0 < found[1] <= found[0] == max(value for value, _ in rows)
    mixed = random.sample(rows, len(rows))
    assert usable_edges(*zip(*mixed, strict=True)) == pytest.approx(found)
    scaled = usable_edges([factor * value for value, _ in rows], [weight for _, weight in rows])
    assert scaled[0] == pytest.approx(factor * found[0])
    assert any(scaled[1] == pytest.approx(factor * value) for value, _ in rows)


@pytest.mark.parametrize(
    ("values", "weights", "floor", "words"),
    [
        ([], [], 0.0, "there are no values"),
        ([1.0], [0.5, 0.5], 0.0, "got 1 values, 2 weights"),
        ([math.nan], [1.0], 0.0, "must be finite"),
        ([1.0], [-1.0], 0.0, "must not be negative"),
        ([1.0], [0.0], 0.0, "nor all zero"),
        ([1.0], [1.0], -1.0, "floor must be finite and at least 0, got -1.0"),
    ],
)
def test_illegal_arguments(values, weights, floor, words):
    with pytest.raises(ValueError, match=words):
        usable_edges(values, weights, floor=floor)


def test_without_positive_curvature_nothing_limits():
    with pytest.raises(ArithmeticError, match=r"no value is positive, the largest is -1\.0"):
        usable_edges([-1.0, -2.0], [0.5, 0.5])
