"""Optimizers that no learning rate is known for are refused, with the way out."""

import pytest
import torch

from batchlr.measurement.optimizer_state import optimizer_kind, rate_ratios


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
