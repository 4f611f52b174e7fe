"""The accepted scaling rules, each as a limit of the library's general functions.

Nothing below has a rule built in: rates come from `max_sgd_lr`, `max_adam_lr` or a report's
``max_lr`` (its default, in the one direction where rules are exact), and each tolerance is what the
general law leaves of the rule at the sizes tested.
"""

import itertools
import math

import numpy as np
import pytest

from batchlr.curvature_noise import CurvatureNoise
from batchlr.curvature_report import CurvatureReport
from batchlr.learning_rates import max_adam_lr, max_sgd_lr, paper_adam_lr, paper_sgd_lr
from batchlr.measured import Measured
from batchlr.measurement.adam_curvature import AdamCurvature
from batchlr.scaling_rules import rescale_adam, rescale_lr
from reports import projected_curvature

LARGEST = 4.0
VARIANCE = 64_000.0  # r1 + c1 of one sample
KAPPA = VARIANCE / LARGEST
CRITICAL = KAPPA / LARGEST  # 4,000: where noise and curvature limit plain SGD alike
UNBOUNDED = 2**31  # samples, so that 1/b = 1/B to 1e-9 of a critical size
ROUNDING = 1e-12
# Too few for a correction: the noise counts as if it were known to be the variance given.
BATCHES = {"num_batches": 3, "batch_size": 500}


def amplified(momentum):
    """How much more than curvature momentum makes noise count."""
    return (1 + momentum) / (1 - momentum)


def make_report(*, dataset_size=UNBOUNDED, adam=None, momentum=0.0):
    return CurvatureReport(
        largest=Measured(LARGEST, 0.0),
        smallest=Measured(-0.1, 0.0),
        noise=CurvatureNoise(
            Measured(0.25 * VARIANCE, 0.0), Measured(0.75 * VARIANCE, 0.0), Measured(math.nan)
        ),
        kappa=KAPPA,
        kappa_smallest=0.0,
        ritz_values=(LARGEST, -0.1),
        ritz_weights=(),
        trace=Measured(math.nan),
        ggn_along_top=Measured(math.nan),
        loss=1.0,
        num_params=100,
        num_samples=10_000,
        num_batches=20,
        batch_size=500,
        dataset_size=dataset_size,
        small_batch=None,
        matrix="hessian",
        norm_mode=None,
        coupled=False,
        momentum=momentum,
        nesterov=False,
        weight_decay=0.0,
        adam=adam,
        converged=True,
        num_products=1,
        seconds=1.0,
        projected=projected_curvature([LARGEST], {(0, 0): VARIANCE}, **BATCHES),
    )


def make_adam(stretch_at, *, variance=VARIANCE, beta1=0.9):
    """Adam's curvature with ``D(B) / D(500)`` as given, tabulated finely."""
    sizes = np.geomspace(1, UNBOUNDED, 2001)
    return AdamCurvature(
        largest=Measured(LARGEST, 0.0),
        parallel=Measured(0.25 * variance, 0.0),
        orthogonal=Measured(0.75 * variance, 0.0),
        batch_size=500,
        beta1=beta1,
        decoupled_decay=0.0,
        converged=True,
        source="gradients",
        batch_sizes=tuple(sizes),
        projected=projected_curvature([LARGEST], {(0, 0): variance}, **BATCHES),
        metrics=np.array([stretch_at(size) for size in sizes]).reshape(-1, 1, 1),
        optimism=(1.0,) * len(sizes),
    )


# --- SGD: linear, saturating, flat ----------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("factor", [2, 8])
def test_far_below_the_critical_size_sgd_scales_linearly(momentum, factor):
    """Goyal et al. 2017: ``k`` times the batch, ``k`` times the rate."""
    report = make_report(momentum=momentum)
    for size in (1, 4):
        rule = rescale_lr(report.max_lr(size).value, size, factor * size)
        limit = report.max_lr(factor * size)
        shortfall = factor * size / (amplified(momentum) * CRITICAL)  # of B over the critical size
        assert rule * (1 - shortfall) <= limit.value < rule
        assert limit.exponent == pytest.approx(1, abs=shortfall)
        assert limit.regime == "noise"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_far_above_the_critical_size_sgd_s_rate_stays(momentum):
    report = make_report(momentum=momentum)
    flat = 2 * (1 + momentum) / LARGEST
    for multiple in (1e3, 1e4):
        size = round(multiple * amplified(momentum) * CRITICAL)
        limit = report.max_lr(size)
        assert flat * (1 - 1 / multiple) <= limit.value <= flat  # to first order in critical / B
        assert rescale_lr(limit.value, size, 2 * size, rule="none") == pytest.approx(
            report.max_lr(2 * size).value, rel=1 / multiple
        )
        assert limit.regime == "curvature"


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_between_them_sgd_s_rate_saturates_at_every_size(momentum):
    critical = amplified(momentum) * CRITICAL
    tuned = max_sgd_lr(LARGEST, KAPPA / 32, momentum=momentum)
    for size in (1, 100, critical, 1e6):
        rule = rescale_lr(tuned, 32, size, rule="saturating", critical_batch_size=critical)
        limit = max_sgd_lr(LARGEST, KAPPA / size, momentum=momentum)
        assert limit == pytest.approx(rule, rel=ROUNDING)


@pytest.mark.parametrize("size", [4, 500, 5_000, 9_999])
def test_a_finite_data_set_enters_through_the_effective_batch_size(size):
    count = 10_000
    effective = 1 / (1 / size - 1 / count)
    want = (2 / LARGEST) / (1 + CRITICAL / effective)
    limit = make_report(dataset_size=count).max_lr(size).value
    assert limit == pytest.approx(want, rel=1e-11)  # 1/B - 1/N cancels up to four digits
    full = make_report(dataset_size=count).max_lr(count).value
    assert full == 2 / LARGEST  # the full batch has no noise


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_mccandlish_s_optimal_step_is_half_the_limit_in_one_dimension(batch_size):
    """``|G|^2 / (G'HG + tr(H Sigma) / B)``, from the gradients of single samples."""
    curvatures = np.random.default_rng(0).gamma(0.5, size=400)
    weight = 0.37
    gradients = curvatures * weight
    hessian, gradient, covariance = curvatures.mean(), gradients.mean(), gradients.var()
    largest_step = gradient**2 / (gradient * hessian * gradient)  # eps_max
    noise_scale = hessian * covariance / (gradient * hessian * gradient)  # B_noise
    optimal = largest_step / (1 + noise_scale / batch_size)
    limit = max_sgd_lr(hessian, curvatures.var() / hessian / batch_size)
    assert optimal == pytest.approx(limit / 2, rel=ROUNDING)


def test_mccandlish_s_law_is_the_limit_s_for_any_critical_size():
    largest_step, noise_scale = 2 / LARGEST, CRITICAL
    for size in (1, 64, 4_000, 10**6):
        law = largest_step / (1 + noise_scale / size)
        # 1/N is left: a critical size over 2^31 samples.
        assert make_report().max_lr(size).value == pytest.approx(law, rel=CRITICAL / UNBOUNDED)


def test_smith_s_noise_scale_is_constant_where_noise_limits_the_rate():
    """``lr N / (B (1 - m))`` of Smith & Le 2018, over batch sizes and momenta alike."""
    count = 50_000
    want = 2 * count / KAPPA
    for size, momentum in itertools.product((1, 4, 16), (0.0, 0.5, 0.9, 0.99)):
        lr = max_sgd_lr(LARGEST, KAPPA / size, momentum=momentum)
        shortfall = size / (amplified(momentum) * CRITICAL)  # what curvature has of the limit
        scale = lr * count / (size * (1 - momentum))
        assert want * (1 - shortfall) <= scale < want


def test_where_curvature_limits_the_rate_smith_s_noise_scale_falls():
    scales = [max_sgd_lr(LARGEST, KAPPA / size) / size for size in (1e6, 2e6)]
    assert scales[1] == pytest.approx(scales[0] / 2, rel=CRITICAL / 1e6)


# --- Adam: root, peak, and SGD's linear rule for large eps ----------------------------------------


def noise_dominated(size):
    """``D ~ sqrt(Sigma / B)``: the second moment is all noise."""
    return math.sqrt(500 / size)


PEAK = amplified(0.9) * VARIANCE / LARGEST**2  # 76,000: where Adam's two terms are alike


def adam_rate(size):
    return make_report(adam=make_adam(noise_dominated)).max_lr(size, optimizer="adam")


@pytest.mark.parametrize("size", [4, 16, 64])
def test_adam_s_rate_goes_like_the_root_of_the_batch_where_noise_dominates(size):
    rule = rescale_lr(adam_rate(size).value, size, 4 * size, rule="sqrt")
    assert rescale_adam(adam_rate(size).value, size, 4 * size).lr == pytest.approx(rule)  # Malladi
    limit = adam_rate(4 * size)
    shortfall = 4 * size / PEAK
    assert rule * (1 - shortfall) <= limit.value <= rule
    # d ln/d ln B is 1/2 - B / (B + B_p); a difference over 10 % either way is good to 1e-3.
    assert limit.exponent == pytest.approx(0.5, abs=shortfall + 1e-3)


@pytest.mark.parametrize("ratio", [1e-3, 0.1, 0.5, 1.0, 2.0, 10.0, 1e3])
def test_adam_s_rate_rises_peaks_and_falls_like_the_surge_law(ratio):
    """``lr_peak / ((sqrt(B_p / B) + sqrt(B / B_p)) / 2)``, the form of Li et al. 2024."""
    size = round(ratio * PEAK)
    peak = amplified(0.9) / (LARGEST * math.sqrt(PEAK / 500))
    root = math.sqrt(PEAK / size)
    law = peak / ((root + 1 / root) / 2)
    # 1/N is left: at most 1e3 B_p of 2^31 samples, and of the noise, whose share there is 1e-3.
    assert adam_rate(size).value == pytest.approx(law, rel=PEAK / UNBOUNDED * 1.01)


def test_the_peak_is_a_maximum_and_exponents_change_sign_there():
    below, at, above = (adam_rate(round(PEAK * factor)) for factor in (0.5, 1.0, 2.0))
    assert below.value < at.value > above.value
    assert below.exponent > 0 > above.exponent
    assert at.exponent == pytest.approx(0, abs=1e-3)


def test_with_a_large_eps_adam_scales_like_sgd():
    """``D`` does not depend on the batch: linear below the critical size, flat above."""
    report = make_report(adam=make_adam(lambda size: 1.0))
    for size in (1, 1_000, 10**6):
        adam = report.max_lr(size, optimizer="adam")
        sgd = report.max_lr(size, momentum=0.9)
        assert adam.value == pytest.approx(sgd.value / (1 - 0.9), rel=ROUNDING)
    linear = rescale_lr(report.max_lr(1, optimizer="adam").value, 1, 16)
    assert report.max_lr(16, optimizer="adam").value == pytest.approx(linear, rel=16 / PEAK)


def test_where_signal_dominates_the_preconditioner_adam_s_rate_is_flat_at_38_over_curvature():
    report = make_report(adam=make_adam(lambda size: 1.0, variance=1.0))
    limit = report.max_lr(10**6, optimizer="adam")
    assert limit.value == pytest.approx(max_adam_lr(LARGEST), rel=1e-5)  # 19 / 16 / 1e6 of noise
    assert limit.value == pytest.approx(38 / LARGEST, rel=1e-5)


# --- the paper's own rules ------------------------------------------------------------------------


def test_the_paper_s_rules_are_linear_for_sgd_and_the_root_for_adam():
    """Of ``2 / (kappa / B)`` and ``2 / sqrt(kappa / B)``, far below the critical size."""
    for size in (1, 4):
        edges = [LARGEST + KAPPA / batch for batch in (size, 4 * size)]
        sgd, adam = ([rate(edge) for edge in edges] for rate in (paper_sgd_lr, paper_adam_lr))
        shortfall = 4 * size / CRITICAL
        assert rescale_lr(sgd[0], 1, 4) == pytest.approx(sgd[1], rel=shortfall)
        assert rescale_lr(adam[0], 1, 4, rule="sqrt") == pytest.approx(adam[1], rel=shortfall)


def test_with_much_damping_the_paper_s_adam_rule_is_linear_too():
    damping = 1e4 * math.sqrt(LARGEST + KAPPA)
    few, many = (paper_adam_lr(LARGEST + KAPPA / size, damping=damping) for size in (1, 4))
    # 4 / 4,000 from curvature beside noise, 1e-4 from the root beside the damping.
    assert many == pytest.approx(rescale_lr(few, 1, 4), rel=1.2e-3)
