"""The processes of one run, as torchrun starts them, and what they share of the network."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlr.training.checkpoint import CheckpointError
from batchlr.training.config import TrainConfig
from batchlr.training.data import DataError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_Made = TypeVar("_Made")
_OF_FILES = (DataError, CheckpointError, OSError)


class ToldElsewhere(DataError):
    """Files are missing, corrupt or cannot be written, as another process says."""


@dataclass(frozen=True)
class Processes:
    """This process's place among those that share the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    shards: bool = False  # each process keeps a part of the weights

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def average(self, values: Iterable[Tensor]) -> None:
        """The mean of each over all processes, in place; one message each."""
        for value in values if self.world_size > 1 else ():
            dist.all_reduce(value)
            value /= self.world_size

    def same(self, value: float, device: torch.device) -> float:
        """The first process's ``value``, everywhere."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(tensor, src=0)
        return float(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` holds in some process."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def together(self, load: Callable[[], _Made], device: torch.device) -> _Made:
        """What ``load``, which sends no messages, returns, once no process has failed in it.

        Raises:
            Exception: what ``load`` raised here. Of files that cannot be used (DataError,
                CheckpointError, OSError) only if the first process did not raise the same.
            ToldElsewhere: it did, or ``load`` failed elsewhere only.
        """
        if self.world_size == 1:
            return load()
        failure: Exception | None = None
        try:
            loaded = load()
        except Exception as error:  # the others wait to hear of it, whatever it is
            failure = error
        words = float(zlib.crc32(str(failure).encode(errors="backslashreplace")))
        repeated = self.same(words, device) == words and not self.is_first
        repeated = repeated and isinstance(failure, _OF_FILES)
        if not self.any(failure is not None, device):
            return loaded
        if failure is None or repeated:
            msg = "another process has failed, and says why"
            raise ToldElsewhere(msg) from failure
        raise failure

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Make ``tensors`` the first process's, in place; one message for each dtype."""
        if self.world_size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_type.values():
            joined = torch.cat([tensor.flatten() for tensor in alike])
            dist.broadcast(joined, src=0)
            parts = torch.split(joined, [tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """``model`` with averaged gradients, if there is anything to average.

        Where processes keep parts of the weights only, ``model`` itself has other parameters from
        then on: make its optimizer afterwards.
        """
        if self.world_size == 1:
            return model
        if self.shards:
            return shard(model, device, self.world_size)
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )


def shard(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """``model``, its weights split over all processes by `torch.distributed.fsdp.fully_shard`.

    A block is gathered when it runs and freed after it. Blocks are the members of the outermost
    `nn.Sequential`s that have weights other than vectors: residual blocks, the convolutions of a
    VGG, the layers of an MLP. All the rest (stem, head, norms between blocks) is the root's and
    gathered together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)  # where fully_shard expects the weights
    mesh = init_device_mesh(device.type, (world_size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.Sequential):
            yield from _blocks(child)
            continue
        for member in child:
            if any(weight.dim() > 1 for weight in member.parameters()):
                yield member


@contextmanager
def averaging(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Backward passes inside average the gradients of a wrapped ``model``, or add up for later."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        cast("FSDPModule", model).set_requires_gradient_sync(now)
    yield


@contextmanager
def processes(config: TrainConfig) -> Iterator[Processes]:
    """The process group of the run, joined and left.

    Raises:
        ValueError: the configuration asks for ``ddp`` or ``fsdp`` outside torchrun, or for
            ``single`` under it with several processes; or ``fsdp`` on CPUs, before torch 2.7.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = config.dist.strategy
    if strategy in ("ddp", "fsdp") and "WORLD_SIZE" not in os.environ:
        msg = (
            f"dist.strategy is {strategy}, but this process was not started by torchrun: run "
            "torchrun --nproc-per-node N scripts/train.py CONFIG"
        )
        raise ValueError(msg)
    if strategy == "single" and world_size > 1:
        msg = f"dist.strategy is single, but torchrun started {world_size} processes: use auto"
        raise ValueError(msg)
    if world_size == 1:
        yield Processes()
        return
    on_gpu = torch.cuda.is_available() and config.train.device in ("auto", "cuda")
    if strategy == "fsdp" and not on_gpu and torch.__version__ < "2.7":
        msg = (
            f"dist.strategy is fsdp, which torch {torch.__version__} can do on GPUs only: take "
            "ddp, or torch 2.7 or newer"
        )
        raise ValueError(msg)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        yield Processes(dist.get_rank(), world_size, local_rank, shards=strategy == "fsdp")
    finally:
        dist.destroy_process_group()
