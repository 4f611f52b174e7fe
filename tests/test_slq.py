"""Spectral measures against exact moments, and their spread against the law of one probe."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from batchlr import DenseOperator, SpectralMeasure, lanczos, stochastic_lanczos_quadrature
from cases import CASES, DiagonalOperator

SIZE = 80


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(seed=0):
    numbers = generator(1000 + seed)  # the probes' own seed would make them part of the matrix
    matrix = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=numbers)
    return (matrix + matrix.T) / math.sqrt(8 * SIZE) + 0.3 * torch.eye(SIZE, dtype=torch.float64)


def spiked(size=3000):
    """Ten outliers from 5 to 60 on a bulk of standard deviation 0.02."""
    spectrum = 0.02 * torch.randn(size, dtype=torch.float64, generator=generator(1001))
    spectrum[:10] = torch.tensor([60, 40, 30, 20, 15, 12, 10, 8, 6, 5])
    return DiagonalOperator(spectrum)


def of_probe(measure, probe):
    """Nodes and weights of one probe, as a measure of its own."""
    chosen = measure.probes == probe
    return measure.nodes[chosen], measure.num_probes * measure.weights[chosen]


def probe_variance(spectrum):
    """Of ``z' A z`` for ``z`` uniform on the sphere."""
    p = len(spectrum)
    return 2 / (p * (p + 2)) * (spectrum.square().sum() - spectrum.sum() ** 2 / p)


class TestExactness:
    @pytest.mark.parametrize("num_steps", [1, 2, 5, 9])
    def test_moments_of_each_probe_up_to_degree_2m_minus_1(self, num_steps):
        matrix = symmetric()
        measure = stochastic_lanczos_quadrature(
            DenseOperator(matrix), num_steps=num_steps, num_probes=3, generator=generator(7)
        )
        again = generator(7)
        for probe in range(3):
            z = torch.randn(SIZE, dtype=torch.float64, generator=again)
            z = z / z.norm()
            nodes, weights = of_probe(measure, probe)
            assert len(nodes) == num_steps
            power = z
            for degree in range(2 * num_steps):
                moment = float(weights @ nodes**degree)
                assert moment == pytest.approx(float(z @ power), abs=1e-12)
                power = matrix @ power
            # The next degree is beyond the quadrature.
            assert abs(float(weights @ nodes ** (2 * num_steps)) - float(z @ power)) > 1e-8

    def test_the_whole_measure_of_one_probe_at_full_depth(self):
        matrix = symmetric()
        measure = stochastic_lanczos_quadrature(DenseOperator(matrix), num_steps=SIZE, num_probes=1)
        values, vectors = torch.linalg.eigh(matrix)
        z = torch.randn(SIZE, dtype=torch.float64, generator=generator())
        torch.testing.assert_close(measure.nodes, values, rtol=0, atol=1e-11)
        torch.testing.assert_close(
            measure.weights, (vectors.T @ (z / z.norm())).square(), rtol=0, atol=1e-9
        )

    def test_every_probe_knows_a_multiple_of_the_identity(self):
        operator = DenseOperator(2.5 * torch.eye(SIZE, dtype=torch.float64))
        measure = stochastic_lanczos_quadrature(operator, num_steps=10, num_probes=4)
        assert len(measure.nodes) == 4  # a breakdown ends a probe early
        assert measure.mean == pytest.approx(2.5, rel=1e-14)
        assert measure.second_moment == pytest.approx(6.25, rel=1e-14)
        assert measure.mean_stderr < 1e-14

    @given(num_steps=st.integers(1, 12), num_probes=st.integers(1, 4), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_is_a_probability_measure_inside_the_spectrum(self, num_steps, num_probes, seed):
        matrix = symmetric(seed)
        operator = DenseOperator(matrix)
        measure = stochastic_lanczos_quadrature(
            operator, num_steps=num_steps, num_probes=num_probes, generator=generator(seed)
        )
        assert (measure.weights >= 0).all()
        assert float(measure.weights.sum()) == pytest.approx(1, abs=1e-12)
        for probe in range(num_probes):
            assert float(of_probe(measure, probe)[1].sum()) == pytest.approx(1, abs=1e-12)
        values = torch.linalg.eigvalsh(matrix)
        assert measure.nodes.min() >= values[0] - 1e-12
        assert measure.nodes.max() <= values[-1] + 1e-12
        assert measure.num_probes == num_probes
        assert measure.num_products == operator.num_products == num_steps * num_probes


class TestEstimates:
    def test_moments_within_four_standard_errors(self):
        matrix = symmetric()
        measure = stochastic_lanczos_quadrature(DenseOperator(matrix), num_steps=3, num_probes=300)
        mean = float(matrix.trace()) / SIZE
        second = float(matrix.square().sum()) / SIZE
        assert abs(measure.mean - mean) < 4 * measure.mean_stderr
        assert abs(measure.second_moment - second) < 4 * measure.second_moment_stderr
        assert measure.mean_stderr < 0.02
        assert measure.second_moment_stderr < 0.02

    def test_spread_of_probes_follows_the_law_of_the_sphere(self):
        matrix = symmetric()
        values = torch.linalg.eigvalsh(matrix)
        measure = stochastic_lanczos_quadrature(DenseOperator(matrix), num_steps=2, num_probes=1000)
        # 1000 nearly Gaussian samples know their standard deviation to 2.2%: four times that.
        for stderr, spectrum in (
            (measure.mean_stderr, values),
            (measure.second_moment_stderr, values**2),
        ):
            theory = math.sqrt(probe_variance(spectrum) / 1000)
            assert stderr == pytest.approx(theory, rel=0.09)

    def test_one_probe_is_far_off_for_a_spiked_trace(self):
        operator = spiked()
        measure = stochastic_lanczos_quadrature(operator, num_steps=2, num_probes=400)
        spread = measure.mean_stderr * math.sqrt(400) / float(operator.diagonal.mean())
        theory = math.sqrt(2) * operator.diagonal.norm() / operator.diagonal.sum()
        assert theory == pytest.approx(0.57, abs=0.01)
        assert spread == pytest.approx(float(theory), rel=0.15)  # heavier tails than Gaussian

    def test_outliers_are_found_to_rounding_in_as_many_steps(self):
        operator = spiked()
        errors = {}
        for num_steps in (5, 10, 20):
            measure = stochastic_lanczos_quadrature(operator, num_steps=num_steps, num_probes=1)
            errors[num_steps] = abs(float(measure.nodes.max()) / 60 - 1)
            assert float(measure.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert errors[5] < 3e-3
        assert errors[10] < 1e-11
        # All ten are resolved by twice as many steps.
        outliers = measure.nodes[measure.nodes > 1].flip(0)
        torch.testing.assert_close(outliers, operator.diagonal[:10], rtol=1e-9, atol=0)

    def test_weight_of_an_outlier_varies_by_sqrt_2_from_probe_to_probe(self):
        operator = spiked()
        measure = stochastic_lanczos_quadrature(operator, num_steps=12, num_probes=200)
        top = torch.stack([of_probe(measure, k)[1][-1] for k in range(200)])
        assert float(top.mean()) == pytest.approx(1 / 3000, rel=0.4)  # 4 standard errors
        assert float(top.std() / top.mean()) == pytest.approx(math.sqrt(2), rel=0.3)

    def test_mean_of_a_networks_hessian(self):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator("hessian")
        trace = (operator @ torch.eye(problem.size, dtype=torch.float64)).trace()
        measure = stochastic_lanczos_quadrature(operator, num_steps=3, num_probes=30)
        assert abs(measure.mean - float(trace) / problem.size) < 4 * measure.mean_stderr


class TestStandardErrors:
    def test_are_those_of_the_mean_over_probes(self):
        measure = stochastic_lanczos_quadrature(
            DenseOperator(symmetric()), num_steps=4, num_probes=5
        )
        means = torch.stack([w @ n for n, w in (of_probe(measure, k) for k in range(5))])
        assert measure.mean == pytest.approx(float(means.mean()), rel=1e-12)
        assert measure.mean_stderr == pytest.approx(float(means.std()) / math.sqrt(5), rel=1e-12)

    def test_are_unknown_for_one_probe(self):
        measure = stochastic_lanczos_quadrature(
            DenseOperator(symmetric()), num_steps=4, num_probes=1
        )
        assert math.isnan(measure.mean_stderr)
        assert math.isnan(measure.second_moment_stderr)
        stderr = measure.density_stderr(torch.linspace(-1, 1, 7), 0.1)
        assert stderr.shape == (7,)
        assert stderr.isnan().all()

    def test_of_the_density(self):
        operator, grid = DenseOperator(symmetric()), torch.linspace(-1, 2, 9)
        measure = stochastic_lanczos_quadrature(operator, num_steps=4, num_probes=3)
        curves = []
        for probe in range(3):
            nodes, weights = of_probe(measure, probe)
            alone = SpectralMeasure(nodes, weights, torch.zeros_like(nodes, dtype=torch.int64), 4)
            curves.append(alone.density(grid, 0.2))
        curves = torch.stack(curves)
        torch.testing.assert_close(measure.density(grid, 0.2), curves.mean(0))
        expected = curves.std(0) / math.sqrt(3)
        torch.testing.assert_close(measure.density_stderr(grid, 0.2), expected)


class TestOutliers:
    def test_each_is_found_with_its_place_and_the_doubt_about_its_weight(self):
        operator = spiked()
        measure = stochastic_lanczos_quadrature(operator, num_steps=25, num_probes=40)
        found = measure.outliers()
        assert len(found) >= 10
        for outlier, exact in zip(found, operator.diagonal[:10].tolist(), strict=False):
            assert outlier.value == pytest.approx(exact, rel=1e-6)
            assert abs(outlier.weight - 1 / 3000) < 4 * outlier.weight.stderr
            assert outlier.weight.stderr >= math.sqrt(2 / 40) * outlier.weight
        assert any(outlier.reliable for outlier in found[:10])

    def test_one_probe_is_flagged_and_has_an_error_all_the_same(self):
        measure = stochastic_lanczos_quadrature(spiked(), num_steps=25, num_probes=1)
        found = measure.outliers()
        assert len(found) >= 10
        for outlier in found:
            assert not outlier.reliable
            assert outlier.weight.stderr == pytest.approx(math.sqrt(2) * outlier.weight)
            assert math.isnan(outlier.value.stderr)

    def test_the_other_end_has_its_own(self):
        operator = spiked()
        operator.diagonal[20] = -7
        measure = stochastic_lanczos_quadrature(operator, num_steps=25, num_probes=3)
        assert measure.outliers("smallest")[0].value == pytest.approx(-7, rel=1e-6)

    def test_a_bulk_is_none(self):
        operator = DiagonalOperator(torch.ones(500, dtype=torch.float64))
        measure = stochastic_lanczos_quadrature(operator, num_steps=5, num_probes=2)
        assert measure.outliers() == ()

    def test_refusals(self):
        measure = stochastic_lanczos_quadrature(spiked(), num_steps=2, num_probes=1)
        with pytest.raises(ValueError, match="end must be 'largest' or 'smallest', got 'top'"):
            measure.outliers("top")
        alone = SpectralMeasure(measure.nodes, measure.weights, measure.probes, 2)
        with pytest.raises(ValueError, match="outliers need to know P"):
            alone.outliers()


class TestFixedNode:
    def test_a_node_lies_there_and_moments_stay_exact(self):
        matrix = symmetric()
        options = {"num_steps": 6, "num_probes": 1}
        fixed = 0
        for seed in range(20):
            plain, radau = (
                stochastic_lanczos_quadrature(
                    DenseOperator(matrix), fixed_node=node, generator=generator(seed), **options
                )
                for node in (None, 0.3)
            )
            if len(radau.nodes) == 7:  # else a node had to be left out, or the fixed one given up
                fixed += 1
                assert float((radau.nodes - 0.3).abs().min()) < 1e-12
                for degree in range(12):
                    moments = [float(m.weights @ m.nodes**degree) for m in (plain, radau)]
                    assert moments[1] == pytest.approx(moments[0], abs=1e-12)
        assert fixed >= 5

    def test_a_network_like_spectrum_is_met_closer(self):
        numbers = torch.randn(2000, dtype=torch.float64, generator=generator(1002))
        spectrum = 0.1 * numbers**5
        errors = []
        for seed in range(20):
            measures = [
                stochastic_lanczos_quadrature(
                    DiagonalOperator(spectrum),
                    num_steps=16,
                    num_probes=1,
                    fixed_node=node,
                    generator=generator(seed),
                )
                for node in (None, 0.0)
            ]
            assert float(measures[1].nodes.abs().min()) < 1e-12
            errors.append(
                [wasserstein_distance(spectrum, m.nodes, None, m.weights) for m in measures]
            )
        plain, fixed = (sum(column) for column in zip(*errors, strict=True))
        assert fixed < plain

    def test_residuals_are_those_of_the_vectors(self):
        matrix = symmetric()
        start = torch.randn(SIZE, dtype=torch.float64, generator=generator(3))
        tridiagonal = lanczos(DenseOperator(matrix), 6, start=start)
        fixed = stochastic_lanczos_quadrature(
            DenseOperator(matrix), num_steps=6, num_probes=1, fixed_node=0.1, generator=generator(3)
        )
        # The null vector of the first rows of (T - node, beta e_m) is the Ritz vector's direction.
        small = torch.diag(tridiagonal.diagonal)
        small += torch.diag(tridiagonal.off_diagonal, 1) + torch.diag(tridiagonal.off_diagonal, -1)
        for node, residual in zip(fixed.nodes, fixed.residuals, strict=True):
            inside = torch.linalg.svd((small - node * torch.eye(6, dtype=torch.float64))[:-1])[2][
                -1
            ]
            vector = tridiagonal.basis.T @ inside
            exact = (matrix @ vector - node * vector).norm()
            assert float(residual) == pytest.approx(float(exact), rel=1e-8)

    def test_nothing_lies_beyond_what_lanczos_has_seen(self):
        spectrum = torch.linspace(-1, 1, 1001, dtype=torch.float64)
        for seed in range(40):
            measure = stochastic_lanczos_quadrature(
                DiagonalOperator(spectrum),
                num_steps=9,
                num_probes=1,
                fixed_node=0.0,
                generator=generator(seed),
            )
            assert float(measure.nodes.abs().max()) < 1.2
            assert float(measure.weights.sum()) == pytest.approx(1)

    def test_a_definite_matrix_gets_none_at_zero(self):
        operator = DiagonalOperator(torch.linspace(1, 2, 500, dtype=torch.float64))
        plain, fixed = (
            stochastic_lanczos_quadrature(operator, num_steps=6, num_probes=2, fixed_node=node)
            for node in (None, 0.0)
        )
        torch.testing.assert_close(fixed.nodes, plain.nodes, rtol=0, atol=0)
        torch.testing.assert_close(fixed.weights, plain.weights, rtol=0, atol=0)

    def test_a_space_that_closes_needs_none(self):
        operator = DiagonalOperator(torch.tensor([1.0, 2, 3], dtype=torch.float64))
        measure = stochastic_lanczos_quadrature(operator, num_steps=3, num_probes=1, fixed_node=0.0)
        torch.testing.assert_close(measure.nodes, operator.diagonal)


class TestSettledWeights:
    def test_isolated_eigenvalues_weigh_one_each(self):
        operator = spiked()
        measure = stochastic_lanczos_quadrature(operator, num_steps=25, num_probes=3).settled()
        for probe in range(3):
            nodes, weights = of_probe(measure, probe)
            top = nodes.argsort(descending=True)[:10]
            torch.testing.assert_close(nodes[top], operator.diagonal[:10], rtol=1e-6, atol=0)
            torch.testing.assert_close(weights[top] * 3000, torch.ones_like(weights[top]))
            assert float(weights.sum()) == pytest.approx(1)
        assert measure.num_products == 75

    def test_moments_of_one_probe_come_close(self):
        operator = spiked()
        exact = float(operator.diagonal.mean())
        errors = []
        for seed in range(20):
            measure = stochastic_lanczos_quadrature(
                operator, num_steps=25, num_probes=1, generator=generator(seed)
            )
            errors.append((abs(measure.mean - exact), abs(measure.settled().mean - exact)))
        plain, settled = (sum(column) for column in zip(*errors, strict=True))
        assert settled < plain / 20  # the bulk's own scatter is left: 0.02 of 20, measured 1/60

    def test_a_bulk_is_left_alone(self):
        spectrum = torch.linspace(-1, 1, 3000, dtype=torch.float64)
        operator = DiagonalOperator(spectrum)
        measure = stochastic_lanczos_quadrature(operator, num_steps=10, num_probes=2)
        torch.testing.assert_close(measure.settled().weights, measure.weights)

    def test_a_space_that_closes_on_many_copies_is_left_alone(self):
        spectrum = torch.tensor([1.0, 2, 3], dtype=torch.float64).repeat_interleave(4)
        operator = DiagonalOperator(spectrum)
        measure = stochastic_lanczos_quadrature(operator, num_steps=3, num_probes=1)
        torch.testing.assert_close(measure.settled().weights, measure.weights)

    def test_it_needs_residuals(self):
        measure = stochastic_lanczos_quadrature(spiked(), num_steps=2, num_probes=1)
        bare = dataclasses.replace(measure, residuals=None)
        with pytest.raises(ValueError, match="settled weights need to know P and residuals"):
            bare.settled()


class TestMemory:
    @pytest.mark.parametrize("basis", ["half", "cpu"])
    def test_moments_do_not_depend_on_where_the_basis_is(self, basis):
        operator = DenseOperator(symmetric())
        options = {"num_steps": 10, "num_probes": 2}
        plain = stochastic_lanczos_quadrature(operator, **options)
        other = stochastic_lanczos_quadrature(operator, basis=basis, **options)
        assert other.second_moment == pytest.approx(plain.second_moment, rel=1e-6)

    def test_a_basis_that_does_not_fit_is_refused(self):
        operator = DenseOperator(symmetric())
        with pytest.raises(MemoryError, match="Krylov basis of 10 vectors of 80 numbers does not"):
            stochastic_lanczos_quadrature(
                operator, num_steps=10, num_probes=2, basis="device", basis_budget=6399
            )
        assert operator.num_products == 0


class TestDensity:
    @pytest.fixture
    def measure(self):
        return stochastic_lanczos_quadrature(DenseOperator(symmetric()), num_steps=10, num_probes=3)

    @pytest.mark.parametrize("bandwidth", [0.02, 0.3])
    def test_broadening_keeps_mass_and_mean_and_adds_to_the_second_moment(self, measure, bandwidth):
        grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
        density = measure.density(grid, bandwidth)
        assert (density >= 0).all()
        moments = [float(torch.trapezoid(density * grid**k, grid)) for k in range(3)]
        assert moments[0] == pytest.approx(1, abs=1e-9)
        assert moments[1] == pytest.approx(measure.mean, abs=1e-9)
        assert moments[2] == pytest.approx(measure.second_moment + bandwidth**2, abs=1e-9)

    def test_follows_a_semicircle(self):
        # A Gaussian symmetric matrix of radius 1 about 0.3; ten nodes and width 0.1 blur it.
        matrix = symmetric()
        grid = torch.linspace(-0.2, 0.8, 11, dtype=torch.float64)
        measure = stochastic_lanczos_quadrature(DenseOperator(matrix), num_steps=30, num_probes=20)
        semicircle = 2 / math.pi * (1 - (grid - 0.3) ** 2).sqrt()
        assert (measure.density(grid, 0.1) - semicircle).abs().max() < 0.1

    def test_takes_a_grid_of_any_dtype(self, measure):
        density = measure.density(torch.arange(-1, 2), 0.5)
        assert density.dtype == torch.float64
        torch.testing.assert_close(density, measure.density(torch.arange(-1.0, 2.0), 0.5))

    @pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
    def test_refuses_bandwidths_that_are_not_positive(self, measure, bandwidth):
        for method in (measure.density, measure.density_stderr):
            with pytest.raises(
                ValueError, match=f"bandwidth must be positive and finite, got {bandwidth}"
            ):
                method(torch.zeros(1), bandwidth)


class TestRandomness:
    def test_same_generator_same_measure_and_no_other_randomness(self):
        operator = DenseOperator(symmetric())
        before = torch.get_rng_state()

        def run(seed):
            g = None if seed is None else generator(seed)
            return stochastic_lanczos_quadrature(operator, num_steps=3, num_probes=2, generator=g)

        assert torch.equal(run(5).nodes, run(5).nodes)
        assert torch.equal(run(None).nodes, run(0).nodes)
        assert not torch.equal(run(5).nodes, run(6).nodes)
        assert torch.equal(torch.get_rng_state(), before)

    def test_products_spent_before_are_not_counted(self):
        operator = DenseOperator(symmetric())
        for _ in range(2):
            measure = stochastic_lanczos_quadrature(operator, num_steps=3, num_probes=2)
            assert measure.num_products == 6

    def test_probes_differ(self):
        measure = stochastic_lanczos_quadrature(
            DenseOperator(symmetric()), num_steps=3, num_probes=2
        )
        assert not torch.equal(of_probe(measure, 0)[0], of_probe(measure, 1)[0])


class TestRefuses:
    @pytest.mark.parametrize("num_steps", [0, SIZE + 1])
    def test_num_steps_out_of_range(self, num_steps):
        with pytest.raises(ValueError, match=rf"num_steps must lie in \[1, 80\], got {num_steps}"):
            stochastic_lanczos_quadrature(
                DenseOperator(symmetric()), num_steps=num_steps, num_probes=1
            )

    @pytest.mark.parametrize("num_probes", [0, -2])
    def test_too_few_probes(self, num_probes):
        with pytest.raises(ValueError, match=f"num_probes must be at least 1, got {num_probes}"):
            stochastic_lanczos_quadrature(
                DenseOperator(symmetric()), num_steps=3, num_probes=num_probes
            )

    def test_products_that_are_not_finite(self):
        matrix = symmetric()
        matrix[0, 0] = math.nan
        with pytest.raises(ArithmeticError, match="products are not finite"):
            stochastic_lanczos_quadrature(DenseOperator(matrix), num_steps=3, num_probes=1)


# In print --------------------------------------------------------------------------------------


def test_a_measure_is_printed_by_its_ends_and_moments():
    measure = SpectralMeasure(
        nodes=torch.tensor([-1.0, 3.0, -1.0, 3.0], dtype=torch.float64),
        weights=torch.full((4,), 0.25, dtype=torch.float64),
        probes=torch.tensor([0, 0, 1, 1]),
        num_products=4,
        size=7,
    )
    assert str(measure) == (
        "spectrum of 7 eigenvalues: from -1 to 3, mean 1 +- 0, mean square 5 +- 0; "
        "4 nodes of 2 probes, 4 products"
    )
    assert str(dataclasses.replace(measure, size=None)).startswith("spectrum: from -1 to 3")
    assert "tensor" not in repr(measure)
