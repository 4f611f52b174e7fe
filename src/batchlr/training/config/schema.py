"""The whole configuration: every key with its type, bounds, default and meaning.

A default of the ``curvature`` section states where it comes from: cited, measured or assumed.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from batchlr.on_the_fly.policy_choice import LIMIT_POLICIES, Policy, sets_momentum
from batchlr.training.config.fields import (
    AboveOne,
    AboveOneOrNull,
    BytesOrNull,
    Count,
    CountFromTwo,
    CountFromZero,
    CountOrAuto,
    CountOrNull,
    Counts,
    Flag,
    FlagOrNull,
    FolderName,
    Fraction,
    Interior,
    NonNegative,
    Options,
    Positive,
    PositiveOrNull,
    Resume,
    Seed,
    Share,
    refusal,
)
from batchlr.training.config.variants import (
    VARIANTS,
    CosineOptions,
    DataOptions,
    DigitsOptions,
    ModelOptions,
    OptimOptions,
    ScheduleOptions,
    SGDOptions,
    VGGOptions,
    default_name,
)


class AdaptiveOptions(Options):
    """How the batch grows while training: until its gradient stands out of its noise."""

    max_size: Count = Field(
        description="largest number of samples in one update, rounded down to whole micro-batches"
    )
    tolerance: Positive = Field(
        default=1.0,
        description="largest noise of the batch's gradient, over the gradient's norm, that passes; "
        "1 = a batch of one noise scale (assumed)",
    )
    debias: Flag = Field(
        default=True,
        description="take the noise out of the gradient's norm; false = as published, which from "
        "tolerance 1 on hardly grows: only where chance has it",
    )
    max_growth: AboveOneOrNull = Field(
        default=2.0,
        description="largest factor of one test, or one micro-batch of each device "
        "more where that is a larger one; null = no bound (assumed)",
    )
    test_every: Count = Field(default=50, description="updates between two tests (assumed)")
    observe_every: Count = Field(
        default=10,
        description="updates between two of which the noise is read, from parts of the batch "
        "(assumed)",
    )
    smoothing: Fraction = Field(
        default=0.9,
        description="weight of the past in the averages of noise and norm, at each reading "
        "(assumed)",
    )
    groups: CountFromTwo = Field(
        default=4,
        description="parts of the batch, over all processes, whose gradients are compared: "
        "micro-batches, or if these are fewer equal parts of two samples or more, as near to this "
        "number as can be (assumed)",
    )
    rate: Literal["auto", "none", "linear", "sqrt"] = Field(
        default="auto",
        description="how the rate follows: auto = as the measured limit does where optim.lr is "
        "auto, else not at all, as published; linear, sqrt = with the batch, or its root",
    )


class BatchOptions(Options):
    """How many samples one update of the weights sees, and how they reach the device."""

    global_size: Count = Field(default=128, description="samples in one update, over all devices")
    micro_size: CountOrAuto = Field(
        default="auto",
        description="samples in one forward pass; gradients accumulate up to global_size; "
        "auto = as many as one device's share. With batch.adaptive that of the first batch: larger "
        "ones accumulate, and all are multiples of it, over all devices",
    )
    adaptive: AdaptiveOptions | None = Field(
        default=None,
        description="let the batch grow from global_size while training; null = it stays",
    )

    @field_validator("micro_size")
    @classmethod
    def _check(cls, micro: int | str, info: ValidationInfo) -> int | str:
        total = info.data.get("global_size")
        if not isinstance(micro, int) or total is None or total % micro == 0:
            return micro
        small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
        divisors = sorted({*small, *(total // d for d in small)})
        micros = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:2])
        below = total // micro * micro
        totals = " or ".join(str(size) for size in (below, below + micro) if size)
        near = " or ".join(map(str, micros))
        words = f"must divide global_size {total}; use {near}, or global_size {totals}"
        raise refusal(words)

    @field_validator("adaptive")
    @classmethod
    def _check_adaptive(
        cls, adaptive: AdaptiveOptions | None, info: ValidationInfo
    ) -> AdaptiveOptions | None:
        first = info.data.get("global_size")
        if adaptive is not None and first is not None and adaptive.max_size < first:
            words = f"must be at least batch.global_size {first}"
            raise refusal(words, at=("max_size",))
        return adaptive


class CurvatureOptions(Options):
    """When and how the curvature is measured. ``optim.lr: auto`` applies what is found."""

    measure: FlagOrNull = Field(
        default=None, description="measure while training; null = only when optim.lr is auto"
    )
    samples: CountFromTwo = Field(
        default=256,
        description="samples in one measurement (assumed); while training no more than half the "
        "batch has (measured: docs/log.md), or 64 (assumed); batchlr lr takes eight batches, if "
        "that is more, where batch norm couples samples",
    )
    max_overhead: NonNegative = Field(
        default=0.05,
        description="cost of the measurements over that of the training steps, which the some ten "
        "that every run needs may exceed (assumed)",
    )
    tolerance: Interior = Field(
        default=0.1, description="relative error at which an eigenvalue search stops (assumed)"
    )
    max_products: Count = Field(
        default=20, description="matrix-vector products one eigenvalue search may cost (assumed)"
    )
    start: Share = Field(
        default=0.25, description="share of the first limit to start at (measured: docs/log.md)"
    )
    growth: AboveOne = Field(
        default=1.5,
        description="largest factor by which one measurement may raise the rate, beyond the error "
        "of the last limit, or to a quarter of the last two (measured: docs/log.md)",
    )
    drop: Fraction = Field(
        default=0.5,
        description="smallest factor by which one measurement may lower the rate; 0 is no bound "
        "(measured: docs/log.md)",
    )
    safety: Share = Field(
        default=1.0, description="share of the maximal stable rate that is used (assumed)"
    )
    adjust_momentum: Flag = Field(
        default=False, description="set the momentum, too, from the measured extremes (assumed)"
    )
    norm_mode: Literal["train", "eval"] = Field(
        default="train",
        description="batch normalisation while measuring: train = statistics of the batch, the "
        "function SGD descends; eval = running statistics (assumed)",
    )
    policy: Policy = Field(
        default="edge",
        description="what a measurement sets: mean_square = the largest stable rate (Mulayoff and "
        "Michaeli 2024, extended to momentum); edge = that of a batch twice as large (measured) "
        "once the loss has come down to stay; "
        "heavy_ball = Polyak's momentum, and the lesser of his rate and the limit; cdat = twice "
        "the greedy rate along the step (Roulet et al. 2024); paper_* = rate and momentum of the "
        "paper's on-the-fly learners as published, from one Lanczos run of max_products steps",
    )
    every_epochs: CountOrNull = Field(
        default=None,
        description="epochs between two measurements (the paper used 1, 10 and 20); null = dense "
        "early, then by need (assumed)",
    )
    rollback: Flag = Field(
        default=True,
        description="go back to an earlier network when training has destroyed it; keeps two "
        "copies of weights and optimizer state (measured: docs/log.md)",
    )
    fixed_samples: Flag = Field(
        default=False,
        description="measure on the same samples the whole run, as the paper did; false = fresh "
        "ones, so that no chance of the draw stays (assumed)",
    )
    memory_budget: BytesOrNull = Field(
        default=None,
        description="bytes that a report (batchlr lr, batchlr sweep) may take beyond model and "
        'data, or text such as "2 GiB": a small one costs time; null = what is free. Measuring '
        "while training takes some dozen vectors and knows no budget",
    )

    @field_validator("policy")
    @classmethod
    def _check(cls, policy: str, info: ValidationInfo) -> str:
        if policy not in LIMIT_POLICIES and info.data.get("safety", 1.0) != 1.0:
            raise refusal("must be mean_square, edge or heavy_ball when safety is not 1")
        if policy not in ("mean_square", "edge") and info.data.get("adjust_momentum"):
            raise refusal("must be mean_square or edge when adjust_momentum is true")
        return policy


class SpectrumOptions(Options):
    """What ``batchlr spectrum`` measures; it has no part in training."""

    matrix: Literal["hessian", "ggn", "residual"] = Field(
        default="hessian", description="ggn = Gauss-Newton; residual = Hessian minus Gauss-Newton"
    )
    steps: Count = Field(
        default=40, description="Lanczos steps of a probe (assumed; the paper used 100)"
    )
    probes: Count = Field(default=3, description="random start vectors (assumed; the paper used 1)")
    batch_sizes: Counts = Field(
        default=(),
        description="a grid of spectra of single random batches, of these sizes; [] = one "
        "spectrum of curvature.samples samples",
    )
    draws: Count = Field(
        default=1, description="batches drawn of each size (the paper drew 10); draw k has seed k"
    )


class RunOptions(Options):
    """How long, and in which arithmetic, to train."""

    epochs: Count = Field(default=10, description="passes over the training set")
    max_steps: CountOrNull = Field(
        default=None,
        description="stop after so many updates, schedule unchanged; null = after epochs",
    )
    clip_norm: PositiveOrNull = Field(
        default=None,
        description="largest norm of the gradient, over all weights; null = no clipping",
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="probability spread over all classes"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 = automatic mixed")
    channels_last: Flag = Field(
        default=False, description="memory layout NHWC, faster on recent GPUs"
    )
    device: str = Field(default="auto", description="auto, or a torch device such as cpu or cuda:1")


class DistOptions(Options):
    """How processes share the work."""

    strategy: Literal["auto", "single", "ddp", "fsdp"] = Field(
        default="auto",
        description="auto = ddp under torchrun, else single; fsdp = weights, gradients and "
        "optimizer state sharded (fully_shard)",
    )


class LogOptions(Options):
    """What is written while training."""

    every_steps: Count = Field(default=1, description="updates between two lines of metrics.jsonl")
    progress: Flag = Field(default=True, description="a progress bar on a terminal")


class CheckpointOptions(Options):
    """When checkpoints are written, and how many stay."""

    every_epochs: CountFromZero = Field(
        default=1,
        description="epochs between two checkpoints; 0 = only at the end or when interrupted",
    )
    keep: Count = Field(default=2, description="newest checkpoints that stay")


class TrainConfig(Options):
    """One run: everything that training depends on."""

    name: FolderName = Field(
        default="run", description="name of the run; default: the file's own name"
    )
    seed: Seed = Field(default=0, description="seed of weights, data order and probes")
    deterministic: Flag = Field(
        default=False, description="refuse nondeterministic kernels; slower"
    )
    data: Annotated[DataOptions, Field(discriminator="name")] = Field(
        default=DigitsOptions(), description="what to learn"
    )
    model: Annotated[ModelOptions, Field(discriminator="name")] = Field(
        default=VGGOptions(), description="the network"
    )
    optim: Annotated[OptimOptions, Field(discriminator="name")] = Field(
        default=SGDOptions(), description="the optimizer"
    )
    batch: BatchOptions = Field(default=BatchOptions(), description="batch sizes")
    schedule: Annotated[ScheduleOptions, Field(discriminator="name")] = Field(
        default=CosineOptions(), description="shape of the rate over the run; its peak is optim.lr"
    )
    curvature: CurvatureOptions = Field(
        default=CurvatureOptions(), description="measuring curvature"
    )
    spectrum: SpectrumOptions = Field(
        default=SpectrumOptions(), description="what `batchlr spectrum` measures"
    )
    train: RunOptions = Field(default=RunOptions(), description="length and arithmetic of the run")
    dist: DistOptions = Field(default=DistOptions(), description="processes")
    log: LogOptions = Field(default=LogOptions(), description="what is written while training")
    checkpoint: CheckpointOptions = Field(default=CheckpointOptions(), description="checkpoints")
    resume: Resume = Field(
        default=False,
        description="false = start anew; auto = from the newest checkpoint; or its path",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return values | {
            section: {"name": default_name(section)} | values[section]
            for section in VARIANTS
            if isinstance(values.get(section), dict)
        }

    @field_validator("batch")
    @classmethod
    def _check_batch(cls, batch: BatchOptions, info: ValidationInfo) -> BatchOptions:
        optim, adaptive = info.data.get("optim"), batch.adaptive
        automatic = optim is not None and optim.lr == "auto"
        if automatic and adaptive is not None and adaptive.rate != "auto":
            raise refusal(
                "must be auto when optim.lr is auto: the rate keeps to the measured limit",
                at=("adaptive", "rate"),
            )
        return batch

    @field_validator("curvature")
    @classmethod
    def _check(cls, curvature: CurvatureOptions, info: ValidationInfo) -> CurvatureOptions:
        optim = info.data.get("optim")
        if curvature.measure is False and optim is not None and optim.lr == "auto":
            raise refusal("must not be false when optim.lr is auto", at=("measure",))
        if sets_momentum(curvature.policy) and optim is not None and optim.name != "sgd":
            words = (
                f"must be mean_square, edge or cdat when optim.name is {optim.name}: the others "
                "set the momentum of sgd"
            )
            raise refusal(words, at=("policy",))
        batch = info.data.get("batch")
        automatic = optim is not None and optim.lr == "auto"
        if batch is not None and batch.adaptive is not None and (curvature.measure or automatic):
            if curvature.policy not in LIMIT_POLICIES:
                raise refusal(
                    "must be mean_square, edge or heavy_ball with batch.adaptive: no other says "
                    "what a larger batch changes",
                    at=("policy",),
                )
            if curvature.every_epochs is not None:
                raise refusal(
                    "must be null with batch.adaptive, where epochs differ in steps",
                    at=("every_epochs",),
                )
        return curvature


# The keys of TrainConfig that hold keys of their own.
SECTIONS: dict[str, type[Options]] = {
    key: type(field.default)
    for key, field in TrainConfig.model_fields.items()
    if isinstance(field.default, Options)
}
