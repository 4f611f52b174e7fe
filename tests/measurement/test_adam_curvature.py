"""Adam's curvature at other batch sizes, and without each group of batches."""

from dataclasses import replace

import numpy as np
import pytest

from batchlr.measured import Measured
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.measurement.adam_measurement import _spread_relatively
from batchlr.measurement.projected_curvature import ProjectedCurvature

SIZES = (1.0, 4.0, 100.0)
STRETCHES = np.array([2.0, 1.0, 0.5])
AXES = np.diag([50.0, 20.0])
NOISE = np.random.default_rng(0).normal(size=(4, 2, 2))
MATRICES = AXES + NOISE + NOISE.transpose(0, 2, 1)
VALUES, VECTORS = np.linalg.eigh(MATRICES.mean(0))

ADAM = AdamCurvature(
    largest=Measured(50.0, 1.0),
    parallel=Measured(3.0, 1.0),
    orthogonal=Measured(4.0, 1.0),
    batch_size=4,
    beta1=0.9,
    decoupled_decay=0.0,
    converged=True,
    source="gradients",
    batch_sizes=SIZES,
    projected=ProjectedCurvature(
        values=VALUES[::-1].copy(),
        matrices=VECTORS[:, ::-1].T @ MATRICES @ VECTORS[:, ::-1],
        samples=(4,) * 4,
        leak_largest=Measured(0.0, 0.0),
        leak_smallest=Measured(0.0, 0.0),
    ),
    metrics=STRETCHES[:, None, None] * np.eye(2),
    optimism=(1.0,) * 3,
)


def test_the_noise_is_that_along_and_across():
    assert ADAM.total == 7.0


NOISES = [(1 / 16 - 1 / 100) ** 0.5, (1 / 4 - 1 / 100) ** 0.5]


@pytest.mark.parametrize(
    ("size", "stretch"),
    [(1, 2.0), (4, 1.0), (16, 0.5 + 0.5 * NOISES[0] / NOISES[1]), (100, 0.5)],
)
def test_the_metric_is_interpolated_in_the_noise_of_a_batch(size, stretch):
    """Its standard deviation, ``(1/B - 1/N)^1/2``; the data set has 100 samples, and no noise."""
    assert ADAM.stretch_at(size) == pytest.approx(stretch)
    seen = ADAM.projected_at(size)
    assert seen.values == pytest.approx(ADAM.projected.values / stretch)


def test_without_a_group_the_metric_is_that_group_s_or_the_whole_s():
    population = 1e9
    own = np.array([1.0, 1.1, 1.2, 1.3])
    table = STRETCHES[:, None, None, None] * own[:, None, None] * np.eye(2)
    plain = ADAM.without_groups_at(100, population)
    varied = replace(ADAM, metrics_without=table).without_groups_at(100, population)
    for here, there, factor in zip(plain, varied, own, strict=True):
        assert there.values == pytest.approx(here.values / factor)
    bare = ADAM.projected.leaving_out(population)
    for here, there in zip(bare, plain, strict=True):
        assert there.values == pytest.approx(here.values / 0.5)


def test_a_metric_without_a_group_stays_positive_between_the_sizes_measured():
    """Halved at both neighbours is halved in between, however steeply the metric falls."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 4, 4))
    metrics = root @ root.swapaxes(1, 2) * np.array([1.0, 0.01, 1.0])[:, None, None]
    places = [0, 2]
    halved, other = metrics[places] / 2, metrics[places] + np.eye(4)
    without = _spread_relatively(places, np.stack([halved, other], 1), metrics)
    assert without[:, 0] == pytest.approx(metrics / 2, rel=1e-9, abs=1e-12)
    assert without[places, 1] == pytest.approx(other, rel=1e-9)
    assert np.linalg.eigvalsh(without).min() > 0
