"""Mistakes that curvature code is known to make, one test each (further ones are in the files of
what they concern: dropout, weight versions, buffers, wrappers in `test_curvature_matrix`, losses
over loaders in `test_batch_weight`, checkpoints and memory in `test_graphs`)."""

import gc
import resource
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchlr import GGNOperator, HessianOperator, supervised, top_eigenpairs
from cases import CASES, Problem, classified, seeded, unsettle
from reference import dense, dense_ggn, dense_hessian

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator}
DENSE = {"hessian": dense_hessian, "ggn": dense_ggn}
CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())

each_kind = pytest.mark.parametrize("kind", KINDS)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


def test_two_operators_on_one_model_measure_their_own_matrices():
    problem = CASES["mlp-tanh"]()
    v = problem.vectors()
    first, second = problem.operator("hessian"), problem.operator("ggn")
    halves = [HessianOperator(problem.model, CROSS_ENTROPY, [b]) for b in problem.batches[:2]]
    for operator in (*halves, second, first):
        operator @ v  # made before any of the others was used
    assert_close(first @ v, dense("mlp-tanh", "hessian") @ v)
    assert_close(second @ v, dense("mlp-tanh", "ggn") @ v)
    alone = Problem(problem.model, problem.criterion, problem.pairs[:1])
    assert_close(halves[0] @ v, dense_hessian(alone) @ v)


@each_kind
@pytest.mark.parametrize("options", [{}, {"keep_graph": False}, {"offload": True}])
def test_nothing_waits_for_the_garbage_collector(kind, options):
    problem = CASES["norms-train"]()
    outputs = []
    hook = problem.model.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
    gc.collect()
    gc.disable()
    try:
        operator = problem.operator(kind, **options)
        top_eigenpairs(operator, max_steps=3)
        list(operator.batch_products(problem.vectors()))
        list(operator.batch_gradients())
        operator.loss()
        del operator
        assert outputs
        assert not any(ref() is not None for ref in outputs)
    finally:
        gc.enable()
        hook.remove()


@each_kind
def test_graphs_go_with_an_error(kind):
    problem = CASES["mlp-tanh"]()
    problem.pairs[2] = (problem.pairs[2][0][:, :4], problem.pairs[2][1])  # the wrong width
    outputs = []
    hook = problem.model.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
    operator = problem.operator(kind)
    try:
        operator @ problem.vectors()
    except RuntimeError:
        pass
    else:
        pytest.fail("the batch fits")
    hook.remove()
    del operator
    assert len(outputs) == 2
    assert not any(ref() is not None for ref in outputs)


@each_kind
@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e9])
def test_the_unit_of_the_loss_cancels(kind, scale):
    problem = CASES["mlp-tanh"]()

    class Scaled(nn.Module):
        reduction = "mean"

        def forward(self, outputs, targets):
            return scale * F.cross_entropy(outputs, targets)

    operator = KINDS[kind](problem.model, supervised(Scaled()), problem.batches)
    v = problem.vectors()
    assert_close(operator @ v, scale * (dense("mlp-tanh", kind) @ v))
    values = torch.linalg.eigvalsh(dense("mlp-tanh", kind))
    found = top_eigenpairs(operator, tol=1e-6).values[0]
    assert float(found) == pytest.approx(scale * float(values[-1]), rel=1e-6)


def test_a_negative_definite_matrix_has_a_negative_top():
    model = nn.Linear(3, 1, bias=False).double()
    operator = HessianOperator(
        model, lambda m, batch: -(m(batch[0]) ** 2).mean(), [(torch.randn(20, 3).double(),)]
    )
    matrix = operator @ torch.eye(3, dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix)
    pairs = top_eigenpairs(operator, which="both", tol=1e-8)
    torch.testing.assert_close(pairs.values, values[[2, 0]])
    assert float(pairs.values[0]) < 0


@each_kind
def test_kinks_have_no_curvature_of_their_own(kind):
    """As autograd defines it; finite differences would see jumps of the slope."""
    with seeded():
        model = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1)).double()
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(1)
    problem = Problem(model, nn.MSELoss(), [(x, x.abs())])
    v = problem.vectors()
    assert_close(problem.operator(kind) @ v, DENSE[kind](problem) @ v)


def test_embeddings_that_are_renormalised_in_place_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(3, 2))
    batch = (torch.tensor([[0], [1]]), torch.tensor([0, 1]))
    operator = HessianOperator(model, CROSS_ENTROPY, [batch])
    with pytest.raises(ValueError, match=r"changes its weights in place.*max_norm"):
        operator @ torch.ones(operator.shape[0])


class TestDtypes:
    @each_kind
    def test_mixed_parameters_have_vectors_of_the_widest(self, kind):
        problem = CASES["mlp-tanh"]()
        expected = dense("mlp-tanh", kind)

        class Mixed(nn.Module):
            """The last layer in double precision, the others in single."""

            def __init__(self, layers: nn.Module) -> None:
                super().__init__()
                self.layers = layers

            def forward(self, x: Tensor) -> Tensor:
                *early, late = self.layers
                for layer in early:
                    x = layer(x)
                return late(x.double())

        layers = problem.model.layers
        layers[:-1].float()
        pairs = [(x.float(), y) for x, y in problem.pairs]
        operator = Problem(Mixed(layers), problem.criterion, pairs).operator(kind)
        v = problem.vectors()
        assert operator.dtype == torch.float64
        assert_close(operator @ v, expected @ v, 1e-5)
        assert all(p.dtype == torch.float64 for p in operator.batch_gradients())
        assert top_eigenpairs(operator, tol=1e-2).converged

    @each_kind
    def test_half_precision_has_vectors_in_single(self, kind):
        problem = CASES["mlp-tanh"]()
        expected = dense("mlp-tanh", kind)
        problem.model.bfloat16()
        pairs = [(x.bfloat16(), y) for x, y in problem.pairs]
        operator = Problem(problem.model, problem.criterion, pairs).operator(kind)
        v = problem.vectors()
        assert operator.dtype == torch.float32
        product = operator @ v.float()
        assert product.dtype == torch.float32
        assert_close(product.double(), expected @ v, 0.1)  # eight bits


class Encoder(nn.Module):
    """A stack of torch's own layers, whose eval mode would call one kernel for all."""

    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x).mean(1))


class TestAttention:
    @each_kind
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("expected_products", [None, 1])
    def test_encoder_layers_in_either_mode(self, kind, training, expected_products):
        with seeded():
            model = unsettle(Encoder(dropout=0.0)).train(training)
            problem = Problem(model, nn.CrossEntropyLoss(), classified((3, 2), 5, 4))
        v = problem.vectors()
        operator = problem.operator(kind, expected_products=expected_products)
        assert_close(operator @ v, DENSE[kind](problem) @ v)

    @each_kind
    def test_frozen_layers_below_the_head(self, kind):
        """Nothing there needs a gradient, so that the fused kernel would be allowed."""
        with seeded():
            model = unsettle(Encoder(dropout=0.0)).eval()
            problem = Problem(model, nn.CrossEntropyLoss(), classified((3, 2), 5, 4))
        model.layers.requires_grad_(False)
        v = problem.vectors()
        assert_close(problem.operator(kind) @ v, DENSE[kind](problem) @ v)
        assert torch.backends.mha.get_fastpath_enabled()

    @each_kind
    def test_dropout_inside_attention_is_kept(self, kind):
        with seeded():
            model = unsettle(Encoder(dropout=0.3)).train()
            problem = Problem(model, nn.CrossEntropyLoss(), classified((3, 2), 5, 4))
        v = problem.vectors()
        kept = problem.operator(kind)
        assert torch.equal(kept @ v, kept @ v)
        assert_close(problem.operator(kind, keep_graph=False) @ v, kept @ v, 1e-12)
        kept.verify()


@pytest.mark.slow
@each_kind
def test_memory_after_500_measurements(kind):
    with seeded():
        model = nn.Sequential(nn.Linear(200, 400), nn.Tanh(), nn.Linear(400, 10))
        batch = (torch.randn(256, 200), torch.randint(10, (256,)))

    def measure():
        top_eigenpairs(KINDS[kind](model, CROSS_ENTROPY, [batch]), tol=0.1, max_steps=6)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(50):
        measure()
    before = peak()
    for _ in range(500):
        measure()
    assert peak() <= 1.02 * before
