"""What holds for the Hessian and the Gauss-Newton matrix of any model."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchlr import GGNOperator, HessianOperator, lanczos, supervised, top_eigenpairs
from cases import CASES, Problem, classified, seeded, unsettle
from reference import dense, dense_ggn, dense_hessian, gradients

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator}
CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())

each_kind = pytest.mark.parametrize("kind", KINDS)
each_case = pytest.mark.parametrize("case", CASES)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative distance in norm; 1e-10 leaves float64 some five digits of rounding."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


class TestAgainstTheDenseMatrix:
    @each_kind
    @each_case
    def test_product_with_a_vector(self, case, kind):
        problem = CASES[case]()
        v = problem.vectors()
        assert_close(problem.operator(kind) @ v, dense(case, kind) @ v)

    @each_kind
    @each_case
    def test_product_with_a_block(self, case, kind):
        problem = CASES[case]()
        v = problem.vectors(5)
        assert_close(problem.operator(kind) @ v, dense(case, kind) @ v)

    @each_kind
    @pytest.mark.parametrize("case", ["mlp-tanh", "tied", "frozen", "unused"])
    def test_every_entry(self, case, kind):
        problem = CASES[case]()
        matrix = problem.operator(kind) @ torch.eye(problem.size, dtype=torch.float64)
        assert_close(matrix, dense(case, kind))

    @each_kind
    @each_case
    def test_both_ends_of_the_spectrum(self, case, kind):
        problem = CASES[case]()
        values = torch.linalg.eigvalsh(dense(case, kind))
        pairs = top_eigenpairs(problem.operator(kind), which="both", tol=1e-3)
        assert pairs.converged
        rounding = 1e-13 * values.abs().max()
        assert abs(pairs.values[0] - values[-1]) <= pairs.residuals[0] + rounding
        assert abs(pairs.values[1] - values[0]) <= pairs.residuals[1] + rounding

    @each_kind
    @pytest.mark.parametrize("case", ["mlp-tanh", "norms-train", "regression"])
    def test_eigsh_finds_the_same_eigenvalues(self, case, kind):
        problem = CASES[case]()
        operator = problem.operator(kind)
        expected = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
        pairs = top_eigenpairs(operator, 3, tol=1e-6)
        expected = torch.from_numpy(expected.copy()).flip(0)
        torch.testing.assert_close(pairs.values, expected, rtol=1e-6, atol=0)

    @each_kind
    @pytest.mark.parametrize("training", [False, True])
    def test_dropout_in_train_mode_keeps_the_masks_it_drew(self, kind, training):
        with seeded():
            layers = [nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)]
            model = unsettle(nn.Sequential(*layers)).train(training)
            problem = Problem(model, nn.CrossEntropyLoss(), classified((5, 3, 2), 5))
        masks = []
        hook = model[2].register_forward_hook(
            lambda module, inputs, output: masks.append((output / inputs[0]).detach())
        )
        operator = problem.operator(kind)
        v = problem.vectors(2)
        product = operator @ v
        hook.remove()
        assert len(masks) == 3
        assert all(bool((mask == 0).any()) == training for mask in masks)

        expected = 0
        for mask, pair in zip(masks, problem.pairs, strict=True):
            masked = nn.Sequential(model[0], model[1], Scale(mask), model[3])
            by_hand = Problem(masked, problem.criterion, [pair])
            matrix = {"hessian": dense_hessian, "ggn": dense_ggn}[kind](by_hand)
            expected = expected + len(mask) / 10 * matrix @ v
        assert_close(product, expected)

    @each_kind
    def test_fused_attention_equals_attention_written_out(self, kind):
        with seeded():
            fused = unsettle(Attention(fused=True))
            problem = Problem(fused, nn.MSELoss(), [(torch.randn(2, 5, 4).double(),) * 2])
        by_hand = Attention(fused=False).double()
        by_hand.load_state_dict(fused.state_dict())
        matrix = {"hessian": dense_hessian, "ggn": dense_ggn}[kind](
            Problem(by_hand, problem.criterion, problem.pairs)
        )
        v = problem.vectors(3)
        assert_close(problem.operator(kind) @ v, matrix @ v)


class Scale(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT / 2).softmax(-1) @ v  # 2 = sqrt(4)


class TestMatrix:
    @each_kind
    @each_case
    def test_is_symmetric(self, case, kind):
        problem = CASES[case]()
        operator = problem.operator(kind)
        u, v = problem.vectors(seed=1), problem.vectors(seed=2)
        a_v = operator @ v
        assert abs(u @ a_v - (operator @ u) @ v) <= 1e-12 * u.norm() * a_v.norm()

    @each_kind
    @pytest.mark.parametrize("scale", [0.0, -3.0, 1e6])
    def test_is_linear(self, kind, scale):
        problem = CASES["norms-train"]()
        operator = problem.operator(kind)
        u, v = problem.vectors(seed=1), problem.vectors(seed=2)
        assert_close(operator @ (u + scale * v), operator @ u + scale * (operator @ v))

    @each_kind
    @each_case
    def test_gives_the_same_product_again(self, case, kind):
        problem = CASES[case]()
        operator, v = problem.operator(kind), problem.vectors()
        first = operator @ v
        operator @ problem.vectors(2, seed=1)
        assert torch.equal(operator @ v, first)
        assert torch.equal(problem.operator(kind) @ v, first)

    @each_kind
    @each_case
    def test_is_the_same_with_or_without_kept_graphs(self, case, kind):
        problem = CASES[case]()
        v = problem.vectors(2)
        kept = problem.operator(kind, keep_graph=True) @ v
        # The Gauss-Newton matrix is multiplied another way then.
        assert_close(problem.operator(kind, keep_graph=False) @ v, kept, 1e-12)

    @each_kind
    def test_norm_mode_is_part_of_its_identity(self, kind):
        problem = CASES["norms-train"]()
        v = problem.vectors()
        train = problem.operator(kind, norm_mode="train") @ v
        evaluation = problem.operator(kind, norm_mode="eval") @ v
        assert (train - evaluation).norm() > 0.1 * train.norm()

    @each_kind
    @pytest.mark.parametrize("norm_mode", ["train", "eval"])
    def test_the_models_own_flags_do_not_reach_its_norms(self, kind, norm_mode):
        problem = CASES["norms-train"]()
        v = problem.vectors()
        in_eval = problem.operator(kind, norm_mode=norm_mode) @ v
        problem.model.train()
        assert torch.equal(problem.operator(kind, norm_mode=norm_mode) @ v, in_eval)

    @each_kind
    def test_norm_mode_is_optional_without_norms(self, kind):
        problem = CASES["mlp-tanh"]()
        v = problem.vectors()
        plain = problem.operator(kind) @ v
        assert torch.equal(problem.operator(kind, norm_mode="eval") @ v, plain)

    @each_kind
    @pytest.mark.parametrize("norm_mode", ["eval", "train"])
    def test_the_cut_into_batches_matters_in_train_mode_only(self, kind, norm_mode):
        problem = CASES[f"preresnet-{norm_mode}"]()
        x, y = (torch.cat(parts) for parts in zip(*problem.pairs, strict=True))
        whole = Problem(problem.model, problem.criterion, [(x, y)], norm_mode)
        v = problem.vectors()
        product = whole.operator(kind) @ v
        difference = (problem.operator(kind) @ v - product).norm() / product.norm()
        assert difference < 1e-10 if norm_mode == "eval" else difference > 0.1

    @each_kind
    def test_describes_itself(self, kind):
        operator = CASES["norms-eval"]().operator(kind)
        name = KINDS[kind].__name__
        assert repr(operator) == f"{name}(P=111, batches=3, samples=10, norm_mode='eval')"
        assert operator.shape == (111, 111)
        assert operator.dtype == torch.float64
        assert operator.device == torch.device("cpu")
        assert operator.samples == (5, 3, 2)

    @each_kind
    def test_a_loader_is_read_once(self, kind):
        problem = CASES["mlp-tanh"]()
        samples = [(a, b) for x, y in problem.pairs for a, b in zip(x, y, strict=True)]
        shuffled = DataLoader(
            samples, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0)
        )
        operator = KINDS[kind](problem.model, CROSS_ENTROPY, shuffled)
        assert operator.samples == (4, 4, 2)
        v = problem.vectors()
        product = operator @ v
        assert_close(product, dense("mlp-tanh", kind) @ v)
        assert torch.equal(operator @ v, product)

    @each_kind
    def test_a_data_parallel_model_is_unwrapped(self, kind):
        problem = CASES["norms-train"]()
        wrapped = nn.DataParallel(problem.model)
        wrapped.register_forward_hook(lambda *_: pytest.fail("the wrapper was called"))
        v = problem.vectors()
        operator = KINDS[kind](wrapped, CROSS_ENTROPY, problem.batches, norm_mode="train")
        assert torch.equal(operator @ v, problem.operator(kind) @ v)

    @pytest.mark.slow
    @each_kind
    def test_a_compiled_model_is_run_uncompiled(self, kind):
        problem = CASES["norms-train"]()
        v = problem.vectors()
        expected = problem.operator(kind) @ v
        compiled = torch.compile(problem.model, backend="aot_eager")
        compiled(problem.pairs[0][0])  # a compiled forward pass has no second derivative
        operator = KINDS[kind](compiled, CROSS_ENTROPY, problem.batches, norm_mode="train")
        assert torch.equal(operator @ v, expected)


class TestPerBatch:
    @each_kind
    @each_case
    def test_products_average_to_the_product(self, case, kind):
        problem = CASES[case]()
        operator, v = problem.operator(kind), problem.vectors()
        parts = list(operator.batch_products(v))
        assert len(parts) == len(problem.pairs)
        mean = sum(n * part for n, part in zip(operator.samples, parts, strict=True)) / sum(
            operator.samples
        )
        assert_close(mean, operator @ v, 1e-12)

    @each_kind
    def test_each_batch_may_have_a_vector_of_its_own(self, kind):
        problem = CASES["mlp-tanh"]()
        operator, vectors = problem.operator(kind), problem.vectors(3).T.contiguous()
        own = list(operator.batch_products(iter(vectors)))
        assert operator.num_products == 1
        for number, (product, vector) in enumerate(zip(own, vectors, strict=True)):
            assert torch.equal(product, list(operator.batch_products(vector))[number])
        with pytest.raises(ValueError, match="shorter"):
            list(operator.batch_products(iter(vectors[:2])))

    @each_kind
    @each_case
    def test_gradients_are_those_of_autograd(self, case, kind):
        problem = CASES[case]()
        ours = list(problem.operator(kind).batch_gradients())
        for gradient, expected in zip(ours, gradients(problem), strict=True):
            assert_close(gradient, expected)

    @each_kind
    def test_loss_is_the_mean_over_samples(self, kind):
        problem = CASES["mlp-tanh"]()
        x, y = (torch.cat(parts) for parts in zip(*problem.pairs, strict=True))
        expected = problem.criterion(problem.model(x), y)
        loss = problem.operator(kind).loss()
        torch.testing.assert_close(loss, expected.detach())
        assert not loss.requires_grad

    @each_kind
    def test_one_batch_alone_has_the_matrix_of_its_product(self, kind):
        problem = CASES["norms-train"]()
        v = problem.vectors()
        for product, pair in zip(
            problem.operator(kind).batch_products(v), problem.pairs, strict=True
        ):
            alone = Problem(problem.model, problem.criterion, [pair], "train")
            assert_close(product, alone.operator(kind) @ v, 1e-12)


class TestCost:
    @each_kind
    def test_counts_products_and_columns(self, kind):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator(kind)
        assert operator.num_products == 0
        operator @ problem.vectors()
        assert operator.num_products == 1
        operator @ problem.vectors(7)
        assert operator.num_products == 8
        list(operator.batch_products(problem.vectors()))
        assert operator.num_products == 9
        list(operator.batch_gradients())
        operator.loss()
        assert operator.num_products == 9

    @pytest.mark.parametrize(
        ("kind", "columns", "passes"),
        [("hessian", (), 1), ("hessian", (6,), 1), ("ggn", (6,), 1), ("ggn", (), 2)],
    )
    def test_without_kept_graphs_a_product_of_any_width_records_each_batch_once(
        self, kind, columns, passes
    ):
        problem = CASES["mlp-tanh"]()
        calls = count_forward_passes(problem.model)
        operator = problem.operator(kind, keep_graph=False)
        for repetition in (1, 2):
            operator @ problem.vectors(*columns)
            assert len(calls) == 3 * passes * repetition

    @each_kind
    def test_with_kept_graphs_each_batch_is_recorded_once_in_all(self, kind):
        problem = CASES["mlp-tanh"]()
        calls = count_forward_passes(problem.model)
        operator = problem.operator(kind)
        assert not calls
        for _ in range(3):
            operator @ problem.vectors(2)
            list(operator.batch_products(problem.vectors()))
            list(operator.batch_gradients())
            operator.loss()
        assert len(calls) == 3

    @each_kind
    def test_graphs_go_with_the_operator(self, kind):
        # At once, not when the garbage collector comes round: they are the bulk of the memory.
        problem = CASES["mlp-tanh"]()
        outputs = []
        hook = problem.model.register_forward_hook(
            lambda module, inputs, output: outputs.append(weakref.ref(output))
        )
        operator = problem.operator(kind)
        operator @ problem.vectors(2)
        hook.remove()
        assert len(outputs) == 3
        graphs = [weakref.ref(operator._graphs.get(k).product) for k in range(3)]
        del operator
        assert not any(ref() for ref in (*outputs, *graphs))


def count_forward_passes(model: nn.Module) -> list[None]:
    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    return calls


class TestFollowsTheModel:
    @each_kind
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_after_an_optimizer_step_it_is_the_new_weights_matrix(self, kind, optimizer):
        problem = CASES["norms-train"]()
        operator, v = problem.operator(kind), problem.vectors()
        before = operator @ v
        optimizer = optimizer(problem.model.parameters(), lr=0.1)
        for x, y in problem.pairs:
            optimizer.zero_grad()
            problem.criterion(problem.model(x), y).backward()
            optimizer.step()
        after = operator @ v
        assert (after - before).norm() > 0.01 * before.norm()
        assert torch.equal(after, problem.operator(kind) @ v)

    @each_kind
    def test_after_loading_weights(self, kind):
        problem = CASES["mlp-tanh"]()
        operator, v = problem.operator(kind), problem.vectors()
        operator @ v
        with seeded(1):
            state = {k: torch.randn_like(t) for k, t in problem.model.state_dict().items()}
        problem.model.load_state_dict(state)
        assert torch.equal(operator @ v, problem.operator(kind) @ v)

    @each_kind
    def test_after_weights_were_replaced_as_a_whole(self, kind):
        problem = CASES["mlp-tanh"]()
        operator, v = problem.operator(kind), problem.vectors()
        operator @ v
        nn.utils.vector_to_parameters(problem.vectors(seed=3), problem.model.parameters())
        assert torch.equal(operator @ v, problem.operator(kind) @ v)

    @each_kind
    def test_after_a_frozen_weight_changed(self, kind):
        problem = CASES["frozen"]()
        operator, v = problem.operator(kind), problem.vectors()
        before = operator @ v
        with torch.no_grad():
            next(problem.model.parameters()).mul_(2)
        after = operator @ v
        assert not torch.equal(after, before)
        assert torch.equal(after, problem.operator(kind) @ v)

    @each_kind
    def test_after_running_statistics_changed(self, kind):
        problem = CASES["norms-eval"]()
        operator, v = problem.operator(kind), problem.vectors()
        before = operator @ v
        problem.model.train()(problem.pairs[0][0])
        problem.model.eval()
        after = operator @ v
        assert not torch.equal(after, before)
        assert torch.equal(after, problem.operator(kind) @ v)

    @each_kind
    def test_after_a_buffer_was_replaced(self, kind):
        problem = CASES["norms-eval"]()
        operator, v = problem.operator(kind), problem.vectors()
        before = operator @ v
        norm = next(m for m in problem.model.modules() if isinstance(m, nn.BatchNorm1d))
        norm.running_var = 4 * norm.running_var
        after = operator @ v
        assert not torch.equal(after, before)
        assert torch.equal(after, problem.operator(kind) @ v)

    @each_kind
    @pytest.mark.parametrize("used", [False, True])
    def test_but_not_if_the_parameters_are_others(self, kind, used):
        problem = CASES["mlp-tanh"]()
        operator, v = problem.operator(kind), problem.vectors()
        if used:
            operator @ v
        state = {k: 2 * t for k, t in problem.model.state_dict().items()}
        problem.model.load_state_dict(state, assign=True)
        with pytest.raises(ValueError, match=r"are others than .* make a new operator"):
            operator @ v

    @each_kind
    def test_after_dropout_was_switched_off(self, kind):
        problem = restless_problem()
        operator, v = problem.operator(kind), problem.vectors()
        before = operator @ v
        problem.model.eval()
        after = operator @ v
        assert not torch.equal(after, before)
        assert torch.equal(after, problem.operator(kind) @ v)


class TestDropout:
    @each_kind
    def test_masks_differ_between_batches_and_generators_and_repeat_with_a_seed(self, kind):
        problem = restless_problem()
        x, y = problem.pairs[0]
        problem = Problem(problem.model, problem.criterion, [(x, y), (x, y)], "eval")
        v = problem.vectors()

        def parts(seed):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return list(problem.operator(kind, generator=generator).batch_products(v))

        first, second = parts(1)
        assert not torch.equal(first, second)
        assert torch.equal(parts(1)[0], first)
        assert not torch.equal(parts(2)[0], first)
        assert torch.equal(parts(None)[0], parts(None)[0])

    @each_kind
    def test_a_generator_moves_on_from_operator_to_operator(self, kind):
        problem = restless_problem()
        v = problem.vectors()
        generator = torch.Generator().manual_seed(0)
        first = problem.operator(kind, generator=generator) @ v
        assert not torch.equal(problem.operator(kind, generator=generator) @ v, first)


def restless_problem() -> Problem:
    """Whatever a careless measurement would disturb: norms, dropout, mixed flags."""
    with seeded():
        model = nn.Sequential(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.3),
            nn.Tanh(),
            nn.Unflatten(1, (2, 3)),
            nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.BatchNorm1d(6, momentum=None),
            nn.Linear(6, 3),
        )
        unsettle(model).train()
        model[1].eval()  # flags that no single train() or eval() would restore
        model[7].eval()
        model[0].weight.requires_grad_(False)
        return Problem(model, nn.CrossEntropyLoss(), classified((5, 3, 2), 4), "train")


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a measurement must leave alone; tensors as their bytes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: bits(t) for name, t in tensors},
        "versions": {name: t._version for name, t in tensors},
        "gradients": {
            name: None if p.grad is None else (id(p.grad), bits(p.grad))
            for name, p in model.named_parameters()
        },
        "requires_grad": {name: t.requires_grad for name, t in tensors},
        "identities": {name: id(t) for name, t in tensors},
        "flags": {name: m.training for name, m in model.named_modules()},
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "random state": bits(torch.get_rng_state()),
        "gradients enabled": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "function modes": torch._C._len_torch_function_stack(),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


MEASUREMENTS = {
    "vector": lambda operator, v: operator @ v,
    "block": lambda operator, v: operator @ v.unsqueeze(1).expand(-1, 3),
    "batch products": lambda operator, v: list(operator.batch_products(v)),
    "interrupted batch products": lambda operator, v: next(operator.batch_products(v)),
    "batch gradients": lambda operator, v: list(operator.batch_gradients()),
    "loss": lambda operator, v: operator.loss(),
    "lanczos": lambda operator, v: lanczos(operator, 4),
    "top eigenpairs": lambda operator, v: top_eigenpairs(operator, max_steps=4),
    "scipy": lambda operator, v: operator.to_scipy() @ v.numpy(),
}


class TestLeavesNoTrace:
    @each_kind
    @pytest.mark.parametrize("norm_mode", ["train", "eval"])
    @pytest.mark.parametrize("with_gradients", [False, True])
    @pytest.mark.parametrize("keep_graph", [False, True])
    def test_bitwise(self, kind, norm_mode, with_gradients, keep_graph):
        problem = restless_problem()
        if with_gradients:
            problem.criterion(problem.model(problem.pairs[0][0]), problem.pairs[0][1]).backward()
        before = snapshot(problem.model)
        operator = problem.operator(kind, norm_mode=norm_mode, keep_graph=keep_graph)
        v = problem.vectors()
        v_before = bits(v)
        for name, measure in MEASUREMENTS.items():
            measure(operator, v)
            assert snapshot(problem.model) == before, name
            assert bits(v) == v_before

    @each_kind
    def test_even_if_the_loss_fails(self, kind):
        problem = restless_problem()
        before = snapshot(problem.model)

        class Overflow(RuntimeError):
            pass

        def fail(*_):
            raise Overflow

        hook = problem.model[-1].register_forward_hook(fail)
        before["hooks"] = snapshot(problem.model)["hooks"]
        with pytest.raises(Overflow):
            problem.operator(kind) @ problem.vectors()
        assert snapshot(problem.model) == before
        hook.remove()

    @each_kind
    def test_training_goes_on_as_if_nothing_had_been_measured(self, kind):
        def train(*, measured: bool) -> Tensor:
            problem = restless_problem()
            optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
            operator = problem.operator(kind)
            with seeded():
                for x, y in problem.pairs:
                    optimizer.zero_grad()
                    if measured:
                        operator @ problem.vectors()
                    problem.criterion(problem.model(x), y).backward()
                    optimizer.step()
            return nn.utils.parameters_to_vector(problem.model.parameters())

        assert torch.equal(train(measured=True), train(measured=False))

    @each_kind
    def test_products_keep_no_graph(self, kind):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator(kind)
        v = problem.vectors().requires_grad_()
        assert not (operator @ v).requires_grad
        assert not any(p.requires_grad for p in operator.batch_products(v))
        assert not any(g.requires_grad for g in operator.batch_gradients())

    @each_kind
    def test_seeds_no_accelerator_that_it_does_not_put_back(self, kind, monkeypatch):
        def refuse(seed):
            pytest.fail("a model on the CPU must not seed the GPUs")

        problem = restless_problem()
        monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
        problem.operator(kind) @ problem.vectors()


class TestUnderAnyCaller:
    @each_kind
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("case", ["norms-train", "transformer"])
    def test_gradient_switches_do_not_matter(self, kind, context, case):
        problem = CASES[case]()
        v = problem.vectors()
        expected = problem.operator(kind) @ v
        recorded_outside = problem.operator(kind)
        recorded_outside @ v
        with context():
            for operator in (problem.operator(kind), recorded_outside):
                assert torch.equal(operator @ v, expected)
                assert torch.equal(operator @ v.clone(), expected)  # an inference tensor
                assert len(list(operator.batch_products(v))) == len(problem.pairs)

    @each_kind
    def test_buffers_made_in_inference_mode_are_accepted(self, kind):
        problem = CASES["norms-eval"]()
        v = problem.vectors()
        expected = problem.operator(kind) @ v
        with torch.inference_mode():
            problem.model[1].running_mean = problem.model[1].running_mean.clone()
        assert torch.equal(problem.operator(kind) @ v, expected)

    @each_kind
    def test_autocast_does_not_reach_products(self, kind):
        problem = CASES["norms-train"]()
        problem.model.float()
        pairs = [(x.float(), y) for x, y in problem.pairs]
        problem = Problem(problem.model, problem.criterion, pairs, "train")
        v = problem.vectors().float()
        expected = problem.operator(kind) @ v
        parts = list(problem.operator(kind).batch_products(v))
        recorded_outside = problem.operator(kind)
        recorded_outside @ v
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for operator in (problem.operator(kind), recorded_outside):
                assert torch.equal(operator @ v, expected)
                for part, expected_part in zip(operator.batch_products(v), parts, strict=True):
                    assert torch.equal(part, expected_part)
                    assert torch.is_autocast_enabled("cpu")  # between batches it is the caller's

    @each_kind
    def test_float32_agrees_with_float64(self, kind):
        problem = CASES["mlp-tanh"]()
        v = problem.vectors()
        expected = problem.operator(kind) @ v
        single = Problem(
            problem.model.float(), problem.criterion, [(x.float(), y) for x, y in problem.pairs]
        )
        product = single.operator(kind) @ v.float()
        assert product.dtype == torch.float32
        assert_close(product.double(), expected, 1e-5)  # a few float32 roundings (6e-8 each)


class TestRefuses:
    @pytest.fixture
    def model(self):
        return CASES["mlp-tanh"]().model

    @pytest.fixture
    def batches(self):
        return CASES["mlp-tanh"]().batches

    @each_kind
    def test_missing_norm_mode(self, kind):
        problem = CASES["norms-train"]()
        with pytest.raises(ValueError, match=r"4 layers, first '1'.*norm_mode='train'.*'eval'"):
            problem.operator(kind, norm_mode=None)

    @each_kind
    @pytest.mark.parametrize("case", ["norms-train", "mlp-tanh"])
    def test_unknown_norm_mode(self, kind, case):
        with pytest.raises(ValueError, match="norm_mode must be 'train' or 'eval', got 'batch'"):
            CASES[case]().operator(kind, norm_mode="batch")

    @each_kind
    def test_a_model_without_trainable_parameters(self, kind, model, batches):
        model.requires_grad_(False)
        with pytest.raises(ValueError, match=r"no trainable parameters \(6 frozen\); set requires"):
            KINDS[kind](model, CROSS_ENTROPY, batches)
        with pytest.raises(ValueError, match=r"parameters \(0 frozen\), nor any other"):
            KINDS[kind](nn.ReLU(), CROSS_ENTROPY, batches)

    @each_kind
    def test_arguments_in_another_order(self, kind, model, batches):
        with pytest.raises(
            TypeError, match=r"must be a torch\.nn\.Module, got Supervised.*order of"
        ):
            KINDS[kind](CROSS_ENTROPY, model, batches)

    @each_kind
    def test_a_criterion_in_place_of_a_loss(self, kind, model, batches):
        with pytest.raises(TypeError, match=r"batchlr\.supervised\(criterion\)"):
            KINDS[kind](model, nn.CrossEntropyLoss(), batches)

    def test_a_loss_of_outputs_and_targets_gets_a_note(self, model, batches):
        """What kind of function it is, only the call shows."""
        operator = HessianOperator(model, lambda x, y: F.cross_entropy(model(x), y), batches)
        with pytest.raises(AttributeError, match="'MLP' object has no attribute") as caught:
            operator.loss()
        (note,) = caught.value.__notes__
        assert note.startswith("the loss was called as loss_fn(model, batch); ")

    def test_a_mistake_inside_the_model_gets_none(self, batches):
        class Broken(nn.Linear):
            def forward(self, x):
                return super().forward(x, 1)

        operator = HessianOperator(Broken(6, 3), CROSS_ENTROPY, batches)
        with pytest.raises(TypeError, match="forward") as caught:
            operator.loss()
        assert not hasattr(caught.value, "__notes__")

    @each_kind
    def test_a_frozen_parameter_of_another_dtype_is_no_obstacle(self, kind):
        problem = CASES["unused"]()
        problem.model.spare_layer.float().requires_grad_(False)
        assert problem.operator(kind).shape == (54, 54)

    @each_kind
    def test_empty_batches(self, kind, model):
        with pytest.raises(ValueError, match="batches is empty"):
            KINDS[kind](model, CROSS_ENTROPY, [])

    @each_kind
    def test_a_single_batch_in_place_of_a_list(self, kind, model, batches):
        with pytest.raises(TypeError, match=r"one tuple of tensors; pass \[\(x, y\)\]"):
            KINDS[kind](model, CROSS_ENTROPY, batches[0])

    @each_kind
    def test_batches_that_cannot_be_counted(self, kind, model):
        with pytest.raises(TypeError, match="cannot count the samples of a batch of type str"):
            KINDS[kind](model, CROSS_ENTROPY, ["digits"])

    @each_kind
    def test_a_loss_per_sample(self, kind, model, batches):
        per_sample = supervised(lambda z, y: F.cross_entropy(z, y, reduction="none"))
        operator = KINDS[kind](model, per_sample, batches)
        with pytest.raises(ValueError, match=r"must be a scalar, got shape \(5,\).*mean over"):
            operator @ torch.ones(51, dtype=torch.float64)

    @each_kind
    def test_a_loss_that_is_no_tensor(self, kind, model, batches):
        halves = supervised(nn.CrossEntropyLoss())
        loss_fn = type(
            "Halves",
            (),
            {
                "__call__": lambda self, m, b: halves(m, b).item(),
                "outputs": lambda self, m, b: (halves.outputs(m, b),),
                "loss": lambda self, z, b: halves.loss(z, b),
            },
        )()
        operator = KINDS[kind](model, loss_fn, batches)
        given_type = {"hessian": "float", "ggn": "tuple"}[kind]
        with pytest.raises(TypeError, match=f"must return a tensor, got {given_type}"):
            operator @ torch.ones(51, dtype=torch.float64)

    @each_kind
    def test_a_vector_of_the_wrong_shape(self, kind, model, batches):
        operator = KINDS[kind](model, CROSS_ENTROPY, batches)
        for method in (operator.__matmul__, lambda v: next(operator.batch_products(v))):
            with pytest.raises(ValueError, match=r"expected a vector \(51,\).*got shape \(50,\)"):
                method(torch.ones(50, dtype=torch.float64))
        assert operator.num_products == 0

    @each_kind
    def test_a_batch_too_small_to_normalise(self, kind):
        problem = CASES["norms-train"]()
        problem.pairs.append((torch.ones(1, 3, dtype=torch.float64), torch.tensor([0])))
        operator = problem.operator(kind)
        with pytest.raises(ValueError, match=r"one value per channel, got input \(1, 4\)"):
            operator @ problem.vectors()

    @each_kind
    def test_products_that_are_not_finite(self, kind):
        problem = CASES["regression"]()
        with torch.no_grad():
            problem.model[0].weight.fill_(torch.nan)
        operator = problem.operator(kind)
        with pytest.raises(ArithmeticError, match="products are not finite"):
            lanczos(operator, 3)
        with pytest.raises(ArithmeticError, match="products are not finite"):
            top_eigenpairs(operator)


class TestLargestGraph:
    @pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
    def test_grows_with_the_samples_run_together(self, operator):
        with seeded():
            model = nn.Sequential(nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 3))
            x, y = torch.randn(60, 8), torch.arange(60) % 3
        batches = [(x[:20], y[:20]), (x[20:], y[20:])]
        alone = operator(model, CROSS_ENTROPY, batches[1:]).largest_graph()
        assert operator(model, CROSS_ENTROPY, batches).largest_graph() == alone
        assert alone > 40 * 50 * 4  # at least the hidden layer's outputs
        halved = operator(model, CROSS_ENTROPY, batches, micro_batch=20).largest_graph()
        assert 40 * 4 < alone - halved < alone

    @pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
    def test_one_is_kept_for_samples_run_together(self, operator):
        model = nn.Linear(2, 3)
        batches = [(torch.ones(n, 2), torch.zeros(n, dtype=torch.long)) for n in (5, 8)]
        assert operator(model, CROSS_ENTROPY, batches).num_graphs == 2
        assert operator(model, CROSS_ENTROPY, batches, micro_batch=3).num_graphs == 2 + 3
