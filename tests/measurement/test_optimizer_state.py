"""What is known of optimizers; those that no rate is known for are refused."""

import pytest
import torch
from torch import nn

from batchlr import BatchAwareLR, CurvatureController, measure_curvature, supervised
from batchlr.measurement.optimizer_state import optimizer_kind, rate_ratios, second_moments
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


def test_names_are_those_of_the_laws():
    words = r"'adam' \(for AdamW, too\), 'rmsprop' or a torch optimizer, got 'adamw'"
    with pytest.raises(ValueError, match=words):
        optimizer_kind("adamw")


def test_a_class_is_told_from_its_optimizer():
    with pytest.raises(ValueError, match="got the class SGD; pass optimizer='sgd', 'adam'"):
        optimizer_kind(torch.optim.SGD)


def test_other_optimizers_are_named():
    optimizer = torch.optim.Adagrad(torch.nn.Linear(2, 1).parameters())
    with pytest.raises(ValueError, match="known for SGD, Adam, AdamW and RMSprop, got Adagrad;"):
        optimizer_kind(optimizer)


def test_an_optimizer_of_some_parameters_leaves_the_others_at_rest():
    model = torch.nn.Linear(2, 1)
    ratios = rate_ratios(model, torch.optim.SGD([model.bias], lr=0.1))
    assert ratios.tolist() == [0.0, 0.0, 1.0]


def test_an_optimizer_of_none_is_refused():
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="none of the model's 2 trainable parameters"):
        rate_ratios(model, torch.optim.SGD(other.parameters(), lr=0.1))
