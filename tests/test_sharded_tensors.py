"""Parts, wholes and norms; with more processes than one in `operators/test_unsharded.py`."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from batchlr.sharded_tensors import gathered, is_sharded, local_part, norms_of_whole


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
