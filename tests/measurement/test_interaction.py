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


def test_means_with_weights_of_their_own_do_not():
    """Classes that count unequally: each pair divides by another sum."""
    weights = torch.tensor([1.0, 20.0, 1.0]).double()
    criterion = nn.CrossEntropyLoss(weight=weights)

    def weighted(model, batch):
        return criterion(model(batch[0]), batch[1])

    for seed in range(20):
        with seeded(seed):
            assert not samples_interact(point(weighted, classified((8, 8), 5)))


@pytest.mark.parametrize("size", [5, 7])
def test_odd_batches_under_train_mode_norms_are_measured(size):
    with seeded():
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        report = measure_curvature(model, SUPERVISED, classified((size,) * 4, 5), norm_mode="train")
    assert report.coupled


def test_a_loss_for_batches_of_one_size_tells_nothing():
    offsets = torch.linspace(0, 1, 16).double()

    def fixed(model, batch):
        return (model(batch).squeeze(1) - offsets).square().mean()

    with seeded():
        model = nn.Linear(5, 1).double()
        batches = [torch.randn(16, 5).double() for _ in range(4)]
        report = measure_curvature(model, fixed, batches, num_small_batches=0)
    assert not report.coupled


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
