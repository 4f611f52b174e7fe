import re

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from batchlr import DenseOperator, LinearOperator
from cases import DiagonalOperator


@pytest.fixture
def operator():
    return DiagonalOperator(torch.arange(1.0, 6.0, dtype=torch.float64))


def symmetric(size, dtype=torch.float64):
    matrix = torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.T


class TestProducts:
    def test_have_the_shape_of_what_is_multiplied(self, operator):
        for shape in ((5,), (5, 1), (5, 3), (5, 0)):
            v = torch.ones(shape, dtype=torch.float64)
            product = operator @ v
            assert product.shape == shape
            expected = operator.diagonal if len(shape) == 1 else operator.diagonal.unsqueeze(1) * v
            assert torch.equal(product, expected)

    def test_count_one_for_each_column(self, operator):
        for shape, count in (((5,), 1), ((5, 1), 2), ((5, 4), 6), ((5, 0), 6)):
            operator @ torch.ones(shape, dtype=torch.float64)
            assert operator.num_products == count

    def test_take_views_and_leave_them_alone(self, operator):
        whole = torch.arange(20.0, dtype=torch.float64).reshape(4, 5)
        before = whole.clone()
        assert torch.equal(operator @ whole.T, operator.diagonal.unsqueeze(1) * before.T)
        assert torch.equal(operator @ whole[2], operator.diagonal * before[2])
        assert torch.equal(whole, before)

    def test_are_detached(self, operator):
        v = torch.ones(5, dtype=torch.float64, requires_grad=True)
        assert not (operator @ v).requires_grad

    def test_interface_is_closed(self):
        with pytest.raises(TypeError, match="abstract"):
            LinearOperator(3, dtype=torch.float32, device=torch.device("cpu"))

    def test_properties(self, operator):
        assert operator.shape == (5, 5)
        assert operator.dtype == torch.float64
        assert operator.device == torch.device("cpu")
        with pytest.raises(AttributeError):
            operator.shape = (6, 6)


class TestRefuses:
    @pytest.mark.parametrize("v", [np.ones(5), [1.0] * 5, 2.0])
    def test_what_is_no_tensor(self, operator, v):
        with pytest.raises(TypeError, match=f"torch.Tensor, got {type(v).__name__}"):
            LinearOperator.__matmul__(operator, v)
        assert operator.num_products == 0

    @pytest.mark.parametrize("shape", [(), (4,), (6,), (1, 5), (4, 5), (5, 2, 1)])
    def test_shapes_that_do_not_fit(self, operator, shape):
        words = f"expected a vector (5,) or a block (5, k), got shape {shape}"
        with pytest.raises(ValueError, match=re.escape(words)):
            operator @ torch.ones(shape, dtype=torch.float64)
        assert operator.num_products == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex128])
    def test_other_dtypes(self, operator, dtype):
        with pytest.raises(ValueError, match=rf"float64 on cpu, got {dtype} on cpu; .*\.to\("):
            operator @ torch.ones(5, dtype=dtype)

    def test_other_devices(self, operator):
        with pytest.raises(ValueError, match=r"float64 on cpu, got torch\.float64 on meta"):
            operator @ torch.ones(5, dtype=torch.float64, device="meta")


class TestToScipy:
    def test_multiplies_vectors_columns_and_blocks(self, operator):
        twin = operator.to_scipy()
        assert twin.shape == (5, 5)
        assert twin.dtype == np.float64
        for shape in ((5,), (5, 1), (5, 3)):
            v = np.arange(float(np.prod(shape))).reshape(shape)
            np.testing.assert_array_equal(twin @ v, np.diag(np.arange(1.0, 6.0)) @ v)
        assert operator.num_products == 5

    def test_is_its_own_transpose(self, operator):
        v = np.ones(5)
        np.testing.assert_array_equal(operator.to_scipy().rmatvec(v), np.arange(1.0, 6.0))
        np.testing.assert_array_equal(operator.to_scipy().H @ v, np.arange(1.0, 6.0))

    def test_takes_read_only_and_strided_arrays(self, operator):
        twin = operator.to_scipy()
        for v in (np.arange(10.0)[::2], np.arange(5.0)):
            v.flags.writeable = False
            np.testing.assert_array_equal(twin @ v, np.arange(1.0, 6.0) * v)

    @pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
    def test_eigsh(self, which):
        matrix = symmetric(40)
        twin = DenseOperator(matrix).to_scipy()
        expected = scipy.sparse.linalg.eigsh(matrix.numpy(), k=4, which=which, v0=np.ones(40))
        actual = scipy.sparse.linalg.eigsh(twin, k=4, which=which, v0=np.ones(40))
        np.testing.assert_allclose(np.sort(actual[0]), np.sort(expected[0]), rtol=1e-10)

    def test_lobpcg_and_cg(self):
        matrix = symmetric(30) @ symmetric(30) + torch.eye(30, dtype=torch.float64)
        twin = DenseOperator(matrix).to_scipy()
        block = np.random.default_rng(0).normal(size=(30, 2))
        values, _ = scipy.sparse.linalg.lobpcg(twin, block, maxiter=200, tol=1e-8)
        expected = torch.linalg.eigvalsh(matrix).numpy()[::-1][:2]
        np.testing.assert_allclose(values, expected, rtol=1e-8)
        solution, info = scipy.sparse.linalg.cg(twin, np.ones(30), rtol=1e-10, maxiter=300)
        assert info == 0
        np.testing.assert_allclose(matrix.numpy() @ solution, np.ones(30), rtol=1e-6)

    def test_keeps_single_precision(self):
        matrix = symmetric(20, torch.float32)
        twin = DenseOperator(matrix).to_scipy()
        assert twin.dtype == np.float32
        assert (twin @ np.ones(20)).dtype == np.float32  # and takes double
        values = scipy.sparse.linalg.eigsh(twin, k=2, return_eigenvectors=False)
        assert values.dtype == np.float32
