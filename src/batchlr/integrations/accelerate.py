"""Hugging Face Accelerate: what measures and steers the rate in a loop of one's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from batchlr import CurvatureUpdate
from batchlr.integrations.steering import Draw, Steering
from batchlr.integrations.training_samples import MOST_SAMPLES, TrainingSamples, num_samples
from batchlr.operators.supervised import LossFunction

try:
    from accelerate.utils import send_to_device
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "accelerate.utils"):
        raise
    msg = "this needs Hugging Face Accelerate: pip install 'batchlr[huggingface]'"
    raise ImportError(msg) from None

_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU")  # every process has the whole model


@final
class CurvatureSteering:
    """Keeps the peak of the rate at the largest stable one; see `CurvatureController`.

    It sees to what Accelerate adds to a loop: accumulated batches (`Accelerator.accumulate`),
    several processes, autocast, steps that the gradient scaler skips, checkpoints
    (`Accelerator.save_state`). It steps its schedule itself; no other scheduler goes with it.
    ``scheduler`` and ``controller`` are what steers.

    Args:
        accelerator: that has prepared the others.
        model: as prepared.
        optimizer: as prepared; of its rates only the ratios matter.
        loader: of the training data, as prepared.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss trained with.
        total_steps: optimizer steps of the run; None is open-ended, without a shape.
        shape: ``shape(optimizer, total_steps)`` makes the torch scheduler of the rate's shape, for
            instance `torch.optim.lr_scheduler.CosineAnnealingLR` as it is; None is a constant.
        batches: draws the batches of a measurement, for data without a length; by default from
            the loader's data set, with its ``collate_fn``.
        batch_size: of one optimizer step, over all processes and accumulated batches; by default
            read off the loader.
        samples: at most, of a measurement.
        seed: of the samples and of the searches.
        options: of `CurvatureController`, ``policy`` for instance.

    Raises:
        ValueError: the loop cannot be steered; the message says why and the way out.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        loader: Any,
        loss_fn: LossFunction,
        *,
        total_steps: int | None,
        shape: Callable[[Optimizer, int], LRScheduler] | None = None,
        batches: Callable[[], list[Any]] | None = None,
        batch_size: int | None = None,
        samples: int = MOST_SAMPLES,
        seed: int = 0,
        **options: Any,
    ) -> None:
        _check(accelerator, loader, batches, batch_size)
        if shape is not None and total_steps is None:
            msg = "the shape of an endless run is unknown: pass total_steps"
            raise ValueError(msg)
        self.accelerator = accelerator
        self.model: nn.Module = accelerator.unwrap_model(model)
        passes = accelerator.gradient_accumulation_steps  # of a step, in each process
        batch_size = batch_size or passes * loader.total_batch_size
        self._steering = Steering(
            getattr(optimizer, "optimizer", optimizer),
            loss_fn,
            shape=None if shape is None else lambda shadow: shape(shadow, total_steps or 0),
            total_steps=total_steps,
            batch_size=batch_size,
            dataset_size=num_samples(loader.dataset),
            seed=seed,
            **options,
        )
        self.scheduler = self._steering.scheduler
        self.controller = self._steering.controller
        accelerator.register_for_checkpointing(self._steering)
        self._draw: Draw = (
            TrainingSamples(
                loader.dataset,
                loader.collate_fn,
                batch_size=batch_size,
                pass_size=max(1, batch_size // (passes * accelerator.num_processes)),
                most=samples,
            )
            if batches is None
            else lambda generator: batches()
        )
        self._losses: list[Tensor] = []
        self._first = True  # the next batch is the first of an optimizer step

    def measure(self) -> CurvatureUpdate | None:
        """Before each batch: measure and apply, if an optimizer step begins and it is time."""
        if not self._first:
            return None
        self._first = False
        with without_autocast(self.model):
            return self._steering.measure(self.model, self._moved)

    def observe(self, loss: Tensor) -> None:
        """After each ``optimizer.step()``, before ``zero_grad()``: the schedule goes on.

        Args:
            loss: the mean over the batch.
        """
        self._losses.append(loss.detach())
        if not self.accelerator.sync_gradients:
            return
        losses, self._losses, self._first = self._losses, [], True
        if not self.accelerator.optimizer_step_was_skipped:
            self._steering.step()
            self._steering.observe(torch.stack(losses).mean())

    def _moved(self, generator: torch.Generator) -> list[Any]:
        return [send_to_device(batch, self.accelerator.device) for batch in self._draw(generator)]


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` runs without the autocast that Accelerate put around its forward pass."""
    patched, plain = (vars(model).get(name) for name in ("forward", "_original_forward"))
    if patched is None or plain is None:
        yield
        return
    model.forward = plain
    try:
        yield
    finally:
        model.forward = patched


def _check(
    accelerator: Any, loader: Any, batches: Callable[[], list[Any]] | None, batch_size: int | None
) -> None:
    """Raise ValueError, naming a way out, unless the loop can be steered."""
    kind = accelerator.distributed_type.value
    if accelerator._schedulers:
        problem = (
            "a scheduler was prepared, which would undo what is measured (and steps once for each "
            "process): prepare none, and pass its shape as CurvatureSteering(shape=...)"
        )
    elif kind not in _WHOLE:
        problem = f"{kind} may split the model: measure on one device, or with DDP"
    elif not any(loader is prepared for prepared in accelerator._dataloaders):
        problem = (
            f"the loader, of type {type(loader).__name__}, is not prepared: pass what "
            "accelerator.prepare returned"
        )
    elif batches is None and num_samples(loader.dataset) is None:
        problem = (
            "batches to measure on cannot be drawn from a data set of type "
            f"{type(loader.dataset).__name__}: pass CurvatureSteering(batches=...), a function "
            "that returns a list of some"
        )
    elif batch_size is None and not hasattr(loader, "total_batch_size"):
        problem = (
            f"the loader, of type {type(loader).__name__}, names no batch size: pass "
            "CurvatureSteering(batch_size=...), the samples of one optimizer step"
        )
    else:
        return
    raise ValueError(problem)
