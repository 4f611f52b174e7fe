"""A difference of operators is the difference of their matrices."""

import pytest
import torch

from batchlr.operators import DenseOperator, DifferenceOperator


def symmetric(size, seed):
    entries = torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return entries + entries.T


def test_its_products_are_those_of_the_difference():
    a, b = symmetric(5, 0), symmetric(5, 1)
    left, right = DenseOperator(a), DenseOperator(b)
    difference = DifferenceOperator(left, right)
    block = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(difference @ block, a - b)
    torch.testing.assert_close(difference @ block[0], (a - b)[0])
    assert difference.num_products == left.num_products == right.num_products == 6
    assert (difference.shape, difference.dtype) == ((5, 5), torch.float64)
    assert repr(difference) == "DifferenceOperator(DenseOperator(P=5), DenseOperator(P=5))"


def test_unlike_matrices_are_refused():
    left, right = DenseOperator(symmetric(3, 0)), DenseOperator(symmetric(4, 0))
    with pytest.raises(ValueError, match=r"only like matrices have a difference, got \(3, 3\) .*"):
        DifferenceOperator(left, right)
    single = DenseOperator(symmetric(3, 0).float())
    with pytest.raises(ValueError, match=r"float64 on cpu and \(3, 3\) torch.float32 on cpu"):
        DifferenceOperator(left, single)
