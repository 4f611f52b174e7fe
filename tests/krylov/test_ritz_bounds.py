"""Bounds of eigenvalues, against the eigenvalues of dense matrices and a singular value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlr.krylov.ritz_bounds import certified_bounds, likely_errors


def generator(seed):
    return torch.Generator().manual_seed(seed)


def krylov(spectrum, steps, seed):
    """Ritz values and residuals of ``steps`` steps on ``diag(spectrum)``, in float64 throughout."""
    size = len(spectrum)
    rows = torch.randn(1, size, dtype=torch.float64, generator=generator(seed))
    rows /= rows.norm()
    for _ in range(steps):
        new = spectrum * rows[-1]
        for _ in range(3):
            new = new - rows.T @ (rows @ new)
        rows = torch.cat([rows, (new / new.norm())[None]])
    small = rows[:-1] @ (spectrum[:, None] * rows[:-1].T)
    values, turn = torch.linalg.eigh(small)
    vectors = rows[:-1].T @ turn
    residuals = (spectrum[:, None] * vectors - vectors * values).norm(dim=0)
    return values, residuals


def random_spectrum(size, seed):
    spectrum = torch.randn(size, dtype=torch.float64, generator=generator(seed)) ** 3
    return spectrum.sort().values


class TestCertifiedBounds:
    @settings(max_examples=100, deadline=None)
    @given(seed=st.integers(0, 10_000), size=st.integers(12, 80), steps=st.integers(1, 11))
    @pytest.mark.parametrize("end", ["largest", "smallest"])
    def test_an_eigenvalue_lies_within_each(self, seed, size, steps, end):
        spectrum = random_spectrum(size, seed)
        values, residuals = krylov(spectrum, steps, seed + 1)
        bounds = certified_bounds(values, residuals, end=end)
        assert (bounds <= residuals).all()
        for value, bound in zip(values, bounds, strict=True):
            assert (spectrum - value).abs().min() <= bound + 1e-10

    @settings(max_examples=100, deadline=None)
    @given(seed=st.integers(0, 10_000), steps=st.integers(2, 20))
    def test_the_edge_s_is_next_to_the_best_the_space_can_say(self, seed, steps):
        values, residuals = krylov(random_spectrum(80, seed), steps, seed + 1)
        bound = certified_bounds(values, residuals)[-1]
        matrix = torch.cat([torch.diag(values - values[-1]), residuals[None]])
        best = torch.linalg.svdvals(matrix)[-1]
        assert bound >= best - 1e-13 * values.abs().max()  # what the singular value is good to
        if bound < 0.1 * (values[-1] - values[-2]):
            assert bound <= 1.01 * best + 1e-13 * values.abs().max()

    def test_beside_a_bulk_it_is_well_below_the_residual(self):
        spectrum = torch.cat([torch.linspace(0, 1, 399), torch.tensor([1.05])]).double()
        values, residuals = krylov(spectrum, 12, 0)
        bound = certified_bounds(values, residuals)[-1]
        assert (spectrum - values[-1]).abs().min() <= bound < 0.8 * residuals[-1]

    def test_a_second_value_is_not_certified_by_the_first(self):
        """The first has come to rest at 3; a second one next to it is still on its way."""
        values = torch.tensor([0.0, 2.99, 3.0], dtype=torch.float64)
        residuals = torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64)
        bounds = certified_bounds(values, residuals)
        assert bounds[1] == pytest.approx(0.5)  # not the 0.01 to the first
        mirrored = certified_bounds(-values.flip(0), residuals.flip(0), end="smallest")
        torch.testing.assert_close(mirrored.flip(0), bounds)

    def test_equal_values_do_not_divide_by_zero(self):
        values = torch.ones(3, dtype=torch.float64)
        residuals = torch.tensor([0.0, 0.0, 1e-3], dtype=torch.float64)
        bounds = certified_bounds(values, residuals, rounding=1e-12)
        assert bounds.tolist() == [0.0, 0.0, 1e-3]


class TestLikelyErrors:
    def test_kato_temple(self):
        values = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
        residuals = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
        expected = [0.01 / 0.8, 0.04 / 0.9, 0.09 / 1.8]
        assert likely_errors(values, residuals).tolist() == pytest.approx(expected)

    def test_a_gap_below_the_residual_says_nothing(self):
        values = torch.tensor([0.0, 0.1], dtype=torch.float64)
        residuals = torch.tensor([0.2, 0.3], dtype=torch.float64)
        assert torch.equal(likely_errors(values, residuals), residuals)

    def test_a_single_value_has_no_gap(self):
        residuals = torch.tensor([0.2], dtype=torch.float64)
        assert torch.equal(likely_errors(torch.ones(1).double(), residuals), residuals)
