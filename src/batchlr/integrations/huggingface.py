"""Hugging Face transformers: a `Trainer` whose rate is measured and steered."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from batchlr.integrations.accelerate import without_autocast
from batchlr.integrations.steering import Draw, Steering
from batchlr.integrations.training_samples import (
    MOST_SAMPLES,
    TrainingSamples,
    num_samples,
)

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    msg = "this needs Hugging Face transformers: pip install 'batchlr[huggingface]'"
    raise ImportError(msg) from None

_IGNORED = -100  # label that no loss of transformers counts


def steer(
    trainer: Any,
    *,
    batches: Callable[[], list[Any]] | None = None,
    samples: int = MOST_SAMPLES,
    seed: int = 0,
    **options: Any,
) -> None:
    """Let ``trainer`` keep the peak of its rate at the largest stable one (`CurvatureController`).

    Call it before ``trainer.train()``. ``lr_scheduler_type`` and the warm-up of the arguments are
    the shape, the measured limit takes the place of ``learning_rate``. Loss (``compute_loss``),
    collator, number of steps, batch, clipping are the trainer's; limits go to its logs when
    measured. The state is in its checkpoints (``scheduler.pt``), one device or DDP. While training,
    ``scheduler`` and ``controller`` of ``trainer.lr_scheduler`` are what steers.

    Args:
        trainer: a `transformers.Trainer`, or of a class derived from it.
        batches: draws the batches of a measurement, for data without a length; by default from
            the training data set.
        samples: at most, of a measurement.
        seed: of the samples and of the searches.
        options: of `CurvatureController`, ``policy`` for instance.

    Raises:
        ValueError: the trainer cannot be steered; the message says why and the way out.
    """
    _check(trainer, batches)
    trainer.add_callback(_Steered(trainer, batches, samples, seed, options))


@final
class _Steered(TrainerCallback):  # type: ignore[misc]
    """Stands in for the trainer's scheduler, sees its losses, and is called around its steps."""

    def __init__(
        self,
        trainer: Any,
        batches: Callable[[], list[Any]] | None,
        samples: int,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        self.trainer = trainer
        self.batches = batches
        self.samples = samples
        self.seed = seed
        self.options = options
        self._losses: list[Tensor] = []
        self._rates: list[Any] = []  # of the optimizer's groups, as given
        self._make_shape = trainer.create_scheduler
        self._make_pass = trainer.training_step
        # Methods that the trainer's documentation offers for overriding; a callback sees no losses.
        trainer.create_scheduler = self.create_scheduler
        trainer.training_step = self.training_step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """In place of the trainer's, whose own scheduler becomes the shape."""
        trainer = self.trainer
        if trainer.lr_scheduler is None:
            optimizer = trainer.optimizer if optimizer is None else optimizer
            self._set_rates(optimizer.param_groups)
            steering = Steering(
                getattr(optimizer, "optimizer", optimizer),  # not Accelerate's wrapper
                _TrainersLoss(trainer),
                shape=lambda shadow: self._shape(num_training_steps, shadow),
                total_steps=num_training_steps,
                batch_size=trainer.get_total_train_batch_size(trainer.args),
                dataset_size=num_samples(trainer.train_dataset),
                seed=self.seed,
                **{"clip_norm": trainer.args.max_grad_norm or None} | self.options,
            )
            trainer.lr_scheduler = steering
        return trainer.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's, one forward and backward pass; its loss is kept."""
        loss: Tensor = self._make_pass(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and apply, if it is time."""
        self._losses = []
        trainer, model = self.trainer, self.trainer.model
        model.train()  # as the trainer does in a moment
        with without_autocast(model):
            update = trainer.lr_scheduler.measure(model, self._draw(kwargs["train_dataloader"]))
        if update is not None:
            figures = trainer.lr_scheduler.figures(update)
            trainer.log({"learning_rate": figures.pop("lr"), **figures})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the controller the loss while the gradients are there."""
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.lr_scheduler.observe(torch.stack(self._losses).sum())

    def _shape(self, num_training_steps: int, shadow: torch.optim.Optimizer) -> Any:
        shape = self._make_shape(num_training_steps, shadow)
        if isinstance(shape, ReduceLROnPlateau) or not hasattr(shape, "get_last_lr"):
            msg = (
                f"lr_scheduler_type {self.trainer.args.lr_scheduler_type!r} follows a metric, not "
                "the steps: use linear, cosine or constant"
            )
            raise ValueError(msg)
        return shape

    def _set_rates(self, groups: list[dict[str, Any]]) -> None:
        """Those given: where a training before this one has ended they are often zero."""
        if len(self._rates) != len(groups):
            self._rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate

    def _draw(self, loader: Any) -> Draw:
        if self.batches is not None:
            batches = self.batches
            return lambda generator: batches()
        args = self.trainer.args
        return TrainingSamples(
            loader.dataset,
            loader.collate_fn,
            batch_size=self.trainer.get_total_train_batch_size(args),
            pass_size=args.per_device_train_batch_size,
            most=self.samples,
        )


@final
class _TrainersLoss:
    """The trainer's loss as ``loss_fn(model, batch)``, weighted as it weighs its micro-batches."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of ``batch``, a scalar."""
        inputs = dict(self.trainer._prepare_inputs(batch))  # compute_loss may take the labels out
        loss: Tensor = self.trainer.compute_loss(model, inputs)
        return loss

    def batch_weight(self, batch: Any) -> float:
        """Labels that count, where the trainer divides by their number; else samples."""
        labels = batch.get("labels")
        if self.trainer.model_accepts_loss_kwargs and isinstance(labels, Tensor):
            return float((labels != _IGNORED).sum())
        return float(len(next(value for value in batch.values() if isinstance(value, Tensor))))


def _check(trainer: Any, batches: Callable[[], list[Any]] | None) -> None:
    """Raise ValueError, naming a way out, unless the trainer can be steered."""
    dataset = trainer.train_dataset
    if any(isinstance(callback, _Steered) for callback in trainer.callback_handler.callbacks):
        problem = "this trainer is steered already: call steer once"
    elif trainer.lr_scheduler is not None:
        name = type(trainer.lr_scheduler).__name__
        problem = (
            f"the trainer was given a scheduler, {name}, which would undo what is measured: pass "
            "optimizers=(optimizer, None), and the shape as lr_scheduler_type"
        )
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        problem = "FSDP and DeepSpeed split the model: measure on one device, or with DDP"
    elif batches is None and num_samples(dataset) is None:
        problem = (
            "batches to measure on cannot be drawn from a training data set of type "
            f"{type(dataset).__name__}: pass steer(batches=...), a function that returns a list of "
            "some"
        )
    else:
        return
    raise ValueError(problem)
