"""The sections of a configuration that choose by ``name``: data, model, optim and schedule."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from batchlr.training.config.fields import (
    Betas,
    Count,
    CountFromTwo,
    CountFromZero,
    Counts,
    Flag,
    Fraction,
    Interior,
    Milestones,
    NonNegative,
    Options,
    Positive,
    RateOrAuto,
    Share,
    UserPath,
    refusal,
)

# data ------------------------------------------------------------------------------------------

Augment = Literal["standard", "none"]
_AUGMENT = "standard = random crops and mirror images of the training set; none = as they are"
Statistics = Literal["cifar10", "cifar100", "imagenet"]
_STATISTICS = "data set whose mean and deviation normalise the pixels; the curvature scales with it"
_ROOT = "folder that holds the files, or will hold them after a download"


class DigitsOptions(Options):
    """The 1797 real handwritten digits that come with scikit-learn; nothing to download."""

    name: Literal["digits"] = "digits"
    image_size: Count = Field(default=32, description="height and width, in pixels; 8 as scanned")
    augment: Augment = Field(
        default="none", description="standard = shift the training images; none = as they are"
    )


class ArraysOptions(Options):
    """Images of your own in one NPZ file."""

    name: Literal["arrays"] = "arrays"
    path: UserPath = Field(
        description="NPZ file with x_train, y_train, x_test, y_test; x is N,C,H,W uint8 or float32"
    )
    augment: Augment = Field(default="none", description=_AUGMENT)


class _CifarOptions(Options):
    root: UserPath = Field(default=Path("data"), description=_ROOT)
    download: Flag = Field(
        default=False, description="fetch the files into root when they are missing"
    )
    augment: Augment = Field(default="standard", description=_AUGMENT)


class Cifar10Options(_CifarOptions):
    """CIFAR-10."""

    name: Literal["cifar10"] = "cifar10"
    statistics: Statistics = Field(default="cifar10", description=_STATISTICS)


class Cifar100Options(_CifarOptions):
    """CIFAR-100, fine labels."""

    name: Literal["cifar100"] = "cifar100"
    statistics: Statistics = Field(default="cifar100", description=_STATISTICS)


class FolderOptions(Options):
    """Image files, one folder a class, below ``root/train`` and ``root/val``."""

    name: Literal["imagefolder", "imagenet"]
    root: UserPath = Field(default=Path("data"), description="folder that holds train/ and val/")
    augment: Augment = Field(default="standard", description=_AUGMENT)
    image_size: Count = Field(
        default=224, description="height and width fed to the network, in pixels"
    )
    workers: CountFromZero = Field(
        default=4, description="processes that read ahead; 0 = the training process itself"
    )


class SyntheticOptions(Options):
    """A random image for each class, plus pixel noise: a problem that learns in seconds."""

    name: Literal["synthetic"] = "synthetic"
    num_samples: Count = Field(default=1024, description="images to train on")
    num_test_samples: Count = Field(default=256, description="images to test on")
    num_classes: CountFromTwo = Field(default=10, description="classes")
    image_size: Count = Field(default=8, description="height and width, in pixels")
    channels: Count = Field(default=3, description="channels of an image")
    noise: NonNegative = Field(
        default=1.0, description="standard deviation of the noise; that of the clean images is 1"
    )


DataOptions = (
    DigitsOptions
    | ArraysOptions
    | Cifar10Options
    | Cifar100Options
    | FolderOptions
    | SyntheticOptions
)


# model -----------------------------------------------------------------------------------------


def _check_depth(depth: int, step: int, offset: int, what: str) -> int:
    """Networks of equal stages exist only at depths ``step n + offset``."""
    below = max(1, (depth - offset) // step) * step + offset
    if depth >= step + offset and (depth - offset) % step == 0:
        return depth
    nearest = str(below) if depth < below else f"{below} or {below + step}"
    words = f"must be {step} n + {offset} for {what}; nearest: {nearest}"
    raise refusal(words)


class VGGOptions(Options):
    """VGG (Simonyan and Zisserman 2014), with or without batch normalisation."""

    name: Literal["vgg"] = "vgg"
    depth: Literal[11, 13, 16, 19] = Field(default=16, description="layers with weights")
    batch_norm: Flag = Field(
        default=False, description="batch normalisation after every convolution"
    )
    width: Positive = Field(default=1.0, description="factor on every number of channels")
    head: Count = Field(
        default=512, description="width of the two hidden linear layers, before width"
    )
    dropout: Fraction = Field(default=0.0, description="share of units dropped in the head")


class WideResNetOptions(Options):
    """Wide residual network (Zagoruyko and Komodakis 2016)."""

    name: Literal["wide_resnet"] = "wide_resnet"
    depth: Count = Field(default=28, description="layers with weights, 6 n + 4")
    widen_factor: Count = Field(default=10, description="factor on the channels of a plain ResNet")
    dropout: Fraction = Field(default=0.0, description="share of units dropped inside every block")
    conv_bias: Flag = Field(default=False, description="bias in every convolution")
    shortcut: Literal["preactivated", "raw"] = Field(
        default="preactivated", description="what a convolved shortcut reads of its block's input"
    )

    @field_validator("depth")
    @classmethod
    def _check(cls, depth: int) -> int:
        return _check_depth(depth, 6, 4, "wide_resnet")


class PreResNetOptions(Options):
    """Pre-activation residual network (He et al. 2016)."""

    name: Literal["preresnet"] = "preresnet"
    block: Literal["bottleneck", "basic"] = Field(
        default="bottleneck",
        description="bottleneck = 1x1, 3x3, 1x1 convolutions; basic = 3x3, 3x3",
    )
    depth: Count = Field(
        default=110, description="layers with weights: 9 n + 2 for bottleneck, 6 n + 2 for basic"
    )
    width: Positive = Field(default=1.0, description="factor on every number of channels")

    @field_validator("depth")
    @classmethod
    def _check(cls, depth: int, info: ValidationInfo) -> int:
        step = {"bottleneck": 9, "basic": 6}.get(info.data.get("block", ""))
        return _check_depth(depth, step, 2, f"{info.data['block']} blocks") if step else depth


class MLPOptions(Options):
    """Fully connected network on flattened images."""

    name: Literal["mlp"] = "mlp"
    hidden: Counts = Field(
        default=(64,), description="widths of the hidden layers; [] = linear model"
    )
    activation: Literal["tanh", "relu"] = Field(default="tanh", description="between the layers")


class TorchvisionOptions(Options):
    """Any classifier of ``torchvision.models``, with random initial weights."""

    name: Literal["torchvision"] = "torchvision"
    arch: str = Field(description="name in torchvision.models, such as resnet50")


ModelOptions = VGGOptions | WideResNetOptions | PreResNetOptions | MLPOptions | TorchvisionOptions


# optim -----------------------------------------------------------------------------------------

_LR = "peak learning rate, or auto = measured from the curvature while training"


class SGDOptions(Options):
    """Stochastic gradient descent with heavy-ball momentum."""

    name: Literal["sgd"] = "sgd"
    lr: RateOrAuto = Field(default="auto", description=_LR)
    momentum: Fraction = Field(default=0.9, description="heavy-ball momentum; 0 = none")
    nesterov: Flag = Field(default=False, description="Nesterov's variant of momentum")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty, added to the gradient")

    @field_validator("nesterov")
    @classmethod
    def _check(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise refusal("must be false when momentum is 0")
        return nesterov


class AdamOptions(Options):
    """Adam (L2 penalty) or AdamW (decoupled weight decay)."""

    name: Literal["adam", "adamw"]
    lr: RateOrAuto = Field(default="auto", description=_LR)
    betas: Betas = Field(
        default=(0.9, 0.999), description="decay of the means of the gradient and of its square"
    )
    eps: Positive = Field(
        default=1e-8, description="added to the root of the mean squared gradient"
    )
    weight_decay: NonNegative = Field(
        default=0.0, description="adam: L2 penalty added to the gradient; adamw: decoupled decay"
    )


OptimOptions = SGDOptions | AdamOptions


# schedule --------------------------------------------------------------------------------------

_WARMUP = "share of all steps over which the rate rises linearly from zero to its peak"


class CosineOptions(Options):
    """Half a cosine from the peak to ``final`` (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"] = "cosine"
    warmup: Fraction = Field(default=0.05, description=_WARMUP)
    final: NonNegative = Field(default=0.0, description="last rate, as a share of the peak")


class ConstantOptions(Options):
    """The peak, throughout."""

    name: Literal["constant"] = "constant"
    warmup: Fraction = Field(default=0.0, description=_WARMUP)


class LinearTailOptions(Options):
    """Constant until ``hold``, linear to ``final`` at ``end``, constant after (Izmailov 2018)."""

    name: Literal["linear_tail"] = "linear_tail"
    warmup: Fraction = Field(default=0.0, description=_WARMUP)
    hold: Fraction = Field(default=0.5, description="share of all steps at which the decay starts")
    end: Share = Field(
        default=0.9, validate_default=True, description="share of all steps at which the decay ends"
    )
    final: NonNegative = Field(default=0.01, description="last rate, as a share of the peak")

    @field_validator("end")
    @classmethod
    def _check(cls, end: float, info: ValidationInfo) -> float:
        if end <= info.data.get("hold", 0.0):
            raise refusal("must lie after hold")
        return end


class StepOptions(Options):
    """The peak, multiplied by ``factor`` at every milestone."""

    name: Literal["step"] = "step"
    warmup: Fraction = Field(default=0.0, description=_WARMUP)
    milestones: Milestones = Field(
        default=(0.3, 0.6, 0.8), description="shares of all steps at which the rate drops"
    )
    factor: Interior = Field(default=0.2, description="factor on the rate at each milestone")

    @field_validator("milestones")
    @classmethod
    def _check(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if sorted(set(milestones)) != list(milestones):
            raise refusal("must increase from one milestone to the next")
        return milestones


ScheduleOptions = CosineOptions | ConstantOptions | LinearTailOptions | StepOptions


# For each section with a ``name``: what may stand there; the first is the default.
VARIANTS: dict[str, dict[str, type[Options]]] = {
    "data": {
        "digits": DigitsOptions,
        "arrays": ArraysOptions,
        "cifar10": Cifar10Options,
        "cifar100": Cifar100Options,
        "imagefolder": FolderOptions,
        "imagenet": FolderOptions,
        "synthetic": SyntheticOptions,
    },
    "model": {
        "vgg": VGGOptions,
        "wide_resnet": WideResNetOptions,
        "preresnet": PreResNetOptions,
        "mlp": MLPOptions,
        "torchvision": TorchvisionOptions,
    },
    "optim": {"sgd": SGDOptions, "adam": AdamOptions, "adamw": AdamOptions},
    "schedule": {
        "cosine": CosineOptions,
        "constant": ConstantOptions,
        "linear_tail": LinearTailOptions,
        "step": StepOptions,
    },
}


def default_name(section: str) -> str:
    """The ``name`` of a section that does not give one."""
    return next(iter(VARIANTS[section]))
