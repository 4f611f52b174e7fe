"""Deflated traces against dense ones, and their spread against the law of the probes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlr import DenseOperator, top_eigenpairs
from batchlr.trace import estimate_trace
from cases import CASES, DiagonalOperator
from test_lanczos import generator, rotation, with_spectrum

SIZE = 90


def spiked():
    spectrum = torch.linspace(-0.5, 0.5, SIZE, dtype=torch.float64)
    spectrum[:4] = torch.tensor([40.0, 25.0, -15.0, 10.0])
    return with_spectrum(spectrum)


def exact(matrix):
    return float(matrix.trace()), float(matrix.square().sum())


class TestEstimates:
    @pytest.mark.parametrize("deflated", [0, 3, 6])
    def test_within_four_standard_errors(self, deflated):
        matrix = spiked()
        vectors = torch.linalg.eigh(matrix).eigenvectors[:, -deflated:] if deflated else None
        found = estimate_trace(DenseOperator(matrix), num_probes=200, vectors=vectors)
        trace, square = exact(matrix)
        assert abs(found.trace - trace) < 4 * found.trace.stderr
        assert abs(found.square - square) < 4 * found.square.stderr
        assert found.num_products == 200 + deflated

    @settings(max_examples=20, deadline=None)
    @given(k=st.integers(1, 20), seed=st.integers(0, 99))
    def test_any_orthonormal_vectors_leave_it_unbiased(self, k, seed):
        """Over all probes in the complement at once: they are as many as its axes."""
        matrix = spiked()
        axes = rotation(SIZE, seed)
        vectors, rest = axes[:, :k], axes[:, k:]
        inner, outer = vectors.T @ matrix @ vectors, rest.T @ matrix @ rest
        square = 2 * (matrix @ vectors).square().sum() - inner.square().sum()
        square = square + (rest.T @ matrix @ rest).square().sum()
        trace, frobenius = exact(matrix)
        assert float(inner.trace() + outer.trace()) == pytest.approx(trace, abs=1e-9)
        assert float(square) == pytest.approx(frobenius, rel=1e-9)
        found = estimate_trace(
            DenseOperator(matrix), num_probes=60, vectors=vectors, generator=generator(seed)
        )
        assert abs(found.trace - trace) < 6 * found.trace.stderr
        assert abs(found.square - frobenius) < 6 * found.square.stderr

    def test_deflation_takes_off_what_outliers_add_to_the_error(self):
        matrix = spiked()
        pairs = top_eigenpairs(DenseOperator(matrix), 3, which="both", tol=1e-6)
        plain = estimate_trace(DenseOperator(matrix), num_probes=50)
        deflated = estimate_trace(
            DenseOperator(matrix), num_probes=50, vectors=pairs.vectors, values=pairs.values
        )
        assert deflated.num_products == plain.num_products == 50
        assert deflated.trace.stderr < plain.trace.stderr / 10
        assert abs(deflated.trace - exact(matrix)[0]) < 4 * deflated.trace.stderr

    @pytest.mark.parametrize("deflate", [False, True])
    def test_the_error_follows_the_law_of_the_sphere(self, deflate):
        spectrum = torch.linspace(-1, 2, SIZE, dtype=torch.float64)
        vectors = None
        if deflate:
            vectors = torch.eye(SIZE, dtype=torch.float64)[:, -10:].contiguous()
        rest = spectrum[:-10] if deflate else spectrum
        n = len(rest)
        variance = 2 * n / (n + 2) * (rest.square().sum() - rest.sum() ** 2 / n)
        found = estimate_trace(DiagonalOperator(spectrum), num_probes=1000, vectors=vectors)
        theory = math.sqrt(float(variance) / 1000)
        assert found.trace.stderr == pytest.approx(theory, rel=0.09)  # four times 2.2 %

    def test_a_network(self):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator("hessian")
        dense = operator @ torch.eye(problem.size, dtype=torch.float64)
        pairs = top_eigenpairs(operator, 3, tol=1e-6)
        found = estimate_trace(operator, num_probes=40, vectors=pairs.vectors, values=pairs.values)
        trace, square = exact(dense)
        assert abs(found.trace - trace) < 4 * found.trace.stderr
        assert abs(found.square - square) < 4 * found.square.stderr


class TestEdges:
    def test_all_directions_known_is_exact(self):
        matrix = spiked()
        values, vectors = torch.linalg.eigh(matrix)
        found = estimate_trace(DenseOperator(matrix), num_probes=3, vectors=vectors)
        assert found.trace == pytest.approx(exact(matrix)[0], rel=1e-12)
        assert found.square == pytest.approx(exact(matrix)[1], rel=1e-12)
        assert found.trace.stderr == found.square.stderr == 0
        known = estimate_trace(DenseOperator(matrix), num_probes=3, vectors=vectors, values=values)
        assert known.num_products == 0
        assert known.trace == pytest.approx(exact(matrix)[0], rel=1e-12)

    def test_one_probe_has_no_error(self):
        found = estimate_trace(DenseOperator(spiked()), num_probes=1)
        assert math.isnan(found.trace.stderr)
        assert math.isnan(found.square.stderr)

    def test_float32(self):
        matrix = spiked()
        found = estimate_trace(DenseOperator(matrix.float()), num_probes=200)
        assert abs(found.trace - exact(matrix)[0]) < 4 * found.trace.stderr

    def test_no_direction_known_is_the_plain_estimate(self):
        operator = DenseOperator(spiked())
        none = torch.zeros(SIZE, 0, dtype=torch.float64)
        found = estimate_trace(operator, num_probes=2, vectors=none)
        assert found == estimate_trace(operator, num_probes=2)

    @pytest.mark.parametrize("unit", [2.0**-80, 2.0**80])
    def test_squares_beyond_the_range_of_float32(self, unit):
        matrix = spiked().float()
        plain = estimate_trace(DenseOperator(matrix), num_probes=3)
        found = estimate_trace(DenseOperator(unit * matrix), num_probes=3)
        assert (found.trace / unit, found.square / unit**2) == (plain.trace, plain.square)

    def test_same_generator_same_result(self):
        operator = DenseOperator(spiked())
        first = estimate_trace(operator, num_probes=3, generator=generator(3))
        again = estimate_trace(operator, num_probes=3, generator=generator(3))
        other = estimate_trace(operator, num_probes=3, generator=generator(4))
        assert first.trace == again.trace != other.trace


class TestRefuses:
    def test_no_probes(self):
        with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
            estimate_trace(DenseOperator(torch.eye(5)), num_probes=0)

    def test_vectors_that_are_not_orthonormal(self):
        with pytest.raises(ValueError, match="vectors must be orthonormal; take them"):
            estimate_trace(DenseOperator(torch.eye(5)), num_probes=1, vectors=torch.ones(5, 2))

    def test_vectors_that_are_not_finite(self):
        vectors = torch.full((5, 1), torch.nan)
        with pytest.raises(ValueError, match="vectors must be orthonormal"):
            estimate_trace(DenseOperator(torch.eye(5)), num_probes=1, vectors=vectors)

    @pytest.mark.parametrize("shape", [(5,), (5, 6)])
    def test_vectors_that_are_no_block(self, shape):
        with pytest.raises(ValueError, match=r"vectors must be a block \(5, k\), got"):
            estimate_trace(DenseOperator(torch.eye(5)), num_probes=1, vectors=torch.ones(shape))

    def test_values_that_do_not_fit(self):
        operator, two = DenseOperator(torch.eye(5)), torch.eye(5)[:, :2].contiguous()
        with pytest.raises(ValueError, match=r"values must be \(2,\), got \(3,\)"):
            estimate_trace(operator, num_probes=1, vectors=two, values=torch.ones(3))
        with pytest.raises(ValueError, match="values belong to vectors, got values alone"):
            estimate_trace(operator, num_probes=1, values=torch.ones(3))

    @pytest.mark.parametrize("with_vectors", [False, True])
    def test_products_that_are_not_finite(self, with_vectors):
        matrix = torch.eye(5)
        matrix[2, 2] = torch.inf
        vectors = torch.eye(5)[:, :3].contiguous() if with_vectors else None
        with pytest.raises(ArithmeticError, match="products are not finite"):
            estimate_trace(DenseOperator(matrix), num_probes=2, vectors=vectors)
