"""Tensors whose parts lie in several processes: torch's DTensors, as `fully_shard` makes them."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process has a part of ``tensor`` only."""
    loaded = sys.modules.get("torch.distributed.tensor")  # who has such a tensor has loaded it
    return loaded is not None and isinstance(tensor, loaded.DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This process's part, which shares its memory; ``tensor`` itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """All of ``tensor`` in every process; itself if it is not sharded.

    For all processes to call together: one all-gather. What was offloaded to the CPU comes back to
    the device computed on.
    """
    if not is_sharded(tensor):
        return tensor
    device = tensor.device_mesh.device_type
    there = tensor if tensor.device.type == device else cast("DTensor", tensor.to(device))
    whole: Tensor = there.full_tensor()
    return whole


def gathered_state(state: Any, *, keep: bool = True) -> Any:
    """``state`` with all of each sharded tensor in it, on the CPU, in place of this process's part.

    For all processes to call together, as `gathered`; one tensor at a time is whole on the device.

    Args:
        state: dictionaries, lists and tuples of tensors and whatever else, which stays as it is.
        keep: whether this process wants it; else what is sharded becomes None.
    """
    if isinstance(state, Tensor) and is_sharded(state):
        whole = gathered(state)
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gathered_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered_state(value, keep=keep) for value in state)
    return state


@torch.no_grad()
def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, of which each process keeps the part it has of ``like``.

    For all processes to call together: one scatter, of the first one's values. Itself if ``like``
    is not sharded or of another shape, or if ``whole`` is sharded already.
    """
    if not is_sharded(like) or is_sharded(whole) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, like.placements)


@torch.no_grad()
def norms_of_whole(norms: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms ``()`` of whole ``tensors`` from ``norms`` ``()`` of this process's parts.

    For all processes to call together, which get the same numbers: one all-reduce of a number a
    tensor for each way in which some are sharded. Of a tensor that is not, the norm stays.
    """
    found = list(norms)
    alike: dict[tuple[DeviceMesh, tuple[bool, ...]], list[int]] = {}
    for number, tensor in enumerate(tensors):
        if is_sharded(tensor):
            split = tuple(placement.is_shard() for placement in tensor.placements)
            alike.setdefault((tensor.device_mesh, split), []).append(number)
    for (mesh, split), numbers in alike.items():
        squares = torch.stack([found[number].double().square() for number in numbers])
        for number, norm in zip(numbers, _sum(squares, mesh, split).sqrt(), strict=True):
            found[number] = norm.to(found[number])
    return found


def _sum(parts: Tensor, mesh: "DeviceMesh", split: Sequence[bool]) -> Tensor:
    """``parts`` ``(n,)`` added over those dimensions of ``mesh`` that are ``split``."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    there = parts if parts.device.type == mesh.device_type else parts.to(mesh.device_type)
    placements = [Partial() if is_split else Replicate() for is_split in split]
    total: Tensor = DTensor.from_local(there, mesh, placements, run_check=False).full_tensor()
    return total
