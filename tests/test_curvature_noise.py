"""Directional noise against per-sample Hessians that are known in closed form."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlr.curvature_noise import directional_noise
from batchlr.operators import HessianOperator, PreconditionedOperator, supervised
from cases import BatchMatrices

ROUNDING = 1e-12  # relative, float64


def cut(hessians, order, sizes):
    """Batches of ``sizes`` from per-sample Hessians ``(N, P, P)`` in the given order."""
    groups = hessians[list(order)[: sum(sizes)]].split(list(sizes))
    return BatchMatrices(torch.stack([group.mean(0) for group in groups]), sizes)


def heavy_tailed(num_samples, size, seed):
    """Per-sample Hessians ``a_i x_i x_i^T`` of unequal scale and sign."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_samples, size)) * np.linspace(2, 0.5, size)
    scale = rng.exponential(size=num_samples) - 0.2
    return torch.from_numpy(np.einsum("n,ni,nj->nij", scale, x, x))


def exact_noise(hessians, vector):
    """Per-sample variances of ``H_i v`` along and orthogonal to ``v``, with divisor N - 1."""
    products = (hessians - hessians.mean(0)) @ vector
    along = products @ vector
    across = products - along[:, None] * vector
    freedom = len(hessians) - 1
    return float(along.square().sum() / freedom), float(across.square().sum() / freedom)


def unit_vector(size, seed=0):
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def top_vector(hessians):
    return torch.linalg.eigh(hessians.mean(0)).eigenvectors[:, -1].contiguous()


# --- models whose per-sample Hessians are known --------------------------------------------------


def linear_regression(num_samples):
    """Model, loss, data and per-sample Hessians ``2 x x^T`` (MSELoss has no factor 1/2)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 1, dtype=torch.float64)
    features = torch.cat([x, torch.ones(num_samples, 1)], dim=1)
    hessians = 2 * features[:, :, None] * features[:, None, :]
    return model, supervised(nn.MSELoss()), (x, y), hessians


def logistic_regression(num_samples):
    """The same with ``J^T (diag(p) - p p^T) J``, ``J`` the logits' derivative in the weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (num_samples,), generator=generator)
    model = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        p = model(x).softmax(1)
    unit = torch.eye(3, dtype=torch.float64)
    weight = torch.einsum("cd,nj->ncdj", unit, x).reshape(num_samples, 3, 12)
    jacobian = torch.cat([weight, unit.expand(num_samples, 3, 3)], dim=2)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessians = jacobian.mT @ inner @ jacobian
    return model, supervised(nn.CrossEntropyLoss()), (x, y), hessians


MODELS = [linear_regression, logistic_regression]


@pytest.mark.parametrize("problem", MODELS)
def test_batches_of_one_sample_give_the_exact_variances(problem):
    model, loss_fn, (x, y), hessians = problem(num_samples=30)
    operator = HessianOperator(model, loss_fn, list(zip(x.split(1), y.split(1), strict=True)))
    for vector in (top_vector(hessians), unit_vector(len(hessians[0]))):
        noise = directional_noise(operator, vector)
        assert (noise.parallel, noise.orthogonal) == pytest.approx(
            exact_noise(hessians, vector), rel=1e-10
        )


@pytest.mark.parametrize("problem", MODELS)
@pytest.mark.parametrize("sizes", [(10, 10, 10), (15, 9, 5, 1)])
def test_a_model_s_batches_agree_with_their_dense_hessians(problem, sizes):
    model, loss_fn, (x, y), hessians = problem(num_samples=30)
    operator = HessianOperator(
        model, loss_fn, list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
    )
    basis = torch.linalg.eigh(hessians.mean(0)).eigenvectors.flip(1).contiguous()
    got = directional_noise(operator, basis[:, 0].contiguous(), others=basis[:, 1:3])
    want = directional_noise(
        cut(hessians, range(30), sizes), basis[:, 0].contiguous(), others=basis[:, 1:3]
    )
    for name in ("parallel", "orthogonal"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-10)
        assert getattr(got, name).stderr == pytest.approx(getattr(want, name).stderr, rel=1e-9)
    torch.testing.assert_close(got.others, want.others, rtol=1e-10, atol=0)


def test_products_made_twice_and_others_known_by_their_products_are_the_same_noise():
    basis = torch.linalg.eigh(SIX.mean(0)).eigenvectors.flip(1).contiguous()
    vector, rest = basis[:, 0].contiguous(), basis[:, 1:]
    held, again = cut(SIX, range(6), (3, 2, 1)), cut(SIX, range(6), (3, 2, 1))
    first = directional_noise(held, vector, others=rest)
    second = directional_noise(again, vector, others=lambda v: rest.T @ v, hold=False)
    assert (held.num_products, again.num_products) == (1, 2)
    assert (second.parallel, second.orthogonal) == pytest.approx(
        (first.parallel, first.orthogonal), rel=1e-12
    )
    torch.testing.assert_close(second.others, first.others)


# --- unbiased, by enumerating every partition ----------------------------------------------------

SIX = heavy_tailed(6, 3, seed=0)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (3, 2, 1), (4, 1, 1), (3, 3), (1,) * 6, (2, 2), (2, 1), (1, 1)]
)
def test_the_mean_over_all_partitions_is_the_exact_variance(sizes):
    basis = torch.linalg.eigh(SIX.mean(0)).eigenvectors.flip(1).contiguous()
    vector, rest = basis[:, 0].contiguous(), basis[:, 1:]
    estimates = [
        directional_noise(cut(SIX, order, sizes), vector, others=rest)
        for order in itertools.permutations(range(6))
    ]
    means = np.mean([(e.parallel, e.orthogonal) for e in estimates], axis=0)
    assert means == pytest.approx(exact_noise(SIX, vector), rel=ROUNDING)
    others = torch.stack([e.others for e in estimates]).mean(0)
    deviations = (SIX - SIX.mean(0)) @ vector @ rest
    torch.testing.assert_close(others, deviations.square().sum(0) / 5, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_a_batch_out_of_n_has_the_noise_over_its_effective_size(batch_size):
    vector = unit_vector(3)
    mean = SIX.mean(0)
    squares = [
        (((SIX[list(chosen)].mean(0) - mean) @ vector) ** 2).sum()
        for chosen in itertools.combinations(range(6), batch_size)
    ]
    noise = directional_noise(cut(SIX, range(6), (1,) * 6), vector)
    expected = noise.total * (1 / batch_size - 1 / 6)
    assert float(torch.stack(squares).mean()) == pytest.approx(expected, rel=ROUNDING)


def test_two_disjoint_batches_of_a_finite_data_set_need_no_correction():
    vector = unit_vector(3)
    squares = [
        ((SIX[list(order[:2])].mean(0) - SIX[list(order[2:4])].mean(0)) @ vector).square().sum()
        for order in itertools.permutations(range(6), 4)
    ]
    exact = sum(exact_noise(SIX, vector))
    assert 2 / 2 * float(torch.stack(squares).mean()) == pytest.approx(exact, rel=ROUNDING)


@pytest.mark.parametrize("batch_size", [4, 32, 200])
def test_random_partitions_of_a_larger_set_scatter_around_the_exact_variance(batch_size):
    hessians = heavy_tailed(600, 8, seed=3)
    vector = top_vector(hessians)
    rng = np.random.default_rng(0)
    sizes = (batch_size,) * (600 // batch_size)
    estimates = np.array(
        [
            (noise.parallel, noise.orthogonal)
            for noise in (
                directional_noise(cut(hessians, rng.permutation(600), sizes), vector)
                for _ in range(300)
            )
        ]
    )
    errors = estimates.mean(0) - exact_noise(hessians, vector)
    assert np.all(np.abs(errors) < 3 * estimates.std(0) / math.sqrt(300))  # 3 standard errors


# --- what the numbers mean -----------------------------------------------------------------------


def test_two_equal_batches_give_half_their_size_times_the_squared_difference():
    hessians = heavy_tailed(14, 5, seed=1)
    vector = unit_vector(5)
    difference = (hessians[:7].mean(0) - hessians[7:].mean(0)) @ vector
    noise = directional_noise(cut(hessians, range(14), (7, 7)), vector)
    assert noise.total == pytest.approx(3.5 * float(difference @ difference), rel=ROUNDING)
    assert noise.parallel == pytest.approx(3.5 * float(vector @ difference) ** 2, rel=ROUNDING)


def test_the_mean_over_directions_is_the_variance_of_the_spiked_wigner_model():
    hessians = heavy_tailed(40, 6, seed=2)
    operator = cut(hessians, range(40), (1,) * 40)
    totals = [directional_noise(operator, v.contiguous()).total for v in torch.eye(6).double()]
    squares = (hessians - hessians.mean(0)).square().sum((1, 2))
    assert np.mean(totals) == pytest.approx(float(squares.sum()) / 39 / 6, rel=ROUNDING)


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    scale=st.floats(1e-3, 1e3),
)
def test_noise_is_quadratic_in_the_loss_and_splits_over_any_orthonormal_basis(seed, sizes, scale):
    hessians = heavy_tailed(sum(sizes), 5, seed)
    basis = torch.linalg.qr(heavy_tailed(5, 5, seed + 1).sum(0))[0].contiguous()
    vector, rest = basis[:, 0].contiguous(), basis[:, 1:]
    noise = directional_noise(cut(hessians, range(sum(sizes)), sizes), vector, others=rest)
    assert float(noise.others.sum()) == pytest.approx(noise.orthogonal, rel=1e-9, abs=1e-20)
    scaled = directional_noise(cut(scale * hessians, range(sum(sizes)), sizes), vector)
    assert scaled.parallel == pytest.approx(scale**2 * noise.parallel, rel=1e-9, abs=1e-20)
    assert scaled.orthogonal == pytest.approx(scale**2 * noise.orthogonal, rel=1e-9, abs=1e-20)


def test_batches_of_the_same_curvature_have_no_noise():
    matrix = heavy_tailed(1, 4, seed=0).expand(5, 4, 4)
    noise = directional_noise(BatchMatrices(matrix, (3, 1, 4, 1, 5)), unit_vector(4))
    scale = float(matrix[0].norm()) ** 2
    assert noise.total < 1e-30 * scale  # rounding, squared
    assert max(noise.parallel.stderr, noise.orthogonal.stderr) < 1e-30 * scale


def test_another_metric_is_that_of_the_scaled_hessians():
    hessians = heavy_tailed(20, 4, seed=5)
    scale = torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)
    vector = unit_vector(4)
    got = directional_noise(
        PreconditionedOperator(cut(hessians, range(20), (1,) * 20), scale), vector
    )
    want = exact_noise(scale[:, None] * hessians * scale, vector)
    assert (got.parallel, got.orthogonal) == pytest.approx(want, rel=ROUNDING)


def test_it_costs_one_product_and_without_others_has_none():
    operator = cut(SIX, range(6), (2, 2, 2))
    noise = directional_noise(operator, unit_vector(3))
    assert operator.num_products == 1
    assert noise.others.shape == (0,)
    assert noise.total == noise.parallel + noise.orthogonal


def test_single_precision_products_are_accumulated_in_double():
    hessians = heavy_tailed(40, 6, seed=2)
    vector = top_vector(hessians)
    noise = directional_noise(cut(hessians.float(), range(40), (4,) * 10), vector.float())
    exact = directional_noise(cut(hessians, range(40), (4,) * 10), vector)
    assert noise.total == pytest.approx(exact.total, rel=1e-5)  # float32 products
    assert noise.others.dtype == torch.float64


# --- standard errors -----------------------------------------------------------------------------


def population_draws(num_batches, batch_size, num_draws):
    """Estimates from fresh samples of a Gaussian-feature problem, and its exact variances."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(2, 0.5, 6, dtype=torch.float64)
    shape = (num_draws, num_batches, batch_size, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scales
    vector = torch.eye(6, dtype=torch.float64)[0].contiguous()
    estimates = [
        directional_noise(BatchMatrices(m, (batch_size,) * num_batches), vector)
        for m in torch.einsum("rkni,rknj->rkij", x, x) / batch_size
    ]
    top = float(scales[0]) ** 2
    others = float(scales[1:].square().sum())
    return estimates, {"parallel": 2 * top**2, "orthogonal": top * others}  # Isserlis


@pytest.mark.parametrize("name", ["parallel", "orthogonal"])
@pytest.mark.parametrize("num_batches", [16, 64])
def test_standard_errors_match_the_scatter_of_repeated_estimates(name, num_batches):
    estimates, exact = population_draws(num_batches, batch_size=16, num_draws=600)
    values = np.array([float(getattr(e, name)) for e in estimates])
    errors = np.array([getattr(e, name).stderr for e in estimates])
    assert values.mean() == pytest.approx(exact[name], abs=4 * values.std() / math.sqrt(600))
    claimed = math.sqrt(np.mean(errors**2))
    # The scatter over 600 draws is known to 3-5 %; taking at least the Gaussian error claims more.
    assert 0.9 < claimed / values.std() < 1.25


@pytest.mark.parametrize("num_batches", [2, 3, 4, 8])
def test_few_batches_that_agree_by_chance_claim_no_certainty(num_batches):
    estimates, _ = population_draws(num_batches, batch_size=16, num_draws=50)
    for noise in estimates:
        least = math.sqrt(2 / (num_batches - 1)) * noise.parallel
        assert noise.parallel.stderr >= least * (1 - ROUNDING)
        assert noise.orthogonal.stderr > 0


def test_two_batches_claim_the_error_of_a_single_gaussian_difference():
    noise = directional_noise(cut(SIX, range(6), (3, 3)), unit_vector(3))
    for variance in (noise.parallel, noise.orthogonal):
        assert variance.stderr == pytest.approx(math.sqrt(2) * variance, rel=ROUNDING)


# --- refusals ------------------------------------------------------------------------------------


def test_one_batch_is_refused():
    with pytest.raises(ValueError, match="needs at least two disjoint batches, got 1"):
        directional_noise(cut(SIX, range(6), (6,)), unit_vector(3))


def test_batches_of_weight_zero_tell_nothing():
    model, loss_fn, (x, y), _ = logistic_regression(num_samples=30)
    ignored = x[:10], torch.full((10,), -100)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    vector = unit_vector(15)
    expected = directional_noise(HessianOperator(model, loss_fn, batches), vector)
    for hold in (True, False):
        operator = HessianOperator(model, loss_fn, [batches[0], ignored, *batches[1:]])
        noise = directional_noise(operator, vector, hold=hold)
        scale = 4 / 3  # a batch of samples of which a quarter is ignored has fewer that count
        assert noise.parallel == pytest.approx(scale * expected.parallel, rel=ROUNDING)
        assert noise.parallel.stderr == pytest.approx(
            scale * expected.parallel.stderr, rel=ROUNDING
        )
        assert noise.orthogonal == pytest.approx(scale * expected.orthogonal, rel=ROUNDING)
    with pytest.raises(ValueError, match=r"got 1 \(and 1 of weight zero"):
        directional_noise(HessianOperator(model, loss_fn, [batches[0], ignored]), vector)


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ValueError, match="vector must have unit norm, got 2"):
        directional_noise(cut(SIX, range(6), (3, 3)), 2 * unit_vector(3))
