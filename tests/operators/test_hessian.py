import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from batchlr import HessianOperator, supervised
from cases import CASES, classified, seeded

EPS = torch.finfo(torch.float64).eps


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)  # weights, then the bias


class TestClosedForms:
    def test_logistic_regression(self):
        problem = CASES["logistic"]()
        x = torch.cat([x for x, _ in problem.pairs])
        p = torch.sigmoid(problem.model(x)).detach()
        design = with_ones(x)
        expected = design.T @ (design * (p * (1 - p)).unsqueeze(1)) / len(x)
        torch.testing.assert_close(problem.operator("hessian") @ identity(5), expected)

    def test_softmax_regression(self):
        problem = CASES["softmax"]()
        x = torch.cat([x for x, _ in problem.pairs])
        p = problem.model(x).softmax(1).detach()
        design = with_ones(x)
        curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)  # (N, C, C)
        expected = torch.einsum("nab,ni,nj->aibj", curvature, design, design) / len(x)
        # Ours has all weights (C, D) before all biases (C,).
        order = torch.cat(
            [
                torch.tensor([a * 5 + i for a in range(3) for i in range(4)]),
                torch.tensor([a * 5 + 4 for a in range(3)]),
            ]
        )
        expected = expected.reshape(15, 15)[order][:, order]
        torch.testing.assert_close(problem.operator("hessian") @ identity(15), expected)

    def test_least_squares(self):
        with seeded():
            x, y = torch.randn(10, 4).double(), torch.randn(10, 1).double()
            model = nn.Linear(4, 1, bias=False).double()
        operator = HessianOperator(
            model, supervised(nn.MSELoss()), [(x[:7], y[:7]), (x[7:], y[7:])]
        )
        torch.testing.assert_close(operator @ identity(4), 2 * x.T @ x / 10)

    def test_a_quadratic_in_the_weights_of_any_loss_function(self):
        with seeded():
            matrix = torch.randn(6, 6).double()
            model = nn.Linear(5, 1).double()

        def loss_fn(model, batch):
            weights = nn.utils.parameters_to_vector(model.parameters())
            return 0.5 * weights @ batch.mean(0) @ weights

        symmetric = matrix + matrix.T
        operator = HessianOperator(model, loss_fn, [torch.stack([symmetric, 3 * symmetric])])
        torch.testing.assert_close(operator @ identity(6), 2 * symmetric)
        torch.testing.assert_close(
            next(operator.batch_gradients()),
            2 * symmetric @ nn.utils.parameters_to_vector(model.parameters()).detach(),
        )

    def test_a_penalty_shifts_every_eigenvalue(self):
        problem = CASES["mlp-tanh"]()
        plain = supervised(problem.criterion)

        def penalised(model, batch):
            return plain(model, batch) + 0.05 * sum(p.square().sum() for p in model.parameters())

        v = problem.vectors()
        operator = HessianOperator(problem.model, penalised, problem.batches)
        torch.testing.assert_close(operator @ v, problem.operator("hessian") @ v + 0.1 * v)

    def test_a_loss_linear_in_the_weights_has_none(self):
        model = nn.Linear(3, 1).double()
        operator = HessianOperator(
            model, lambda model, x: model(x).mean(), [torch.ones(2, 3, dtype=torch.float64)]
        )
        assert torch.equal(operator @ identity(4), torch.zeros(4, 4, dtype=torch.float64))
        assert torch.equal(next(operator.batch_gradients()), torch.ones(4, dtype=torch.float64))

    def test_a_network_scaled_by_its_batch_norm_is_flat_along_its_weights(self):
        # The loss does not change with the length of a weight in front of a train-mode norm, so
        # that w' H w = 0 and H w = -g (Euler, degree -1 of the gradient).
        with seeded():
            model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, eps=0.0)).double()
            batches = classified((6, 4), 4)
        model[1].requires_grad_(False)
        operator = HessianOperator(
            model, supervised(nn.CrossEntropyLoss()), batches, norm_mode="train"
        )
        w = model[0].weight.detach().reshape(-1)
        gradient = sum(
            n / 10 * g for n, g in zip(operator.samples, operator.batch_gradients(), strict=True)
        )
        torch.testing.assert_close(operator @ w, -gradient)
        assert abs(w @ (operator @ w)) < 100 * EPS


def test_is_indefinite_where_the_gauss_newton_matrix_is_not():
    problem = CASES["mlp-tanh"]()
    values = torch.linalg.eigvalsh(problem.operator("hessian") @ identity(problem.size))
    assert values[0] < -0.01 * values[-1]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case", ["mlp-tanh", "mlp-relu", "regression", "preresnet-eval", "vgg-eval"]
)
def test_agrees_with_curvlinops(case):
    from curvlinops import HessianLinearOperator

    problem = CASES[case]()
    params = dict(problem.model.named_parameters())
    rival = HessianLinearOperator(
        problem.model, problem.criterion, list(params.values()), problem.pairs
    )
    v = problem.vectors(2)
    torch.testing.assert_close(problem.operator("hessian") @ v, rival @ v, rtol=1e-5, atol=1e-9)


class TestRefuses:
    def test_layers_that_are_differentiable_once(self):
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.square()

            @staticmethod
            @once_differentiable
            def backward(ctx, cotangent):
                (x,) = ctx.saved_tensors
                return 2 * x * cotangent

        model = nn.Linear(3, 2)
        operator = HessianOperator(model, lambda m, x: Once.apply(m(x)).mean(), [torch.ones(4, 3)])
        with pytest.raises(ValueError, match=r"differentiated only once.*once_differentiable"):
            operator @ torch.ones(8)

    def test_complex_weights(self):
        model = nn.Linear(3, 2, dtype=torch.complex64)
        with pytest.raises(ValueError, match=r"must be real.*'weight'.*view_as_real"):
            HessianOperator(model, lambda m, x: m(x).abs().mean(), [torch.ones(4, 3)])

    def test_a_loss_that_does_not_depend_on_the_weights(self):
        model, batches = nn.Linear(2, 1), [torch.ones(3, 2)]
        for loss_fn in (
            lambda model, x: x.mean(),
            lambda model, x: model(x).mean().detach(),
        ):
            operator = HessianOperator(model, loss_fn, batches)
            with pytest.raises(ValueError, match="does not depend on the model's trainable"):
                operator @ torch.ones(3)

    @pytest.mark.parametrize("shape", [(1,), (3, 1)])
    def test_a_loss_with_dimensions(self, shape):
        operator = HessianOperator(
            nn.Linear(2, 1),
            lambda model, x: model(x)[: shape[0]].reshape(shape),
            [torch.ones(3, 2)],
        )
        with pytest.raises(ValueError, match="must be a scalar, got shape"):
            operator @ torch.ones(3)


def test_relu_of_a_function_counts_its_kinks_as_flat():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    operator = HessianOperator(
        model,
        lambda model, x: F.relu(model(x)).square().mean(),
        [torch.tensor([[1.0], [-1.0]], dtype=torch.float64)],
    )
    assert (operator @ identity(1)).item() == 1.0  # 2 for the sample above zero, 0 below
