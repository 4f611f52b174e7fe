"""An update says in a line what was measured and what came of it."""

import pytest
import torch
from torch import nn

from batchlr.controller import CurvatureController
from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.operators import supervised
from batchlr.schedulers import BatchAwareLR

MSE = supervised(nn.MSELoss())
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [tuple(torch.randn(8, 2, generator=GENERATOR) for _ in range(2)) for _ in range(4)]


@pytest.fixture
def model():
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    return model


@pytest.fixture
def controller(model):
    scheduler = BatchAwareLR(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5), peak=1.0)
    return CurvatureController(scheduler, MSE, batch_size=8, dataset_size=32)


def test_a_measurement_is_printed_in_a_line(model, controller):
    update = controller.maybe_update(model, BATCHES)
    assert str(update) == (
        f"step 0: peak {update.peak:.3g}, momentum 0.5; largest eigenvalue "
        f"{update.largest_eigenvalue:.4g}; limit {update.bound}; {update.num_products} products "
        f"in {update.seconds:.2g} s"
    )
    assert "report" not in repr(update)  # it is one screen of its own


def test_a_failure_is_printed_with_its_reason():
    update = CurvatureUpdate(5, 0.125, 0.9, failure="the loss is nan", num_products=2, seconds=0.5)
    assert str(update) == (
        "step 5: peak 0.125, momentum 0.9; measurement failed, the last good rate kept: the loss "
        "is nan; 2 products in 0.5 s"
    )
