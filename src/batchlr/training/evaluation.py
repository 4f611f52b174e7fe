"""How well a network does on the test set."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batchlr.training.data import test_batches
from batchlr.training.experiment import Experiment


@dataclass(frozen=True)
class TestResult:
    """Means over the test set."""

    accuracy: float  # share of images whose label gets the largest output
    loss: float  # cross-entropy, without label smoothing


def evaluate(experiment: Experiment) -> TestResult:
    """Accuracy and loss of the network in eval mode; each module's own mode is put back.

    All processes take the first one's buffers (running means), which checkpoints hold.
    """
    model = experiment.model
    experiment.processes.share(model.buffers())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # Sums over samples, so that batches and processes need not be of equal size.
    sums = torch.zeros(3, dtype=torch.float64, device=experiment.device)
    with torch.no_grad():
        for images, labels in test_batches(
            experiment.data,
            batch_size=256,
            device=experiment.device,
            rank=experiment.processes.rank,
            world_size=experiment.processes.world_size,
        ):
            outputs = model(experiment.arranged(images))
            sums[0] += (outputs.argmax(1) == labels).sum()
            sums[1] += F.cross_entropy(outputs, labels, reduction="sum")
            sums[2] += len(labels)
    for module, training in modes:
        module.training = training
    correct, loss, count = experiment.processes.sum(sums).tolist()
    return TestResult(correct / count, loss / count)
