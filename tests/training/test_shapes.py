import math

import pytest
import torch

from batchlr import BatchAwareLR
from batchlr.training.config.variants import (
    ConstantOptions,
    CosineOptions,
    LinearTailOptions,
    StepOptions,
)
from batchlr.training.shapes import shape_factory


def rates(options, total_steps, peak=1.0):
    """The rate of every step of a run, as the optimizer sees it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = BatchAwareLR(optimizer, peak, shape_factory(options, total_steps))
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_is_the_peak():
    assert rates(ConstantOptions(), 7, peak=0.3) == [0.3] * 7


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_half_a_cosine_from_the_peak_to_the_final_share(final):
    expected = [final + (1 - final) * math.cos(math.pi * t / 40) ** 2 for t in range(20)]
    assert rates(CosineOptions(warmup=0.0, final=final), 20) == pytest.approx(expected, rel=1e-12)


def test_cosine_starts_at_the_peak_once_it_is_warm():
    found = rates(CosineOptions(warmup=0.2), 20)
    cosine = [(1 + math.cos(math.pi * t / 16)) / 2 for t in range(16)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine], rel=1e-12)


def test_linear_tail_holds_falls_and_stays():
    found = rates(LinearTailOptions(hold=0.5, end=0.9, final=0.01), 20, peak=2.0)
    falling = [2 - 2 * 0.99 * t / 8 for t in range(1, 8)]
    assert found == pytest.approx([2.0] * 11 + falling + [0.02] * 2, rel=1e-12)


def test_steps_multiply_the_rate_at_their_milestones():
    found = rates(StepOptions(milestones=(0.3, 0.65), factor=0.2), 10)
    assert found == pytest.approx([1.0] * 3 + [0.2] * 4 + [0.04] * 3, rel=1e-12)


@pytest.mark.parametrize(
    "kind",
    [ConstantOptions, CosineOptions, LinearTailOptions, StepOptions],
    ids=lambda k: k.__name__,
)
def test_every_shape_warms_up_linearly(kind):
    found = rates(kind(warmup=0.25), 16)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-12)
    assert found[4] == max(found) == 1.0


@pytest.mark.parametrize(
    ("warmup", "total", "first"), [(0.05, 8, 1.0), (0.05, 12, 0.5), (0.0, 3, 1.0), (0.9, 1, 0.5)]
)
def test_a_warm_up_of_less_than_half_a_step_is_none(warmup, total, first):
    assert rates(ConstantOptions(warmup=warmup), total)[0] == first


def test_no_rate_of_a_run_is_zero():
    """The cosine reaches its end after the last step, not before it."""
    for total in (1, 2, 3, 10):
        assert min(rates(CosineOptions(), total)) > 0
