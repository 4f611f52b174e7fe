"""The matrix of the mean over all data, whatever the mean is over and however the data are cut."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from batchlr import GGNOperator, HessianOperator, supervised, top_eigenpairs
from batchlr.curvature_noise import directional_noise
from batchlr.gradients.gradient_noise import gradient_moments
from batchlr.operators.batch_weight import batch_weight, criterion_weight
from cases import seeded

CLASSES = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
SIZES = (5, 1, 3)


class PerToken(nn.Module):
    """Logits ``(B, 3, T)`` of a sequence ``(B, T, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).movedim(-1, 1)


def tokens(*, ignored: int) -> list[tuple[Tensor, Tensor]]:
    """Ragged batches of ragged sequences, the rest of each filled with ``ignored``."""
    pairs = []
    for size in SIZES:
        x, y = torch.randn(size, 6, 4, dtype=torch.float64), torch.randint(3, (size, 6))
        for sequence in y:
            sequence[int(torch.randint(1, 6, ())) :] = ignored
        pairs.append((x, y))
    return pairs


def classes() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in SIZES]


def probabilities() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.rand(len(x), 3).double().softmax(1)) for x, _ in classes()]


def values() -> list[tuple[Tensor, Tensor]]:
    return [(x, x[:, :3].sin()) for x, _ in classes()]


def binary() -> list[tuple[Tensor, Tensor]]:
    return [(x, (x[:, :3] > 0).double()) for x, _ in classes()]


class LogProbabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = PerToken()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).log_softmax(1)


MLP = partial(nn.Sequential, nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

# The criterion, of reduction "mean" or "sum", the model and the batches.
PROBLEMS = {
    "classes": (nn.CrossEntropyLoss, MLP, classes),
    "class weights": (partial(nn.CrossEntropyLoss, weight=CLASSES), MLP, classes),
    "smoothing": (partial(nn.CrossEntropyLoss, label_smoothing=0.2), MLP, classes),
    "all three": (
        partial(nn.CrossEntropyLoss, weight=CLASSES, label_smoothing=0.2, ignore_index=2),
        PerToken,
        partial(tokens, ignored=2),
    ),
    "padding": (nn.CrossEntropyLoss, PerToken, partial(tokens, ignored=-100)),
    "log probabilities": (
        partial(nn.NLLLoss, weight=CLASSES, ignore_index=-1),
        LogProbabilities,
        partial(tokens, ignored=-1),
    ),
    "probabilities": (
        partial(nn.CrossEntropyLoss, weight=CLASSES, label_smoothing=0.1), MLP, probabilities,
    ),
    "squares": (nn.MSELoss, MLP, values),
    "elements": (partial(nn.BCEWithLogitsLoss, pos_weight=CLASSES), MLP, binary),
    "huber": (partial(nn.HuberLoss, delta=0.3), MLP, values),
    "a function": (
        lambda reduction: partial(F.cross_entropy, weight=CLASSES, reduction=reduction),
        MLP,
        classes,
    ),
}  # fmt: skip


def problem(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    _, build, draw = PROBLEMS[name]
    with seeded():
        model = build().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model, draw()


def whole(model: nn.Module, loss_of) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian in float64 by plain autograd of ``loss_of(model)``."""
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()]).requires_grad_()

    def loss(weights: Tensor) -> Tensor:
        pieces = weights.split([p.numel() for p in named.values()])
        tensors = {n: w.view_as(p) for (n, p), w in zip(named.items(), pieces, strict=True)}
        return loss_of(lambda x: functional_call(model, tensors, (x,)))

    value = loss(flat)
    gradient = torch.autograd.grad(value, flat)[0]
    return value.detach(), gradient, torch.autograd.functional.hessian(loss, flat.detach())


def joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return x, y


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


class TestWholeData:
    @each_problem
    @each_reduction
    def test_loss_gradient_and_hessian(self, name, reduction):
        model, pairs = problem(name)
        x, y = joined(pairs)
        mean = PROBLEMS[name][0](reduction="mean")
        value, gradient, matrix = whole(model, lambda network: mean(network(x), y))
        criterion = PROBLEMS[name][0](reduction=reduction)
        operator = HessianOperator(model, supervised(criterion), pairs)
        identity = torch.eye(len(gradient), dtype=torch.float64)
        assert_close(operator @ identity, matrix)
        torch.testing.assert_close(operator.loss(), value)
        parts = zip(operator.weights, operator.batch_gradients(), strict=True)
        assert_close(sum(w * g for w, g in parts) / sum(operator.weights), gradient)
        assert sum(operator.weights) == pytest.approx(sum(operator.samples))

    @each_problem
    @each_reduction
    def test_gauss_newton(self, name, reduction):
        model, pairs = problem(name)
        x, y = joined(pairs)
        mean = PROBLEMS[name][0](reduction="mean")
        named = dict(model.named_parameters())
        jacobian = torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(
            {n: p.detach() for n, p in named.items()}
        )
        z = model(x).detach()
        jacobian = torch.cat([j.reshape(z.numel(), -1) for j in jacobian.values()], 1)
        curvature = torch.autograd.functional.hessian(lambda o: mean(o, y), z)
        matrix = jacobian.T @ curvature.reshape(z.numel(), z.numel()) @ jacobian
        loss_fn = supervised(PROBLEMS[name][0](reduction=reduction))
        identity = torch.eye(len(matrix), dtype=torch.float64)
        assert_close(GGNOperator(model, loss_fn, pairs) @ identity, matrix)
        few = GGNOperator(model, loss_fn, pairs, expected_products=1)
        assert_close(few @ identity[:, 0], matrix[:, 0])

    @each_problem
    def test_does_not_depend_on_the_cut(self, name):
        model, pairs = problem(name)
        loss_fn = supervised(PROBLEMS[name][0](reduction="mean"))
        v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        expected = HessianOperator(model, loss_fn, [joined(pairs)]) @ v
        assert_close(HessianOperator(model, loss_fn, pairs, micro_batch=2) @ v, expected)
        assert_close(HessianOperator(model, loss_fn, pairs[::-1]) @ v, expected)

    @each_problem
    def test_products_of_batches_average_by_weight(self, name):
        model, pairs = problem(name)
        operator = HessianOperator(model, supervised(PROBLEMS[name][0](reduction="mean")), pairs)
        v = torch.randn(operator.shape[0], dtype=torch.float64)
        parts = zip(operator.weights, operator.batch_products(v), strict=True)
        assert_close(sum(w * p for w, p in parts) / sum(operator.weights), operator @ v, 1e-12)
        pairs = top_eigenpairs(operator, k=1, max_steps=6, tol=1e-2, with_subspace=True)
        mean = torch.einsum(
            "k,kij->ij", v.new_tensor(operator.weights), pairs.subspace.matrices
        ) / sum(operator.weights)
        assert_close(mean, torch.diag(pairs.subspace.values), 1e-9)


class TestZeroWeight:
    @pytest.fixture
    def pairs(self):
        with seeded():
            pairs = tokens(ignored=-100)
        pairs[1] = (pairs[1][0], torch.full_like(pairs[1][1], -100))
        return pairs

    @pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
    def test_a_batch_of_padding_changes_nothing(self, kind, pairs):
        model = PerToken().double()
        loss_fn = supervised(nn.CrossEntropyLoss())
        operator = kind(model, loss_fn, pairs)
        v = torch.randn(operator.shape[0], dtype=torch.float64)
        expected = kind(model, loss_fn, [pairs[0], pairs[2]])
        assert_close(operator @ v, expected @ v, 1e-12)
        assert_close(operator.loss(), expected.loss(), 1e-12)
        assert operator.weights[1] == 0
        assert list(operator.batch_products(v))[1].eq(0).all()
        assert list(operator.batch_gradients())[1].eq(0).all()

    def test_all_batches_of_padding_are_refused(self, pairs):
        with pytest.raises(ValueError, match="all batches have weight zero"):
            HessianOperator(PerToken().double(), supervised(nn.CrossEntropyLoss()), [pairs[1]])


class TestOwnLosses:
    def test_without_a_word_samples_count(self):
        model, pairs = problem("classes")
        criterion = nn.CrossEntropyLoss()
        own = HessianOperator(model, lambda m, batch: criterion(m(batch[0]), batch[1]), pairs)
        assert own.weights == tuple(map(float, SIZES))

    def test_a_loss_says_what_its_mean_is_over(self):
        model, pairs = problem("padding")

        class NextToken:
            """Batches are dicts, the model's outputs are reshaped."""

            def __call__(self, model, batch):
                z = model(batch["tokens"]).movedim(1, -1).reshape(-1, 3)
                return F.cross_entropy(z, batch["next"].reshape(-1))

            def batch_weight(self, batch):
                return (batch["next"] != -100).sum()

        batches = [{"tokens": x, "next": y} for x, y in pairs]
        x, y = joined(pairs)
        _, _, matrix = whole(model, lambda network: F.cross_entropy(network(x), y))
        operator = HessianOperator(model, NextToken(), batches)
        v = torch.randn(operator.shape[0], dtype=torch.float64)
        assert_close(operator @ v, matrix @ v)

    def test_a_criterion_of_unknown_kind_is_told_its_weight(self):
        model, pairs = problem("padding")

        def focal(outputs, targets):
            logs = outputs.log_softmax(1).movedim(1, -1)[targets != -100]
            logs = logs.gather(1, targets[targets != -100].unsqueeze(1))
            return -((1 - logs.exp()).square() * logs).mean()

        x, y = joined(pairs)
        _, _, matrix = whole(model, lambda network: focal(network(x), y))
        loss_fn = supervised(focal, weight=lambda batch: (batch[1] != -100).sum())
        operator = HessianOperator(model, loss_fn, pairs)
        v = torch.randn(operator.shape[0], dtype=torch.float64)
        assert_close(operator @ v, matrix @ v)
        assert (HessianOperator(model, supervised(focal), pairs) @ v - matrix @ v).norm() > 1e-3

    def test_losses_without_targets(self):
        """A differential equation's residual: the loss itself holds a derivative."""
        with seeded():
            model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
            batches = [torch.randn(n, 1, dtype=torch.float64) for n in SIZES]

        def residual(network, points):
            points = points.clone().requires_grad_()
            u = network(points)
            (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
            return (slope + u).square().mean()

        _, _, matrix = whole(model, lambda network: residual(network, torch.cat(batches)))
        operator = HessianOperator(model, residual, batches)
        identity = torch.eye(len(matrix), dtype=torch.float64)
        assert_close(operator @ identity, matrix)

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_an_impossible_weight_is_refused(self, weight):
        model, pairs = problem("classes")
        loss_fn = supervised(nn.CrossEntropyLoss(), weight=lambda batch: weight)
        with pytest.raises(ValueError, match=r"finite and not negative, got .* from batch_weight"):
            HessianOperator(model, loss_fn, pairs)


class TestNoise:
    """Weights are what noise is measured in, so that a batch's own mean is compared."""

    def test_a_weight_that_is_shared_by_all_changes_nothing(self):
        model, pairs = problem("classes")
        plain = HessianOperator(model, supervised(nn.CrossEntropyLoss()), pairs)
        tripled = HessianOperator(
            model, supervised(nn.CrossEntropyLoss(), weight=lambda batch: 3 * len(batch[1])), pairs
        )
        v = torch.nn.functional.normalize(torch.ones(plain.shape[0], dtype=torch.float64), dim=0)
        assert directional_noise(plain, v).total == pytest.approx(
            directional_noise(tripled, v).total
        )
        torch.testing.assert_close(
            gradient_moments(plain).variance, gradient_moments(tripled).variance
        )

    def test_batches_of_one_matrix_have_no_noise_whatever_their_weights(self):
        model, pairs = problem("class weights")
        x, y = pairs[0]
        repeated = [(x, y), (torch.cat([x, x]), torch.cat([y, y]))]
        loss_fn = supervised(nn.CrossEntropyLoss(weight=CLASSES))
        operator = HessianOperator(model, loss_fn, repeated)
        v = torch.nn.functional.normalize(torch.ones(operator.shape[0], dtype=torch.float64), dim=0)
        assert directional_noise(operator, v).total < 1e-20


class TestCriterionWeight:
    def test_counts_what_torch_divides_by(self):
        y = torch.tensor([0, 2, -100, 2])
        assert criterion_weight(nn.CrossEntropyLoss(), y) == 3
        assert criterion_weight(nn.CrossEntropyLoss(weight=CLASSES), y) == pytest.approx(6.2)
        assert criterion_weight(nn.CrossEntropyLoss(ignore_index=2), y[:2]) == 1
        assert criterion_weight(nn.MSELoss(), torch.zeros(4, 3)) == 12
        assert criterion_weight(nn.MultiMarginLoss(), y) == 4
        assert criterion_weight(F.mse_loss, torch.zeros(2, 3)) == 6
        assert criterion_weight(nn.CrossEntropyLoss(), torch.ones(4, 3, 5) / 3) == 20

    def test_of_an_operators_loss_is_the_losss_own(self):
        batch = (torch.ones(3, 2), torch.tensor([0, 1, -100]))
        assert batch_weight(supervised(nn.CrossEntropyLoss()), batch) == 2
        assert batch_weight(lambda model, batch: None, batch) == 3
