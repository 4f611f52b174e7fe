"""Scheduler, controller and measured samples as one thing, which another loop calls and saves."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlr import BatchAwareLR, CurvatureController, CurvatureUpdate
from batchlr.measurement.optimizer_state import get_momentum
from batchlr.operators.isolation import forked_random_state
from batchlr.operators.supervised import LossFunction
from batchlr.schedulers import ShapeFactory

Draw = Callable[[torch.Generator], list[Any]]


@final
class Steering:
    """What a framework's loop calls around its optimizer steps: `measure`, `step`, `observe`.

    In several processes, each with the whole model, every one measures the same samples and takes
    over the first one's decisions. It is a scheduler as far as frameworks ask for one.

    Args:
        optimizer: torch's own, not a framework's wrapper.
        loss_fn: of `CurvatureController`.
        shape: of `BatchAwareLR`.
        total_steps: of the run; None is open-ended.
        batch_size: of one optimizer step, over all processes.
        dataset_size: None is unbounded.
        seed: of the samples drawn and of the searches' start vectors.
        options: of `CurvatureController`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        *,
        shape: ShapeFactory | None,
        total_steps: int | None,
        batch_size: int,
        dataset_size: int | None,
        seed: int,
        **options: Any,
    ) -> None:
        size = batch_size if dataset_size is None else min(batch_size, dataset_size)
        # Kept with ``apply=False``; else the first measurement replaces it before the first step.
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        self.scheduler = BatchAwareLR(optimizer, rate, shape, batch_size=size)
        self.controller = CurvatureController(
            self.scheduler,
            loss_fn,
            total_steps=total_steps,
            batch_size=size,
            dataset_size=dataset_size,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        self._samples = torch.Generator().manual_seed(seed + 1)

    def measure(self, model: nn.Module, draw: Draw) -> CurvatureUpdate | None:
        """Before an optimizer step: measure and apply, if it is time; see `CurvatureController`.

        Args:
            model: the module itself, without the wrapper of data parallelism.
            draw: makes the batches, called only if it is time, and with random states of its own;
                the same in every process.
        """
        device = next(model.parameters()).device
        same = _agreement(device)

        def batches() -> list[Any]:
            seed = int(torch.randint(2**31, (), generator=self._samples))
            with forked_random_state(device, seed):
                return draw(self._samples)

        update = self.controller.maybe_update(model, batches, same)
        if update is None or same is None:
            return update
        self.controller.agree(same)
        momentum = get_momentum(self.scheduler.optimizer)
        return replace(update, peak=self.scheduler.peak, momentum=momentum)

    def step(self) -> None:
        """After an optimizer step: the schedule goes on."""
        self.scheduler.step()

    def observe(self, loss: Tensor) -> None:
        """After an optimizer step, its gradients still in place: show the loss ``()``.

        Args:
            loss: the mean over this process's samples of the step.
        """
        same = _agreement(loss.device)
        if same is not None:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        self.controller.observe(loss, same)

    def get_last_lr(self) -> list[float]:
        """The rates of the optimizer's groups."""
        return [float(rate) for rate in self.scheduler.get_last_lr()]

    def figures(self, update: CurvatureUpdate) -> dict[str, float]:
        """What is known of a measurement, named as in ``metrics.jsonl``."""
        bound = update.bound
        known = {
            "lr": self.get_last_lr()[0],
            "peak_lr": update.peak,
            "largest_eigenvalue": update.largest_eigenvalue,
            "max_lr": math.nan if bound is None else bound.value,
            "max_lr_low": math.nan if bound is None else bound.low,
            "max_lr_high": math.nan if bound is None else bound.high,
        }
        return {name: value for name, value in known.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives; with it, the model and the optimizer a run goes on as it was."""
        return {
            "scheduler": self.scheduler.state_dict(),
            "controller": self.controller.state_dict(),
            "samples": self._samples.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.controller.load_state_dict(state_dict["controller"])
        self._samples.set_state(state_dict["samples"].cpu())


def _agreement(device: torch.device) -> Callable[[float], float] | None:
    """The first process's number in all of them; None where there is only one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None

    def same(value: float) -> float:
        holder = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(holder, src=0)
        return float(holder)

    return same
