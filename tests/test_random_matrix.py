"""Limit laws against matrices drawn at P = 2000 and more, and against themselves.

The draws use tridiagonal models: Householder reflections that fix the spike's direction turn a
spiked Gaussian matrix into a tridiagonal one of the same law (Dumitriu & Edelman 2002; Bloemendal
& Virág 2013), so that a draw costs a millisecond and the spike's direction stays the first
coordinate. The slow tests draw the dense matrices and so check this reduction too.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.linalg import eigh, eigh_tridiagonal
from scipy.sparse.linalg import eigsh

from batchlr.random_matrix import SpikedMarchenkoPastur, SpikedWigner, subordinated_outlier

NUM_PARAMS = 3000
FORMS = ("multiplicative", "additive")
RATIOS = (0.5, 2.0, 8.0)


def top_eigenpair(diagonal, off_diagonal):
    """Largest eigenvalue of a tridiagonal matrix and its squared overlap with the first axis."""
    last = len(diagonal) - 1
    values, vectors = eigh_tridiagonal(
        diagonal, off_diagonal, select="i", select_range=(last, last)
    )
    return values[0], vectors[0, 0] ** 2


def draw_wigner(spike, rng):
    """Outlier and overlap of a positive spike in a Gaussian orthogonal matrix of edge 2."""
    scale = 1.0 / math.sqrt(NUM_PARAMS)
    diagonal = scale * math.sqrt(2.0) * rng.normal(size=NUM_PARAMS)
    off_diagonal = scale * np.sqrt(rng.chisquare(np.arange(NUM_PARAMS - 1, 0, -1)))
    diagonal[0] += spike
    return top_eigenpair(diagonal, off_diagonal)


def draw_wishart(spike, ratio, form, rng):
    """Outlier and overlap of a spike in a Wishart matrix of unit scale.

    The data matrix becomes lower bidiagonal; a multiplicative spike stretches its first row.
    """
    num_samples = round(NUM_PARAMS / ratio)
    size = min(NUM_PARAMS, num_samples + 1)
    diagonal = np.sqrt(rng.chisquare(num_samples - np.arange(min(NUM_PARAMS, num_samples))))
    sub_diagonal = np.sqrt(rng.chisquare(NUM_PARAMS - 1 - np.arange(size - 1)))
    if form == "multiplicative":
        diagonal[0] *= math.sqrt(spike)
    product_diagonal = np.zeros(size)
    product_diagonal[: len(diagonal)] = diagonal**2
    product_diagonal[1:] += sub_diagonal**2
    product_diagonal /= num_samples
    if form == "additive":
        product_diagonal[0] += spike
    return top_eigenpair(product_diagonal, diagonal[: size - 1] * sub_diagonal / num_samples)


def mean_of_draws(draw, *args, num_draws=20):
    rng = np.random.default_rng(0)
    return np.mean([draw(*args, rng) for _ in range(num_draws)], axis=0)


def mean_of_wishart_draws(spike, ratio, form):
    """As many draws as take the mean to 0.6 %, where one strays by ``sqrt(2 ratio / P)``."""
    num_draws = round(20 * max(1.0, ratio))
    return mean_of_draws(draw_wishart, spike, ratio, form, num_draws=num_draws)


def gaussian_orthogonal(size, rng):
    """Dense Gaussian orthogonal matrix of edge 2."""
    square = rng.normal(size=(size, size))
    return (square + square.T) / math.sqrt(2.0 * size)


# --- Wigner ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spike", [5.0, 2.0, 1.2])
def test_wigner_outlier_and_overlap_match_random_matrices(spike):
    outlier, overlap = mean_of_draws(draw_wigner, spike)
    law = SpikedWigner(noise_std=1.0)
    assert outlier == pytest.approx(law.outlier(spike), rel=0.01)
    assert overlap == pytest.approx(law.overlap(spike), abs=0.03)


def test_weak_wigner_spike_leaves_no_trace_at_the_edge():
    outlier, overlap = mean_of_draws(draw_wigner, 0.6)
    assert outlier == pytest.approx(SpikedWigner(noise_std=1.0).outlier(0.6), rel=0.01)
    assert overlap < 0.01


@pytest.mark.slow
def test_wigner_law_holds_for_several_spikes_in_a_dense_matrix():
    rng = np.random.default_rng(1)
    spikes = (5.0, 2.0, 1.5, -4.0)
    law = SpikedWigner(noise_std=1.0)
    found = []
    for _ in range(4):
        matrix = gaussian_orthogonal(2000, rng)
        for axis, spike in enumerate(spikes):
            matrix[axis, axis] += spike
        values, vectors = eigh(matrix)
        order = (-1, -2, -3, 0)
        found.append([(values[k], vectors[axis, k] ** 2) for axis, k in enumerate(order)])
    for spike, (outlier, overlap) in zip(spikes, np.mean(found, axis=0), strict=True):
        assert outlier == pytest.approx(law.outlier(spike), rel=0.01)
        assert overlap == pytest.approx(law.overlap(spike), abs=0.03)


def test_wigner_law_is_odd():
    law = SpikedWigner(noise_std=0.7)
    for spike in (0.1, 0.7, 3.0):
        assert law.outlier(-spike) == -law.outlier(spike)
        assert law.overlap(-spike) == law.overlap(spike)
        assert law.spike(law.outlier(-spike)) == -law.spike(law.outlier(spike))


def test_wigner_law_is_continuous_at_the_transition():
    law = SpikedWigner(noise_std=3.0)
    above = math.nextafter(law.threshold, math.inf)
    assert law.outlier(law.threshold) == law.edges[1] == 6.0
    assert law.outlier(above) == pytest.approx(6.0, rel=1e-15)
    assert law.overlap(law.threshold) == 0.0
    assert law.overlap(above) == pytest.approx(0.0, abs=1e-15)
    assert law.spike(6.0) == law.threshold


@given(noise_std=st.floats(1e-6, 1e6), relative_spike=st.floats(1.01, 1e6))
def test_wigner_spike_inverts_outlier(noise_std, relative_spike):
    law = SpikedWigner(noise_std)
    spike = noise_std * relative_spike
    assert law.spike(law.outlier(spike)) == pytest.approx(spike, rel=1e-12)
    assert law.spike(law.outlier(-spike)) == pytest.approx(-spike, rel=1e-12)


@given(noise_std=st.floats(1e-6, 1e6), spike=st.floats(-1e6, 1e6))
def test_every_wigner_outlier_can_be_inverted(noise_std, spike):
    law = SpikedWigner(noise_std)
    assert abs(law.spike(law.outlier(spike))) >= law.threshold * (1.0 - 1e-12)


@given(spike=st.floats(-10.0, 10.0).filter(lambda x: abs(x) > 1.01))
def test_wigner_overlap_is_the_slope_of_the_outlier(spike):
    law = SpikedWigner(noise_std=1.0)
    step = 1e-5
    slope = (law.outlier(spike + step) - law.outlier(spike - step)) / (2.0 * step)
    assert law.overlap(spike) == pytest.approx(slope, abs=1e-6)


def test_semicircle_has_unit_mass_and_the_noise_variance():
    law = SpikedWigner(noise_std=1.7)
    mass, _ = quad(law.density, *law.edges)
    variance, _ = quad(lambda x: x * x * law.density(x), *law.edges)
    assert mass == pytest.approx(1.0, rel=1e-6)
    assert variance == pytest.approx(1.7**2, rel=1e-6)
    assert law.density(3.41) == law.density(-3.41) == 0.0


def test_without_noise_every_wigner_spike_is_its_own_outlier():
    law = SpikedWigner(noise_std=0.0)
    for spike in (-2.0, 0.0, 1e-300, 5.0):
        assert law.outlier(spike) == law.spike(spike) == spike
    assert law.overlap(-2.0) == 1.0
    with pytest.raises(ValueError, match=r"density needs noise_std > 0, got 0.0.*point mass"):
        law.density(0.0)


@pytest.mark.parametrize("noise_std", [-1.0, math.inf, math.nan])
def test_wigner_refuses_illegal_noise(noise_std):
    with pytest.raises(
        ValueError, match=f"noise_std must be finite and at least 0, got {noise_std}"
    ):
        SpikedWigner(noise_std)


@pytest.mark.parametrize("outlier", [1.99, -1.99, 0.0])
def test_wigner_refuses_to_invert_an_outlier_inside_the_bulk(outlier):
    with pytest.raises(ValueError, match=rf"bulk edges \(-2.0, 2.0\), got {outlier}"):
        SpikedWigner(noise_std=1.0).spike(outlier)


@pytest.mark.parametrize("law", [SpikedWigner(1.0), SpikedMarchenkoPastur(1.0, 2.0)])
def test_laws_refuse_values_that_are_not_finite(law):
    with pytest.raises(ValueError, match=r"spike must be finite.*, got nan"):
        law.outlier(math.nan)
    with pytest.raises(ValueError, match=r"spike must be finite.*, got inf"):
        law.overlap(math.inf)
    with pytest.raises(ValueError, match="outlier must be finite, got inf"):
        law.spike(math.inf)


# --- Marchenko-Pastur --------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "tolerance"), [("additive", 0.006), ("multiplicative", 0.02)])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("excess", [1.3, 2.0, 4.0])
def test_wishart_outlier_and_overlap_match_random_matrices(form, tolerance, ratio, excess):
    law = SpikedMarchenkoPastur(1.0, ratio, form)
    spike = excess * law.threshold
    outlier, overlap = mean_of_wishart_draws(spike, ratio, form)
    assert outlier == pytest.approx(law.outlier(spike), rel=tolerance)
    assert overlap == pytest.approx(law.overlap(spike), abs=0.03)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_weak_wishart_spike_leaves_no_trace_at_the_edge(form, ratio):
    law = SpikedMarchenkoPastur(1.0, ratio, form)
    spike = 0.5 * law.threshold
    outlier, overlap = mean_of_wishart_draws(spike, ratio, form)
    assert outlier == pytest.approx(law.outlier(spike), rel=0.01)
    assert overlap < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_wishart_laws_hold_for_several_spikes_in_a_dense_matrix(form, ratio):
    rng = np.random.default_rng(2)
    size, noise_scale = 800, 0.3
    num_samples = round(size / ratio)
    law = SpikedMarchenkoPastur(noise_scale, ratio, form)
    spikes = np.array([4.0, 2.0]) * law.threshold
    found = []
    for _ in range(25 * math.ceil(ratio)):  # one draw strays by sqrt(2 ratio / size)
        data = math.sqrt(noise_scale / num_samples) * rng.normal(size=(size, num_samples))
        if form == "multiplicative":
            data[:2] *= np.sqrt(spikes / noise_scale)[:, None]
        matrix = data @ data.T
        if form == "additive":
            matrix[[0, 1], [0, 1]] += spikes
        values, vectors = eigsh(matrix, k=2, which="LA", v0=np.ones(size))
        found.append([(values[1 - k], vectors[k, 1 - k] ** 2) for k in range(2)])
    for spike, (outlier, overlap) in zip(spikes, np.mean(found, axis=0), strict=True):
        assert outlier == pytest.approx(law.outlier(spike), rel=0.02)
        assert overlap == pytest.approx(law.overlap(spike), abs=0.03)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_marchenko_pastur_law_is_continuous_at_the_transition(form, ratio):
    law = SpikedMarchenkoPastur(0.7, ratio, form)
    above = law.threshold * (1.0 + 1e-9)
    assert law.outlier(law.threshold) == law.edges[1]
    assert law.outlier(above) == pytest.approx(law.edges[1], rel=1e-12)
    assert law.overlap(law.threshold) == 0.0
    assert law.overlap(above) == pytest.approx(0.0, abs=1e-7)
    assert law.spike(law.edges[1]) == pytest.approx(law.threshold, rel=1e-12)


@given(
    noise_scale=st.floats(1e-6, 1e6),
    ratio=st.floats(1e-3, 1e6),
    form=st.sampled_from(FORMS),
    excess=st.floats(1.01, 1e4),
)
def test_marchenko_pastur_spike_inverts_outlier(noise_scale, ratio, form, excess):
    law = SpikedMarchenkoPastur(noise_scale, ratio, form)
    spike = law.threshold * excess
    assert law.spike(law.outlier(spike)) == pytest.approx(spike, rel=1e-9)


@given(
    noise_scale=st.floats(1e-6, 1e6),
    ratio=st.floats(1e-3, 1e6),
    form=st.sampled_from(FORMS),
    spike=st.floats(0.0, 1e6),
)
def test_every_marchenko_pastur_outlier_can_be_inverted(noise_scale, ratio, form, spike):
    law = SpikedMarchenkoPastur(noise_scale, ratio, form)
    assert law.spike(law.outlier(spike)) >= law.threshold * (1.0 - 1e-9)


@pytest.mark.parametrize("ratio", RATIOS)
def test_marchenko_pastur_outliers_match_the_textbook_forms(ratio):
    scale, spike = 0.3, 20.0
    multiplicative = spike * (1.0 + ratio * scale / (spike - scale))
    additive = spike + scale / (1.0 - ratio * scale / spike)
    x = spike / scale - 1.0
    law = SpikedMarchenkoPastur(scale, ratio)
    assert law.outlier(spike) == pytest.approx(multiplicative, rel=1e-14)
    assert law.overlap(spike) == pytest.approx((1 - ratio / x**2) / (1 + ratio / x), rel=1e-14)
    law = SpikedMarchenkoPastur(scale, ratio, form="additive")
    assert law.outlier(spike) == pytest.approx(additive, rel=1e-14)


@given(excess=st.floats(1.01, 100.0), ratio=st.floats(0.01, 100.0))
def test_additive_overlap_is_the_slope_of_the_outlier(excess, ratio):
    law = SpikedMarchenkoPastur(1.0, ratio, form="additive")
    spike = excess * law.threshold
    step = 1e-6 * spike
    assume(spike - step > law.threshold)
    slope = (law.outlier(spike + step) - law.outlier(spike - step)) / (2.0 * step)
    assert law.overlap(spike) == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 8.0])
def test_marchenko_pastur_density_has_the_stated_mass_and_moments(ratio):
    law = SpikedMarchenkoPastur(1.3, ratio)
    low, high = law.edges

    def moment(power):
        def integrand(angle):  # x = low..high through an angle: no square-root ends to integrate
            x = (low + high) / 2.0 - (high - low) / 2.0 * math.cos(angle)
            return x**power * law.density(x) * (high - low) / 2.0 * math.sin(angle)

        return quad(integrand, 0.0, math.pi)[0]

    assert moment(0) == pytest.approx(min(1.0, 1.0 / ratio), rel=1e-6)
    assert moment(1) == pytest.approx(1.3, rel=1e-6)
    assert moment(2) == pytest.approx(1.3**2 * (1.0 + ratio), rel=1e-6)
    assert law.density(high * 1.01) == law.density(-0.1) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_every_wishart_spike_is_its_own_outlier(form):
    law = SpikedMarchenkoPastur(0.0, 2.0, form)
    for spike in (0.0, 3.0):
        assert law.outlier(spike) == law.spike(spike) == spike
    assert law.overlap(3.0) == 1.0
    with pytest.raises(
        ValueError, match=r"density needs noise_scale > 0 and ratio > 0.*point mass"
    ):
        law.density(0.0)


def test_infinitely_many_samples_leave_the_population():
    assert SpikedMarchenkoPastur(0.5, 0.0).outlier(3.0) == 3.0
    assert SpikedMarchenkoPastur(0.5, 0.0, form="additive").outlier(3.0) == 3.5
    assert SpikedMarchenkoPastur(0.5, 0.0).overlap(3.0) == 1.0


def test_marchenko_pastur_refuses_illegal_parameters():
    with pytest.raises(ValueError, match=r"noise_scale must be finite and at least 0, got -1.0"):
        SpikedMarchenkoPastur(-1.0, 2.0)
    with pytest.raises(ValueError, match=r"ratio must be finite and at least 0, got inf"):
        SpikedMarchenkoPastur(1.0, math.inf)
    with pytest.raises(ValueError, match="form must be 'multiplicative' or 'additive', got 'free'"):
        SpikedMarchenkoPastur(1.0, 2.0, form="free")


def test_marchenko_pastur_refuses_illegal_values():
    law = SpikedMarchenkoPastur(1.0, 4.0)
    with pytest.raises(ValueError, match=r"at least the upper bulk edge 9.0, got 8.9"):
        law.spike(8.9)
    with pytest.raises(ValueError, match=r"spike must be finite and at least 0, got -1.0"):
        law.outlier(-1.0)
    with pytest.raises(ValueError, match=r"spike must be finite and at least 0, got -1.0"):
        law.overlap(-1.0)


# --- a bulk of its own -------------------------------------------------------------------------


def uniform_bulk(low, high, size):
    nodes = low + (high - low) * (np.arange(size) + 0.5) / size
    return nodes.tolist(), [1.0 / size] * size


def mean_extreme(diagonal, side, num_pairs=2):
    """Mean extremal eigenvalue of ``diag + noise`` over pairs of noise matrices of opposite sign.

    Opposite signs cancel the extreme's first-order fluctuation, 0.9 % of it in a single draw.
    """
    rng = np.random.default_rng(3)
    size = len(diagonal)
    found = []
    for _ in range(num_pairs):
        noise = gaussian_orthogonal(size, rng)
        for matrix in (np.diag(diagonal) + noise, np.diag(diagonal) - noise):
            extreme = eigsh(matrix, k=1, which=side, v0=np.ones(size), return_eigenvectors=False)
            found.append(extreme[0])
    return np.mean(found)


@pytest.mark.parametrize(("spike", "side"), [(4.0, "LA"), (2.0, "LA"), (-3.0, "SA")])
def test_spike_beside_a_uniform_bulk_matches_random_matrices(spike, side):
    nodes, weights = uniform_bulk(0.0, 1.5, 900)
    predicted = subordinated_outlier(spike, nodes, weights, noise_variance=1.0)
    assert mean_extreme([spike, *nodes[1:]], side) == pytest.approx(predicted, rel=0.01)


def test_spike_beside_a_uniform_bulk_uses_the_closed_form_of_its_transform():
    nodes, weights = uniform_bulk(0.0, 1.5, 900)
    expected = 4.0 + math.log(4.0 / 2.5) / 1.5  # integral of 1/(4 - x) over [0, 1.5], mean
    assert subordinated_outlier(4.0, nodes, weights, 1.0) == pytest.approx(expected, rel=1e-6)


def test_weak_spike_beside_a_bulk_sits_at_the_bulk_edge():
    nodes, weights = uniform_bulk(0.0, 1.5, 900)
    edge = subordinated_outlier(1.51, nodes, weights, noise_variance=1.0)
    assert subordinated_outlier(1.6, nodes, weights, noise_variance=1.0) == edge
    assert mean_extreme(nodes, "LA") == pytest.approx(edge, rel=0.01)


@given(spike=st.floats(-5.0, 5.0), noise_std=st.floats(0.0, 3.0))
def test_bulk_at_zero_recovers_the_wigner_law(spike, noise_std):
    assume(spike != 0.0)
    predicted = subordinated_outlier(spike, [0.0], [1.0], noise_std**2)
    assert predicted == pytest.approx(SpikedWigner(noise_std).outlier(spike), rel=1e-12)


@given(
    nodes=st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=8),
    spike=st.floats(1.001, 5.0),
    noise_variance=st.floats(0.0, 10.0),
)
def test_outlier_beside_a_bulk_mirrors_and_never_falls_below_its_spike(
    nodes, spike, noise_variance
):
    weights = [1.0 / len(nodes)] * len(nodes)
    outlier = subordinated_outlier(spike, nodes, weights, noise_variance)
    mirrored = [-node for node in nodes]
    assert outlier >= spike * (1.0 - 1e-12)
    assert subordinated_outlier(-spike, mirrored, weights, noise_variance) == -outlier


def test_nodes_without_weight_do_not_count():
    with_node = subordinated_outlier(4.0, [0.0, 3.9], [1.0, 0.0], 1.0)
    assert with_node == subordinated_outlier(4.0, [0.0], [1.0], 1.0)


def test_subordination_refuses_a_spike_among_the_nodes():
    with pytest.raises(ValueError, match=r"outside the bulk's nodes \[0.0, 4.0\], got 4.0.*itself"):
        subordinated_outlier(4.0, [0.0, 4.0], [0.5, 0.5], 1.0)


def test_subordination_refuses_weights_that_are_no_shares():
    with pytest.raises(ValueError, match="must pair up, got 1 and 2"):
        subordinated_outlier(4.0, [0.0], [0.5, 0.5], 1.0)
    with pytest.raises(ValueError, match=r"sum to at most 1 and more than 0, got a sum of 2.0"):
        subordinated_outlier(4.0, [0.0, 1.0], [1.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="more than 0, got a sum of 0"):
        subordinated_outlier(4.0, [], [], 1.0)
    with pytest.raises(ValueError, match=r"weight must be finite and at least 0, got -0.5"):
        subordinated_outlier(4.0, [0.0], [-0.5], 1.0)


def test_subordination_refuses_illegal_values():
    with pytest.raises(ValueError, match="spike must be finite, got nan"):
        subordinated_outlier(math.nan, [0.0], [1.0], 1.0)
    with pytest.raises(ValueError, match="node must be finite, got inf"):
        subordinated_outlier(4.0, [math.inf], [1.0], 1.0)
    with pytest.raises(ValueError, match=r"noise_variance must be finite and at least 0, got -1.0"):
        subordinated_outlier(4.0, [0.0], [1.0], -1.0)
