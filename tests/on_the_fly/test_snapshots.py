"""A snapshot brings back every bit that steps change, and nothing else."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from batchlr.on_the_fly.snapshots import Snapshot
from batchlr.sharded_tensors import gathered, gathered_state, is_sharded
from two_processes import needs_fully_shard

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def steps(model, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def bits(model, optimizer):
    """Copies of all that should come back."""
    state = {k: v for k, v in optimizer.state_dict().items() if k == "state"}
    return copy.deepcopy((dict(model.state_dict()), state))


def assert_equal(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    first, second = one[1]["state"], other[1]["state"]
    assert first.keys() == second.keys()
    for number in first:
        assert first[number].keys() == second[number].keys()
        for key, value in first[number].items():
            assert (
                torch.equal(value, second[number][key])
                if torch.is_tensor(value)
                else (value == second[number][key])
            )


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_everything_is_as_it_was_and_goes_on_as_it_would_have(kind, before):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, before)
    snapshot, then = Snapshot(), bits(model, optimizer)
    snapshot.take(model, optimizer)
    steps(model, optimizer, 2, seed=2)
    expected = bits(model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    snapshot.restore(model, optimizer)
    assert_equal(bits(model, optimizer), then)
    steps(model, optimizer, 2, seed=2)
    assert_equal(bits(model, optimizer), expected)
    snapshot.restore(model, optimizer)  # a second time
    assert_equal(bits(model, optimizer), then)


def test_weights_stay_the_same_objects_and_rates_what_they_are():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    steps(model, optimizer, 1)
    snapshot = Snapshot()
    snapshot.take(model, optimizer)
    weights = list(model.parameters())
    moments = [optimizer.state[p]["exp_avg"] for p in weights]
    optimizer.param_groups[0]["lr"] = 0.7
    snapshot.restore(model, optimizer)
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(weights, moments, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_memory_is_taken_once():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    steps(model, optimizer, 1)
    snapshot = Snapshot()
    snapshot.take(model, optimizer)
    before = {k: v.data_ptr() for k, v in snapshot._tensors.items()}
    steps(model, optimizer, 1)
    snapshot.take(model, optimizer)
    assert {k: v.data_ptr() for k, v in snapshot._tensors.items()} == before
    size = sum(p.numel() for p in model.parameters())
    floats = sum(t.numel() for name, t in snapshot._tensors.items() if not name.startswith("b."))
    assert floats == 3 * size + 6  # two moments, and the steps of six tensors


def test_frozen_layers_and_mixed_precisions_come_back_too():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)])
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    snapshot, then = Snapshot(), bits(model, optimizer)
    snapshot.take(model, optimizer)
    model[0].requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    snapshot.restore(model, optimizer)
    assert_equal(bits(model, optimizer), then)
    assert not model[0].weight.requires_grad


def test_the_state_goes_round_through_a_file():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    steps(model, optimizer, 2)
    snapshot, other, then = Snapshot(), Snapshot(), bits(model, optimizer)
    snapshot.take(model, optimizer)
    file = io.BytesIO()
    torch.save(snapshot.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    steps(model, optimizer, 2)
    other.restore(model, optimizer)
    assert_equal(bits(model, optimizer), then)


def test_the_state_does_not_change_later():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    snapshot = Snapshot()
    snapshot.take(model, optimizer)
    state = snapshot.state_dict()
    weight = state["tensors"]["w.0.weight"].clone()
    steps(model, optimizer, 1)
    snapshot.take(model, optimizer)
    assert torch.equal(state["tensors"]["w.0.weight"], weight)
    assert not torch.equal(snapshot.state_dict()["tensors"]["w.0.weight"], weight)


def test_another_network_is_refused():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    snapshot = Snapshot()
    assert not snapshot.fits(model)
    snapshot.take(model, optimizer)
    assert snapshot.fits(model)
    model.append(nn.Linear(2, 2))
    assert not snapshot.fits(model)
    with pytest.raises(ValueError, match="not those the snapshot was taken of: take another after"):
        snapshot.restore(model, optimizer)


@needs_fully_shard
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gathered_state_is_sharded_again_and_restored(alone, kind):
    model = fully_shard(network())
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 2)
    snapshot, other = Snapshot(), Snapshot()
    snapshot.take(model, optimizer)
    then = [gathered(p.detach()).clone() for p in model.parameters()]
    other.load_state_dict(gathered_state(snapshot.state_dict()))
    other.shard(model, optimizer)
    for name, tensor in other.state_dict()["tensors"].items():
        assert is_sharded(tensor) == is_sharded(snapshot.state_dict()["tensors"][name]), name
    steps(model, optimizer, 2)
    other.restore(model, optimizer)
    for parameter, weight in zip(model.parameters(), then, strict=True):
        assert torch.equal(gathered(parameter.detach()), weight)
    steps(model, optimizer, 1)
