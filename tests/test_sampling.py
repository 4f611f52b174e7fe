"""Growing subsamples and nested unions on batch matrices that are known."""

import math

import pytest
import torch

from batchlr.sampling import nested_edges, sampled_edge
from cases import BatchMatrices
from test_lanczos import generator, with_spectrum

SIZE = 30
COUNT = 64


def matrices(noise, seed=7):
    """64 batches around a matrix whose largest eigenvalue is 9."""
    draws = torch.randn(COUNT, SIZE, SIZE, dtype=torch.float64, generator=generator(seed))
    spectrum = torch.cat([torch.linspace(-1, 1, SIZE - 2), torch.tensor([5.0, 9.0])]).double()
    return with_spectrum(spectrum) + noise * (draws + draws.transpose(1, 2)) / 2


def family(all_matrices):
    return lambda n: BatchMatrices(all_matrices[:n], (2,) * n)


class TestSampledEdge:
    def test_noisier_batches_need_more_of_them(self):
        used = [
            sampled_edge(family(matrices(noise)), COUNT, tol=0.02).num_batches
            for noise in (0.05, 1.0, 4.0)
        ]
        assert used[0] == 4
        assert used[0] < used[1] < used[2]

    @pytest.mark.parametrize("tol", [0.1, 0.03, 0.01])
    def test_the_error_is_within_the_tolerance_and_true(self, tol):
        misses = 0
        for seed in range(12):
            every = matrices(1.0, seed)
            whole = float(torch.linalg.eigvalsh(every.mean(0))[-1])
            found = sampled_edge(family(every), COUNT, tol=tol)
            assert found.converged
            assert found.sampling_error <= tol * found.largest
            misses += abs(found.largest - whole) > 3 * max(found.largest.stderr, tol * whole / 2)
        assert misses <= 1

    def test_it_grows_step_by_step_and_counts_what_it_spent(self):
        operators = []

        def make(n):
            operators.append(BatchMatrices(matrices(3.0)[:n], (2,) * n))
            return operators[-1]

        found = sampled_edge(make, COUNT, tol=0.02)
        counts = [count for count, _, _ in found.history]
        assert counts == sorted(set(counts))
        assert len(counts) > 1
        assert found.num_batches == counts[-1]
        assert found.num_samples == 2 * counts[-1]
        spent = sum(len(o.samples) * o.num_products for o in operators)
        assert found.num_products == spent

    def test_with_one_step_it_is_the_rayleigh_quotient_of_the_start(self):
        """Each search begins where the last one ended: here at the start itself."""
        every = matrices(4.0)
        start = torch.randn(SIZE, dtype=torch.float64, generator=generator(1))
        unit = start / start.norm()
        found = sampled_edge(family(every), COUNT, tol=0.02, max_steps=1, start=start)
        along = torch.einsum("i,kij,j->k", unit, every, unit)
        for count, value, relative in found.history:
            mean = float(along[:count].mean())
            error = float(along[:count].std()) * math.sqrt(1 / count - 1 / COUNT)
            assert value == pytest.approx(mean, rel=1e-10)
            assert relative == pytest.approx(error / abs(mean), rel=1e-8)
        assert len(found.history) > 1
        assert found.num_products == sum(count for count, _, _ in found.history)
        assert not found.converged
        torch.testing.assert_close(found.vector.abs(), unit.abs(), rtol=1e-10, atol=1e-12)

    def test_from_near_the_top_eigenvector_a_search_takes_fewer_products(self):
        every = matrices(0.05)
        top = torch.linalg.eigh(every[:4].mean(0)).eigenvectors[:, -1]
        anywhere = torch.randn(SIZE, dtype=torch.float64, generator=generator(1))
        cold, warm = (
            sampled_edge(family(every), COUNT, tol=0.02, start=start)
            for start in (anywhere, top + 0.02 * anywhere)
        )
        assert warm.largest == pytest.approx(cold.largest, rel=0.01)
        assert warm.num_products < cold.num_products

    @pytest.mark.parametrize("most", [2, 5])
    def test_a_search_that_does_not_converge_takes_the_steps_allowed(self, most):
        operators = []

        def make(n):
            operators.append(BatchMatrices(matrices(3.0)[:n], (2,) * n))
            return operators[-1]

        found = sampled_edge(make, COUNT, tol=1e-12, max_steps=most)
        assert {operator.num_products for operator in operators} == {most}
        assert found.num_batches == COUNT
        assert not found.converged

    def test_a_start_that_is_no_direction_is_refused(self):
        for start in (torch.zeros(SIZE).double(), torch.full((SIZE,), math.nan).double()):
            with pytest.raises(ValueError, match="start must be a finite, non-zero vector"):
                sampled_edge(family(matrices(1.0)), COUNT, start=start)

    def test_all_batches_have_no_sampling_error(self):
        found = sampled_edge(family(matrices(30.0)), COUNT, tol=0.001)
        assert found.num_batches == COUNT
        assert found.sampling_error == 0

    @pytest.mark.parametrize("tol", [0.0, 1.0, math.nan])
    def test_illegal_tolerances(self, tol):
        with pytest.raises(ValueError, match=r"tol must lie in \(0, 1\), got"):
            sampled_edge(family(matrices(1.0)), COUNT, tol=tol)

    def test_of_zero_matrices_all_are_looked_at(self):
        found = sampled_edge(lambda n: BatchMatrices(torch.zeros(n, 5, 5), (2,) * n), 6)
        assert (found.largest, found.sampling_error, found.num_batches) == (0, 0, 6)

    def test_a_single_batch(self):
        with pytest.raises(ValueError, match="sampling needs at least two batches, got 1"):
            sampled_edge(family(matrices(1.0)), 1)

    def test_an_operator_of_other_batches(self):
        with pytest.raises(ValueError, match=r"make_operator\(4\) gave 3 batches"):
            sampled_edge(lambda n: BatchMatrices(matrices(1.0)[:3], (2, 2, 2)), COUNT)


class TestNestedEdges:
    @pytest.mark.parametrize("noise", [0.1, 1.0])
    def test_unions_are_those_of_dense_matrices_in_the_whole_space(self, noise):
        every = matrices(noise)
        operator = BatchMatrices(every, (2,) * COUNT)
        found = nested_edges(operator, (1, 8, 64), max_steps=SIZE, tol=1e-300)
        for size, edge in found.items():
            groups = every.reshape(COUNT // size, size, SIZE, SIZE).mean(1)
            exact = torch.linalg.eigvalsh(groups)[:, -1]
            assert edge == pytest.approx(float(exact.mean()), rel=1e-6)
        assert found[1] > found[8] > found[64]  # small batches curve more

    def test_a_few_products_give_lower_bounds_that_are_close(self):
        every = matrices(0.5)
        operator = BatchMatrices(every, (2,) * COUNT)
        found = nested_edges(operator, (4, 16, 64))
        for size, edge in found.items():
            groups = every.reshape(COUNT // size, size, SIZE, SIZE).mean(1)
            exact = float(torch.linalg.eigvalsh(groups)[:, -1].mean())
            assert edge <= exact + 1e-9
            assert edge == pytest.approx(exact, rel=0.05)
        assert operator.num_products <= 20

    def test_batches_of_weight_zero_are_left_out(self):
        every, ones = matrices(1.0)[:4], (2,) * 4
        expected = nested_edges(BatchMatrices(every, ones), [1, 2])
        with_none = torch.cat([every[:1], every[:1] * 0, every[1:]])
        operator = BatchMatrices(with_none, (2, 0, 2, 2, 2))
        found = nested_edges(operator, [1, 2])
        for size in (1, 2):
            assert found[size] == pytest.approx(expected[size], rel=1e-9)
            assert found[size].stderr == pytest.approx(expected[size].stderr, rel=1e-6)
        with pytest.raises(ValueError, match=r"sizes must lie in \[1, 4\]"):
            nested_edges(operator, [5])

    def test_unions_larger_than_the_whole(self):
        operator = BatchMatrices(matrices(1.0), (2,) * COUNT)
        with pytest.raises(ValueError, match=r"sizes must lie in \[1, 64\], .* got 65"):
            nested_edges(operator, (65,))
