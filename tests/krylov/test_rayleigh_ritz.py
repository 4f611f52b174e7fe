"""A small space and the matrix on it, against dense matrices."""

import pytest
import torch

from batchlr import DenseOperator, lanczos
from batchlr.krylov.rayleigh_ritz import RitzSpace
from test_lanczos import batch_matrices, generator, with_spectrum

SIZE = 40


def operator_of(values, dtype=torch.float64):
    return DenseOperator(with_spectrum(torch.as_tensor(values, dtype=torch.float64)).to(dtype))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def filled(operator, count, capacity=10, **options):
    space = RitzSpace(operator, capacity, **options)
    for seed in range(count):
        assert space.extend(random(operator.shape[0], seed=seed, dtype=operator.dtype))
    return space


class TestRitz:
    @pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
    def test_values_and_vectors_are_those_of_the_matrix_on_the_span(self, unit):
        matrix = unit * with_spectrum(torch.linspace(-3, 5, SIZE, dtype=torch.float64))
        space = filled(DenseOperator(matrix), 6)
        span = torch.linalg.qr(torch.stack([random(SIZE, seed=s) for s in range(6)], 1)).Q
        values, coefficients = space.ritz()
        expected = torch.linalg.eigvalsh(span.T @ matrix @ span).flip(0)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-13 * unit * 5)
        vectors = space.vector(coefficients)
        assert (vectors.T @ vectors - torch.eye(6).double()).abs().max() < 1e-13
        assert (vectors - span @ (span.T @ vectors)).abs().max() < 1e-13
        torch.testing.assert_close(space.image(coefficients), matrix @ vectors)

    def test_residuals_are_those_of_the_pairs_and_cost_no_product(self):
        matrix = with_spectrum(torch.linspace(-3, 5, SIZE, dtype=torch.float64))
        operator = DenseOperator(matrix)
        space = filled(operator, 5)
        values, coefficients = space.ritz()
        for value, column in zip(values.tolist(), coefficients.T, strict=True):
            vector = space.vector(column)
            torch.testing.assert_close(
                space.residual(value, column), matrix @ vector - value * vector
            )
        assert operator.num_products == space.num_products == 5

    def test_residuals_as_directions_make_the_krylov_space(self):
        """Rayleigh-Ritz extended by its residual is Lanczos."""
        operator = operator_of(torch.linspace(-3, 5, SIZE))
        start = random(SIZE)
        space = RitzSpace(operator, 12)
        space.extend(start)
        for _ in range(11):
            values, coefficients = space.ritz()
            space.extend(space.residual(float(values[0]), coefficients[:, 0]))
        values, _ = space.ritz()
        expected, _ = lanczos(operator, 12, start=start).eigh()
        torch.testing.assert_close(values, expected.flip(0), rtol=0, atol=1e-10)

    def test_a_vector_of_the_space_does_not_join_again(self):
        operator = operator_of(torch.arange(1.0, SIZE + 1))
        space = filled(operator, 4)
        _, coefficients = space.ritz()
        assert not space.extend(space.vector(coefficients[:, 2]))
        assert not space.extend(torch.zeros(SIZE, dtype=torch.float64))
        assert not space.extend(torch.full((SIZE,), torch.nan, dtype=torch.float64))
        assert operator.num_products == space.size == 4

    def test_float32_rows_stay_orthonormal(self):
        operator = operator_of(torch.cat([torch.linspace(0, 1, SIZE - 1), torch.tensor([1e3])]))
        single = DenseOperator((operator @ torch.eye(SIZE).double()).float())
        space = RitzSpace(single, 30)
        space.extend(random(SIZE, dtype=torch.float32))
        for _ in range(25):
            values, coefficients = space.ritz()
            second = min(1, len(values) - 1)  # the first has converged by then
            space.extend(space.residual(float(values[second]), coefficients[:, second]))
        _, coefficients = space.ritz()
        vectors = space.vector(coefficients)
        gram = vectors.T @ vectors
        assert (gram - torch.eye(space.size)).abs().max() < 1e-4

    def test_products_that_are_not_finite_are_refused(self):
        matrix = torch.eye(5)
        matrix[2, 2] = torch.inf
        with pytest.raises(ArithmeticError, match="products are not finite: the model"):
            RitzSpace(DenseOperator(matrix), 3).extend(torch.ones(5))

    @pytest.mark.parametrize("size", [0.0, 3e38, 1e-44, torch.inf, torch.nan])
    def test_a_first_vector_that_cannot_be_scaled_to_one_does_not_join(self, size):
        space = RitzSpace(DenseOperator(torch.eye(5)), 3)
        assert not space.extend(torch.full((5,), size))
        assert space.extend(torch.ones(5))
        assert space.num_products == 1


class TestRestart:
    @pytest.mark.parametrize("end", ["largest", "smallest", "both"])
    def test_it_keeps_the_ritz_pairs_of_that_end_and_spends_nothing(self, end):
        operator = operator_of(torch.linspace(-3, 5, SIZE))
        space = filled(operator, 8, capacity=8)
        before, _ = space.ritz()
        assert space.extend(random(SIZE, seed=9), end=end)
        assert space.size == 5
        assert operator.num_products == space.num_products == 9
        values, coefficients = space.ritz()
        # One vector more moves the values kept outwards, never inwards.
        if end != "smallest":
            assert values[0] >= before[0] - 1e-12
        if end != "largest":
            assert values[-1] <= before[-1] + 1e-12
        vectors = space.vector(coefficients)
        assert (vectors.T @ vectors - torch.eye(5).double()).abs().max() < 1e-12
        residual = space.residual(float(values[0]), coefficients[:, 0])
        exact = (operator @ vectors[:, 0].contiguous()) - values[0] * vectors[:, 0]
        torch.testing.assert_close(residual, exact, rtol=0, atol=1e-12)

    def test_restarted_searches_converge_like_those_with_all_the_memory(self):
        spikes = torch.tensor([1.1, 1.3, 1.5, 1.8, 2.2], dtype=torch.float64)
        values = torch.cat([torch.linspace(0, 1, 395, dtype=torch.float64), spikes])
        operator = operator_of(values)
        counts = []
        for capacity in (12, 400):
            space = RitzSpace(operator, capacity)
            space.extend(random(400))
            while True:
                found, coefficients = space.ritz()
                residual = space.residual(float(found[0]), coefficients[:, 0])
                if residual.norm() < 1e-6:
                    break
                space.extend(residual)
            assert found[0] == pytest.approx(2.2, abs=1e-11)
            counts.append(space.num_products)
        assert counts[0] <= 1.5 * counts[1]

    def test_a_space_as_large_as_the_matrix_takes_no_more(self):
        space = filled(operator_of([1.0, 2.0, 3.0]), 3)
        assert not space.extend(random(3, seed=8))


class TestBatches:
    @pytest.mark.parametrize("capacity", [4, 10])
    def test_matrices_are_those_of_the_batches_on_the_vectors(self, capacity):
        operator = batch_matrices()
        space = filled(operator, 6, capacity=capacity, by_batch=True)
        values, coefficients = space.ritz()
        axes = space.vector(coefficients)
        dense = axes.T @ operator.matrices @ axes
        assert (space.matrices(coefficients) - dense).abs().max() < 1e-12
        weights = torch.tensor(operator.samples).double() / sum(operator.samples)
        mean = torch.einsum("k,kij->ij", weights, space.matrices(coefficients))
        assert (mean - torch.diag(values)).abs().max() < 1e-12
        assert operator.num_products == 6

    @pytest.mark.parametrize("capacity", [4, 10])
    def test_overlaps_are_those_with_the_first_vector(self, capacity):
        operator = batch_matrices()
        space = filled(operator, 6, capacity=capacity)
        first = random(20, seed=0)
        _, coefficients = space.ritz()
        expected = (space.vector(coefficients).T @ (first / first.norm())).square()
        torch.testing.assert_close(space.overlaps(coefficients), expected)

    def test_products_of_the_batches_are_held_as_far_as_asked(self):
        operator = batch_matrices()
        space = filled(operator, 3, by_batch=True, keep_products=3)
        _, coefficients = space.ritz()
        vector = space.vector(coefficients[:, 0])
        torch.testing.assert_close(
            space.batch_products(coefficients[:, 0]), operator.matrices @ vector
        )
        space.extend(random(20, seed=5))
        _, coefficients = space.ritz()
        assert space.batch_products(coefficients[:, 0]) is None
