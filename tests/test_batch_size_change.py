"""What changes with the batch size, against its rules and a problem solved by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlr import measure_curvature, supervised
from batchlr.batch_size_change import batch_size_change, scaling_reach

sizes = st.integers(1, 10**6)


def by_setting(*arguments, **options):
    return {change.setting: change for change in batch_size_change(*arguments, **options)}


@given(old=sizes, new=sizes)
def test_sgd_does_as_much_a_sample_as_before(old, new):
    there = by_setting(old, new, lr=0.1, weight_decay=1e-4, steps=10**9)
    rate, decay = there["learning rate"].value, there["weight decay"].value
    steps = there["steps, warm-up, decay points"].value
    assert rate / new == pytest.approx(0.1 / old)
    assert rate * decay / new == pytest.approx(0.1 * 1e-4 / old)
    assert steps * new == pytest.approx(10**9 * old, rel=1e-3)
    assert there["momentum"].factor == 1
    assert there["rate if the loss is a sum"].value == pytest.approx(0.1)


@given(old=st.integers(10, 100), new=st.integers(10, 100))
def test_adamw_forgets_and_decays_as_fast_a_sample(old, new):
    there = by_setting(
        old, new, optimizer="adamw", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    assert there["learning rate"].value == pytest.approx(1e-3 * math.sqrt(new / old))
    rate, decay = there["learning rate"].value, there["weight decay"].value
    assert rate * decay / new == pytest.approx(1e-3 * 0.1 / old)
    for name, beta in (("beta1", 0.9), ("beta2", 0.999)):
        kept = there[name].value ** (1 / new)
        assert kept == pytest.approx(beta ** (1 / old))
    assert there["rate if the loss is a sum"].value == there["learning rate"].value


def test_other_optimizers_have_the_settings_they_have():
    coupled = by_setting(8, 16, optimizer="adam", weight_decay=0.1)["weight decay"]
    assert (coupled.factor, coupled.value) == (1, 0.1)
    there = by_setting(8, 16, optimizer="rmsprop", betas=(0.9, 0.99))
    assert "beta1" not in there
    assert there["alpha"].value == pytest.approx(0.99**2)


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [(torch.optim.Adam, "beta2"), (torch.optim.RMSprop, "alpha")],
)
def test_averages_are_torch_s_by_default(optimizer, setting):
    defaults = optimizer([torch.zeros(1)]).defaults
    there = by_setting(8, 16, optimizer=optimizer.__name__.lower())[setting]
    here = defaults["alpha"] if setting == "alpha" else defaults["betas"][1]
    assert there.value == pytest.approx(here**2)


def test_without_a_value_there_is_a_factor():
    words = {name: str(change) for name, change in by_setting(128, 1024).items()}
    assert words["learning rate"] == "x 8"
    assert words["weight decay"] == "the same"
    assert words["steps, warm-up, decay points"] == "/ 8"
    assert str(by_setting(128, 1024, lr=0.1)["learning rate"]) == "0.8"


def test_nothing_changes_where_the_size_does_not():
    for optimizer in ("sgd", "adam", "adamw", "rmsprop"):
        assert all(change.factor == 1 for change in batch_size_change(64, 64, optimizer=optimizer))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, rmsprop, got 'lion'"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0, got -1.0"),
        ({"steps": 0}, "steps must be positive and finite, got 0"),
    ],
)
def test_refusals(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        batch_size_change(8, 16, **options)


def report_of_one_weight(count=4000):
    """Least squares in one weight: per-sample curvatures 0 and 20, so mean 10 and variance 100."""
    x = torch.tensor([0.0, math.sqrt(20.0)]).repeat(count // 2).reshape(-1, 1)
    model = nn.Linear(1, 1, bias=False).double()
    loss_fn = nn.MSELoss()
    batches = [(part, 0 * part) for part in (x.double() / math.sqrt(2)).split(1)]
    return measure_curvature(
        model, lambda model, batch: loss_fn(model(batch[0]), batch[1]), batches
    )


def test_the_linear_rule_holds_up_to_where_the_limit_bends():
    """The limit is ``2 / (10 + 100 / (10 b))``; a linear rate is ``(b + 1) / (b_0 + 1)`` of it."""
    report = report_of_one_weight()
    low, high = scaling_reach(report, 1)
    assert low == 1
    assert high == 1  # 3/2 at the next size, 2
    low, high = scaling_reach(report, 64)
    # (B + 1) / 65 = 1.25 at B = 80.25; asked at 64 2^(k/4). Downwards the linear rate is the lower.
    assert (low, high) == (1, 76)


def test_with_adam_beta1_goes_along():
    """Adam's limit at a batch eight times as large is that at ``beta1^8``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(512, 6), torch.randint(3, (512,))
    batches = list(zip(x.split(16), y.split(16), strict=True))
    report = measure_curvature(model, supervised(nn.CrossEntropyLoss()), batches)
    _, high = scaling_reach(report, 16, optimizer="adam", momentum=0.9)
    limits = [
        report.max_lr(size, optimizer="adam", momentum=0.9 ** (size / 16)).value
        for size in (16, high, round(high * 2**0.25))
    ]
    assert math.sqrt(high / 16) * limits[0] <= 1.25 * limits[1]
    assert math.sqrt(round(high * 2**0.25) / 16) * limits[0] > 1.25 * limits[2]
