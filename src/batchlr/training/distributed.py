"""The processes of one run, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlr.training.config import TrainConfig


@dataclass(frozen=True)
class Processes:
    """This process's place among those that share the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

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

    def wait(self, device: torch.device) -> None:
        """Until all processes are here."""
        self.any(False, device)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """``model`` with averaged gradients, if there is anything to average."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )


@contextmanager
def processes(config: TrainConfig) -> Iterator[Processes]:
    """The process group of the run, joined and left.

    Raises:
        ValueError: the configuration asks for ``ddp`` outside torchrun, or for ``single`` under it
            with several processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.dist.strategy == "ddp" and "WORLD_SIZE" not in os.environ:
        msg = (
            "dist.strategy is ddp, but this process was not started by torchrun: run "
            "torchrun --nproc-per-node N scripts/train.py CONFIG"
        )
        raise ValueError(msg)
    if config.dist.strategy == "single" and world_size > 1:
        msg = f"dist.strategy is single, but torchrun started {world_size} processes: use auto"
        raise ValueError(msg)
    if world_size == 1:
        yield Processes()
        return
    on_gpu = torch.cuda.is_available() and config.train.device in ("auto", "cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
