"""The networks, their data and the points in training at which all parts measure."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchlr.training.models import build_model

CLASSES = 10
TRAINING_STEPS = 20
LEARNING_RATE = 0.05

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network after some steps of SGD, and the batches its curvature is measured on."""

    name: str
    model: nn.Module
    batches: list[Batch]
    norm_mode: str | None
    attention: bool
    criterion: nn.Module

    def copy(self) -> nn.Module:
        """A network of one's own: some libraries leave gradients, flags or statistics changed."""
        return copy.deepcopy(self.model)

    def double(self) -> "Case":
        """The same in float64."""
        return Case(
            self.name,
            self.copy().double(),
            [(x.double() if x.is_floating_point() else x, y) for x, y in self.batches],
            self.norm_mode,
            self.attention,
            self.criterion,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class Transformer(nn.Module):
    """Token embedding, two stock encoder layers, and logits ``(B, words, T)`` of the next word."""

    def __init__(self, words: int = 200, length: int = 32, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers(self.embedding(tokens) + self.position)
        return self.output(x).transpose(1, 2)


@dataclass(frozen=True)
class Recipe:
    """How a case is made; ``small`` is the batch for what takes dozens of products."""

    network: Callable[[], nn.Module]
    batch: int
    small: int
    side: int = 32  # of an image; 0: sequences of words
    channels: int = 3
    norm_mode: str | None = None
    attention: bool = False


def image_network(name: str, side: int = 32, channels: int = 3, **options) -> nn.Module:
    return build_model(
        name, num_classes=CLASSES, in_channels=channels, image_size=side, **options
    )  # fmt: skip


def mlp(width: int = 800) -> nn.Module:
    return image_network("mlp", 28, 1, hidden=[width, width // 2], activation="relu")


def vgg(*, batch_norm: bool) -> nn.Module:
    return image_network("vgg", depth=11, batch_norm=batch_norm)


RECIPES = {
    "MLP": Recipe(mlp, 512, 256, side=28, channels=1),
    "VGG-11": Recipe(lambda: vgg(batch_norm=False), 64, 8),
    "VGG-11-BN, eval": Recipe(lambda: vgg(batch_norm=True), 64, 8, norm_mode="eval"),
    "VGG-11-BN, train": Recipe(lambda: vgg(batch_norm=True), 64, 8, norm_mode="train"),
    "WRN-16-4, eval": Recipe(
        lambda: image_network("wide_resnet", depth=16, widen_factor=4), 16, 4, norm_mode="eval"
    ),
    "PreResNet-20, eval": Recipe(
        lambda: image_network("preresnet", depth=20, block="basic"), 64, 8, norm_mode="eval"
    ),
    "transformer": Recipe(Transformer, 16, 8, side=0, attention=True),
}


def images(count: int, recipe: Recipe, generator: torch.Generator) -> Batch:
    """One smooth prototype a class, and noise."""
    shape = (recipe.channels, recipe.side, recipe.side)
    prototypes = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return 0.5 * prototypes[labels] + torch.randn(count, *shape, generator=generator), labels


def sentences(count: int, generator: torch.Generator) -> Batch:
    """Random walks over the words: the next one is near the last."""
    steps = torch.randint(-3, 4, (count, 33), generator=generator)
    words = (torch.randint(200, (count, 1), generator=generator) + steps.cumsum(1)) % 200
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


def make_case(
    name: str,
    *,
    samples: int | None = None,
    num_batches: int = 1,
    steps: int = TRAINING_STEPS,
    device: str = "cpu",
) -> Case:
    """The network ``name`` after ``steps`` of SGD, and ``num_batches`` batches of ``samples``."""
    recipe = RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = recipe.network()
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> Batch:
        x, y = images(count, recipe, generator) if recipe.side else sentences(count, generator)
        return x.to(device), y.to(device)

    model.to(device).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for _ in range(steps):
        x, y = draw(recipe.small)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for _ in range(8 if recipe.norm_mode else 0):
            model(draw(recipe.small)[0])  # running statistics catch up with the weights
    model.train(recipe.norm_mode == "train")
    count = recipe.batch if samples is None else samples
    batches = [draw(count) for _ in range(num_batches)]
    return Case(name, model, batches, recipe.norm_mode, recipe.attention, criterion)
