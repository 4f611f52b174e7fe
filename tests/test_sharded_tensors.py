"""Parts, wholes and norms; with more processes than one in `operators/test_unsharded.py`."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from batchlr.sharded_tensors import (
    gathered,
    gathered_state,
    is_sharded,
    local_part,
    norms_of_whole,
    sharded_like,
)


def sharded(tensor: torch.Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def test_an_ordinary_tensor_is_its_own_part_and_whole():
    tensor, norm = torch.ones(3), torch.tensor(2.0)
    assert not is_sharded(tensor)
    assert local_part(tensor) is tensor
    assert gathered(tensor) is tensor
    assert norms_of_whole([norm], [tensor])[0] is norm


def test_a_part_shares_the_memory_of_the_sharded_tensor(alone):
    values = torch.arange(6.0).reshape(3, 2)
    tensor = sharded(values)
    assert is_sharded(tensor)
    part = local_part(tensor)
    assert type(part) is torch.Tensor
    part.mul_(2)
    assert type(gathered(tensor)) is torch.Tensor
    assert torch.equal(gathered(tensor), 2 * torch.arange(6.0).reshape(3, 2))


def test_the_whole_of_a_parameter_has_no_history(alone):
    tensor = sharded(torch.ones(3)).requires_grad_()
    assert not gathered(tensor).requires_grad
    assert not local_part(tensor).requires_grad


def test_norms_keep_their_order_dtype_and_the_tiniest_values(alone):
    """Squares of 1e-30 are zero in single precision."""
    mesh = init_device_mesh("cpu", (1,))
    tensors = [
        torch.full((1,), 1e-30),
        torch.ones(4),
        torch.zeros(2),
        torch.ones(9, dtype=torch.float64),
    ]
    ways = [[Shard(0)], None, [Replicate()], [Shard(0)]]
    given = [
        tensor if way is None else distribute_tensor(tensor, mesh, way)
        for tensor, way in zip(tensors, ways, strict=True)
    ]
    parts = [tensor.abs().max() for tensor in tensors]
    found = norms_of_whole(parts, given)
    assert [norm.dtype for norm in found] == [tensor.dtype for tensor in tensors]
    assert torch.stack(found[:3]).tolist() == torch.stack(parts[:3]).tolist()
    assert float(found[3]) == 1.0


def test_a_state_is_gathered_wherever_in_it_a_tensor_is_sharded(alone):
    values, plain = torch.arange(6.0).reshape(3, 2), torch.ones(2)
    state = {"a": [sharded(values), 3], 1: (plain, None, {"b": sharded(plain)}), "text": "c"}
    whole = gathered_state(state)
    assert type(whole["a"][0]) is type(whole[1][2]["b"]) is torch.Tensor
    assert torch.equal(whole["a"][0], values)
    assert torch.equal(whole[1][2]["b"], plain)
    assert whole[1][0] is plain
    assert (whole["a"][1], whole[1][1], whole["text"]) == (3, None, "c")
    assert is_sharded(state["a"][0])
    left = gathered_state(state, keep=False)
    assert left == {"a": [None, 3], 1: (plain, None, {"b": None}), "text": "c"}


def test_a_whole_tensor_is_sharded_as_another_of_its_shape(alone):
    values = torch.arange(6.0).reshape(3, 2)
    like = sharded(torch.zeros(3, 2))
    found = sharded_like(values, like)
    assert is_sharded(found)
    assert found.placements == like.placements
    assert torch.equal(gathered(found), values)
    for other, model in ((values, torch.zeros(3, 2)), (torch.ones(()), like), (found, like)):
        assert sharded_like(other, model) is other
