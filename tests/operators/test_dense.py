import pytest
import torch

from batchlr import DenseOperator


def test_is_the_matrix():
    matrix = torch.tensor([[2.0, 1.0], [1.0, -3.0]])
    operator = DenseOperator(matrix)
    assert torch.equal(operator @ torch.eye(2), matrix)
    assert torch.equal(operator @ torch.tensor([1.0, 2.0]), torch.tensor([4.0, -5.0]))
    assert operator.dtype == torch.float32
    assert repr(operator) == "DenseOperator(P=2)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_its_dtype(dtype):
    v = torch.ones(3, dtype=dtype)
    assert torch.equal(DenseOperator(torch.eye(3, dtype=dtype)) @ v, v)


def test_holds_no_graph():
    operator = DenseOperator(torch.eye(2, requires_grad=True))
    assert not (operator @ torch.ones(2)).requires_grad


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_symmetry_is_judged_to_rounding_in_any_unit(scale):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(50, 50, generator=generator)
    gram = factor @ torch.diag(torch.arange(50.0)) @ factor.T  # symmetric up to float32 rounding
    DenseOperator(scale * gram)
    with pytest.raises(ValueError, match=r"not symmetric.*pass \(A \+ A.T\) / 2"):
        DenseOperator(scale * factor)


def test_the_zero_matrix_is_symmetric():
    assert torch.equal(DenseOperator(torch.zeros(3, 3)) @ torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 2)])
def test_refuses_what_is_not_square(shape):
    with pytest.raises(ValueError, match=r"square matrix \(P, P\) with P >= 1, got shape"):
        DenseOperator(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_refuses_what_is_not_floating_point(dtype):
    with pytest.raises(ValueError, match=f"expected a floating-point matrix, got {dtype}"):
        DenseOperator(torch.ones(2, 2, dtype=dtype))
