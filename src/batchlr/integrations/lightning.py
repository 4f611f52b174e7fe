"""PyTorch Lightning: a callback that measures and steers the rate.

>>> from torch.optim.lr_scheduler import CosineAnnealingLR
>>> callback = CurvatureCallback(shape=CosineAnnealingLR)  # for Trainer(callbacks=[callback])
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from batchlr import BatchAwareLR, CurvatureController
from batchlr.integrations.steering import Draw, Steering
from batchlr.integrations.training_samples import (
    MOST_SAMPLES,
    TrainingSamples,
    num_samples,
)
from batchlr.operators.supervised import LossFunction

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")  # every process has the whole model


def _callback_class() -> Any:
    """A base class that the trainers of both packages, which share no classes, take for theirs."""
    bases = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            bases.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not bases:
        msg = "this needs PyTorch Lightning: pip install 'batchlr[lightning]'"
        raise ImportError(msg)
    return type("Callback", tuple(bases), {})


@final
class CurvatureCallback(_callback_class()):  # type: ignore[misc]
    """Keeps the peak of the rate at the largest stable one; see `CurvatureController`.

    For automatic optimization with one optimizer, on one device or with ``strategy="ddp"``.
    ``configure_optimizers`` returns the optimizer alone; of its rates only the ratios matter.
    Steps, batch and data set are the trainer's. Rate, largest eigenvalue and limit go to the
    loggers when measured. Its state is in Lightning's checkpoints. From the start of training on
    ``scheduler`` and ``controller`` are what steers.

    Args:
        shape: ``shape(optimizer, total_steps)`` makes the torch scheduler of the rate's shape, for
            instance `torch.optim.lr_scheduler.CosineAnnealingLR` as it is; None is a constant.
        loss_fn: ``loss_fn(module, batch)``, the scalar mean loss trained with. By default that of
            ``training_step``, whose logs, metrics and attributes are then forgotten; what else it
            does beside computing the loss is done, so pass a loss if it does.
        batches: draws the batches of a measurement, for data without a length or of several
            loaders. By default from the training loader's data set, with its ``collate_fn``.
        batch_size: of one optimizer step, over all processes and accumulated batches; by default
            read off the training loader.
        samples: at most, of a measurement.
        seed: of the samples and of the searches.
        options: of `CurvatureController`, ``policy`` for instance.
    """

    def __init__(
        self,
        shape: Callable[[Optimizer, int], LRScheduler] | None = None,
        *,
        loss_fn: LossFunction | None = None,
        batches: Callable[[], list[Any]] | None = None,
        batch_size: int | None = None,
        samples: int = MOST_SAMPLES,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.loss_fn = _training_loss if loss_fn is None else loss_fn
        self.batches = batches
        self.batch_size = batch_size
        self.samples = samples
        self.seed = seed
        self.options = options
        self.scheduler: BatchAwareLR | None = None
        self.controller: CurvatureController | None = None
        self._steering: Steering | None = None
        self._rates: list[Any] = []
        self._restored: dict[str, Any] = {}
        self._losses: list[Tensor] = []
        self._steps = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be steered, before anything of a checkpoint is in the optimizer."""
        _check(trainer, pl_module)
        self._rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make what steers, or what a checkpoint says it was."""
        for group, rate in zip(trainer.optimizers[0].param_groups, self._rates, strict=True):
            group["lr"] = rate
        steering = self._make_steering(trainer)
        if self._restored:
            steering.load_state_dict(self._restored)
        self._steering = steering
        self.scheduler, self.controller = steering.scheduler, steering.controller
        self._restored, self._losses, self._steps = {}, [], trainer.global_step

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch of an optimizer step: measure and apply, if it is time."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        assert self._steering is not None
        update = self._steering.measure(pl_module, _moved(self._draw(trainer), trainer))
        if update is not None:
            for logger in trainer.loggers:
                logger.log_metrics(self._steering.figures(update), step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: the schedule goes on, and the controller sees the loss."""
        assert self._steering is not None
        if outputs and "loss" in outputs:  # over the number of accumulated batches
            self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self._steering.step()
        if self._losses:
            self._steering.observe(torch.stack(self._losses).mean())
        self._losses = []

    def state_dict(self) -> dict[str, Any]:
        """Of scheduler, controller and samples."""
        return {} if self._steering is None else self._steering.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until there is what to load it into."""
        self._restored = state_dict

    def _draw(self, trainer: Any) -> Draw:
        """What draws the batches of a measurement, as a data loader has them."""
        if self.batches is not None:
            batches = self.batches
            return lambda generator: batches()
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if num_samples(dataset) is None:
            msg = (
                "batches to measure on cannot be drawn from a training loader of type "
                f"{type(loader).__name__} with a data set of type {type(dataset).__name__}: pass "
                "CurvatureCallback(batches=...), a function that returns a list of some"
            )
            raise ValueError(msg)
        size = self._step_size(trainer)
        return TrainingSamples(
            dataset,
            loader.collate_fn,
            batch_size=size,
            pass_size=max(1, size // _passes(trainer)),
            most=self.samples,
        )

    def _step_size(self, trainer: Any) -> int:
        """Samples of one optimizer step."""
        if self.batch_size is not None:
            return self.batch_size
        loader = trainer.train_dataloader
        sampler = getattr(loader, "batch_sampler", None)
        size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        if not isinstance(size, int):
            msg = (
                f"the training loader of type {type(loader).__name__} names no batch size: pass "
                "CurvatureCallback(batch_size=...), the samples of one optimizer step"
            )
            raise ValueError(msg)
        return size * _passes(trainer)

    def _make_steering(self, trainer: Any) -> Steering:
        steps, shape = trainer.estimated_stepping_batches, self.shape
        total_steps = int(steps) if 0 < steps < math.inf else None
        if shape is not None and total_steps is None:
            msg = "the shape of an endless run is unknown: set the Trainer's max_steps"
            raise ValueError(msg)
        self._draw(trainer)  # which complains now, if it must
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        norm = trainer.gradient_clip_algorithm in (None, "norm")
        return Steering(
            trainer.optimizers[0],
            self.loss_fn,
            shape=None if shape is None else lambda optimizer: shape(optimizer, total_steps or 0),
            total_steps=total_steps,
            batch_size=self._step_size(trainer),
            dataset_size=num_samples(dataset),
            seed=self.seed,
            **{"clip_norm": (trainer.gradient_clip_val or None) if norm else None} | self.options,
        )


def _passes(trainer: Any) -> int:
    """Batches of the loader in one optimizer step."""
    passes: int = trainer.world_size * trainer.accumulate_grad_batches
    return passes


def _check(trainer: Any, module: Any) -> None:
    """Raise ValueError, naming a way out, unless the run can be steered."""
    strategy = type(trainer.strategy).__name__
    if not module.automatic_optimization:
        problem = (
            "the module optimizes manually: call batchlr.CurvatureController in its training_step"
        )
    elif len(trainer.optimizers) != 1:
        problem = f"one rate is measured, for one optimizer, not {len(trainer.optimizers)}"
    elif trainer.lr_scheduler_configs:
        name = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        problem = (
            f"configure_optimizers returned a {name}, which would undo what is measured: return "
            f"the optimizer alone, and give its shape to CurvatureCallback(shape={name})"
        )
    elif strategy not in _STRATEGIES:
        problem = (
            f"the strategy {strategy} may split the model: measure with strategy='ddp', or on one "
            "device"
        )
    else:
        return
    raise ValueError(problem)


def _moved(draw: Draw, trainer: Any) -> Draw:
    """``draw``, its batches brought where and to what the trainer brings its own."""

    def moved(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return lambda generator: [moved(batch) for batch in draw(generator)]


def _training_loss(module: nn.Module, batch: Any) -> Tensor:
    """The loss of ``training_step``, of which the module remembers nothing."""
    step: Any = module.training_step
    taken = copy(batch) if isinstance(batch, (dict, list)) else batch  # the step may pop entries
    with_number = len(inspect.signature(step).parameters) > 1
    with _forgetting(module):
        output = step(taken, 0) if with_number else step(taken)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        msg = (
            f"training_step gave no loss on a batch to measure on, but {type(output).__name__}: "
            "pass CurvatureCallback(loss_fn=...)"
        )
        raise TypeError(msg)
    return loss


@contextmanager
def _forgetting(module: nn.Module) -> Iterator[None]:
    """Inside, what ``training_step`` logs, counts and keeps is forgotten.

    Attributes are put back; public tensors, lists, dicts and sets, and metrics, are copies inside.
    """
    kept = dict(vars(module))
    metrics = _metrics(module)
    try:
        for name, value in kept.items():
            if name.startswith("_"):
                continue
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach().clone()
            elif isinstance(value, (list, dict, set)):
                vars(module)[name] = copy(value)
        vars(module)["log"] = lambda *args, **kwargs: None
        for owner, name, metric in metrics:
            owner._modules[name] = _new(metric)
        yield
    finally:
        for owner, name, metric in metrics:
            owner._modules[name] = metric
        vars(module).clear()
        vars(module).update(kept)


def _new(metric: nn.Module) -> nn.Module:
    """A copy of ``metric``, whose state may have a graph that `deepcopy` refuses."""
    held = [value for part in metric.modules() for value in vars(part).values()]
    tensors = [t for value in held for t in (value if isinstance(value, list) else [value])]
    detached = {
        id(t): t.detach().clone()
        for t in tensors
        if isinstance(t, Tensor) and t.grad_fn is not None
    }
    return deepcopy(metric, detached)


def _metrics(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost metrics in ``module``: owner, name, metric."""
    from torchmetrics import Metric, MetricCollection

    found = []
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            found.append((module, name, child))
        else:
            found += _metrics(child)
    return found
