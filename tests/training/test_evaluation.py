"""Accuracy and loss of networks whose outputs are known, on test sets made for them."""

import math

import pytest
import torch
import torch.nn.functional as F
from runs import NETWORKS, tiny
from torch import nn

from batchlr.training.data import ImageData, TensorImages
from batchlr.training.distributed import Processes
from batchlr.training.evaluation import evaluate
from batchlr.training.experiment import build_experiment

CLASSES = 5


class Reader(nn.Module):
    """Outputs ``scale`` for the class written in the first pixel, and 0 for all others."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return self.scale * F.one_hot(images[:, 0, 0, 0].long(), CLASSES)


@pytest.fixture
def experiment(tmp_path):
    """A function that builds one on synthetic images, changed by overrides."""

    def build(*overrides):
        return build_experiment(tiny(tmp_path, *NETWORKS["batch norm"], *overrides))

    return build


def written(predicted, labels):
    """A test set whose images hold what `Reader` is to predict."""
    images = torch.zeros(len(labels), 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(predicted, dtype=torch.float32)
    test = TensorImages(images, torch.tensor(labels))
    return ImageData("written", test, test, CLASSES, in_channels=1, image_size=2)


def test_accuracy_and_loss_have_their_closed_forms(experiment):
    """Cross-entropy is ``ln(exp(s) + C - 1)``, less ``s`` where the prediction is right."""
    made, scale = experiment(), 1.5
    made.model = Reader(scale)
    made.data = written([0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 0, 1, 2])
    total = math.log(math.exp(scale) + CLASSES - 1)
    result = evaluate(made)
    assert result.accuracy == pytest.approx(3 / 7, rel=1e-12)
    assert result.loss == pytest.approx(total - 3 / 7 * scale, rel=1e-6)


@pytest.mark.parametrize("count", [1, 256, 257, 600])
def test_every_sample_counts_alike_whatever_the_batches(experiment, count):
    """The last half is wrong: of 257 a mean over batches of 129 and 128 would be one half."""
    made, right = experiment(), -(-count // 2)
    made.model = Reader(3.0)
    made.data = written([1] * count, [1] * right + [2] * (count - right))
    result = evaluate(made)
    assert result.accuracy == pytest.approx(right / count, rel=1e-12)
    total = math.log(math.exp(3.0) + CLASSES - 1)
    assert result.loss == pytest.approx(total - 3.0 * right / count, rel=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rank", "accuracy"), [(0, 3 / 4), (1, 1 / 3)])
def test_of_two_processes_each_looks_at_its_own_samples(experiment, rank, accuracy):
    """Every second one; the sums of both are the whole, of which here is only one part."""
    made = experiment()
    made.model = Reader(1.5)
    made.data = written([0, 1, 2, 3, 4, 0, 1], [0, 2, 2, 2, 4, 0, 2])
    made.processes = Processes(rank, world_size=2)
    assert evaluate(made).accuracy == pytest.approx(accuracy, rel=1e-12)


def test_it_is_that_of_eval_mode_without_smoothing(experiment):
    made = experiment("train.label_smoothing=0.3")
    made.model.train()
    result = evaluate(made)
    images, labels = next(made.data.test.batches([torch.arange(50)]))
    with torch.no_grad():
        outputs = made.model.eval()(images)
        in_train_mode = F.cross_entropy(made.model.train()(images), labels)
    assert result.accuracy == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-5)
    assert result.loss != pytest.approx(float(in_train_mode), rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_network_changes(experiment, training):
    made = experiment()
    model = made.model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(made)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_part_stays_in_eval_mode(experiment):
    made = experiment()
    made.model.train().norm.eval()
    before = {name: module.training for name, module in made.model.named_modules()}
    evaluate(made)
    assert {name: module.training for name, module in made.model.named_modules()} == before
    assert set(before.values()) == {True, False}


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_as_in_training_and_no_graph_is_kept(experiment, channels_last):
    made, seen = experiment(f"train.channels_last={str(channels_last).lower()}"), []

    def look(module, inputs, output):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        seen.append((inputs[0].is_contiguous(memory_format=layout), output.requires_grad))

    made.model.register_forward_hook(look)
    evaluate(made)
    assert seen == [(True, False)]


def test_a_network_that_is_lost_has_a_loss_that_says_so(experiment):
    made = experiment()
    made.model = Reader(math.nan)
    made.data = written([1, 2], [1, 2])
    assert math.isnan(evaluate(made).loss)
