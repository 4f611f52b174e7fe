"""A loop around Accelerate, steered, and the digits it learns."""

from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

import batchlr
from batchlr.integrations.accelerate import CurvatureSteering

LOSS = batchlr.supervised(nn.CrossEntropyLoss())


@cache
def digits(count: int = 1797) -> TensorDataset:
    pixels, labels = (torch.tensor(array)[:count] for array in load_digits(return_X_y=True))
    return TensorDataset(pixels.float() / 16, labels)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class Run:
    """Everything prepared, and the loop."""

    def __init__(
        self,
        total_steps: int | None,
        *,
        size: int = 64,
        data: Dataset | None = None,
        passes: int = 1,
        shape: Any = CosineAnnealingLR,
        precision: str = "no",
        **options: Any,
    ) -> None:
        for shared in (AcceleratorState, GradientState):  # one each for all of a program
            shared._reset_state()
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=passes, mixed_precision=precision
        )
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        loader = DataLoader(digits() if data is None else data, size)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.steering = CurvatureSteering(
            self.accelerator,
            self.model,
            self.optimizer,
            self.loader,
            LOSS,
            total_steps=total_steps,
            shape=shape,
            **options,
        )
        self.rates: list[float] = []

    def epoch(self) -> None:
        accelerator, optimizer = self.accelerator, self.optimizer
        for batch in self.loader:
            self.steering.measure()
            with accelerator.accumulate(self.model):
                if accelerator.sync_gradients:
                    self.rates.append(optimizer.param_groups[0]["lr"])
                loss = LOSS(self.model, batch)
                accelerator.backward(loss)
                optimizer.step()
                self.steering.observe(loss)
                optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])
