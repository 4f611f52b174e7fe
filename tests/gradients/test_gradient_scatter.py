"""Figures of a batch's gradients against worked-out values, definitions and exact expectations."""

import itertools
import math

import pytest
import torch

import gold12
from batchlr.gradients.gradient_scatter import (
    GradientScatter,
    pooled_scatter,
    scatter_of_gradients,
    scatter_of_norms,
)
from gold12 import GRADIENTS


def groups(count):
    """Means ``(J, 9)`` of neighbours."""
    return GRADIENTS.reshape(count, 12 // count, 9).mean(1)


def figures(scatter):
    return [scatter.square_norm, scatter.trace, scatter.along, scatter.across]


def test_the_gram_matrix_gives_the_golden_values():
    scatter = scatter_of_gradients([GRADIENTS])
    expected = [gold12.SQUARE_NORM, gold12.TRACE, gold12.ALONG, gold12.ACROSS]
    assert figures(scatter) == pytest.approx(expected, rel=1e-11)
    assert scatter.batch_size == 12
    assert scatter.mean_square == pytest.approx(gold12.MEAN_SQUARE, rel=1e-12)
    assert scatter.noise_scale == pytest.approx(gold12.NOISE_SCALE, rel=1e-12)


def test_the_figures_are_their_definitions():
    mean = GRADIENTS.mean(0)
    along = GRADIENTS @ mean
    across = GRADIENTS - torch.outer(along / mean.dot(mean), mean)
    scatter = scatter_of_gradients([GRADIENTS])
    assert scatter.trace == pytest.approx(float(GRADIENTS.var(0).sum()), rel=1e-12)
    assert scatter.along == pytest.approx(float(along.var()), rel=1e-10)
    assert scatter.across == pytest.approx(float(across.var(0).sum()), rel=1e-12)


@pytest.mark.parametrize("count", [3, 4, 6, 12])
def test_the_trace_is_that_along_and_that_across(count):
    scatter = scatter_of_gradients([groups(count)], group_size=12 // count)
    whole = scatter.along / scatter.square_norm + scatter.across
    assert scatter.trace == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("count", gold12.OF_GROUPS)
def test_groups_give_the_golden_trace_by_gradients_and_by_norms(count):
    means, expected = groups(count), gold12.OF_GROUPS[count]
    by_gradients = scatter_of_gradients([means], group_size=12 // count)
    by_norms = scatter_of_norms(
        float(means.square().sum()),
        float(means.mean(0).square().sum()),
        num_groups=count,
        batch_size=12,
    )
    assert by_gradients.trace == pytest.approx(expected, rel=1e-8)
    assert by_norms.trace == pytest.approx(expected, rel=1e-8)
    assert by_gradients.square_norm == pytest.approx(gold12.SQUARE_NORM, rel=1e-12)
    assert by_norms.square_norm == pytest.approx(gold12.SQUARE_NORM, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 2), (4, 4), (6, 2), (6, 3)])
def test_groups_are_unbiased_over_all_batches_drawn_without_replacement(batch_size, count):
    rows, size = GRADIENTS[:6], batch_size // count
    scatters = [
        scatter_of_gradients(
            [rows[list(order)].reshape(count, size, 9).mean(1)], group_size=size, dataset_size=6
        )
        for order in itertools.permutations(range(6), batch_size)
    ]
    trace = sum(scatter.trace for scatter in scatters) / len(scatters)
    mean_square = sum(scatter.mean_square for scatter in scatters) / len(scatters)
    assert trace == pytest.approx(float(rows.var(0).sum()), rel=1e-11)
    assert mean_square == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-11)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_pooled_parts_give_the_whole_exactly(count):
    parts = [scatter_of_gradients([part]) for part in GRADIENTS.split(12 // count)]
    pooled = pooled_scatter(parts, gold12.SQUARE_NORM)
    assert pooled.trace == pytest.approx(gold12.TRACE, rel=1e-11)
    assert pooled.batch_size == 12


def test_parts_of_one_sample_pool_too():
    """The authors' pooling is NaN there, so that their batches never grow."""
    parts = [GradientScatter(1, float(row.square().sum()), math.nan) for row in GRADIENTS]
    assert pooled_scatter(parts, gold12.SQUARE_NORM).trace == pytest.approx(gold12.TRACE, rel=1e-11)


@pytest.mark.parametrize(("count", "published"), [(3, 5.749), (6, 6.237)])
def test_pooling_is_not_the_published_one_which_is_biased_up(count, published):
    parts = GRADIENTS.reshape(count, 12 // count, 9)
    within = float(parts.var(1).sum(1).mean())
    between = float(parts.mean(1).var(0, unbiased=False).sum())
    assert within + between == pytest.approx(published, abs=6e-4)
    pooled = pooled_scatter([scatter_of_gradients([part]) for part in parts], gold12.SQUARE_NORM)
    assert pooled.trace == pytest.approx(gold12.TRACE, rel=1e-11)


def test_splitting_a_parameter_changes_nothing():
    """The published code sums over tensors what belongs to all of them together."""
    whole = figures(scatter_of_gradients([GRADIENTS]))
    split = [GRADIENTS[:, :6].reshape(12, 2, 3), GRADIENTS[:, 6:]]
    assert figures(scatter_of_gradients(split)) == pytest.approx(whole, rel=1e-12)
    apart = [scatter_of_gradients([tensor]) for tensor in split]
    assert sum(part.along for part in apart) == pytest.approx(0.50983, abs=1e-5)
    assert sum(part.across for part in apart) == pytest.approx(4.14960, abs=1e-5)


def test_rotations_and_the_order_of_groups_change_nothing():
    expected = figures(scatter_of_gradients([groups(4)], group_size=3))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(9, 9, dtype=torch.float64, generator=generator)
    turned = groups(4) @ torch.linalg.qr(random)[0]
    assert figures(scatter_of_gradients([turned], group_size=3)) == pytest.approx(expected)
    mixed = groups(4)[[2, 0, 3, 1]]
    assert figures(scatter_of_gradients([mixed], group_size=3)) == pytest.approx(expected)


def test_a_scaled_loss_scales_the_figures_and_leaves_their_ratios():
    scatter, scaled = (scatter_of_gradients([c * GRADIENTS]) for c in (1.0, 3.0))
    factors = [9.0, 9.0, 81.0, 9.0]
    expected = [factor * value for factor, value in zip(factors, figures(scatter), strict=True)]
    assert figures(scaled) == pytest.approx(expected, rel=1e-12)
    assert scaled.noise_scale == pytest.approx(scatter.noise_scale, rel=1e-12)


def test_a_batch_of_all_data_has_no_noise():
    scatter = scatter_of_gradients([GRADIENTS], dataset_size=12)
    assert scatter.inverse_size == 0
    assert scatter.mean_square == scatter.square_norm
    half = GradientScatter(6, 1.0, 1.0, dataset_size=12)
    assert half.inverse_size == pytest.approx(1 / 12)


def test_noise_without_a_gradient_is_said_to_dominate():
    scatter = scatter_of_gradients([torch.tensor([[1.0, 0.1], [-1.0, 0.1]])])
    assert scatter.mean_square == pytest.approx(0.01 - 2.0 / 2)
    assert scatter.noise_dominated
    assert scatter.noise_scale == math.inf


def test_gradients_that_cancel_have_nothing_across():
    scatter = scatter_of_gradients([torch.tensor([[1.0], [-1.0]])])
    assert (scatter.square_norm, scatter.trace, scatter.across) == (0.0, 2.0, None)
    assert not scatter.is_usable


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_not_usable(bad):
    assert not GradientScatter(4, 1.0, bad).is_usable
    assert not GradientScatter(4, bad, 1.0).is_usable
    assert GradientScatter(4, 1.0, 1.0).is_usable


def test_one_group_is_refused():
    with pytest.raises(ValueError, match="at least two groups of samples, got 1: split"):
        scatter_of_gradients([GRADIENTS[:1]])
    with pytest.raises(ValueError, match="at least two groups of samples, got 1: split"):
        scatter_of_norms(1.0, 1.0, num_groups=1, batch_size=4)
    with pytest.raises(ValueError, match="at least two groups of samples, got 0: split"):
        scatter_of_gradients([])


def test_groups_without_samples_are_refused():
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        scatter_of_gradients([GRADIENTS], group_size=0)


def test_parts_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"parts must be of one size, got \[3, 4\]"):
        pooled_scatter([GradientScatter(3, 1.0, 1.0), GradientScatter(4, 1.0, 1.0)], 1.0)
