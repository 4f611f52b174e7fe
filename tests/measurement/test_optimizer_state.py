import pytest
import torch
from torch import nn

from batchlr import BatchAwareLR, CurvatureController, measure_curvature, supervised
from batchlr.measurement.optimizer_state import second_moments
from cases import classified, seeded

LOSS = supervised(nn.CrossEntropyLoss())
OPTIONS = [
    ({"maximize": True}, r"maximize=True climbs.*the negative"),
    ({"momentum": 0.9, "dampening": 0.5}, r"dampening, got 0\.5.*dampening=0"),
]


def problem():
    with seeded():
        return nn.Linear(3, 3).double(), classified((6, 6), 3)


@pytest.mark.parametrize(("options", "words"), OPTIONS)
def test_options_whose_limit_is_unknown_are_refused(options, words):
    model, batches = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    with pytest.raises(ValueError, match=words):
        measure_curvature(model, LOSS, batches, optimizer=optimizer)
    scheduler = BatchAwareLR(optimizer, peak=0.1)
    with pytest.raises(ValueError, match=words):
        CurvatureController(scheduler, LOSS)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_amsgrad_divides_by_the_largest_average(kind):
    model, batches = problem()
    optimizer = kind(model.parameters(), amsgrad=True, betas=(0.9, 0.5))
    for size in (10.0, 0.1):  # the second average is smaller
        optimizer.zero_grad()
        (size * LOSS(model, batches[0])).backward()
        optimizer.step()
    moments = second_moments(model, optimizer)
    states = [optimizer.state[p] for p in model.parameters()]
    expected, smaller = (
        torch.cat([state[key].flatten() for state in states])
        for key in ("max_exp_avg_sq", "exp_avg_sq")
    )
    torch.testing.assert_close(moments.average, expected / (1 - 0.5**2))
    assert (smaller < expected).all()
