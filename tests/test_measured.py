import copy
import json
import math
import pickle

import numpy as np
import pytest

from batchlr.measured import Measured, ratio_of_means


@pytest.fixture
def curvature():
    return Measured(12.5, stderr=0.5)


def test_computes_like_a_float(curvature):
    assert isinstance(curvature, float)
    assert curvature == 12.5
    assert hash(curvature) == hash(12.5)
    assert 2 / curvature == 0.16
    assert math.sqrt(curvature) == math.sqrt(12.5)
    assert max(curvature, 3.0) is curvature
    assert f"{curvature:.2f}" == "12.50"
    assert json.dumps({"largest": curvature}) == '{"largest": 12.5}'


def test_errors_are_not_propagated(curvature):
    for result in (curvature * 2, -curvature, curvature + curvature, abs(curvature)):
        assert type(result) is float


def test_prints_its_error(curvature):
    assert str(curvature) == "12.5 +- 0.5"
    assert f"{curvature}" == "12.5 +- 0.5"
    assert str(Measured(1234.5678, stderr=0.0123)) == "1235 +- 0.012"
    assert repr(curvature) == "12.5"


def test_error_is_nan_if_not_known():
    assert math.isnan(Measured(1.0).stderr)
    assert str(Measured(1.0)) == "1 +- nan"


@pytest.mark.parametrize("stderr", [0.5, 0, math.inf])
@pytest.mark.parametrize(
    "round_trip",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(6)),
    ],
)
def test_survives_copies_and_pickles(round_trip, stderr):
    twin = round_trip(Measured(12.5, stderr=stderr))
    assert type(twin) is Measured
    assert twin == 12.5
    assert twin.stderr == stderr
    assert type(twin.stderr) is float


def test_of_a_measured_keeps_the_value_only(curvature):
    assert math.isnan(Measured(curvature).stderr)


def test_ratios_of_means_scatter_as_they_claim():
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(300):
        below = rng.gamma(4.0, size=50)
        draws.append(ratio_of_means(2 * below + rng.normal(size=50), below))
    claimed = math.sqrt(np.mean([draw.stderr**2 for draw in draws]))
    assert claimed == pytest.approx(np.std(draws, ddof=1), rel=0.15)  # 300 draws: known to 4 %
    assert np.mean(draws) == pytest.approx(2.0, abs=4 * claimed / math.sqrt(300))


def test_a_single_pair_has_a_ratio_and_no_error():
    ratio = ratio_of_means([3.0], [2.0])
    assert ratio == 1.5
    assert math.isnan(ratio.stderr)
