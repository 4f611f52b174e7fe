"""A model sharded over processes is measured, trained and put back as one that is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import batchlr
from two_processes import needs_fully_shard, run_in_two

pytestmark = needs_fully_shard

LOSS = batchlr.supervised(nn.CrossEntropyLoss())
SCRIPT = Path(__file__).parents[1] / "fully_sharded.py"


# Two processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(SCRIPT, folder, timeout=280)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_curvature_and_rate_are_those_of_the_whole_model(ranks, matrix, optimizer):
    """With the optimizer's own state, which is sharded as the weights are."""
    for rank in ranks:
        case = rank[f"{matrix}, {optimizer}"]
        assert case["found"] == pytest.approx(case["expected"], rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "hessian, rmsprop",
        "probes",
        "groups",
        "norms",
        "accumulated",
        "adagrad norm",
        "tied",
        "half precision",
        "offloaded",
        "gathered for good",
        "replicated",
    ],
)
def test_every_process_finds_what_one_alone_finds(ranks, name):
    for rank in ranks:
        assert rank[name]["found"] == pytest.approx(rank[name]["expected"], rel=1e-5)
        assert rank[name]["found"] == ranks[0][name]["found"]


def test_training_goes_on_bit_identically(ranks):
    for rank in ranks:
        assert rank["untouched"] == dict.fromkeys(rank["untouched"], True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_controller_sets_the_rates_it_would_set_alone(ranks, optimizer):
    cases = [rank[f"controlled, {optimizer}"] for rank in ranks]
    assert cases[0]["found"] == cases[1]["found"]
    for key, values in cases[0]["found"].items():
        assert values == pytest.approx(cases[0]["expected"][key], rel=1e-5)
    assert len(set(cases[0]["found"]["rates"])) > 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_lost_network_gets_its_sharded_weights_back(ranks, optimizer):
    for rank in ranks:
        found = rank[f"rolled back, {optimizer}"]
        assert found["events"][-1] == "undone"
        assert found["state"] == 0  # the optimizer is at its start as well
        assert all(found[key] for key in ("moved", "back", "sharded", "goes on"))


def test_snapshots_survive_a_file_of_each_process(ranks):
    for rank in ranks:
        found = rank["resumed"]
        assert found.pop("event") == "undone"
        assert found == dict.fromkeys(found, True)


# One process -----------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 3) for _ in range(4)]


def test_an_ordinary_model_is_left_alone():
    model = network()
    objects = [*model.parameters(), *(m._forward_hooks for m in model.modules())]
    with batchlr.unsharded(model) as inside:
        assert inside is model
        now = [*model.parameters(), *(m._forward_hooks for m in model.modules())]
        assert all(one is other for one, other in zip(now, objects, strict=True))


def test_a_second_time_inside_changes_nothing(alone):
    model = fully_shard(network())
    with batchlr.unsharded(model):
        whole = list(model.parameters())
        with batchlr.unsharded(model):
            assert all(a is b for a, b in zip(model.parameters(), whole, strict=True))
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        batchlr.HessianOperator(model, LOSS, batches()).verify()
    assert all(isinstance(p, DTensor) for p in model.parameters())


def test_other_hooks_stay(alone):
    calls = []
    model = fully_shard(network())
    model.register_forward_hook(lambda *_: calls.append("after"))
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    with batchlr.unsharded(model):
        LOSS(model, batches()[0])
    assert calls == ["before", "after"]
    LOSS(model, batches()[0])
    assert calls == ["before", "after"] * 2


def test_an_operator_of_a_sharded_model_says_the_way_out(alone):
    model = fully_shard(network())
    with pytest.raises(ValueError, match=r"first '0.weight'.*`with batchlr.unsharded\(model\):`"):
        batchlr.HessianOperator(model, LOSS, batches())
    with torch.no_grad():  # leaves the weights gathered
        model(batches()[0][0])
    with pytest.raises(ValueError, match=r"processes, and .*`with batchlr.unsharded\(model\):`"):
        batchlr.HessianOperator(model, LOSS, batches())


def test_an_operator_does_not_outlive_the_whole_weights(alone):
    model = fully_shard(network())
    with batchlr.unsharded(model):
        operator = batchlr.HessianOperator(model, LOSS, batches())
        vector = torch.ones(operator.shape[0])
        assert (operator @ vector).isfinite().all()
    assert all(p.numel() == 0 for p in operator.parameters)
    with pytest.raises(ValueError, match="make and use it inside"):
        operator @ vector


def test_a_loss_that_runs_fsdp_voids_the_measurement(alone):
    model = fully_shard(network())
    LOSS(model, batches()[0]).backward()  # FSDP prepares itself in the first pass

    def unsharding(model: nn.Module, batch: Any) -> torch.Tensor:
        model.unshard()
        return LOSS(model, batch)

    with pytest.raises(RuntimeError, match=r"loss_fn must not call unshard\(\)"):
        batchlr.measure_curvature(model, unsharding, batches())
    LOSS(model, batches()[0]).backward()
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning")
def test_fsdp_of_the_first_kind_is_refused(alone):
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*fully_shard instead"):
        batchlr.measure_curvature(model, LOSS, batches())
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*fully_shard instead"):
        batchlr.HessianOperator(model, LOSS, batches())


def test_tensor_parallel_weights_are_refused(alone):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(network(), mesh["tensor"], {"0": ColwiseParallel()})
    for parallel in (model, fully_shard(model, mesh=mesh["data"])):
        with pytest.raises(ValueError, match="tensor parallel ones: measure a copy"):
            batchlr.measure_curvature(parallel, LOSS, batches())


def test_distributed_weights_without_fsdp_are_refused(alone):
    model = network()
    mesh = init_device_mesh("cpu", (1,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="DTensors that fully_shard did not make"):
        batchlr.measure_curvature(model, LOSS, batches())
