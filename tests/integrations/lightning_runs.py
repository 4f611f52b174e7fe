"""A small module for Lightning, and the digits it learns."""

from functools import cache

import lightning.pytorch as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

WARNINGS = [  # Lightning's, of itself and of runs as small as these
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory",
    "ignore:Starting from v1.9.0, `tensorboardX`",
]


@cache
def digits() -> TensorDataset:
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return TensorDataset(pixels.float() / 16, labels)


class Net(L.LightningModule):
    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.lr = lr
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Rates(L.Callback):
    """The rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def loader(dataset: Dataset | None = None, size: int = 64, **options) -> DataLoader:
    return DataLoader(digits() if dataset is None else dataset, size, **options)


def fit(module, callbacks, data=None, ckpt_path=None, trainer=L.Trainer, **options) -> list[float]:
    """Train; returns the rates."""
    rates = Rates()
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    trainer(
        accelerator="cpu",
        callbacks=[*callbacks, rates],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return rates.rates


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
