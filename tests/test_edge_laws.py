"""Each law of the largest batch eigenvalue in a case where it is known."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from batchlr.curvature_noise import CurvatureNoise
from batchlr.edge_laws import EdgeLaw, edge_laws
from batchlr.measured import Measured
from reports import projected_curvature
from test_curvature_report import make_report, second_order_report

EVERY = [
    "resampled",
    "second-order",
    "wigner-top",
    "wigner",
    "subordinated",
    "trace",
    "marchenko-pastur",
    "additive",
    "two-point",
]
UNKNOWN = Measured(math.nan)
SIZE = 50
INVERSE = 1 / SIZE - 1e-4


def full_report(**changes):
    return make_report(**{"small_batch": (4, Measured(12.0, 0.5))} | changes)


def test_all_laws_are_there_with_the_default_one_first():
    laws = edge_laws(full_report(), SIZE)
    assert sorted(laws) == sorted(EVERY)
    assert next(iter(laws)) == "resampled"
    for law in laws.values():
        assert law.largest >= 2.0
        assert law.largest.stderr >= 0.1  # that of lambda_1 at least
        assert math.isnan(law.overlap) or 0 <= law.overlap <= 1
        assert law.assumes


def test_the_default_law_is_the_report_s():
    report = full_report()
    law, want = edge_laws(report, SIZE)["resampled"].largest, report.largest_at(SIZE)
    assert (law, law.stderr) == (want, want.stderr)


def test_the_second_order_is_kappa_over_the_batch():
    law = edge_laws(full_report(), SIZE)["second-order"]
    assert law.largest == pytest.approx(2 + 80 * INVERSE, rel=1e-14)
    assert law.largest.stderr == pytest.approx(math.hypot(0.1, 80 * INVERSE * 4 / 100))
    assert law.overlap == pytest.approx(1 - 100 * INVERSE / 4, rel=1e-12)
    assert edge_laws(full_report(), 10)["second-order"].overlap == 0.0


def test_where_noise_leaves_all_axes_the_default_is_the_second_order():
    laws = edge_laws(second_order_report(), SIZE)
    assert laws["resampled"].largest == pytest.approx(laws["second-order"].largest, rel=1e-12)


def test_the_wigner_laws_are_the_theorem_s_outlier():
    """``lambda + P sigma^2 / (b lambda)`` above the threshold, with overlap ``1 - P sigma^2 /
    (b lambda^2)``."""
    laws = edge_laws(full_report(), SIZE)
    for name, variance, share in (("wigner", 1.5, 0.1 / 1.5), ("wigner-top", 100.0, 0.04)):
        shift = variance * INVERSE / 2
        assert laws[name].largest == pytest.approx(2 + shift, rel=1e-12)
        assert laws[name].largest.stderr == pytest.approx(math.hypot(0.1, shift * share))
        assert laws[name].overlap == pytest.approx(1 - variance * INVERSE / 4, rel=1e-10)


def test_below_the_threshold_the_wigner_law_is_the_edge_of_the_noise():
    law = edge_laws(full_report(), 5)["wigner-top"]
    assert law.largest == pytest.approx(2 * math.sqrt(100 * (1 / 5 - 1e-4)), rel=1e-12)
    assert law.overlap == 0.0


def test_wigner_s_law_holds_for_matrices_with_such_noise():
    """A spike of 2 in 400 dimensions of homogeneous noise, by a dense eigensolver."""
    rng = np.random.default_rng(0)
    size, variance = 400, 100.0
    draws = rng.normal(size=(5, size, size)) * math.sqrt(variance * INVERSE / size)
    noise = (draws + draws.transpose(0, 2, 1)) / math.sqrt(2)
    noise[:, 0, 0] += 2.0
    values, vectors = np.linalg.eigh(noise)
    law = edge_laws(full_report(), SIZE)["wigner-top"]
    # Fluctuations of an outlier: sqrt(2 sigma^2) = 0.1, over the root of five; edges of size^-2/3.
    assert law.largest == pytest.approx(values[:, -1].mean(), abs=0.15)
    assert law.overlap == pytest.approx((vectors[:, 0, -1] ** 2).mean(), abs=0.15)


def test_the_subordinated_law_without_a_bulk_is_wigner_s():
    at_zero = full_report(ritz_values=(2.0, 0.0, 0.0), ritz_weights=(0.0, 0.6, 0.4))
    laws = edge_laws(at_zero, SIZE)
    assert laws["subordinated"].largest == pytest.approx(laws["wigner"].largest, rel=1e-6)


def test_a_bulk_of_its_own_repels_the_outlier_from_each_node():
    """To first order in the noise: its share over the gap, node by node; the top repels nothing."""
    quiet = CurvatureNoise(Measured(60.0), Measured(100.0), Measured(1e-3, 1e-4))
    law = edge_laws(full_report(noise=quiet), SIZE)["subordinated"]
    shares = np.array([0.5, 0.3]) / 0.8  # of a bulk without the top
    want = 1e-3 * INVERSE * (shares / (2.0 - np.array([1.0, -0.5]))).sum()
    assert law.largest - 2.0 == pytest.approx(want, rel=1e-3)
    assert math.isnan(law.overlap)


def test_the_trace_law_is_exact_to_second_order_for_gaussian_features():
    """``x_i`` Gaussian with covariance ``C``: ``c1 = lambda_1 (tr C - lambda_1)``."""
    covariance = np.array([4.0, 0.02, 0.01, 0.01])
    batch_size, rng = 200, np.random.default_rng(0)
    excess = []
    for _ in range(4000):
        x = rng.normal(size=(batch_size, 4)) * np.sqrt(covariance)
        gram = x.T @ x / batch_size
        excess.append(np.linalg.eigvalsh(gram)[-1] - gram[0, 0])
    report = full_report(
        largest=Measured(4.0, 0.0), trace=Measured(covariance.sum(), 0.0), dataset_size=2**31
    )
    law = edge_laws(report, batch_size)["trace"]
    # 4,000 draws of a sum of three squares, mostly of one: 2 %; gaps within 1 % of lambda_1.
    assert law.largest - 4.0 == pytest.approx(np.mean(excess), rel=0.08)
    assert law.largest - 4.0 == pytest.approx(0.04 / batch_size, rel=1e-6)
    assert edge_laws(full_report(), SIZE)["trace"].largest.stderr == pytest.approx(
        math.hypot(0.1, 0.5 * INVERSE)
    )


def test_marchenko_pastur_s_law_is_that_of_a_spiked_covariance():
    """``l (1 + q s / (l - s))`` of Baik & Silverstein, ``s`` the noise's eigenvalue."""
    law = edge_laws(full_report(), SIZE)["marchenko-pastur"]
    scale, ratio = (12.0 - 2.0) / 10, 10 * INVERSE
    assert law.largest == pytest.approx(2 * (1 + ratio * scale / (2 - scale)), rel=1e-9)


def test_the_additive_law_moves_less_than_the_covariance_of_the_same_noise():
    laws = edge_laws(full_report(largest=Measured(5.0, 0.1), trace=Measured(8.0, 0.1)), SIZE)
    assert 5.0 < laws["additive"].largest < laws["marchenko-pastur"].largest


def test_the_two_point_law_goes_through_both_points():
    report = full_report()
    assert edge_laws(report, 4)["two-point"].largest == pytest.approx(12.0, rel=1e-12)
    law = edge_laws(report, SIZE)["two-point"].largest
    share = INVERSE / (1 / 4 - 1e-4)
    assert law == pytest.approx(2 + 10 * share, rel=1e-12)
    assert law.stderr == pytest.approx(math.hypot(0.1, 0.5 * share), rel=1e-12)
    below = full_report(small_batch=(4, Measured(1.0, 0.5)))
    assert edge_laws(below, SIZE)["two-point"].largest == 2.0  # never below lambda_1


def test_for_the_whole_data_set_every_law_is_the_largest_eigenvalue():
    for law in edge_laws(full_report(), 10_000).values():
        assert law.largest == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"small_batch": None}, {"two-point"}),
        ({"ritz_weights": ()}, {"subordinated"}),
        ({"ritz_values": (2.0,), "ritz_weights": (1.0,)}, {"subordinated"}),  # no bulk
        ({"trace": UNKNOWN}, {"trace", "marchenko-pastur", "additive"}),
        ({"trace": Measured(1.5, 0.1)}, {"trace", "marchenko-pastur", "additive"}),
        (
            {"noise": CurvatureNoise(Measured(60.0), Measured(100.0), UNKNOWN)},
            {"wigner", "subordinated"},
        ),
    ],
)
def test_laws_of_what_was_not_measured_are_left_out(changes, missing):
    assert set(edge_laws(full_report(**changes), SIZE)) == set(EVERY) - missing


def test_an_error_that_is_not_known_counts_as_none():
    unknown = CurvatureNoise(Measured(60.0), Measured(100.0), Measured(1.5))
    laws = edge_laws(full_report(noise=unknown, largest=Measured(2.0)), SIZE)
    for name in ("second-order", "wigner", "wigner-top"):
        assert laws[name].largest.stderr == 0.0


def test_a_law_is_frozen():
    with pytest.raises(FrozenInstanceError):
        EdgeLaw(Measured(1.0), 0.5, "").overlap = 1.0


@pytest.mark.parametrize("largest", [0.0, -1.0])
def test_without_a_positive_outlier_there_is_no_law(largest):
    report = full_report(
        largest=Measured(largest, 0.1), projected=projected_curvature([largest, largest - 1], {})
    )
    with pytest.raises(ValueError, match="laws of an outlier need a positive largest eigenvalue, "):
        edge_laws(report, SIZE)


@pytest.mark.parametrize("batch_size", [0, 10_001])
def test_a_batch_size_outside_the_data_set_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must lie in \[1, 10000\].*{batch_size}"):
        edge_laws(full_report(), batch_size)
