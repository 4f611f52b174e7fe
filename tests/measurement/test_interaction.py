import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchlr import measure_curvature, supervised
from batchlr.measurement.curvature_point import CurvaturePoint
from batchlr.measurement.interaction import samples_interact
from cases import classified, seeded

SUPERVISED = supervised(nn.CrossEntropyLoss())


def contrastive(model, batch):
    """InfoNCE between inputs and themselves shifted."""
    here, there = (F.normalize(model(x), dim=1) for x in (batch, batch + 0.1))
    return F.cross_entropy(here @ there.T / 0.2, torch.arange(len(batch)))


def point(loss_fn, batches, *layers):
    model = nn.Sequential(nn.Linear(5, 4), *layers, nn.Tanh(), nn.Linear(4, 3)).double()
    return CurvaturePoint.at(model, loss_fn, batches)


def test_contrastive_losses_do():
    with seeded():
        batches = [torch.randn(8, 5).double() for _ in range(4)]
        assert samples_interact(point(contrastive, batches))


@pytest.mark.parametrize("layers", [[], [nn.Dropout(0.5)]])
@pytest.mark.parametrize("size", [3, 8])
def test_losses_that_are_means_do_not(layers, size):
    with seeded():
        assert not samples_interact(point(SUPERVISED, classified((size, size), 5), *layers))


def test_other_batch_sizes_are_then_not_to_be_relied_upon():
    with seeded():
        model = nn.Linear(5, 4).double()
        batches = [torch.randn(8, 5).double() for _ in range(16)]
        report = measure_curvature(model, contrastive, batches)
    assert report.coupled
    there = report.max_lr(64)
    assert not there.reliable
    assert any("samples of a batch interact" in reason for reason in there.reasons)
    assert not any("interact" in reason for reason in report.max_lr(8).reasons)
