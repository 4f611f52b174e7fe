"""Lanczos on matrices whose spectra are chosen, with dense eigensolvers as the judge."""

import contextlib
import gc
import math
import weakref

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batchlr import DenseOperator, LinearOperator, lanczos, top_eigenpairs
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.lanczos import MAX_STEPS
from cases import CASES, BatchMatrices, DiagonalOperator

SIZE = 60
SPECTRA = {
    "flat": torch.linspace(1, 2, SIZE),
    "step": torch.cat([torch.linspace(-0.1, 0.1, SIZE - 5), torch.linspace(5, 9, 5)]),
    "geometric": 0.7 ** torch.arange(SIZE),
    "indefinite": torch.linspace(-3, 2, SIZE),
    "pairs": torch.arange(SIZE) // 2,
    "low rank": torch.cat([torch.zeros(SIZE - 6), torch.arange(1, 7)]),
    "negative": torch.linspace(-9, -1, SIZE),
}
UNITS = [1e-8, 1.0, 1e8]

# Of any value; whole, so that eigenvalues repeat; all equal, so that nearly all are zero.
ENTRIES = [
    st.floats(-10, 10).map(lambda x: round(x, 6)),
    st.integers(-2, 2).map(float),
    st.just(1.0),
]

each_spectrum = pytest.mark.parametrize(
    "spectrum", [s.double() for s in SPECTRA.values()], ids=SPECTRA
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rotation(size, seed=0):
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator(seed))
    return torch.linalg.qr(gaussian).Q


def with_spectrum(values, seed=0):
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    q = rotation(len(values), seed)
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def tridiagonal_matrix(t):
    return torch.diag(t.diagonal) + torch.diag(t.off_diagonal, 1) + torch.diag(t.off_diagonal, -1)


def distance(value, spectrum):
    return float((spectrum - value).abs().min())


class TestLanczos:
    @each_spectrum
    @pytest.mark.parametrize("num_steps", [1, 2, 10, SIZE])
    @pytest.mark.parametrize("unit", UNITS)
    def test_basis_is_orthonormal_and_reduces_the_matrix(self, spectrum, num_steps, unit):
        matrix = unit * with_spectrum(spectrum)
        t = lanczos(DenseOperator(matrix), num_steps, generator=generator())
        m = len(t.diagonal)
        assert m <= num_steps
        assert t.basis.shape == (m, SIZE)
        assert t.off_diagonal.shape == (m - 1,)
        assert (t.off_diagonal > 0).all()
        identity = torch.eye(m, dtype=torch.float64)
        assert (t.basis @ t.basis.T - identity).abs().max() < 1e-12
        size = matrix.norm()
        reduced = t.basis @ matrix @ t.basis.T
        assert (reduced - tridiagonal_matrix(t)).norm() < 1e-12 * size
        # A Q' = Q' T but for the last column, whose remainder has the length given.
        remainder = matrix @ t.basis.T - t.basis.T @ tridiagonal_matrix(t)
        assert remainder[:, :-1].norm() < 1e-12 * size
        assert abs(remainder[:, -1].norm() - t.residual) < 1e-12 * size

    @each_spectrum
    def test_ritz_values_at_full_depth_are_the_distinct_eigenvalues(self, spectrum):
        t = lanczos(DenseOperator(with_spectrum(spectrum)), SIZE)
        values, vectors = t.eigh()
        for value in values:
            assert distance(value, spectrum) < 1e-11
        for eigenvalue in spectrum:
            assert distance(eigenvalue, values) < 1e-11
        torch.testing.assert_close((vectors * values) @ vectors.T, tridiagonal_matrix(t))

    def test_ritz_values_grow_outwards_with_every_step(self):
        operator = DenseOperator(with_spectrum(SPECTRA["indefinite"].double()))
        ends = [lanczos(operator, m).eigh()[0][[0, -1]] for m in range(2, 30)]
        low, high = torch.stack(ends).T
        assert (low.diff() <= 1e-12).all()
        assert (high.diff() >= -1e-12).all()

    @pytest.mark.parametrize("num_steps", [50, 200])
    def test_float32_stays_orthonormal(self, num_steps):
        # An outlier a thousand times the bulk: without reorthogonalisation it comes back as ghosts.
        spectrum = torch.cat([torch.linspace(0, 1, 499), torch.tensor([1000.0])])
        t = lanczos(DenseOperator(with_spectrum(spectrum.double()).float()), num_steps)
        assert t.basis.dtype == torch.float32
        assert t.diagonal.dtype == t.off_diagonal.dtype == t.residual.dtype == torch.float64
        identity = torch.eye(num_steps)
        assert (t.basis @ t.basis.T - identity).abs().max() < 1e-4
        values, _ = t.eigh()
        assert (values > 500).sum() == 1
        assert values[-1] == pytest.approx(1000, rel=1e-5)

    def test_first_basis_vector_is_the_start_normalised(self):
        operator = DenseOperator(with_spectrum(torch.arange(1.0, 7.0).double()))
        start = torch.arange(6, dtype=torch.float64)
        before = start.clone()
        for factor in (1e-150, 1.0, 1e150):
            t = lanczos(operator, 3, start=factor * start)
            torch.testing.assert_close(t.basis[0], start / start.norm(), rtol=1e-14, atol=1e-15)
        assert torch.equal(start, before)

    def test_spends_one_product_a_step(self):
        operator = DenseOperator(with_spectrum(SPECTRA["flat"].double()))
        lanczos(operator, 7)
        assert operator.num_products == 7


class TestRandomness:
    def test_same_generator_same_result(self):
        operator = DenseOperator(with_spectrum(SPECTRA["flat"].double()))
        first = lanczos(operator, 5, generator=generator(3))
        again = lanczos(operator, 5, generator=generator(3))
        other = lanczos(operator, 5, generator=generator(4))
        assert torch.equal(first.basis, again.basis)
        assert torch.equal(first.diagonal, again.diagonal)
        assert not torch.equal(first.basis, other.basis)

    def test_without_a_generator_results_repeat_and_the_global_state_stays(self):
        operator = DenseOperator(with_spectrum(SPECTRA["flat"].double()))
        before = torch.get_rng_state()
        first = lanczos(operator, 5)
        assert torch.equal(lanczos(operator, 5).basis, first.basis)
        assert torch.equal(lanczos(operator, 5, generator=generator(0)).basis, first.basis)
        top = top_eigenpairs(DenseOperator(torch.eye(30)), 2)
        assert torch.equal(top_eigenpairs(DenseOperator(torch.eye(30)), 2).vectors, top.vectors)
        assert torch.equal(torch.get_rng_state(), before)

    def test_default_start_is_uniform_on_the_sphere(self):
        operator = DenseOperator(torch.eye(3, dtype=torch.float64))
        g = generator()
        starts = torch.cat([lanczos(operator, 1, generator=g).basis for _ in range(1000)])
        # Archimedes: in three dimensions each coordinate is uniform on [-1, 1].
        for coordinate in starts.T:
            assert scipy.stats.kstest(coordinate, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3


class TestBreakdown:
    @pytest.mark.parametrize("unit", UNITS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_identity_ends_after_one_step(self, unit, dtype):
        t = lanczos(DenseOperator(unit * torch.eye(50, dtype=dtype)), 20)
        assert t.diagonal.tolist() == [pytest.approx(unit, rel=1e-6)]
        assert t.residual == 0
        assert t.basis.shape == (1, 50)

    def test_zero_matrix_ends_after_one_step(self):
        t = lanczos(DenseOperator(torch.zeros(5, 5)), 4)
        assert t.diagonal.tolist() == [0.0]
        assert t.residual == 0

    @pytest.mark.parametrize("unit", UNITS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_start_in_an_invariant_subspace_ends_at_its_dimension(self, unit, dtype):
        matrix = torch.zeros(40, 40, dtype=torch.float64)
        matrix[:4, :4] = with_spectrum(torch.arange(1.0, 5.0).double())
        matrix[4:, 4:] = with_spectrum(torch.linspace(5, 9, 36).double())
        start = torch.zeros(40, dtype=dtype)
        start[:4] = torch.tensor([1.0, -2.0, 3.0, 4.0])
        t = lanczos(DenseOperator((unit * matrix).to(dtype)), 20, start=start)
        expected = unit * torch.arange(1.0, 5.0, dtype=torch.float64)
        torch.testing.assert_close(t.eigh()[0], expected, rtol=1e-5, atol=0)
        assert t.residual == 0
        assert (t.basis[:, 4:] == 0).all()

    @pytest.mark.parametrize("unit", UNITS)
    def test_rank_r_ends_about_r_steps_later(self, unit):
        spectrum = SPECTRA["low rank"].double()
        t = lanczos(DenseOperator(unit * with_spectrum(spectrum)), SIZE)
        # Six eigenvalues and zero; rounding may hide the end for a step.
        assert 7 <= len(t.diagonal) <= 8
        torch.testing.assert_close(
            t.eigh()[0][-6:], unit * torch.arange(1.0, 7.0).double(), rtol=1e-12, atol=0
        )

    def test_a_thin_bulk_beside_outliers_is_not_a_breakdown_in_float32(self):
        # 300,000 parameters; the off-diagonal falls to 1e-4 of the matrix once past the outliers.
        bulk = 0.01 * torch.randn(300_000, generator=generator())
        bulk[:10] = torch.linspace(50, 100, 10)
        t = lanczos(DiagonalOperator(bulk), 40)
        assert len(t.diagonal) == 40
        assert 0.01 < t.off_diagonal[-5:].mean() < 0.03


class TestTopEigenpairs:
    @each_spectrum
    @pytest.mark.parametrize("which", ["largest", "smallest", "both"])
    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("unit", UNITS)
    def test_bounds_hold(self, spectrum, which, k, unit):
        spectrum = unit * spectrum
        matrix = with_spectrum(spectrum)
        operator = DenseOperator(matrix)
        pairs = top_eigenpairs(operator, k, which=which)
        assert_sound(pairs, matrix)
        assert pairs.converged
        assert pairs.num_products == operator.num_products
        expected = {"largest": k, "smallest": k, "both": 2 * k}[which]
        assert pairs.values.shape == pairs.residuals.shape == pairs.bounds.shape == (expected,)
        assert pairs.vectors.shape == (SIZE, expected)
        scale = spectrum.abs().max()
        assert (pairs.bounds <= 1e-3 * scale).all()

    @pytest.mark.parametrize("name", ["flat", "step", "geometric", "indefinite", "negative"])
    @pytest.mark.parametrize("k", [1, 4])
    def test_simple_eigenvalues_are_found_in_order(self, name, k):
        spectrum = SPECTRA[name].double().sort().values
        operator = DenseOperator(with_spectrum(spectrum))
        high, low = spectrum[-k:].flip(0), spectrum[:k].flip(0)
        expected = {"largest": high, "smallest": low, "both": torch.cat([high, low])}
        for which, values in expected.items():
            pairs = top_eigenpairs(operator, k, which=which, tol=1e-9)
            torch.testing.assert_close(pairs.values, values, rtol=0, atol=1e-8)

    @settings(max_examples=40)
    @given(data=st.data(), size=st.integers(1, 12), entries=st.sampled_from(ENTRIES))
    @pytest.mark.parametrize("which", ["largest", "smallest", "both"])
    def test_any_symmetric_matrix(self, data, size, entries, which):
        square = data.draw(arrays(np.float64, (size, size), elements=entries))
        matrix = np.tril(square) + np.tril(square, -1).T
        k = data.draw(st.integers(1, max(1, size // 2)))
        assume(which != "both" or 2 * k <= size)
        tol = data.draw(st.sampled_from([1e-10, 1e-3]))
        pairs = top_eigenpairs(DenseOperator(torch.from_numpy(matrix)), k, which=which, tol=tol)
        assert pairs.converged
        assert pairs.num_products <= size
        assert_sound(pairs, torch.from_numpy(matrix))
        exact = scipy.linalg.eigvalsh(matrix)
        if k == 1 and tol == 1e-10:
            error = float(pairs.residuals.max()) + 1e-12 * np.abs(exact).max()
            ends = {"largest": [exact[-1]], "smallest": [exact[0]], "both": exact[[-1, 0]]}[which]
            assert np.abs(pairs.values.numpy() - ends).max() <= error

    @pytest.mark.parametrize("which", ["largest", "smallest", "both"])
    @pytest.mark.parametrize("k", [1, 2, 5])
    @pytest.mark.parametrize("value", [-2.0, 0.0, 1.0])
    def test_multiples_of_the_identity(self, which, k, value):
        matrix = value * torch.eye(30, dtype=torch.float64)
        pairs = top_eigenpairs(DenseOperator(matrix), k, which=which)
        assert_sound(pairs, matrix)
        torch.testing.assert_close(pairs.values, torch.full_like(pairs.values, value))
        assert pairs.converged

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_copies_of_an_eigenvalue_are_found_once_the_krylov_space_is_exhausted(self, k):
        spectrum = torch.tensor([5.0, 5.0, 5.0, *[1.0] * 20], dtype=torch.float64)
        matrix = with_spectrum(spectrum)
        pairs = top_eigenpairs(DenseOperator(matrix), k)
        torch.testing.assert_close(pairs.values, torch.full((k,), 5.0).double())
        assert_sound(pairs, matrix)

    def test_as_many_pairs_as_steps_though_the_space_is_exhausted_unseen(self):
        # From 64 steps on only every fourth is looked at; the rows behind a breakdown are dropped.
        matrix = with_spectrum(torch.cat([torch.zeros(134), torch.arange(1, 67)]).double())
        pairs = top_eigenpairs(DenseOperator(matrix), 70, max_steps=70)
        assert pairs.values.shape == (70,)
        assert 70 <= pairs.num_products <= 80
        assert_sound(pairs, matrix)

    @pytest.mark.parametrize("second", [0.5, 8.0])
    def test_an_eigenvector_that_is_not_the_top_one_does_not_trap_it(self, second):
        # Its own residual is zero, and with 8 no random vector looks larger at once.
        spectrum = torch.linspace(0, 1, 40, dtype=torch.float64)
        spectrum[20], spectrum[30] = second, 10.0
        start = torch.zeros(40, dtype=torch.float64)
        start[20] = 1.0
        pairs = top_eigenpairs(DiagonalOperator(spectrum), start=start)
        assert pairs.values[0] == pytest.approx(10, abs=0.01)
        assert pairs.converged

    def test_stops_early(self):
        operator = DenseOperator(with_spectrum(SPECTRA["step"].double()))
        loose = top_eigenpairs(operator, tol=1e-2)
        tight = top_eigenpairs(operator, tol=1e-10)
        assert loose.converged
        assert tight.converged
        assert loose.num_products < tight.num_products < 30

    def test_a_warm_start_saves_products(self):
        # The matrix moves a little, as under one optimizer step.
        spectrum = torch.cat([torch.linspace(0, 1, 299), torch.tensor([1.3])]).double()
        matrix = with_spectrum(spectrum)
        moved = matrix + 1e-3 * with_spectrum(spectrum, seed=1)
        cold = top_eigenpairs(DenseOperator(moved))
        last = top_eigenpairs(DenseOperator(matrix)).vectors[:, 0]
        warm = top_eigenpairs(DenseOperator(moved), start=last)
        assert warm.converged
        assert warm.num_products < 0.5 * cold.num_products
        torch.testing.assert_close(warm.values, cold.values, rtol=1e-3, atol=0)

    def test_settle_judges_one_end_and_reports_both(self):
        # The low end is a bulk edge, slow to come; the high end is an outlier.
        spectrum = torch.cat([torch.linspace(0, 1, 299), torch.tensor([8.0])]).double()
        operator = DenseOperator(with_spectrum(spectrum))
        both = top_eigenpairs(operator, which="both", tol=1e-4)
        high = top_eigenpairs(operator, which="both", tol=1e-4, settle="largest")
        low = top_eigenpairs(operator, which="both", tol=1e-4, settle="smallest")
        assert high.converged
        assert low.converged
        assert high.num_products < low.num_products <= both.num_products
        assert high.bounds[0] <= 1e-4 * 8 < high.bounds[1]
        assert both.bounds.max() <= 1e-4 * 8
        for pairs in (both, high, low):
            assert pairs.values.shape == (2,)
            assert_sound(pairs, with_spectrum(spectrum))

    def test_the_largest_is_settled_relative_to_itself(self):
        # Judged by the strongest curvature seen, a first guess of 0.1 would do.
        spectrum = torch.cat([torch.linspace(-60, 0, 299), torch.tensor([1.0])]).double()
        operator = DenseOperator(with_spectrum(spectrum))
        pairs = top_eigenpairs(operator, which="both", tol=0.1, settle="largest")
        assert pairs.converged
        assert pairs.values[0] == pytest.approx(1.0, rel=0.1)

    def test_too_few_steps_are_reported_not_hidden(self):
        matrix = with_spectrum(SPECTRA["flat"].double())
        pairs = top_eigenpairs(DenseOperator(matrix), tol=1e-6, max_steps=5)
        assert not pairs.converged
        assert pairs.num_products == 5
        assert pairs.bounds[0] > 1e-6 * 2
        assert_sound(pairs, matrix)

    def test_by_default_gives_up_after_200_steps(self):
        operator = DiagonalOperator(torch.linspace(0, 1, 5000, dtype=torch.float64))
        pairs = top_eigenpairs(operator, tol=1e-9)
        assert not pairs.converged
        assert pairs.num_products == MAX_STEPS == 200

    def test_all_eigenvalues_of_a_small_matrix(self):
        spectrum = torch.tensor([-2.0, 0.5, 1.0, 4.0], dtype=torch.float64)
        matrix = with_spectrum(spectrum)
        for which, k in (("largest", 4), ("smallest", 4), ("both", 2)):
            pairs = top_eigenpairs(DenseOperator(matrix), k, which=which)
            torch.testing.assert_close(pairs.values, spectrum.flip(0), rtol=0, atol=1e-12)

    def test_a_one_by_one_matrix(self):
        pairs = top_eigenpairs(DenseOperator(torch.tensor([[-3.0]])))
        assert pairs.values.tolist() == [-3.0]
        assert pairs.converged
        assert pairs.num_products == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_claims_no_more_than_its_arithmetic(self, dtype):
        pairs = top_eigenpairs(DenseOperator(3 * torch.eye(20, dtype=dtype)))
        assert pairs.vectors.dtype == dtype
        assert pairs.values.dtype == pairs.residuals.dtype == torch.float64
        assert pairs.residuals[0] == pytest.approx(3 * torch.finfo(dtype).eps, rel=1e-6)

    def test_float32_with_all_the_steps_there_are_has_converged(self):
        matrix = with_spectrum(torch.linspace(1, 2, 20).double())
        pairs = top_eigenpairs(DenseOperator(matrix.float()), tol=1e-12)
        assert pairs.converged
        assert pairs.num_products == 20
        assert pairs.values[0] == pytest.approx(2, rel=1e-5)

    def test_a_network_against_all_of_its_eigenvalues(self):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator("hessian")
        exact = torch.linalg.eigvalsh(operator @ torch.eye(problem.size, dtype=torch.float64))
        pairs = top_eigenpairs(operator, 5, which="both", tol=1e-8)
        expected = torch.cat([exact[-5:].flip(0), exact[:5].flip(0)])
        torch.testing.assert_close(pairs.values, expected, rtol=1e-6, atol=0)


def assert_sound(pairs, matrix):
    """Orthonormal vectors, residuals that bound the true ones, values near true eigenvalues."""
    exact = torch.linalg.eigvalsh(matrix)
    rounding = 1e-13 * float(exact.abs().max()) * math.sqrt(len(matrix))
    count = len(pairs.values)
    assert (pairs.values.diff() <= rounding).all()  # descending
    gram = pairs.vectors.T @ pairs.vectors
    assert (gram - torch.eye(count, dtype=gram.dtype)).abs().max() < 1e-10
    true_residuals = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert (true_residuals <= pairs.residuals + rounding).all()
    assert (pairs.bounds <= pairs.residuals).all()
    for value, bound in zip(pairs.values, pairs.bounds, strict=True):
        assert distance(value, exact) <= bound + rounding


class TestErrors:
    """`residual^2 / gap` against the true error."""

    @each_spectrum
    @pytest.mark.parametrize("which", ["largest", "both"])
    def test_errors_bound_the_distance_to_an_eigenvalue(self, spectrum, which):
        matrix = with_spectrum(spectrum)
        exact = torch.linalg.eigvalsh(matrix)
        rounding = 1e-13 * float(exact.abs().max()) * math.sqrt(SIZE)
        for tol in (1e-3, 1e-6):
            pairs = top_eigenpairs(DenseOperator(matrix), which=which, tol=tol)
            assert (pairs.errors <= pairs.bounds).all()
            for value, error in zip(pairs.values, pairs.errors, strict=True):
                assert distance(value, exact) <= error + rounding

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10_000), size=st.integers(20, 60), steps=st.integers(5, 15))
    def test_they_hold_for_an_end_that_stands_out(self, seed, size, steps):
        spectrum = torch.rand(size, dtype=torch.float64, generator=generator(seed))
        spectrum[0] = 1.5
        matrix = with_spectrum(spectrum, seed)
        pairs = top_eigenpairs(DenseOperator(matrix), tol=1e-12, max_steps=steps)
        assume(pairs.values[0] > 1 and pairs.residuals[0] < 0.2)  # before, it has found another
        assert 1.5 - pairs.values[0] <= pairs.errors[0] + 1e-13

    def test_vectors_may_be_left_out(self):
        operator = DenseOperator(with_spectrum(SPECTRA["step"].double()))
        bare = top_eigenpairs(operator, 2, with_vectors=False)
        assert bare.vectors.shape == (SIZE, 0)
        assert torch.equal(bare.values, top_eigenpairs(operator, 2).values)

    def test_judging_residuals_takes_more_products_and_gives_a_better_vector(self):
        spectrum = torch.cat([torch.linspace(0, 1, 499), torch.tensor([1.05])]).double()
        operator = DiagonalOperator(spectrum)
        bound = top_eigenpairs(operator, tol=1e-2)
        residual = top_eigenpairs(operator, tol=1e-2, criterion="residual")
        assert bound.converged
        assert bound.bounds[0] <= 1e-2 * bound.values[0] < bound.residuals[0]
        assert residual.residuals[0] <= 1e-2 * residual.values[0]
        assert bound.num_products < residual.num_products

    def test_judging_errors_takes_fewer_products(self):
        spectrum = torch.cat([torch.linspace(0, 1, 499), torch.tensor([1.5])]).double()
        operator = DiagonalOperator(spectrum)
        certified = top_eigenpairs(operator, tol=1e-6)
        estimated = top_eigenpairs(operator, tol=1e-6, criterion="error")
        assert estimated.converged
        assert estimated.num_products < 0.9 * certified.num_products
        assert abs(estimated.values[0] - 1.5) < 1e-6 * 1.5

    def test_a_gap_that_could_close_counts_for_nothing(self):
        """At the edge of a bulk the residuals of the last two values reach over each other."""
        operator = DiagonalOperator(torch.linspace(0, 1, 5000, dtype=torch.float64))
        pairs = top_eigenpairs(operator, tol=1e-9, max_steps=10)
        assert torch.equal(pairs.errors, pairs.bounds)


class TestDifficultSpectra:
    @pytest.mark.parametrize("which", ["largest", "both"])
    def test_a_cluster_at_the_edge(self, which):
        spectrum = torch.cat([torch.linspace(-1, 1, 180), 2 + 1e-4 * torch.arange(20)]).double()
        matrix = with_spectrum(spectrum)
        pairs = top_eigenpairs(DenseOperator(matrix), which=which, tol=1e-3)
        assert_sound(pairs, matrix)
        assert abs(pairs.values[0] - spectrum.max()) <= 2e-3 * 2

    def test_two_hundred_float32_steps_have_no_ghosts_and_stay_orthogonal(self):
        bulk = 0.01 * torch.randn(20_000, generator=generator())
        bulk[:10] = torch.linspace(50, 100, 10)
        t = lanczos(DiagonalOperator(bulk), 200)
        gram = t.basis @ t.basis.T
        assert (gram - torch.eye(200)).abs().max() < 1e-4
        values, _ = t.eigh()
        assert (values > 1).sum() == 10
        expected = torch.linspace(50, 100, 10).double()
        torch.testing.assert_close(values[-10:], expected, rtol=1e-5, atol=0)

    def test_the_algebraically_largest_not_the_largest_in_magnitude(self):
        spectrum = torch.linspace(-50, 3, SIZE, dtype=torch.float64)
        pairs = top_eigenpairs(DenseOperator(with_spectrum(spectrum)), tol=1e-6)
        assert pairs.values[0] == pytest.approx(3, abs=1e-4)

    @pytest.mark.parametrize("scale", [1e-7, 1e-20])
    def test_tiny_matrices_in_float32_against_scipy(self, scale):
        matrix = with_spectrum(torch.linspace(-3, 2, SIZE, dtype=torch.float64))
        single = (scale * matrix).float()
        pairs = top_eigenpairs(DenseOperator(single), which="both", tol=1e-4)
        exact = scipy.linalg.eigvalsh(single.double().numpy())[[-1, 0]]
        assert np.abs(pairs.values.numpy() - exact).max() < 1e-3 * 3 * scale

    def test_the_oracle_agrees_on_a_network(self):
        problem = CASES["mlp-relu"]()
        operator = problem.operator("hessian")
        exact = scipy.sparse.linalg.eigsh(
            operator.to_scipy(), k=2, which="LA", return_eigenvectors=False
        )
        pairs = top_eigenpairs(operator, 2, tol=1e-8)
        np.testing.assert_allclose(pairs.values.flip(0).numpy(), exact, rtol=1e-8)


class TestRestart:
    @pytest.mark.parametrize("which", ["largest", "smallest", "both"])
    @pytest.mark.parametrize("k", [1, 3])
    def test_a_short_basis_finds_the_same_pairs(self, which, k):
        spectrum = torch.cat(
            [torch.linspace(-1, 1, 294), torch.tensor([-4.0, -3, -2, 2, 3, 5])]
        ).double()
        matrix = with_spectrum(spectrum)
        options = {"k": k, "which": which, "tol": 1e-8}
        whole = top_eigenpairs(DenseOperator(matrix), **options)
        wanted = 2 * k if which == "both" else k
        short = top_eigenpairs(DenseOperator(matrix), max_basis=2 * wanted + 8, **options)
        assert short.converged
        assert short.num_products > 2 * wanted + 8  # it has restarted
        torch.testing.assert_close(short.values, whole.values, rtol=0, atol=1e-12)
        assert_sound(short, matrix)
        assert short.num_products < 2 * whole.num_products

    def test_products_are_counted_across_restarts(self):
        operator = DiagonalOperator(torch.linspace(0, 1, 2000, dtype=torch.float64))
        pairs = top_eigenpairs(operator, tol=1e-9, max_steps=50, max_basis=10)
        assert pairs.num_products == operator.num_products == 50
        assert not pairs.converged

    def test_a_small_budget_makes_it_restart(self):
        spectrum = torch.cat([torch.linspace(0, 1, 999), torch.tensor([1.25])]).double()
        operator = DiagonalOperator(spectrum)
        pairs = top_eigenpairs(operator, tol=1e-6, basis_budget=12 * 1000 * 8)
        assert pairs.converged
        assert pairs.num_products > 12
        assert pairs.values[0] == pytest.approx(1.25, rel=1e-9)

    @pytest.mark.parametrize("samples", [(3, 5, 2, 2, 1, 4, 3, 6, 2, 5)])
    def test_the_batches_own_matrices_survive_a_restart(self, samples):
        operator = batch_matrices(samples, size=60)
        pairs = top_eigenpairs(operator, tol=1e-12, max_basis=10, with_subspace=True)
        assert pairs.num_products > 10
        space = pairs.subspace
        dense = space.axes.T @ operator.matrices @ space.axes
        assert (space.matrices - dense).abs().max() < 1e-10 * operator.mean.norm()
        assert space.weights.sum() < 1 + 1e-12

    def test_copies_are_still_found_in_the_complement(self):
        matrix = with_spectrum(torch.tensor([5.0, 5.0, *[1.0] * 38], dtype=torch.float64))
        pairs = top_eigenpairs(DenseOperator(matrix), 2, max_basis=12)
        torch.testing.assert_close(pairs.values, torch.full((2,), 5.0).double())


class TestBasisForms:
    @pytest.mark.parametrize("form", ["device", "half", "cpu"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_form_finds_the_spectrum(self, form, dtype):
        bulk = 0.01 * torch.randn(5000, generator=generator(), dtype=torch.float64).to(dtype)
        bulk[:3] = torch.tensor([3.0, 5.0, 10.0])
        operator = DiagonalOperator(bulk)
        plain = lanczos(operator, 40).eigh()[0]
        t = lanczos(operator, 40, basis=form)
        # The worst case: an eigenvector in one entry, which float16 rounds to 5e-4.
        half = 3e-4 if dtype == torch.float32 else 1e-7
        loss = half if form == "half" else 1e-12
        assert (t.eigh()[0] - plain).abs().max() <= loss * 10
        assert (t.eigh()[0] > 1).sum() == 3  # no ghosts
        gram = t.basis.double() @ t.basis.double().T
        assert (gram - torch.eye(40).double()).abs().max() < (2e-3 if form == "half" else 1e-4)
        pairs = top_eigenpairs(operator, 2, basis=form, tol=1e-3, which="both")
        assert pairs.values[0] == pytest.approx(10, rel=5e-4 if form == "half" else 1e-4)

    def test_the_basis_can_be_left_behind(self):
        operator = DiagonalOperator(torch.linspace(0, 1, 100))
        kept, left = lanczos(operator, 10), lanczos(operator, 10, keep_basis=False)
        assert left.basis.shape == (0, 100)
        assert torch.equal(kept.diagonal, left.diagonal)
        assert torch.equal(kept.off_diagonal, left.off_diagonal)

    @pytest.mark.parametrize("run", [lanczos, top_eigenpairs])
    def test_what_does_not_fit_is_refused_before_any_product(self, run):
        operator = DiagonalOperator(torch.linspace(0, 1, 1000))
        options = {"num_steps": 30} if run is lanczos else {}
        words = r"does not fit \(device: .* of 9 kB; half: .* of 9 kB\)\. Ways out: fewer steps"
        with pytest.raises(MemoryError, match=words):
            run(operator, **options, basis_budget=9_000)
        assert operator.num_products == 0

    @pytest.mark.parametrize("run", [lanczos, top_eigenpairs])
    def test_unknown_forms(self, run):
        operator = DiagonalOperator(torch.linspace(0, 1, 10))
        options = {"num_steps": 3} if run is lanczos else {}
        with pytest.raises(ValueError, match=r"basis must be one of auto, .*, got 'disk'"):
            run(operator, **options, basis="disk")

    @pytest.mark.parametrize("fails", [False, True])
    def test_everything_is_freed_on_return_and_on_error(self, fails):
        freed = []

        class Watched(LinearOperator):
            def _multiply(self, columns):
                if fails and self.num_products == 5:
                    raise ArithmeticError
                product = torch.linspace(0, 1, 50).unsqueeze(1) * columns
                weakref.finalize(product, freed.append, 1)
                return product

        operator = Watched(50, dtype=torch.float32, device=torch.device("cpu"))
        with contextlib.suppress(ArithmeticError):
            top_eigenpairs(operator, tol=1e-9, max_steps=8)
        gc.collect()
        assert not [o for o in gc.get_objects() if type(o) is KrylovBasis]
        assert len(freed) == (4 if fails else 8)


class TestBothRefuse:
    @pytest.fixture(params=["lanczos", "top_eigenpairs"])
    def run(self, request):
        operator = DenseOperator(torch.eye(5, dtype=torch.float64))
        if request.param == "lanczos":
            return lambda start: lanczos(operator, 3, start=start)
        return lambda start: top_eigenpairs(operator, start=start)

    @pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
    def test_a_start_without_direction(self, run, bad):
        start = torch.zeros(5, dtype=torch.float64)
        start[2] = bad
        with pytest.raises(ValueError, match=r"finite, non-zero vector \(5,\), got shape \(5,\)"):
            run(start)

    def test_a_block_as_start(self, run):
        with pytest.raises(ValueError, match=r"non-zero vector \(5,\), got shape \(5, 2\)"):
            run(torch.ones(5, 2, dtype=torch.float64))

    def test_a_start_of_the_wrong_size(self, run):
        with pytest.raises(ValueError, match=r"expected a vector \(5,\).* got shape \(4,\)"):
            run(torch.ones(4, dtype=torch.float64))

    def test_a_start_of_the_wrong_dtype(self, run):
        with pytest.raises(ValueError, match=r"expected torch\.float64 on cpu, got torch\.float32"):
            run(torch.ones(5))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [(0, 0), (3, 4)])
    def test_matrices_that_are_not_finite(self, bad, place):
        matrix = torch.eye(5, dtype=torch.float64)
        matrix[place] = matrix[place[::-1]] = bad
        with pytest.raises(ArithmeticError, match="products are not finite: the model"):
            lanczos(DenseOperator(matrix), 3)
        for k in (1, 3):
            with pytest.raises(ArithmeticError, match="products are not finite: the model"):
                top_eigenpairs(DenseOperator(matrix), k)


class TestRefuses:
    def test_an_unknown_criterion(self):
        with pytest.raises(
            ValueError, match="criterion must be 'bound', 'residual' or 'error', got 'gap'"
        ):
            top_eigenpairs(DenseOperator(torch.eye(5)), criterion="gap")

    def test_a_basis_too_short_to_restart(self):
        operator = DiagonalOperator(torch.linspace(0, 1, 100))
        with pytest.raises(ValueError, match="max_basis must be at least 12 for 2 pairs, got 11"):
            top_eigenpairs(operator, which="both", max_basis=11)

    @pytest.mark.parametrize("num_steps", [0, -1, 6])
    def test_num_steps_out_of_range(self, num_steps):
        with pytest.raises(ValueError, match=rf"num_steps must lie in \[1, 5\], got {num_steps}"):
            lanczos(DenseOperator(torch.eye(5)), num_steps)

    @pytest.mark.parametrize(
        ("k", "which"), [(0, "largest"), (-1, "both"), (6, "largest"), (6, "smallest"), (3, "both")]
    )
    def test_more_pairs_than_there_are(self, k, which):
        words = rf"k = {k} pairs \({which}\) are not to be had from a \(5, 5\) matrix"
        with pytest.raises(ValueError, match=words):
            top_eigenpairs(DenseOperator(torch.eye(5)), k, which=which)

    @pytest.mark.parametrize("tol", [0.0, -1e-3, 1.0, math.nan])
    def test_tolerances_out_of_range(self, tol):
        with pytest.raises(ValueError, match=rf"tol must lie in \(0, 1\), got {tol}"):
            top_eigenpairs(DenseOperator(torch.eye(5)), tol=tol)

    @pytest.mark.parametrize("which", ["largest_magnitude", None])
    def test_unknown_ends(self, which):
        with pytest.raises(ValueError, match=f"'largest', 'smallest' or 'both', got {which!r}"):
            top_eigenpairs(DenseOperator(torch.eye(5)), which=which)

    @pytest.mark.parametrize("settle", ["top", "neither"])
    def test_unknown_ends_to_settle(self, settle):
        with pytest.raises(ValueError, match=f"settle must be .* got {settle!r}"):
            top_eigenpairs(DenseOperator(torch.eye(5)), which="both", settle=settle)

    @pytest.mark.parametrize(("which", "settle"), [("largest", "smallest"), ("smallest", "both")])
    def test_settling_an_end_that_is_not_wanted(self, which, settle):
        with pytest.raises(ValueError, match=f"settle must be .* got {settle!r}"):
            top_eigenpairs(DenseOperator(torch.eye(5)), which=which, settle=settle)

    @pytest.mark.parametrize(
        ("k", "which", "max_steps"), [(2, "largest", 1), (1, "both", 1), (1, "largest", 0)]
    )
    def test_fewer_steps_than_pairs(self, k, which, max_steps):
        with pytest.raises(ValueError, match=rf"max_steps must be at least .* got {max_steps}"):
            top_eigenpairs(DenseOperator(torch.eye(5)), k, which=which, max_steps=max_steps)

    def test_more_pairs_than_the_default_steps(self):
        with pytest.raises(ValueError, match=r"at least the 202 pairs asked for, got 200"):
            top_eigenpairs(DiagonalOperator(torch.ones(500)), 101, which="both")


def batch_matrices(samples=(3, 5, 2, 2, 1, 4, 3, 6, 2, 5), size=20, noise=0.3):
    """More batches than are held at a time, ragged, around a matrix with three outliers."""
    draws = torch.randn(len(samples), size, size, dtype=torch.float64, generator=generator(7))
    spectrum = torch.cat([torch.linspace(-1, 1, size - 3), torch.tensor([4.0, 6.0, 9.0])])
    noisy = with_spectrum(spectrum.double()) + noise * (draws + draws.transpose(1, 2)) / 2
    return BatchMatrices(noisy, samples)


class TestSubspace:
    OPTIONS = [  # noqa: RUF012  # not changed
        {"k": 1, "max_steps": 6},
        {"k": 2, "which": "both", "tol": 1e-6},
        {"k": 1, "max_steps": 20, "tol": 1e-14},
    ]

    @pytest.mark.parametrize("options", OPTIONS)
    def test_matrices_are_those_of_the_batches_on_orthonormal_axes(self, options):
        operator = batch_matrices()
        space = top_eigenpairs(operator, with_subspace=True, **options).subspace
        m = len(space.values)
        assert space.axes.shape == (20, m)
        identity = torch.eye(m, dtype=torch.float64)
        assert (space.axes.T @ space.axes - identity).abs().max() < 1e-12
        dense = space.axes.T @ operator.matrices @ space.axes
        assert (space.matrices - dense).abs().max() < 1e-11 * operator.mean.norm()

    @pytest.mark.parametrize("options", OPTIONS)
    def test_the_weighted_mean_of_the_matrices_is_diagonal(self, options):
        operator = batch_matrices()
        space = top_eigenpairs(operator, with_subspace=True, **options).subspace
        weights = torch.tensor(operator.samples) / sum(operator.samples)
        mean = torch.einsum("k,kij->ij", weights.double(), space.matrices)
        # The samples' shares are float32 here: 1e-7.
        assert (mean - torch.diag(space.values)).abs().max() < 1e-6 * operator.mean.norm()
        assert (space.values.diff() <= 0).all()

    @pytest.mark.parametrize("options", OPTIONS)
    def test_weights_are_the_overlaps_with_the_start(self, options):
        start = torch.randn(20, dtype=torch.float64, generator=generator(3))
        pairs = top_eigenpairs(batch_matrices(), start=start, with_subspace=True, **options)
        space = pairs.subspace
        assert space.weights.sum() == pytest.approx(1, rel=1e-12)
        overlaps = (space.axes.T @ (start / start.norm())).square()
        torch.testing.assert_close(space.weights, overlaps, rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_it_costs_no_product_and_changes_no_pair(self, options):
        plain, seen = batch_matrices(), batch_matrices()
        without = top_eigenpairs(plain, **options)
        with_it = top_eigenpairs(seen, with_subspace=True, **options)
        assert without.subspace is None
        assert with_it.num_products == without.num_products == plain.num_products
        assert seen.num_products == plain.num_products
        # The mean of products is not the product with the mean, by rounding.
        torch.testing.assert_close(with_it.values, without.values, rtol=1e-12, atol=1e-12)
        assert with_it.subspace.values[0] == pytest.approx(float(with_it.values[0]), rel=1e-12)

    def test_after_a_breakdown_it_holds_both_krylov_spaces(self):
        """A block matrix whose start sees one block; the larger eigenvalue lies in the other."""
        blocks = torch.zeros(4, 9, 9, dtype=torch.float64)
        draws = torch.randn(4, 9, 9, dtype=torch.float64, generator=generator(1))
        draws = (draws + draws.transpose(1, 2)) / 2
        blocks[:, :3, :3], blocks[:, 3:, 3:] = draws[:, :3, :3], draws[:, 3:, 3:]
        blocks[:, 8, 8] += 10
        operator = BatchMatrices(blocks, (2, 1, 3, 2))
        start = torch.zeros(9, dtype=torch.float64)
        start[:3] = torch.tensor([1.0, 2.0, -1.0])
        pairs = top_eigenpairs(operator, start=start, with_subspace=True, tol=1e-8)
        space = pairs.subspace
        assert len(space.values) > 3
        top = torch.linalg.eigvalsh(operator.mean)[-1]
        assert space.values[0] == pytest.approx(float(top), rel=1e-9)
        dense = space.axes.T @ operator.matrices @ space.axes
        assert (space.matrices - dense).abs().max() < 1e-10
        assert space.weights.sum() == pytest.approx(1, rel=1e-12)
        assert space.weights[0] < 1e-20  # the start does not see it

    def test_single_precision_is_single_in_the_axes_only(self):
        operator = batch_matrices()
        single = BatchMatrices(operator.matrices.float(), operator.samples)
        space = top_eigenpairs(single, with_subspace=True, max_steps=8).subspace
        assert space.axes.dtype == torch.float32
        assert space.matrices.dtype == space.values.dtype == space.weights.dtype == torch.float64
        dense = space.axes.T.double() @ operator.matrices @ space.axes.double()
        assert (space.matrices - dense).abs().max() < 1e-5 * operator.mean.norm()

    def test_an_operator_without_batches_is_refused(self):
        operator = DenseOperator(torch.eye(3, dtype=torch.float64))
        with pytest.raises(
            TypeError, match="with_subspace needs an operator of batches, got DenseOperator"
        ):
            top_eigenpairs(operator, with_subspace=True)


def test_a_product_that_is_the_vector_itself_leaves_the_basis_alone():
    class Identity(LinearOperator):
        def _multiply(self, columns):
            return columns

    size = 70_000  # long vectors are held as they are multiplied
    operator = Identity(size, dtype=torch.float32, device=torch.device("cpu"))
    start = torch.ones(size)
    t = lanczos(operator, 1, start=start)
    torch.testing.assert_close(t.basis[0], start / math.sqrt(size))
    assert float(t.diagonal[0]) == pytest.approx(1.0, rel=1e-5)  # equal numbers, summed in float32


# In print --------------------------------------------------------------------------------------


def test_eigenpairs_are_printed_with_their_errors_and_without_their_vectors():
    operator = DenseOperator(torch.diag(torch.arange(1000.0, dtype=torch.float64)))
    pairs = top_eigenpairs(operator, 2, max_steps=30)
    head, *lines = str(pairs).splitlines()
    assert head == "2 eigenvalues of 1000, 30 products, not converged"
    for line, value, bound, error in zip(
        lines, pairs.values, pairs.bounds, pairs.errors, strict=True
    ):
        assert line.split() == f"{value:.4g} within {bound:.2g}, error about {error:.2g}".split()
    assert len(repr(pairs)) < 500
    assert len(repr(lanczos(operator, 5))) < 500
