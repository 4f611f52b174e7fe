"""Published policies, on linear regressions whose Hessian is chosen."""

import json

import pytest
import torch
from torch import nn

from batchlr.on_the_fly.published_rate import PublishedRate
from batchlr.operators import supervised
from batchlr.policies import POLICIES

MSE = supervised(nn.MSELoss())
SPECTRUM = torch.tensor([8.0, 3.0, 1.0, 0.25, 0.01], dtype=torch.float64)


def regression(seed=0):
    """A linear model whose loss on one batch has `SPECTRUM`; the batch, the dense Hessian."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    x = torch.linalg.qr(rows).Q * (10 * SPECTRUM).sqrt() @ axes.T  # 2 x'x / 20 has the spectrum
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 5, generator=generator, dtype=torch.float64))
    y = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    return model, (x, y), axes * SPECTRUM @ axes.T


def published(model, policy="cdat", *, seed=0, num_steps=5, norm_mode="train"):
    return PublishedRate(
        torch.optim.SGD(model.parameters(), lr=1.0),
        policy=policy,
        norm_mode=norm_mode,
        num_steps=num_steps,
        generator=torch.Generator().manual_seed(seed),
    )


def greedy_parts(model, batch, hessian):
    """``g'g`` and ``g'Hg``: descent and curvature of SGD's step, ``-g``."""
    (gradient,) = torch.autograd.grad(MSE(model, batch), [model.weight])
    gradient = gradient[0]
    return float(gradient @ gradient), float(gradient @ hessian @ gradient)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_policy_of_the_paper_sees_the_spectrum_and_the_start_s_weights(policy, seed):
    model, batch, hessian = regression(seed)
    found = published(model, policy, seed=seed).measure(model, MSE, [batch])
    start = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(hessian)
    weights = (vectors.T @ start / start.norm()).square()
    expected = POLICIES[policy](values.tolist(), weights.tolist())
    assert found.lr == pytest.approx(expected.lr, rel=1e-6)
    assert found.momentum == pytest.approx(expected.momentum, rel=1e-6)
    assert found.learned.ritz_values == pytest.approx(SPECTRUM.flip(0).tolist(), rel=1e-9)
    assert found.along is None


def test_steps_are_as_many_as_asked_and_start_elsewhere_each_time():
    model, batch, _ = regression()
    rate = published(model, "paper_sgd", num_steps=3)
    first, second = (rate.measure(model, MSE, [batch]).learned for _ in range(2))
    assert len(first.ritz_values) == len(second.ritz_values) == 3
    assert first.ritz_values != second.ritz_values
    assert rate.num_products == 6


@pytest.mark.parametrize("seed", range(5))
def test_cdat_has_twice_the_greedy_rate_of_a_quadratic_for_one_product(seed):
    model, batch, hessian = regression(seed)
    rate = published(model)
    found = rate.measure(model, MSE, [batch])
    descent, curvature = greedy_parts(model, batch, hessian)
    assert found.lr == pytest.approx(2 * descent / curvature, rel=1e-9)
    assert found.momentum is None
    assert found.learned is None
    assert found.along.curvature == pytest.approx(curvature, rel=1e-9)
    assert rate.num_products == 1


def test_cdat_remembers_nine_tenths_also_in_what_is_saved():
    model, batch, hessian = regression()
    rate = published(model)
    rate.measure(model, MSE, [batch])
    before = greedy_parts(model, batch, hessian)
    again = published(model)
    again.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    with torch.no_grad():
        model.weight += 1.0
    now = greedy_parts(model, batch, hessian)
    descent, curvature = (0.9 * a + 0.1 * b for a, b in zip(before, now, strict=True))
    for one in (rate, again):
        assert one.measure(model, MSE, [batch]).lr == pytest.approx(2 * descent / curvature)
        assert one.num_products == 2
    assert published(model).measure(model, MSE, [batch]).lr == pytest.approx(2 * now[0] / now[1])


@pytest.mark.parametrize("policy", ["cdat", "paper_sgd"])
def test_norms_are_measured_in_the_mode_asked_for(policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    model[1].running_var.fill_(100.0)
    batch = torch.randn(16, 3), torch.randn(16, 1)
    rates = [
        published(model, policy, norm_mode=mode).measure(model, MSE, [batch]).lr
        for mode in ("train", "eval")
    ]
    assert rates[0] != pytest.approx(rates[1], rel=0.1)


@pytest.mark.parametrize(
    ("policy", "products", "words"),
    [
        ("cdat", 1, "along the step the loss falls by 0 and curves by"),
        ("paper_sgd", 5, "all Ritz values are 0"),
    ],
)
def test_a_policy_without_a_rate_says_so_and_what_that_cost(policy, products, words):
    model, (x, _), _ = regression()
    flat = (torch.zeros_like(x), torch.zeros(20, 1, dtype=torch.float64))
    rate = published(model, policy)
    with pytest.raises(ArithmeticError, match=words):
        rate.measure(model, MSE, [flat])
    assert rate.num_products == products


def test_no_batches_are_refused():
    model, _, _ = regression()
    for policy in ("cdat", "paper_sgd"):
        with pytest.raises(ValueError, match="at least one batch"):
            published(model, policy).measure(model, MSE, [])
