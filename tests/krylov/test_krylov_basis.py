"""A basis read in the ways its users read it, whatever form it is held in."""

import pytest
import torch

from batchlr.krylov.krylov_basis import KrylovBasis

SIZE = 70_000  # more than one part


def orthonormal(count):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(SIZE, count, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(rows).Q.T.contiguous()


@pytest.mark.parametrize("form", ["device", "half", "cpu"])
def test_vectors_and_parts_are_the_whole(form):
    rows = orthonormal(20)
    basis = KrylovBasis(
        SIZE, 20, form=form, dtype=torch.float64, device=torch.device("cpu"), at_once=False
    )
    for row in rows:
        basis.append(row)
    tolerance = 1e-9 if form == "half" else 0.0  # float32, scaled to entries of one
    for index in (0, 7, -1):
        torch.testing.assert_close(basis.vector(index), rows[index], rtol=0, atol=tolerance)
    pieces = list(basis.parts())
    assert len(pieces) == 2
    torch.testing.assert_close(torch.cat([p for _, p in pieces], 1), rows, rtol=0, atol=tolerance)
    for part, piece in pieces:
        assert piece.shape[1] == len(range(SIZE)[part])


@pytest.mark.parametrize("form", ["device", "half", "cpu"])
def test_a_vector_is_scaled_on_its_way_in(form):
    rows = orthonormal(2)
    basis = KrylovBasis(SIZE, 2, form=form, dtype=torch.float64, device=torch.device("cpu"))
    basis.append(rows[0])
    tolerance = 1e-9 if form == "half" else 1e-16
    held = basis.append(8 * rows[1], torch.tensor(0.125, dtype=torch.float64))
    torch.testing.assert_close(held, rows[1], rtol=0, atol=0)
    torch.testing.assert_close(basis.vector(1), rows[1], rtol=0, atol=tolerance)


def test_no_vector_beyond_the_last():
    with pytest.raises(IndexError):
        KrylovBasis.of(orthonormal(2)).vector(2)


def test_a_basis_of_rows_does_not_copy_them():
    rows = orthonormal(3)
    basis = KrylovBasis.of(rows)
    assert basis.count == 3
    assert basis.tensor().data_ptr() == basis.vector(0).data_ptr() == rows.data_ptr()
    combined = basis.combine(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    found = basis.project(combined)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
