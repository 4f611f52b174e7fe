"""The recurrence with restarts and by batch, against the dense matrices."""

import math

import pytest
import torch

from batchlr import DenseOperator
from batchlr.krylov.lanczos_process import LanczosProcess
from cases import BatchMatrices
from test_lanczos import generator, with_spectrum

SIZE = 30
SPECTRUM = torch.cat([torch.linspace(-1, 1, SIZE - 2), torch.tensor([-7.0, 9.0])]).double()


def unit(size=SIZE, seed=0):
    vector = torch.randn(size, dtype=torch.float64, generator=generator(seed))
    return vector / vector.norm()


def grown(operator, steps, start=None, *, restarts=(), **options):
    """A process of so many steps, cut to the pairs of ``restarts`` each time it is full."""
    process = LanczosProcess(
        operator, options.pop("capacity", steps), unit() if start is None else start, **options
    )
    for _ in range(steps):
        process.advance()
    for kept in restarts:
        process.restart(kept)
        while process.count < process.capacity:
            process.advance()
    return process


def batch_matrices(count=5):
    draws = torch.randn(count, SIZE, SIZE, dtype=torch.float64, generator=generator(1))
    return with_spectrum(SPECTRUM) + draws + draws.transpose(1, 2)


KEPT = [
    (),
    ({"largest": 3},),
    ({"largest": 4}, {"largest": 2}),
    ({"largest": 2, "smallest": 2},) * 3,
]


@pytest.mark.parametrize("restarts", KEPT)
def test_the_relation_holds_whatever_was_cut(restarts):
    """``A Q' = Q' T + residual next e_m'``, with orthonormal rows."""
    matrix = with_spectrum(SPECTRUM)
    process = grown(DenseOperator(matrix), 10, restarts=restarts)
    basis = process.basis.tensor()
    assert process.count == 10
    identity = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis @ matrix @ basis.T, process.matrix, rtol=0, atol=1e-11)
    remainder = matrix @ basis.T - basis.T @ process.matrix
    assert remainder[:, :-1].abs().max() < 1e-11
    assert float(remainder[:, -1].norm()) == pytest.approx(float(process.residual))
    assert not process.settle()


def test_a_product_a_step_and_none_for_a_restart():
    operator = DenseOperator(with_spectrum(SPECTRUM))
    process = grown(operator, 10, restarts=({"largest": 3},))
    assert process.num_products == operator.num_products == 10 + 7


def test_restarts_find_what_the_first_space_had_not():
    operator = DenseOperator(with_spectrum(SPECTRUM))
    ends = torch.tensor([-7.0, 9.0], dtype=torch.float64)
    few, more = (
        grown(operator, 4, restarts=({"largest": 1, "smallest": 1},) * n).eigh()[0] for n in (0, 9)
    )
    assert (few[[0, -1]] - ends).abs().min() > 1e-4
    torch.testing.assert_close(more[[0, -1]], ends)


@pytest.mark.parametrize("restarts", KEPT)
@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("samples", [(1, 1, 1, 1, 1), (3, 1, 4, 1, 5)])
def test_a_subspace_has_every_batch_s_matrix_on_its_axes(restarts, block, samples):
    matrices = batch_matrices()
    operator = BatchMatrices(matrices, samples)
    space = grown(operator, 8, restarts=restarts, by_batch=True, block=block).subspace()
    axes = space.axes
    torch.testing.assert_close(axes.T @ matrices @ axes, space.matrices, rtol=0, atol=1e-11)
    assert (space.values.diff() <= 0).all()
    ritz = torch.linalg.eigvalsh(axes.T @ operator.mean @ axes).flip(0)
    torch.testing.assert_close(space.values, ritz, rtol=0, atol=1e-11)
    weights = torch.tensor(samples, dtype=torch.float64) / sum(samples)
    mean = torch.einsum("k,kij->ij", weights, space.matrices)
    torch.testing.assert_close(mean, torch.diag(space.values), rtol=0, atol=1e-11)


@pytest.mark.parametrize("restarts", KEPT)
def test_weights_are_of_what_restarts_have_left_of_the_start(restarts):
    process = grown(BatchMatrices(batch_matrices(), [1] * 5), 8, by_batch=True)
    left = unit()
    for kept in restarts:
        process.restart(kept)
        rows = process.basis.tensor()
        left = rows.T @ (rows @ left)
        while process.count < process.capacity:
            process.advance()
    space = process.subspace()
    torch.testing.assert_close(space.weights, (space.axes.T @ left).square())
    assert float(space.weights.sum()) == pytest.approx(float(left.square().sum()))
    assert (float(space.weights.sum()) < 0.999) is bool(restarts)


def test_an_invariant_subspace_ends_it_and_its_complement_goes_on():
    matrix = with_spectrum(torch.tensor([1.0] * 5 + [2.0] * 4).double())
    process = grown(DenseOperator(matrix), 5, unit(9), capacity=9)
    assert process.settle()
    assert process.count == 2  # as many as eigenvalues differ
    assert float(process.residual) == 0.0
    torch.testing.assert_close(process.eigh()[0], torch.tensor([1.0, 2.0]).double())
    process.start_again(unit(9, seed=5))
    process.advance()
    process.advance()
    basis = process.basis.tensor()
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(process.eigh()[0], torch.tensor([1.0, 1.0, 2.0, 2.0]).double())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_breakdown_does_not_depend_on_the_unit(scale):
    matrix = scale * with_spectrum(torch.tensor([1.0] * 5 + [2.0] * 4).double())
    process = grown(DenseOperator(matrix), 4, unit(9))
    assert process.settle()
    assert process.count == 2


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_products_that_are_not_finite_are_no_breakdown(value):
    matrix = with_spectrum(SPECTRUM)
    matrix[3, 3] = value
    process = grown(DenseOperator(matrix), 2)
    with pytest.raises(ArithmeticError, match="products are not finite: the model or its loss"):
        process.settle()


def test_a_product_that_is_its_vector_leaves_the_basis_alone():
    """An identity may return what it is given, which is then made into the next vector."""

    class Identity(DenseOperator):
        def __matmul__(self, vector):
            return vector

    process = grown(Identity(torch.eye(SIZE, dtype=torch.float64)), 1)
    assert process.settle()
    torch.testing.assert_close(process.basis.vector(0), unit())
    assert float(process.matrix) == pytest.approx(1.0)
