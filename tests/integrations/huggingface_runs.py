"""A small network and a tiny BERT for the Trainer of transformers, and what they learn."""

import os
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from batchlr.integrations.huggingface import steer


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return pixels.float() / 16, labels


def samples(count: int = 1797) -> list[dict[str, Any]]:
    return [{"pixels": x, "labels": int(y)} for x, y in zip(*digits(), strict=True)][:count]


class Net(nn.Module):
    """Of no class of transformers; its loss comes with its outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, pixels, labels=None):
        logits = self.net(pixels)
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def sgd(model: nn.Module, lr: float = 1.0):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), None


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 16, "vocab_size": 30}
    # In eval mode, as from_pretrained returns models.
    return BertForSequenceClassification(BertConfig(num_labels=2, **sizes)).eval()


@cache
def sentences() -> tuple[dict[str, Any], ...]:
    """Of different lengths; most words of the second half of the vocabulary, or not."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(256):
        words = torch.randint(2, 30, (4 + number % 5,), generator=generator)
        found.append({"input_ids": words.tolist(), "labels": int((words > 15).sum() * 2 > 7)})
    return tuple(found)


def make(model: nn.Module, dataset, out, *, steered=True, options=None, **settings) -> Trainer:
    given = {
        name: settings.pop(name)
        for name in ("optimizers", "data_collator", "compute_loss_func")
        if name in settings
    }
    arguments = TrainingArguments(
        str(out),
        **{
            "per_device_train_batch_size": 64,
            "num_train_epochs": 2,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "max_grad_norm": 0.0,
        }
        | settings,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, **given)
    if steered:
        steer(trainer, **options or {})
    return trainer


def rates(trainer: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


def measured(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What was logged of measurements, by step."""
    history = trainer.state.log_history
    return {entry["step"]: entry for entry in history if "largest_eigenvalue" in entry}


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
