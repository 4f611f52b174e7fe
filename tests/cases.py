"""Small problems in float64, on which each operator is compared with the dense matrix.

`CASES` builds a fresh problem on each call, always the same one. Batches are ragged, so that a mean
over batches in place of the sample-weighted one shows; VGG, the dearest, has a single one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchlr import GGNOperator, HessianOperator, LinearOperator, supervised
from batchlr.operators.base import BatchedOperator
from batchlr.training.models import MLP, VGG, PreResNet

RAGGED = (5, 3, 2)


def conv_net():
    """For 8x8 images of one channel; batch norm and dropout are what probes could disturb."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(108, 4),
    )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A model, a loss and batches, in the form the operators take and in the reference's."""

    model: nn.Module
    criterion: nn.Module
    pairs: list[tuple[Tensor, Tensor]]  # (x, y) of each batch, whatever the batch looks like
    norm_mode: str | None = None
    form: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)

    @property
    def batches(self) -> list[Any]:
        return [self.form(x, y) for x, y in self.pairs]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def operator(self, kind: str, **options: Any) -> HessianOperator | GGNOperator:
        operator = {"hessian": HessianOperator, "ggn": GGNOperator}[kind]
        options = {"norm_mode": self.norm_mode, **options}
        return operator(self.model, supervised(self.criterion), self.batches, **options)

    def vectors(self, *columns: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.size, *columns, dtype=torch.float64, generator=generator)


class DiagonalOperator(LinearOperator):
    """A diagonal matrix of any size."""

    def __init__(self, diagonal: Tensor) -> None:
        super().__init__(diagonal.numel(), dtype=diagonal.dtype, device=diagonal.device)
        self.diagonal = diagonal

    def _multiply(self, columns: Tensor) -> Tensor:
        return self.diagonal.unsqueeze(1) * columns


class BatchMatrices(BatchedOperator):
    """The sample-weighted mean of explicit matrices ``(K, P, P)``."""

    def __init__(self, matrices: Tensor, samples: Sequence[int]) -> None:
        super().__init__(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        self.matrices = matrices
        self.counts = tuple(samples)

    @property
    def samples(self) -> tuple[int, ...]:
        return self.counts

    @property
    def mean(self) -> Tensor:
        weights = torch.tensor(self.counts, dtype=self.dtype) / sum(self.counts)
        return torch.einsum("k,kij->ij", weights, self.matrices)

    def batch_products(self, vectors: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        for matrix, vector in zip(self.matrices, self._each(vectors), strict=True):
            yield matrix @ vector

    def _multiply(self, columns: Tensor) -> Tensor:
        return self.mean @ columns


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Global random numbers from ``seed`` inside, untouched outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def classified(sizes: tuple[int, ...], *shape: int, num_classes: int = 3) -> list[Any]:
    """Batches of Gaussian inputs with random classes."""
    return [
        (torch.randn(n, *shape, dtype=torch.float64), torch.randint(num_classes, (n,)))
        for n in sizes
    ]


def unsettle(model: nn.Module) -> nn.Module:
    """In float64, with norms and biases far from their initial ones and zeros, in eval mode."""
    model.double()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            nn.init.normal_(parameter, mean=centre, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return model.eval()


def mlp(activation: str) -> Problem:
    model = unsettle(MLP([4, 3], in_features=5, num_classes=3, activation=activation))
    return Problem(model, nn.CrossEntropyLoss(), classified(RAGGED, 5))


def vgg(norm_mode: str) -> Problem:
    model = VGG(11, width=1 / 128, num_classes=3, batch_norm=True, in_channels=1)
    return convolutional(model, (4,), 32, norm_mode)


def preresnet(norm_mode: str) -> Problem:
    model = PreResNet(8, block="basic", width=1 / 16, num_classes=3, in_channels=1)
    return convolutional(model, (3, 2), 8, norm_mode)


def convolutional(
    model: nn.Module, sizes: tuple[int, ...], image_size: int, norm_mode: str
) -> Problem:
    pairs = classified(sizes, 1, image_size, image_size)
    unsettle(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
            module.reset_running_stats()
    with torch.no_grad():
        for x, _ in pairs:  # with any other running statistics most of the few ReLUs are dead
            model(x)
    return Problem(model.eval(), nn.CrossEntropyLoss(), pairs, norm_mode)


def norms(norm_mode: str) -> Problem:
    """Batch and instance norms with and without running statistics and affine parameters."""
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, affine=False, momentum=None),
        nn.Tanh(),
        nn.Linear(4, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.Tanh(),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return Problem(unsettle(model), nn.CrossEntropyLoss(), classified(RAGGED, 3), norm_mode)


class TiedAutoencoder(nn.Module):
    """One weight both ways, and one layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.middle = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 4)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().clone().T.contiguous())
        self.decoder_twin = nn.Linear(3, 4)
        self.decoder_twin.weight = self.decoder.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.middle(self.encoder(x).tanh()).tanh()).tanh()
        return self.decoder_twin(self.encoder(self.decoder(h).tanh()))


def tied() -> Problem:
    pairs = [(x, torch.sin(x)) for x, _ in classified(RAGGED, 4)]
    return Problem(unsettle(TiedAutoencoder()), nn.MSELoss(), pairs)


def frozen() -> Problem:
    problem = mlp("tanh")
    linears = [m for m in problem.model.modules() if isinstance(m, nn.Linear)]
    linears[0].requires_grad_(False)
    linears[1].bias.requires_grad_(False)
    return problem


def unused() -> Problem:
    problem = mlp("tanh")
    problem.model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    problem.model.spare_layer = nn.Linear(2, 1).double()
    return problem


def dicts() -> Problem:
    model = unsettle(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    pairs = classified(RAGGED, 5)
    return Problem(
        model, nn.CrossEntropyLoss(), pairs, form=lambda x, y: {"pixel_values": x, "labels": y}
    )


def regression() -> Problem:
    model = unsettle(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
    pairs = [(x, x[:, :2] * x[:, 1:]) for x, _ in classified(RAGGED, 3)]
    return Problem(model, nn.MSELoss(), pairs)


def logistic() -> Problem:
    model = unsettle(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    pairs = [(x, y.double()) for x, y in classified(RAGGED, 4, num_classes=2)]
    return Problem(model, nn.BCEWithLogitsLoss(), pairs)


def softmax() -> Problem:
    model = unsettle(MLP([], in_features=4, num_classes=3))
    return Problem(model, nn.CrossEntropyLoss(), classified(RAGGED, 4))


class SequenceClassifier(nn.Module):
    """A transformer layer, whose attention is a fused kernel, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(x).mean(1))


def transformer() -> Problem:
    return Problem(unsettle(SequenceClassifier()), nn.CrossEntropyLoss(), classified((3, 2), 5, 4))


def _fresh(build: Callable[..., Problem], *args: Any) -> Callable[[], Problem]:
    def built() -> Problem:
        with seeded():
            return build(*args)

    return built


CASES: dict[str, Callable[[], Problem]] = {
    "mlp-tanh": _fresh(mlp, "tanh"),
    "mlp-relu": _fresh(mlp, "relu"),
    "vgg-train": _fresh(vgg, "train"),
    "vgg-eval": _fresh(vgg, "eval"),
    "preresnet-train": _fresh(preresnet, "train"),
    "preresnet-eval": _fresh(preresnet, "eval"),
    "norms-train": _fresh(norms, "train"),
    "norms-eval": _fresh(norms, "eval"),
    "tied": _fresh(tied),
    "frozen": _fresh(frozen),
    "unused": _fresh(unused),
    "dicts": _fresh(dicts),
    "regression": _fresh(regression),
    "logistic": _fresh(logistic),
    "softmax": _fresh(softmax),
    "transformer": _fresh(transformer),
}
