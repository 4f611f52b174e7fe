import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchlr import GGNOperator, supervised
from cases import CASES, Problem, classified, seeded
from reference import dense


def identity(size):
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_is_positive_semi_definite(case):
    problem = CASES[case]()
    v = problem.vectors(20)
    products = problem.operator("ggn") @ v
    forms = (v * products).sum(0)
    assert (forms >= -1e-12 * v.norm(dim=0) * products.norm(dim=0)).all()


@pytest.mark.parametrize("case", ["mlp-tanh", "tied"])
def test_rank_is_bounded_by_samples_times_outputs(case):
    problem = CASES[case]()
    values = torch.linalg.eigvalsh(problem.operator("ggn") @ identity(problem.size))
    samples = sum(problem.operator("ggn").samples)
    outputs = 4 if case == "tied" else 2  # softmax loses one of its three
    assert (values > 1e-10 * values[-1]).sum() <= samples * outputs
    assert values[0] > -1e-12 * values[-1]


@pytest.mark.parametrize("case", ["logistic", "softmax"])
def test_equals_the_hessian_of_a_linear_model(case):
    problem = CASES[case]()
    v = problem.vectors(4)
    torch.testing.assert_close(problem.operator("ggn") @ v, problem.operator("hessian") @ v)


def test_equals_the_hessian_of_linear_regression():
    with seeded():
        x, y = torch.randn(10, 4).double(), torch.randn(10, 2).double()
        model = nn.Linear(4, 2).double()
    problem = Problem(model, nn.MSELoss(), [(x[:7], y[:7]), (x[7:], y[7:])])
    v = problem.vectors(4)
    torch.testing.assert_close(problem.operator("ggn") @ v, problem.operator("hessian") @ v)


def test_equals_the_hessian_where_the_residuals_vanish():
    problem = CASES["regression"]()
    fitted = [(x, problem.model(x).detach()) for x, _ in problem.pairs]
    v = problem.vectors(4)
    difference = problem.operator("ggn") @ v - problem.operator("hessian") @ v
    assert difference.norm() > 0.1 * (problem.operator("ggn") @ v).norm()

    problem = Problem(problem.model, problem.criterion, fitted)
    torch.testing.assert_close(problem.operator("ggn") @ v, problem.operator("hessian") @ v)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case", ["mlp-tanh", "mlp-relu", "regression", "preresnet-eval", "vgg-eval"]
)
def test_agrees_with_curvlinops(case):
    from curvlinops import GGNLinearOperator

    problem = CASES[case]()
    params = dict(problem.model.named_parameters())
    rival = GGNLinearOperator(
        problem.model, problem.criterion, list(params.values()), problem.pairs
    )
    v = problem.vectors(2)
    torch.testing.assert_close(problem.operator("ggn") @ v, rival @ v, rtol=1e-5, atol=1e-9)


def test_a_loss_linear_in_the_outputs_has_none():
    problem = CASES["mlp-tanh"]()
    linear = supervised(lambda outputs, _: outputs.mean())
    operator = GGNOperator(problem.model, linear, problem.batches)
    v = problem.vectors(2)
    assert torch.equal(operator @ v, torch.zeros_like(v))
    assert next(operator.batch_gradients()).norm() > 0


def test_a_loss_written_by_hand_in_two_halves():
    problem = CASES["mlp-tanh"]()

    class Halves:
        def __call__(self, model, batch):
            return self.loss(self.outputs(model, batch), batch)

        def outputs(self, model, batch):
            return model(batch[0]).log_softmax(1)  # a curved link: another split, another matrix

        def loss(self, outputs, batch):
            return F.nll_loss(outputs, batch[1])

    v = problem.vectors(2)
    by_hand = GGNOperator(problem.model, Halves(), problem.batches) @ v
    assert torch.equal(by_hand, torch.zeros_like(v))  # the negative log-likelihood is linear

    class Logits(Halves):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            return F.cross_entropy(outputs, batch[1])

    by_hand = GGNOperator(problem.model, Logits(), problem.batches) @ v
    torch.testing.assert_close(by_hand, dense("mlp-tanh", "ggn") @ v)


class TestRefuses:
    def test_a_loss_in_one_piece(self):
        with pytest.raises(TypeError, match=r"two halves.*function lacks them.*supervised"):
            GGNOperator(nn.Linear(2, 1), lambda model, x: model(x).mean(), [torch.ones(3, 2)])

    def test_outputs_that_do_not_depend_on_the_weights(self):
        model = nn.Linear(2, 2)
        model.forward = lambda x: x
        operator = GGNOperator(model, supervised(nn.MSELoss()), [(torch.ones(3, 2),) * 2])
        with pytest.raises(ValueError, match="outputs do not depend on its trainable parameters"):
            operator @ torch.ones(6)

    def test_a_loss_that_does_not_depend_on_the_outputs(self):
        constant = supervised(lambda outputs, targets: targets.mean())
        operator = GGNOperator(nn.Linear(2, 2), constant, [(torch.ones(3, 2),) * 2])
        with pytest.raises(ValueError, match="does not depend on the model's trainable"):
            operator @ torch.ones(6)


def test_train_mode_couples_the_samples_of_a_batch():
    # Each sample's outputs depend on all of the batch, and so J does: no sum over samples.
    with seeded():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        pairs = classified((4,), 4)
    problem = Problem(model, nn.CrossEntropyLoss(), pairs, "train")
    bias = slice(12, 15)  # of the linear layer: subtracted again by the norm
    matrix = problem.operator("ggn") @ identity(21)
    assert matrix[bias].abs().max() < 1e-15
    matrix = problem.operator("ggn", norm_mode="eval") @ identity(21)
    assert matrix[bias].abs().max() > 1e-3


class Square(torch.autograd.Function):
    """Without a ``jvp``, which forward mode would need."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent


class Custom(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Force(nn.Module):
    """The gradient of an energy by the input, which needs gradients to be on."""

    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("build", [lambda layers: layers, Force])
def test_where_there_is_no_forward_mode_one_product_is_that_of_many(build):
    with seeded():
        model = build(nn.Sequential(nn.Linear(3, 4), Custom(), nn.Linear(4, 3))).double()
        pairs = [(torch.randn(5, 3).double(), torch.randn(5, 3).double())]
    problem = Problem(model, nn.MSELoss(), pairs)
    v = problem.vectors()
    one = problem.operator("ggn", expected_products=1) @ v
    torch.testing.assert_close(one, problem.operator("ggn") @ v, rtol=1e-10, atol=1e-12)
