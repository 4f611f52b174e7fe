"""The learner's measurement is that of a dense Hessian, and leaves the model alone."""

import math

import pytest
import torch
from torch import nn

from batchlr.on_the_fly import learned_step_size
from batchlr.operators import HessianOperator, supervised
from batchlr.policies import POLICIES, paper_sgd

MSE = supervised(nn.MSELoss())
CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


def learn_step_size(model, loss_fn, batches, *, norm_mode="train", **options):
    operator = HessianOperator(model, loss_fn, batches, norm_mode=norm_mode)
    return learned_step_size.learn_step_size(model, operator, **options)


def regression(size=6):
    """Model, one batch, and the dense Hessian ``2 x^T x / N`` of a linear regression."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, size, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 1, generator=generator, dtype=torch.float64)
    return nn.Linear(size, 1, bias=False, dtype=torch.float64), (x, y), 2 * x.T @ x / 32


@pytest.mark.parametrize("policy", POLICIES)
def test_all_steps_give_the_whole_spectrum_and_the_policy_s_step(policy):
    model, batch, hessian = regression()
    learned = learn_step_size(model, MSE, [batch], policy=policy)
    values = torch.linalg.eigvalsh(hessian)
    assert learned.ritz_values == pytest.approx(values.tolist(), rel=1e-9)
    assert (learned.smallest, learned.largest) == (learned.ritz_values[0], learned.ritz_values[-1])
    assert sum(learned.weights) == pytest.approx(1, rel=1e-12)
    assert learned.step_size == POLICIES[policy](learned.ritz_values, learned.weights)
    assert (learned.policy, learned.num_samples, learned.num_products) == (policy, 32, 6)
    assert learned.loss == pytest.approx(float(MSE(model, batch).detach()), rel=1e-12)


def test_weights_are_squared_components_of_the_start_vector():
    """With all steps, Gauss weights are those of the start vector in the eigenbasis."""
    model, batch, hessian = regression()
    learned = learn_step_size(
        model, MSE, [batch], policy="paper_sgd", generator=torch.Generator().manual_seed(3)
    )
    start = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    components = torch.linalg.eigh(hessian).eigenvectors.T @ (start / start.norm())
    assert learned.weights == pytest.approx(components.square().tolist(), rel=1e-6)


def test_the_number_of_steps_is_the_number_of_products():
    model, batch, _ = regression(30)
    learned = learn_step_size(model, MSE, [batch], policy="paper_sgd", num_steps=7)
    assert learned.num_products == len(learned.ritz_values) == len(learned.weights) == 7
    assert learned.step_size == paper_sgd(learned.ritz_values, learned.weights)


def conv_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(144, 3))


def test_dropout_is_off_norms_are_in_their_mode_and_nothing_changes():
    model = conv_net().train()
    model[0].eval()  # a flag of its own
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    found = {
        mode: learn_step_size(
            model, CROSS_ENTROPY, [batch], policy="paper_sgd", num_steps=5, norm_mode=mode
        )
        for mode in ("train", "eval")
    }
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for mode, learned in found.items():
        assert learned.norm_mode == mode
        plain = HessianOperator(model.eval(), CROSS_ENTROPY, [batch], norm_mode=mode)
        assert learned.loss == float(plain.loss())
    assert found["train"].largest != pytest.approx(found["eval"].largest, rel=0.01)


def test_an_unknown_policy_is_refused():
    model, batch, _ = regression()
    with pytest.raises(ValueError, match=r"policy must be one of paper_sgd, .*, got 'best'"):
        learn_step_size(model, MSE, [batch], policy="best")
    with pytest.raises(ValueError, match=r"num_steps must lie in \[1, 6\], got 0"):
        learn_step_size(model, MSE, [batch], policy="paper_sgd", num_steps=0)


def test_a_loss_that_is_not_finite_has_no_step_size_and_flags_come_back():
    model, batch, _ = regression()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="the loss is nan on the batches given"):
        learn_step_size(model, MSE, [batch], policy="paper_sgd")
    assert model.training
