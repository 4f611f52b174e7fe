"""Graphs are measured, and kept while the budget lasts."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchlr import GGNOperator, HessianOperator, supervised
from batchlr.operators.graphs import (
    ComputedAnew,
    default_budget,
    free_main_memory,
    graph_bytes,
    holding_all,
)
from cases import CASES, Problem, classified, seeded

each_kind = pytest.mark.parametrize("kind", ["hessian", "ggn"])


def count_runs(model: nn.Module) -> list[None]:
    runs: list[None] = []
    model.register_forward_hook(lambda *_: runs.append(None))
    return runs


class TestGraphBytes:
    def test_counts_what_is_saved_once(self):
        x = torch.randn(10, 20, requires_grad=True)  # 800 bytes
        y = x.exp()  # saved by exp and by the product
        z = (y * y).sum()
        assert graph_bytes([z]) == 800 + 4  # y, and z itself

    def test_weights_are_there_anyway(self):
        w = torch.randn(30, 30, requires_grad=True)
        x = torch.randn(5, 30)
        z = (x @ w).sum()
        assert graph_bytes([z]) == 4 * 5 * 30 + 4  # x
        assert graph_bytes([z], owned=[x, w]) == 4

    def test_sees_what_layers_of_python_save(self):
        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x.new_zeros(100))
                return 2 * x

            @staticmethod
            def backward(ctx, cotangent):
                return 2 * cotangent

        z = Twice.apply(torch.ones(1, requires_grad=True))
        assert graph_bytes([z]) == 4 + 400

    def test_checkpoints_are_not_run(self):
        runs = []

        def block(x):
            runs.append(None)
            return x.exp().sin()

        z = checkpoint(block, torch.ones(50, requires_grad=True), use_reentrant=False).sum()
        held = graph_bytes([z], computed_anew=True)
        if torch.__version__ >= (2, 14):  # torch tells what is held
            assert held < 400
        else:  # as if all was
            assert held == 4 + 4 + 2 * 200
        assert len(runs) == 1

    def test_a_twice_as_large_batch_has_twice_the_graph(self):
        with seeded():
            model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))

        def size(samples):
            batch = (torch.randn(samples, 8), torch.zeros(samples, dtype=torch.int64))
            operator = HessianOperator(model, supervised(nn.CrossEntropyLoss()), [batch])
            operator.loss()
            return operator._graphs.bytes_of(operator._graphs.get(0))

        small, large, larger = (size(n) for n in (1000, 2000, 3000))
        assert larger - large == pytest.approx(large - small, rel=1e-3)
        assert large - small > 1000 * 4 * (64 + 64 + 8)  # tanh, its derivative and the inputs


class TestHoldingAll:
    def test_a_graph_that_holds_all_is_recorded(self):
        x = torch.ones(3, requires_grad=True)
        with holding_all():
            z = x.exp().sum()
        z.backward()
        assert x.grad is not None

    def test_checkpoints_are_told(self):
        x = torch.ones(3, requires_grad=True)
        with pytest.raises(ComputedAnew), holding_all():
            checkpoint(torch.exp, x, use_reentrant=False)
        checkpoint(torch.exp, x, use_reentrant=False)  # allowed again

    def test_among_other_hooks_nothing_is_known_to_be_held(self):
        save_on_cpu = torch.autograd.graph.save_on_cpu
        with save_on_cpu(), pytest.raises(ComputedAnew), holding_all():
            pass

    def test_other_errors_pass(self):
        with pytest.raises(RuntimeError, match="of another kind"), holding_all():
            raise RuntimeError("of another kind")

    def test_who_forbids_hooks_goes_on_doing_so(self):
        forbidden = torch.autograd.graph.disable_saved_tensors_hooks("no hooks here")
        with forbidden:
            with holding_all():
                pass
            with pytest.raises(RuntimeError, match="no hooks here"):
                torch.autograd.graph.save_on_cpu().__enter__()


class TestBudget:
    @each_kind
    def test_graphs_beyond_it_are_recorded_anew(self, kind, caplog):
        problem = CASES["mlp-tanh"]()
        v = problem.vectors(8)
        expected = problem.operator(kind) @ v
        operator = problem.operator(kind)
        operator @ v
        size = operator._graphs.bytes_of(operator._graphs.get(0))
        runs = count_runs(problem.model)
        limited = problem.operator(kind, memory_budget=size)
        with caplog.at_level(logging.INFO, logger="batchlr"):
            for repetition in range(3):
                # Another order of summation, and another way to the Gauss-Newton matrix.
                torch.testing.assert_close(limited @ v, expected, rtol=1e-10, atol=1e-14)
                assert len(runs) == 3 + 2 * repetition
        assert "graphs of 1 batches fill the memory budget" in caplog.text

    @each_kind
    def test_nothing_fits_into_nothing(self, kind):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator(kind, memory_budget=0)
        operator @ problem.vectors()
        assert all(operator._graphs.get(k) is None for k in range(3))

    def test_a_new_model_state_has_the_whole_budget_again(self):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator("hessian")
        operator @ problem.vectors()
        size = sum(operator._graphs.bytes_of(operator._graphs.get(k)) for k in range(3))
        limited = problem.operator("hessian", memory_budget=size - 1)  # less than all of them
        for _ in range(3):
            with torch.no_grad():
                next(problem.model.parameters()).mul_(1.1)
            limited @ problem.vectors()
            kept = [limited._graphs.get(k) is not None for k in range(3)]
            assert kept == [True, True, False]

    def test_default_is_a_share_of_free_memory(self):
        assert 1 << 20 < default_budget(torch.device("cpu")) < 1 << 45

    @pytest.mark.parametrize(
        ("folder", "limit", "used"),
        [
            (".", "memory.max", "memory.current"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ],
    )
    def test_a_container_s_limit_counts_less_what_it_cannot_forget(
        self, tmp_path, folder, limit, used
    ):
        home = tmp_path / folder
        home.mkdir(exist_ok=True)
        (home / limit).write_text("5000\n")
        (home / used).write_text("4000\n")
        (home / "memory.stat").write_text("active_file 700\ninactive_file 2000\n")
        assert free_main_memory(tmp_path) == 3000

    def test_no_limit_is_none(self, tmp_path):
        (tmp_path / "memory.max").write_text("max\n")
        assert free_main_memory(tmp_path) > 1 << 20


class TestExpectedProducts:
    @each_kind
    def test_for_one_nothing_is_kept(self, kind):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator(kind, expected_products=1)
        operator @ problem.vectors()
        assert operator._graphs.get(0) is None

    def test_for_one_the_gauss_newton_graph_is_an_ordinary_one(self):
        problem = CASES["vgg-eval"]()
        v = problem.vectors()
        sizes = []
        for expected in (1, 10):
            operator = problem.operator("ggn", expected_products=expected, keep_graph=True)
            operator @ v
            sizes.append(operator._graphs.bytes_of(operator._graphs.get(0)))
        assert sizes[0] < 0.8 * sizes[1]


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"keep_graph": "always"}, "keep_graph must be True, False or 'auto', got 'always'"),
            ({"memory_budget": -1}, "memory_budget must be a number of bytes.*got -1"),
            ({"memory_budget": 1, "keep_graph": True}, "for keep_graph='auto' only"),
            ({"expected_products": 0}, "expected_products must be at least 1, got 0"),
            ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ],
    )
    def test_illegal_options(self, options, words):
        with pytest.raises(ValueError, match=words):
            CASES["mlp-tanh"]().operator("hessian", **options)

    @each_kind
    def test_micro_batches_of_a_model_that_normalises_over_them(self, kind):
        problem = CASES["preresnet-train"]()
        with pytest.raises(ValueError, match=r"micro_batch would change.*norm_mode='eval'"):
            problem.operator(kind, micro_batch=2)
        problem.operator(kind, micro_batch=2, norm_mode="eval")

    @each_kind
    @pytest.mark.parametrize("norm_mode", ["train", "eval"])
    def test_micro_batches_of_norms_without_running_statistics(self, kind, norm_mode):
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
        problem = Problem(model.double(), nn.CrossEntropyLoss(), classified((4,), 4), norm_mode)
        with pytest.raises(ValueError, match=r"micro_batch would change.*; use smaller batches"):
            problem.operator(kind, micro_batch=2)


class TestMicroBatches:
    @each_kind
    @pytest.mark.parametrize("case", ["mlp-tanh", "preresnet-eval", "dicts", "transformer"])
    def test_change_nothing_but_the_size_of_a_run(self, case, kind):
        problem = CASES[case]()
        v = problem.vectors()
        sizes = []
        problem.model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
        whole, cut = problem.operator(kind), problem.operator(kind, micro_batch=2)
        torch.testing.assert_close(cut @ v, whole @ v, rtol=1e-10, atol=1e-13)
        assert max(sizes[: -len(problem.pairs)]) <= 2
        for ours, theirs in zip(cut.batch_products(v), whole.batch_products(v), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
        for ours, theirs in zip(cut.batch_gradients(), whole.batch_gradients(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(cut.loss(), whole.loss())
        assert cut.samples == whole.samples
        assert cut.num_products == 2


class TestOffload:
    @each_kind
    @pytest.mark.parametrize("case", ["mlp-relu", "preresnet-train", "transformer"])
    def test_changes_no_product(self, case, kind):
        problem = CASES[case]()
        v = problem.vectors()
        # Before torch 2.14 the layers are torch's own, whose sums are taken in another order.
        rounding = 0.0 if torch.__version__ >= (2, 14) else 1e-10
        operator = problem.operator(kind, offload=True)
        for _ in range(2):
            torch.testing.assert_close(
                operator @ v, problem.operator(kind) @ v, rtol=rounding, atol=rounding
            )


class Checkpointed(nn.Module):
    """A block that is computed again in each backward pass, with everything that could go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6)
        )
        self.output = nn.Linear(6, 3)
        self.through = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, x, use_reentrant=False) if self.through else self.block(x)
        return self.output(h)


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("norm_mode", ["train", "eval"])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_checkpointed_layers(kind, norm_mode, keep_graph):
    with seeded():
        model = Checkpointed().double().train()
        batch = (torch.randn(9, 4).double(), torch.randint(3, (9,)))
    options = {"norm_mode": norm_mode, "keep_graph": keep_graph}
    loss_fn = supervised(nn.CrossEntropyLoss())
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    operator = kind(model, loss_fn, [batch], **options)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    products = [operator @ v, operator @ v]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    model.through = False
    expected = kind(model, loss_fn, [batch], **options) @ v
    for product in products:
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-14)
