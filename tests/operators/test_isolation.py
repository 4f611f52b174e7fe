"""What a measurement must not touch, nor be touched by, beyond the model itself."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from batchlr import HessianOperator, supervised
from cases import seeded
from reference import hessian_of

LOSS = supervised(nn.CrossEntropyLoss())
CPU = torch.device("cpu")


def normalised(batch_size=6):
    with seeded():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
        model.double()
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.2, 5)
        return model, (torch.randn(batch_size, 4).double(), torch.randint(3, (batch_size,)))


def matrix(model, loss_fn, batch, **options):
    operator = HessianOperator(model, loss_fn, [batch], **options)
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def test_norms_frozen_in_a_model_that_trains_stay_frozen():
    model, batch = normalised()
    model.train()
    model[1].eval()
    expected = hessian_of(model, LOSS, batch)
    torch.testing.assert_close(matrix(model, LOSS, batch, norm_mode="train"), expected)
    assert model.training
    assert not model[1].training


def test_norms_of_a_model_in_eval_mode_are_measured_as_they_train():
    model, batch = normalised()
    model.train()
    expected = hessian_of(model, LOSS, batch)
    torch.testing.assert_close(matrix(model.eval(), LOSS, batch, norm_mode="train"), expected)


def test_buffers_of_other_modules_that_the_loss_runs_are_left_alone():
    with seeded():
        generator = nn.Linear(2, 3).double()
        critic = nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 1))
        critic.double()
        noise = torch.randn(8, 2).double()
    before = {name: buffer.clone() for name, buffer in critic.named_buffers()}
    result = matrix(generator, lambda m, z: critic(m(z)).square().mean(), noise)
    assert float(result.norm()) > 0
    for name, buffer in critic.named_buffers():
        assert torch.equal(buffer, before[name]), name
    critic(generator(noise))  # trains as before
    assert not torch.equal(critic[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_random_numbers_of_python_and_numpy_are_repeated_and_put_back(draw):
    model, batch = normalised()
    states = random.getstate(), np.random.get_state()[1].copy()

    def noisy(m, b):
        return (1 + draw()) * LOSS(m, b)

    options = {"norm_mode": "train", "keep_graph": False}
    operator = HessianOperator(model, noisy, [batch], **options)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    assert torch.equal(operator @ v, operator @ v)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_autocast_entered_by_the_loss_is_off():
    model, batch = normalised()
    model.float()
    batch = (batch[0].float(), batch[1])

    def mixed(m, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return LOSS(m, b)

    plain = matrix(model, LOSS, batch, norm_mode="train")
    assert torch.equal(matrix(model, mixed, batch, norm_mode="train"), plain)
    assert mixed(model, batch) != LOSS(model, batch)
