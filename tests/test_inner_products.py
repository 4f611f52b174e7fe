"""Inner products of vectors so long that a float32 sum would lose what comes late."""

import pytest
import torch

from batchlr.inner_products import PART, dot, dots, norm

LONG = 3 * PART + 17


@pytest.fixture
def early_and_late():
    """One large entry first, then very many that are lost beside it, one by one, in float32."""
    vector = torch.full((LONG,), 2e-4)
    vector[0] = 1.0
    return vector


def test_what_comes_late_counts(early_and_late):
    exact = 1 + (LONG - 1) * float(early_and_late[1]) ** 2
    assert float(dot(early_and_late, early_and_late)) == pytest.approx(exact, rel=1e-4)
    assert float(norm(early_and_late)) == pytest.approx(exact**0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_any_shape_and_type_are_summed_in_more(dtype):
    matrix = torch.full((300, 300), 1.5).to(dtype)
    found = norm(matrix.T[:, :200])
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(1.5 * (300 * 200) ** 0.5, rel=1e-7)


def test_the_norm_of_complex_numbers_is_that_of_both_parts():
    pair = torch.tensor([3 + 4j, 12j])
    assert float(norm(pair)) == float(norm(pair.conj())) == 13


@pytest.mark.parametrize("size", [PART, LONG])
@pytest.mark.parametrize("unit", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_squares_beyond_the_range_of_float32(size, unit):
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for found in (norm(unit * vector), dot(unit * vector, unit * vector).sqrt()):
        assert float(found) / unit == pytest.approx(float(norm(vector)), rel=1e-6)
    assert dot(unit * vector, torch.zeros(size)) == 0


@pytest.mark.parametrize("size", [1, 5, PART, PART + 1, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_float64(size, dtype):
    generator = torch.Generator().manual_seed(size)
    left, right = torch.randn(2, size, generator=generator, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    scale = float(left.double().norm() * right.double().norm())
    exact = torch.dot(left.double(), right.double())
    assert dot(left, right).dtype == torch.float64
    assert abs(float(dot(left, right) - exact)) <= tolerance * scale
    assert abs(float(dots(left.unsqueeze(0), right)[0] - exact)) <= tolerance * scale


@pytest.mark.parametrize("shape", [(LONG,), (LONG, 3)])
def test_rows_with_a_vector_or_a_block(shape):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, LONG, generator=generator)
    vectors = torch.randn(shape, generator=generator)
    found = dots(rows, vectors)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, rows.double() @ vectors.double(), rtol=0, atol=0.05)


def test_rows_keep_what_comes_late(early_and_late):
    exact = 1 + (LONG - 1) * float(early_and_late[1]) ** 2
    found = dots(early_and_late.unsqueeze(0), early_and_late)
    assert float(found[0]) == pytest.approx(exact, rel=1e-4)
