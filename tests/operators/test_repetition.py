"""An operator that is not one symmetric matrix is found out."""

import itertools

import pytest
import torch
from torch import nn

from batchlr import GGNOperator, HessianOperator, lanczos, supervised, top_eigenpairs
from batchlr.operators.repetition import RepetitionCheck
from cases import CASES, classified, seeded, unsettle

EACH = pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])


class Restless(nn.Module):
    """Its weights differ from one run to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.runs = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x * (1 + 0.3 * next(self.runs)))


@pytest.fixture
def restless():
    with seeded():
        return unsettle(Restless()), classified((8,), 5)


LOSS = supervised(nn.CrossEntropyLoss())


@EACH
def test_a_loss_that_changes_is_refused(kind, restless):
    model, batches = restless
    operator = kind(model, LOSS, batches, keep_graph=False)
    with pytest.raises(ArithmeticError, match=r"loss of batch 0 was .* and is .*self_check=False"):
        lanczos(operator, 4)


def test_a_matrix_that_changes_is_refused(restless):
    model, batches = restless

    def loss_fn(model, batch):  # its value is the same each time
        loss = LOSS(model, batch)
        return loss / loss.detach()

    operator = HessianOperator(model, loss_fn, batches, keep_graph=False)
    for solve in (lanczos, lambda op, m: top_eigenpairs(op, max_steps=m, with_subspace=True)):
        with pytest.raises(ArithmeticError, match=r"not one symmetric matrix: u'Av = .* v'Au = "):
            solve(operator, 4)
        operator = HessianOperator(model, loss_fn, batches, keep_graph=False)


@EACH
def test_the_check_can_be_switched_off(kind, restless):
    model, batches = restless
    operator = kind(model, LOSS, batches, keep_graph=False, self_check=False)
    lanczos(operator, 4)
    assert operator.num_products == 4


@EACH
def test_on_kept_graphs_even_such_a_loss_is_one_matrix(kind, restless):
    model, batches = restless
    operator = kind(model, LOSS, batches, keep_graph=True)
    lanczos(operator, 4)
    operator.verify()


@EACH
def test_verify_takes_two_products(kind, restless):
    model, batches = restless
    problem = CASES["norms-train"]()
    operator = problem.operator(kind.__name__.removesuffix("Operator").lower())
    operator.verify()
    assert operator.num_products == 2
    operator = kind(model, lambda m, b: LOSS(m, b), batches) if kind is HessianOperator else None
    if operator is not None:
        operator = HessianOperator(model, LOSS, batches, keep_graph=False, self_check=False)
        with pytest.raises(ArithmeticError, match="not one symmetric matrix"):
            operator.verify(torch.Generator().manual_seed(1))


@EACH
def test_weights_may_change_between_products(kind):
    problem = CASES["mlp-tanh"]()
    operator = problem.operator(kind.__name__.removesuffix("Operator").lower())
    for _ in range(4):
        operator @ problem.vectors()
        list(operator.batch_products(problem.vectors()))
        with torch.no_grad():
            for parameter in problem.model.parameters():
                parameter.mul_(1.2)
    assert operator.num_products == 8  # and none found fault with the matrix of before


@EACH
def test_the_check_costs_no_product_and_keeps_no_vector(kind):
    problem = CASES["mlp-tanh"]()
    operator = problem.operator(kind.__name__.removesuffix("Operator").lower())
    operator @ problem.vectors()
    operator @ problem.vectors(seed=1)
    assert operator.num_products == 2
    assert operator._check._first == {"mean": None}


class TestCompare:
    def test_of_an_asymmetric_matrix(self):
        matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        check = RepetitionCheck(torch.float32)
        u, v = torch.eye(2)
        check.see("it", u, matrix @ u)
        with pytest.raises(ArithmeticError, match=r"u'Av = 2 but v'Au = 0"):
            check.see("it", v, matrix @ v)

    @pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
    def test_does_not_depend_on_units(self, scale):
        with seeded():
            matrix = torch.randn(50, 50, dtype=torch.float64)
        matrix = scale * (matrix + matrix.T)
        u, v = torch.randn(2, 50, dtype=torch.float64)
        RepetitionCheck(torch.float64).compare(u, matrix @ u, v, matrix @ v)
        matrix[0, 1] += scale
        with pytest.raises(ArithmeticError):
            RepetitionCheck(torch.float64).compare(u, matrix @ u, v, matrix @ v)

    def test_what_is_not_finite_is_left_to_the_solver(self):
        u = torch.ones(3)
        RepetitionCheck(torch.float32).compare(u, u * torch.nan, u, u)

    def test_a_zero_matrix(self):
        u = torch.ones(3)
        RepetitionCheck(torch.float32).compare(u, 0 * u, u, 0 * u)
