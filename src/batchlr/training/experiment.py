"""What a configuration stands for: data, network, loss, optimizer, scheduler, controller."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from batchlr.batch_size import AdaptiveBatchSize
from batchlr.controller import CurvatureController
from batchlr.gradients.sample_gradients import coupling_layers
from batchlr.on_the_fly.collapse import Same
from batchlr.operators.supervised import SupervisedLoss, supervised
from batchlr.schedulers import BatchAwareLR
from batchlr.sharded_tensors import gathered_state, sharded_like
from batchlr.training.adaptive_batch import adaptive_batch_size, group_size
from batchlr.training.config import TrainConfig
from batchlr.training.config.variants import SGDOptions
from batchlr.training.data import (
    Batch,
    ImageData,
    batches_per_epoch,
    load_data,
    measurement_batches,
)
from batchlr.training.distributed import Processes
from batchlr.training.models import build_model
from batchlr.training.pass_sizes import check_sharing, micro_size, tracking_sizes
from batchlr.training.shapes import shape_factory


@dataclass
class Experiment:
    """Everything that a run advances, built from its configuration."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    data: ImageData
    model: nn.Module  # as built, or sharded
    parallel: nn.Module  # the same with averaged gradients, if there are several processes
    loss_fn: SupervisedLoss
    optimizer: torch.optim.Optimizer
    scheduler: BatchAwareLR
    controller: CurvatureController | None
    adaptive: AdaptiveBatchSize | None
    steps_per_epoch: int  # at the batch size it begins with
    sampler: torch.Generator = field(default_factory=torch.Generator)  # of measured samples

    @property
    def batch_size(self) -> int:
        """Samples of one update, over all processes, at present."""
        return self.config.batch.global_size if self.adaptive is None else self.adaptive.batch_size

    @property
    def same(self) -> Same | None:
        """Makes a number the first process's in all of them; None if there is only one."""
        if self.processes.world_size == 1:
            return None
        return partial(self.processes.same, device=self.device)

    def is_read(self, step: int) -> bool:
        """Whether the gradient's noise is read off update number ``step``."""
        options = self.config.batch.adaptive
        if self.adaptive is None or options is None or not self.adaptive.may_grow:
            return False
        return step % options.observe_every == 0

    def part_size(self, *, read: bool) -> int:
        """Samples in one forward pass of one process; of an update whose noise is read, of a group.

        Groups are micro-batches, or if they are too few equal parts of them.
        """
        if read:
            return group_size(self.config, self.processes, self.batch_size)
        return micro_size(self.config, self.processes.world_size, self.batch_size)

    def distorts(self, step: int) -> bool:
        """Whether the loss of update ``step`` is that of smaller batches' statistics.

        So it is where there is batch norm and the noise is read in smaller parts than usual. Where
        every update is read none differs from another.
        """
        options = self.config.batch.adaptive
        if options is None or options.observe_every == 1 or not self.is_read(step):
            return False
        finer = self.part_size(read=True) < self.part_size(read=False)
        return finer and bool(coupling_layers(self.model))

    def resize(self, batch_size: int, *, total_steps: int) -> None:
        """Let the rate follow the batch, whose size has just become ``batch_size``.

        Args:
            batch_size: of the next update.
            total_steps: of the run, if it stays.
        """
        options = self.config.batch.adaptive
        assert options is not None
        if self.controller is not None:
            self.controller.set_batch_size(batch_size, total_steps=total_steps)
        if self.config.optim.lr != "auto":
            rule = "none" if options.rate == "auto" else options.rate
            self.scheduler.set_batch_size(batch_size, rule=rule)

    def measurement_batches(self, sizes: tuple[int, int] | None = None) -> list[Batch]:
        """Disjoint training batches to measure curvature on, not augmented.

        Fresh ones, or with ``curvature.fixed_samples`` the same each time.

        Args:
            sizes: size and number of the batches; by default `tracking_sizes`.
        """
        size, count = sizes or tracking_sizes(
            self.config, self.data, self.processes.world_size, self.batch_size
        )
        fixed = self.config.curvature.fixed_samples
        batches = measurement_batches(
            self.data,
            batch_size=size,
            num_batches=count,
            generator=_sampler(self.config) if fixed else self.sampler,
            device=self.device,
        )
        return [(self.arranged(x), y) for x, y in batches]

    def arranged(self, images: torch.Tensor) -> torch.Tensor:
        """``images`` ``(B, C, H, W)`` in the configured memory layout."""
        if not self.config.train.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives from which `load_state_dict` goes on bit-identically.

        What is sharded is gathered, by all processes together, and whole in the first one's only:
        the state says nothing of how many processes there were, or of how they shared the weights.
        """
        state: dict[str, Any] = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "adaptive": None if self.adaptive is None else self.adaptive.state_dict(),
            "sampler": self.sampler.get_state(),
            "random_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        if self.processes.shards:
            state = gathered_state(state, keep=self.processes.is_first)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned in the first process, in all of them together."""
        like = self.model.state_dict()
        weights = {name: sharded_like(t, like.get(name, t)) for name, t in state["model"].items()}
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(_sharded_as(self.optimizer, state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
        if self.controller is not None and state["controller"] is not None:
            self.controller.load_state_dict(state["controller"])
        if self.adaptive is not None:
            self.adaptive.load_state_dict(state["adaptive"])
        self.sampler.set_state(state["sampler"])
        torch.set_rng_state(state["random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"], self.device)


def build_experiment(config: TrainConfig, processes: Processes | None = None) -> Experiment:
    """Build everything; seeds torch's global generator, as a program of its own may.

    Raises:
        DataError: data is missing or corrupt.
        ValueError: sizes do not fit one another, or a name is unknown.
    """
    processes = processes or Processes()
    device = find_device(config, processes)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    data = processes.together(partial(build_data, config), device)
    steps_per_epoch = batches_per_epoch(data, batch_size=config.batch.global_size)
    check_sharing(config, data, processes)
    total_steps = steps_per_epoch * config.train.epochs
    options = config.model.model_dump(exclude={"name"})
    model = build_model(
        config.model.name,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        **options,
    ).to(device)
    if config.train.channels_last and not processes.shards:  # fully_shard keeps its own layout
        model = model.to(memory_format=torch.channels_last)
    parallel = processes.wrap(model, device)
    loss_fn = supervised(nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing))
    optimizer = _optimizer(config, model)
    automatic = config.optim.lr == "auto"
    scheduler = BatchAwareLR(
        optimizer,
        # The first measurement replaces it before the first step.
        1.0 if config.optim.lr == "auto" else config.optim.lr,
        shape_factory(config.schedule, total_steps),
        batch_size=config.batch.global_size,
    )
    measured = automatic if config.curvature.measure is None else config.curvature.measure
    return Experiment(
        config=config,
        processes=processes,
        device=device,
        data=data.to(device),
        model=model,
        parallel=parallel,
        loss_fn=loss_fn,
        optimizer=optimizer,
        scheduler=scheduler,
        controller=_controller(config, data, scheduler, loss_fn, steps_per_epoch)
        if measured
        else None,
        adaptive=adaptive_batch_size(config, data, processes),
        steps_per_epoch=steps_per_epoch,
        sampler=_sampler(config),
    )


def build_data(config: TrainConfig) -> ImageData:
    """The configured data set."""
    options = config.data.model_dump(exclude={"name"})
    return load_data(config.data.name, seed=config.seed, **options)


def _sampler(config: TrainConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed + 1)


def find_device(config: TrainConfig, processes: Processes) -> torch.device:
    """The configured device, or this process's accelerator if there is one.

    Raises:
        ValueError: the device is unknown or not there.
    """
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        msg = f"train.device {name!r} is not available: {str(error).splitlines()[0]}"
        raise ValueError(msg) from None
    return device


def _sharded_as(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's ``state``, loaded whole, split as its parameters are.

    Not by `torch.distributed.checkpoint.state_dict`: its `get_optimizer_state_dict` makes a step of
    an optimizer that has made none, after which Adam counts one too many.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        number: {
            key: sharded_like(value, parameters[number]) if torch.is_tensor(value) else value
            for key, value in kept.items()
        }
        for number, kept in state["state"].items()
    }
    return state | {"state": split}


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    options = config.optim
    if isinstance(options, SGDOptions):
        return torch.optim.SGD(
            model.parameters(),
            lr=1.0,  # only ratios between groups matter to BatchAwareLR
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return kind(
        model.parameters(),
        lr=1.0,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def _controller(
    config: TrainConfig,
    data: ImageData,
    scheduler: BatchAwareLR,
    loss_fn: SupervisedLoss,
    steps_per_epoch: int,
) -> CurvatureController:
    options = config.curvature
    every = options.every_epochs
    return CurvatureController(
        scheduler,
        loss_fn,
        total_steps=steps_per_epoch * config.train.epochs,
        batch_size=config.batch.global_size,
        dataset_size=len(data.train),
        max_overhead=options.max_overhead,
        start=options.start,
        growth=options.growth,
        drop=options.drop,
        safety=options.safety,
        adjust_momentum=options.adjust_momentum,
        apply=config.optim.lr == "auto",
        norm_mode=options.norm_mode,
        tol=options.tolerance,
        max_products=options.max_products,
        clip_norm=config.train.clip_norm,
        policy=options.policy,
        rollback=options.rollback,
        every_steps=None if every is None else every * steps_per_epoch,
        generator=torch.Generator().manual_seed(config.seed),
    )
