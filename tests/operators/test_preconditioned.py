import pytest
import torch

from batchlr import PreconditionedOperator, top_eigenpairs
from cases import CASES
from reference import dense


@pytest.fixture
def problem():
    return CASES["mlp-tanh"]()


@pytest.fixture
def scale(problem):
    return problem.vectors(seed=5).abs()


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_is_the_matrix_scaled_from_both_sides(problem, scale, kind):
    operator = PreconditionedOperator(problem.operator(kind), scale)
    expected = torch.diag(scale) @ dense("mlp-tanh", kind) @ torch.diag(scale)
    identity = torch.eye(problem.size, dtype=torch.float64)
    torch.testing.assert_close(operator @ identity, expected)
    torch.testing.assert_close(operator @ identity[3], expected[3])
    values = torch.linalg.eigvalsh(expected)
    pairs = top_eigenpairs(operator, tol=1e-8)
    torch.testing.assert_close(pairs.values[0], values[-1])


def test_batch_products_average_to_the_product(problem, scale):
    operator = PreconditionedOperator(problem.operator("hessian"), scale)
    v = problem.vectors()
    parts = list(operator.batch_products(v))
    mean = sum(n / 10 * part for n, part in zip(operator.samples, parts, strict=True))
    torch.testing.assert_close(mean, operator @ v)


def test_each_batch_may_have_a_vector_of_its_own(problem, scale):
    inner = problem.operator("hessian")
    operator = PreconditionedOperator(inner, scale)
    vectors = problem.vectors(3).T.contiguous()
    own = list(operator.batch_products(iter(vectors)))
    assert operator.num_products == inner.num_products == 1
    for number, (product, vector) in enumerate(zip(own, vectors, strict=True)):
        expected = scale * list(inner.batch_products(scale * vector))[number]
        torch.testing.assert_close(product, expected)


def test_costs_one_product_of_the_inner_matrix_each(problem, scale):
    inner = problem.operator("hessian")
    operator = PreconditionedOperator(inner, scale)
    operator @ problem.vectors()
    operator @ problem.vectors(3)
    list(operator.batch_products(problem.vectors()))
    assert operator.num_products == inner.num_products == 5


def test_has_the_shape_and_samples_of_the_inner_matrix(problem, scale):
    inner = problem.operator("hessian")
    operator = PreconditionedOperator(inner, scale)
    assert operator.shape == inner.shape
    assert operator.samples == (5, 3, 2)
    assert operator.dtype == torch.float64
    assert repr(operator) == f"PreconditionedOperator({inner!r})"


def test_scale_is_brought_to_the_matrix_dtype_and_off_any_graph(problem, scale):
    operator = PreconditionedOperator(problem.operator("hessian"), scale.float().requires_grad_())
    assert operator.scale.dtype == torch.float64
    assert not (operator @ problem.vectors()).requires_grad


def test_a_zero_scale_takes_a_parameter_out(problem, scale):
    scale[7] = 0.0
    product = PreconditionedOperator(problem.operator("hessian"), scale) @ problem.vectors()
    assert product[7] == 0.0


def test_a_step_of_adam_is_plain_descent_in_the_scaled_metric(problem):
    # w <- w - lr D^-1 g is u <- u - lr S g(S u) with w = S u, S = D^-1/2: same curvature.
    d = problem.vectors(seed=5).abs() + 0.1
    h = dense("mlp-tanh", "hessian")
    operator = PreconditionedOperator(problem.operator("hessian"), d.rsqrt())
    ours = torch.linalg.eigvalsh(operator @ torch.eye(problem.size, dtype=torch.float64))
    theirs = torch.linalg.eigvals(h / d.unsqueeze(1))  # D^-1 H, similar and not symmetric
    torch.testing.assert_close(ours, theirs.real.sort().values, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(50,), (51, 1), ()])
def test_refuses_a_scale_of_another_shape(problem, shape):
    with pytest.raises(ValueError, match=r"scale must have shape \(51,\), got"):
        PreconditionedOperator(problem.operator("hessian"), torch.ones(shape))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_refuses_a_scale_that_is_negative_or_not_finite(problem, scale, bad):
    scale[3] = bad
    with pytest.raises(ValueError, match="finite and non-negative; is the optimizer's second"):
        PreconditionedOperator(problem.operator("hessian"), scale)


def test_refuses_vectors_as_the_inner_matrix_does(problem, scale):
    operator = PreconditionedOperator(problem.operator("hessian"), scale)
    for method in (operator.__matmul__, lambda v: next(operator.batch_products(v))):
        with pytest.raises(ValueError, match=r"expected a vector \(51,\)"):
            method(torch.ones(3, dtype=torch.float64))
