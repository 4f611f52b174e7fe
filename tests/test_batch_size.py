"""Batch sizes chosen from figures with known answers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import batchlr
import gold12
from batchlr import AdaptiveBatchSize, GradientScatter, GroupGradients, supervised
from batchlr.gradients.gradient_scatter import scatter_of_gradients
from gold12 import GRADIENTS

GOLD = scatter_of_gradients([GRADIENTS])
AT_ONCE = {"interval": 1, "smoothing": 0.0, "max_growth": math.inf}


def outcome(scatter, **options):
    adaptive = AdaptiveBatchSize(
        scatter.batch_size, **{"max_batch_size": 10**9, **AT_ONCE, **options}
    )
    adaptive.observe(scatter)
    return adaptive.step()


def stationary(batch_size, trace=100.0, mean_square=1.0):
    """What a batch shows on average of noise and a gradient that stay as they are."""
    return GradientScatter(batch_size, mean_square + trace / batch_size, trace)


def last_size(adaptive, mean_square=1.0, steps=400):
    for _ in range(steps):
        adaptive.observe(stationary(adaptive.batch_size, mean_square=mean_square))
        adaptive.step()
    return adaptive.batch_size


# The tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tolerance", "size"), [(0.1, 74), (0.25, 12), (0.5, 12)])
def test_the_published_norm_test_gives_the_golden_sizes(tolerance, size):
    found = outcome(GOLD, tolerance=tolerance, debias=False)
    assert found.target == pytest.approx(gold12.TRACE / tolerance**2 / gold12.SQUARE_NORM)
    assert found.next_batch_size == size
    assert found.passed == (size == 12)
    scalar = math.sqrt(gold12.TRACE / 12 / gold12.SQUARE_NORM)
    assert found.smallest_tolerance == pytest.approx(scalar)


def test_unbiased_the_target_is_the_noise_scale_over_the_tolerance_squared():
    found = outcome(GOLD, tolerance=0.1)
    assert found.target == pytest.approx(100 * gold12.NOISE_SCALE)
    assert found.noise_scale == pytest.approx(gold12.NOISE_SCALE)
    assert found.next_batch_size == 79


def test_inner_product_tests_give_the_golden_sizes():
    square, along, across = gold12.SQUARE_NORM, gold12.ALONG, gold12.ACROSS
    inner = outcome(GOLD, test="inner_product", tolerance=0.01, debias=False)
    assert inner.target == pytest.approx(along / 0.01**2 / square**2)
    assert inner.smallest_tolerance == pytest.approx(math.sqrt(along / 12) / square)
    both = outcome(GOLD, test="augmented", tolerance=0.01, orthogonality=0.1, debias=False)
    assert both.target == pytest.approx(max(inner.target, across / 0.1**2 / square))
    loose = outcome(GOLD, test="augmented", tolerance=0.01, orthogonality=5.84, debias=False)
    assert loose.target == pytest.approx(inner.target)


@pytest.mark.parametrize(("inner", "orthogonal"), [(0.5, 1.0), (0.1, 0.1), (0.9, 5.84)])
def test_the_augmented_test_is_never_cheaper_than_the_norm_test(inner, orthogonal):
    """Both tolerances together are one of the norm test, by the identity of the variances."""
    options = {"debias": False}
    along = outcome(GOLD, test="inner_product", tolerance=inner, **options).target
    across = gold12.ACROSS / orthogonal**2 / gold12.SQUARE_NORM
    norm = outcome(GOLD, tolerance=math.hypot(inner, orthogonal), **options).target
    mixed = (inner**2 * along + orthogonal**2 * across) / (inner**2 + orthogonal**2)
    assert norm == pytest.approx(mixed, rel=1e-10)
    augmented = outcome(
        GOLD, test="augmented", tolerance=inner, orthogonality=orthogonal, **options
    ).target
    assert norm <= augmented * (1 + 1e-12)


@pytest.mark.parametrize("test", ["norm", "inner_product", "augmented"])
def test_a_scaled_loss_changes_no_decision(test):
    for factor in (1e-4, 7.0):
        scaled = scatter_of_gradients([factor * GRADIENTS])
        options = {"test": test, "tolerance": 0.05, "debias": False}
        assert outcome(scaled, **options).target == pytest.approx(outcome(GOLD, **options).target)


def test_a_batch_of_all_data_passes_whatever_the_tolerance():
    finite = replace(GOLD, dataset_size=12)
    adaptive = AdaptiveBatchSize(12, max_batch_size=12, tolerance=1e-3, dataset_size=12)
    adaptive.observe(finite)
    found = adaptive.test()
    assert found.passed
    assert found.smallest_tolerance == 0
    assert found.next_batch_size == 12


def test_the_data_set_is_the_one_that_the_batch_sizes_are_chosen_for():
    told = outcome(replace(GOLD, dataset_size=100), tolerance=0.1, dataset_size=100)
    assert outcome(GOLD, tolerance=0.1, dataset_size=100) == told
    assert outcome(GOLD, tolerance=0.1) != told


def test_a_finite_data_set_lowers_the_target():
    """The variance of a mean of ``B`` out of ``N`` is ``trace (1/B - 1/N)``."""
    finite = replace(GOLD, dataset_size=100)
    found = outcome(finite, tolerance=0.1, dataset_size=100)
    scale = gold12.TRACE / (gold12.SQUARE_NORM - gold12.TRACE * (1 / 12 - 1 / 100))
    assert 1 / found.target == pytest.approx(0.01 / scale + 1 / 100)
    at_target = GradientScatter(round(found.target), GOLD.square_norm, GOLD.trace, dataset_size=100)
    variance = at_target.trace * at_target.inverse_size
    assert variance == pytest.approx(0.01 * finite.mean_square, rel=0.1)


# Where they lead -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tolerance", "fixed_point"), [(0.5, 300), (0.1, 9900)])
def test_the_published_test_ends_at_a_multiple_of_the_noise_scale(tolerance, fixed_point):
    adaptive = AdaptiveBatchSize.paper(8, max_batch_size=10**6, tolerance=tolerance)
    assert last_size(adaptive) == fixed_point  # 100 (1 / tolerance^2 - 1)


def test_the_published_default_is_there_in_four_tests():
    adaptive = AdaptiveBatchSize.paper(8, max_batch_size=10**6)
    assert [last_size(adaptive, steps=1) for _ in range(4)] == [741, 8811, 9888, 9900]


@pytest.mark.parametrize("tolerance", [1.0, 2.0])
def test_the_published_test_never_grows_from_a_tolerance_of_one_on(tolerance):
    adaptive = AdaptiveBatchSize.paper(8, max_batch_size=10**6, tolerance=tolerance)
    assert last_size(adaptive) == 8


@pytest.mark.parametrize("test", ["norm", "inner_product", "augmented"])
def test_the_published_tests_have_one_tolerance(test):
    """Of the inner products' two conditions the second is the stricter one, by far."""
    square = gold12.SQUARE_NORM
    targets = {
        "norm": gold12.TRACE / 0.1**2 / square,
        "inner_product": gold12.ALONG / 0.1**2 / square**2,
        "augmented": gold12.ACROSS / 0.1**2 / square,
    }
    adaptive = AdaptiveBatchSize.paper(12, max_batch_size=10**6, test=test)
    adaptive.observe(GOLD)
    assert adaptive.step().target == pytest.approx(targets[test], rel=1e-12)


@pytest.mark.parametrize(("tolerance", "fixed_point"), [(1.0, 100), (0.5, 400), (0.1, 10_000)])
def test_unbiased_it_ends_at_the_noise_scale_over_the_tolerance_squared(tolerance, fixed_point):
    adaptive = AdaptiveBatchSize(8, max_batch_size=10**6, tolerance=tolerance, interval=1)
    assert last_size(adaptive) == fixed_point


def test_without_a_gradient_it_grows_by_no_more_than_its_bound_and_says_why():
    adaptive = AdaptiveBatchSize(8, max_batch_size=100, interval=1, smoothing=0.0)
    sizes = []
    for _ in range(4):
        adaptive.observe(stationary(adaptive.batch_size, mean_square=0.0))
        found = adaptive.step()
        assert found.noise_dominated
        assert not found.passed
        assert found.target == math.inf
        sizes.append(adaptive.batch_size)
    assert sizes == [16, 32, 64, 100]


def test_without_a_gradient_all_data_would_pass_where_there_is_an_end_to_them():
    adaptive = AdaptiveBatchSize(8, max_batch_size=100, dataset_size=500, interval=1)
    adaptive.observe(GradientScatter(8, 1.0, 100.0))
    found = adaptive.step()
    assert found.noise_dominated
    assert found.target == pytest.approx(500)


def test_there_is_no_test_once_the_batch_may_not_grow():
    adaptive = AdaptiveBatchSize(8, max_batch_size=16, interval=1)
    adaptive.observe(stationary(8))
    assert adaptive.step().next_batch_size == 16
    assert not adaptive.may_grow
    adaptive.observe(stationary(16))
    assert adaptive.step() is None


def test_a_size_saved_that_cannot_be_shared_out_is_refused():
    saved = AdaptiveBatchSize(20, max_batch_size=100).state_dict()
    adaptive = AdaptiveBatchSize(8, max_batch_size=100, multiple_of=8)
    with pytest.raises(ValueError, match="batch size saved, 20, is no multiple of 8"):
        adaptive.load_state_dict(saved)
    assert adaptive.batch_size == 8


@pytest.mark.parametrize(
    ("bounds", "largest"),
    [
        ({"max_batch_size": 199}, 199),
        ({"max_batch_size": 1000, "dataset_size": 150}, 150),
        ({"max_batch_size": 199, "multiple_of": 8}, 192),
    ],
)
def test_a_size_saved_above_the_bound_is_refused_and_changes_nothing(bounds, largest):
    """What fits the device now is exceeded by no batch, and no batch shrinks."""
    grown = AdaptiveBatchSize(200, max_batch_size=1000)
    grown.observe(stationary(200))
    adaptive = AdaptiveBatchSize(8, **bounds)
    before = adaptive.state_dict()
    words = rf"saved, 200, is above the largest allowed now, {largest}, .* allow 200, or begin anew"
    with pytest.raises(ValueError, match=words):
        adaptive.load_state_dict(grown.state_dict())
    assert adaptive.state_dict() == before


def test_a_size_saved_at_the_bound_stays():
    grown = AdaptiveBatchSize(200, max_batch_size=1000)
    grown.observe(stationary(200, mean_square=0.0))
    adaptive = AdaptiveBatchSize(8, max_batch_size=207, multiple_of=8)
    adaptive.load_state_dict(grown.state_dict())
    assert (adaptive.batch_size, adaptive.may_grow) == (200, False)
    assert adaptive.test().next_batch_size == 200


def test_in_pure_noise_the_published_test_multiplies_by_one_over_its_tolerance_squared():
    found = outcome(stationary(8, mean_square=0.0), tolerance=0.1, debias=False)
    assert found.next_batch_size == 800


def test_trace_and_norm_are_averaged_apart():
    """The average of the ratios, 300 and 100 / 7, would be 157."""
    adaptive = AdaptiveBatchSize(8, max_batch_size=10**6, interval=2, max_growth=math.inf)
    adaptive.observe(GradientScatter(8, 1 + 300 / 8, 300.0))
    assert adaptive.step() is None
    adaptive.observe(GradientScatter(8, 7 + 100 / 8, 100.0))
    found = adaptive.step()
    expected = (0.9 * 300 + 100) / (0.9 * 1 + 7)  # 46.8
    assert found.target == pytest.approx(expected, rel=1e-12)


def test_what_was_observed_of_small_batches_counts_for_large_ones():
    adaptive = AdaptiveBatchSize(8, max_batch_size=10**6, interval=1, max_growth=math.inf)
    adaptive.observe(stationary(8))
    assert adaptive.step().next_batch_size == 100
    adaptive.observe(stationary(100))
    assert adaptive.step().target == pytest.approx(100)


def test_batches_never_shrink():
    adaptive = AdaptiveBatchSize(64, max_batch_size=100, interval=1, smoothing=0.0)
    adaptive.observe(stationary(64, trace=1.0))
    found = adaptive.step()
    assert (found.passed, found.next_batch_size) == (True, 64)


@pytest.mark.parametrize(
    ("unit", "growth", "sizes"), [(48, math.inf, [144]), (48, 2.0, [96, 144]), (48, 1.2, [96, 144])]
)
def test_sizes_are_multiples_of_what_can_be_shared_out(unit, growth, sizes):
    adaptive = AdaptiveBatchSize(
        48, max_batch_size=1000, interval=1, max_growth=growth, multiple_of=unit
    )
    found = []
    for _ in sizes:
        adaptive.observe(stationary(adaptive.batch_size))  # asks for 100
        found.append(adaptive.step().next_batch_size)
    assert found == sizes
    assert AdaptiveBatchSize(48, max_batch_size=1000, multiple_of=48).max_batch_size == 960


def test_it_tests_every_interval_and_only_what_it_has_seen():
    adaptive = AdaptiveBatchSize(8, max_batch_size=100, interval=3)
    for _ in range(3):
        assert adaptive.step() is None  # nothing was observed
    adaptive.observe(stationary(8))
    assert [adaptive.step() is None for _ in range(6)] == [True, True, False] * 2


@pytest.mark.parametrize(
    "scatter", [GradientScatter(8, 0.0, 1.0), GradientScatter(8, math.nan, 1.0)]
)
def test_gradients_that_are_zero_or_not_finite_are_ignored(scatter):
    adaptive = AdaptiveBatchSize(8, max_batch_size=100, interval=1)
    adaptive.observe(scatter)
    assert adaptive.step() is None
    adaptive.observe(stationary(8))
    before = adaptive.test()
    adaptive.observe(scatter)
    assert adaptive.test() == before


def test_a_restored_one_goes_on_as_the_first():
    options = {"max_batch_size": 10_000, "interval": 3, "smoothing": 0.7, "max_growth": 1.5}
    whole, first, second = (AdaptiveBatchSize(8, **options) for _ in range(3))
    for step in range(20):
        scatter = stationary(8, trace=100 + step)
        adaptive = first if step < 10 else second
        whole.observe(scatter)
        adaptive.observe(scatter)
        assert whole.step() == adaptive.step()
        if step == 9:
            second.load_state_dict(first.state_dict())
    assert whole.state_dict() == second.state_dict()
    assert whole.batch_size > 8


def test_forgotten_observations_count_no_more():
    adaptive = AdaptiveBatchSize(8, max_batch_size=100)
    adaptive.observe(stationary(8))
    adaptive.forget()
    with pytest.raises(ValueError, match=r"nothing was observed yet: call observe\(\) first"):
        adaptive.test()


# In a loop -------------------------------------------------------------------------------------


def test_a_loop_grows_its_batch_and_its_rate_follows_the_measured_limit():
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = (x[:, 0] + 0.5 * torch.randn(512) > 0).long()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    loss_fn = supervised(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = batchlr.BatchAwareLR(optimizer, peak=1.0, batch_size=8)
    controller = batchlr.CurvatureController(scheduler, loss_fn, dataset_size=512)
    adaptive = AdaptiveBatchSize(
        8, max_batch_size=128, dataset_size=512, interval=10, multiple_of=4
    )
    groups = GroupGradients(model.parameters())
    changes = []
    for _ in range(60):
        size = adaptive.batch_size
        rows = torch.randperm(512)[:size]
        controller.maybe_update(model, lambda: [(x[k::8], y[k::8]) for k in range(8)])
        optimizer.zero_grad()
        for part in rows.split(size // 4):
            (loss_fn(model, (x[part], y[part])) / 4).backward()
            groups.add()
        adaptive.observe(groups.scatter(size))
        optimizer.step()
        scheduler.step()
        test = adaptive.step()
        if test is not None and test.next_batch_size != size:
            before = scheduler.peak
            controller.set_batch_size(test.next_batch_size)
            changes.append((test.next_batch_size, scheduler.peak / before))
    sizes = [size for size, _ in changes]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= 32
    assert controller.batch_size == scheduler.batch_size == sizes[-1]
    assert all(1 < factor <= 2 for _, factor in changes)


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": 0.0}, r"tolerance must be positive and finite, got 0\.0"),
        ({"orthogonality": -1.0}, r"orthogonality must be positive and finite, got -1\.0"),
        ({"max_growth": 1.0}, r"max_growth must be above 1, got 1\.0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1\.0"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"multiple_of": 3}, "batch_size must be a positive multiple of 3, got 8"),
        ({"max_batch_size": 7}, "max_batch_size 7 and dataset_size None .* below batch_size 8"),
        ({"dataset_size": 7}, "max_batch_size 100 and dataset_size 7 .* below batch_size 8"),
        ({"dataset_size": 0}, "dataset_size must be at least 1, got 0"),
        ({"test": "Norm", "debias": False}, "test must be one of 'norm', 'inner_product', 'augm"),
        ({"test": "augmented"}, "the augmented test has no unbiased form: pass debias=False"),
    ],
)
def test_illegal_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveBatchSize(8, **{"max_batch_size": 100, **options})


def test_inner_product_tests_refuse_norms_alone():
    adaptive = AdaptiveBatchSize(8, max_batch_size=100, test="inner_product", debias=False)
    with pytest.raises(ValueError, match="inner_product test needs the gradients themselves"):
        adaptive.observe(stationary(8))


def test_it_shows_its_settings():
    adaptive = AdaptiveBatchSize(64, max_batch_size=300, dataset_size=500, multiple_of=8)
    assert repr(adaptive) == (
        "AdaptiveBatchSize(batch_size=64, max_batch_size=296, dataset_size=500, test='norm', "
        "tolerance=1.0, interval=50, multiple_of=8)"
    )


def test_the_data_set_bounds_the_batch_where_the_device_does_not():
    adaptive = AdaptiveBatchSize(64, max_batch_size=10**6, dataset_size=500, multiple_of=8)
    assert adaptive.max_batch_size == 496
    whole = AdaptiveBatchSize(496, max_batch_size=10**6, dataset_size=500, multiple_of=8)
    assert not whole.may_grow
