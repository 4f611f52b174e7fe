"""Measured curvature against dense Hessians, per-sample algebra and sampled batches."""

import copy
import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from batchlr.curvature import measure_curvature, track_curvature
from batchlr.measurement.memory_plan import MemoryBudgetError
from batchlr.operators import supervised
from batchlr.schedulers import BatchAwareLR
from batchlr.tracker import CurvatureTracker
from cases import seeded

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


@functools.cache
def digits():
    """The 1,797 digits, shuffled: ``(N, 64)`` in [0, 1], float64, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    return torch.from_numpy(data.data[order] / 16), torch.from_numpy(data.target[order])


def first_digits(num_samples):
    x, y = digits()
    return x[:num_samples], y[:num_samples]


def network(hidden=4):
    torch.manual_seed(0)
    layers = [nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)] if hidden else []
    return nn.Sequential(*(layers or [nn.Linear(64, 10)])).double()


def train(model, epochs, lr=0.5):
    """Plain SGD on batches of 64."""
    x, y = digits()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for rows in itertools.chain.from_iterable(
        torch.randperm(len(x), generator=generator).split(64) for _ in range(epochs)
    ):
        optimizer.zero_grad()
        CROSS_ENTROPY(model, (x[rows], y[rows])).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


def loss_of_flat(model, batch):
    """The mean loss as a function of the flat parameters, and where the model is."""
    parameters = dict(model.named_parameters())

    def loss(flat):
        pieces = flat.split([p.numel() for p in parameters.values()])
        named = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, named, (batch[0],)), batch[1])

    return loss, torch.cat([p.detach().reshape(-1) for p in parameters.values()])


def dense_hessian(model, batch):
    return torch.autograd.functional.hessian(*loss_of_flat(model, batch))


def dense_gauss_newton(model, batch):
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    jacobians = torch.func.jacrev(lambda p: functional_call(model, p, (batch[0],)))(parameters)
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)  # (N, C, P)
    p = model(batch[0]).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nip,nij,njq->pq", jacobian, inner, jacobian) / len(p)


def measure(model, batch, batch_size=50, **options):
    options = {"optimizer": "sgd", "num_small_batches": 0} | options
    return measure_curvature(model, CROSS_ENTROPY, [batch], batch_size=batch_size, **options)


# --- the two ends of the spectrum ----------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 3])
@pytest.mark.parametrize(
    ("matrix", "reference"), [("hessian", dense_hessian), ("ggn", dense_gauss_newton)]
)
def test_extremes_are_those_of_the_dense_matrix(epochs, matrix, reference):
    model, batch = train(network(), epochs), first_digits(300)
    report = measure(model, batch, matrix=matrix, tol=1e-4, max_products=200)
    values = torch.linalg.eigvalsh(reference(model, batch))
    assert report.converged
    # An eigenvalue's error is the residual squared over a gap: (1e-4)^2 of lambda_1 and below.
    scale = float(values[-1])
    assert report.largest == pytest.approx(float(values[-1]), abs=1e-7 * scale)
    assert report.largest.stderr < 1e-4 * scale  # no sampling error: these are all the samples
    tops = sorted(report.ritz_values, reverse=True)[:3]
    assert tops == pytest.approx(values[-3:].flip(0).tolist(), abs=1e-6 * scale)
    # The lower end may be the edge of a bulk without gaps: all that holds is the residual.
    tolerance = 1e-6 * scale if values[0] < -0.01 * scale else 1e-4 * scale
    assert report.smallest == pytest.approx(float(values[0]), abs=tolerance)
    loss, weights = loss_of_flat(model, batch)
    assert report.loss == pytest.approx(float(loss(weights)), rel=1e-12)
    assert (report.num_params, report.num_samples, report.dataset_size) == (310, 300, 300)


def test_single_precision_finds_the_same_curvature():
    model, (x, y) = train(network(), 1), first_digits(300)
    double = measure(model, (x, y))
    single = measure(model.float(), (x.float(), y))
    assert single.largest == pytest.approx(double.largest, rel=1e-4)
    assert single.noise.total == pytest.approx(double.noise.total, rel=1e-3)


def test_a_single_parameter_has_one_eigenvalue():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    x = torch.arange(1.0, 9.0, dtype=torch.float64).unsqueeze(1)
    report = measure_curvature(model, supervised(nn.MSELoss()), [(x, x)])
    exact = 2 * float(x.square().mean())
    assert (report.largest, report.smallest) == (pytest.approx(exact), pytest.approx(exact))
    assert report.kappa == 0.0  # nothing to repel it
    assert report.noise.orthogonal == pytest.approx(0.0, abs=1e-20 * exact**2)


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
def test_batch_norm_curvature_is_that_of_the_mode_asked_for(norm_mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].running_var.fill_(3.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=generator)
    report = measure(model, (x, y), batch_size=15, norm_mode=norm_mode, tol=1e-6)
    twin = copy.deepcopy(model).train(norm_mode == "train")
    batches = zip(x.split(15), y.split(15), strict=True)
    dense = torch.stack([dense_hessian(twin, batch) for batch in batches]).mean(0)
    assert report.largest == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-9)
    assert report.norm_mode == norm_mode
    assert report.coupled == (norm_mode == "train")


def test_without_batch_norm_there_is_no_norm_mode():
    report = measure(network(), first_digits(60), batch_size=20)
    assert (report.norm_mode, report.coupled, report.matrix) == (None, False, "hessian")


def test_it_converges_or_says_that_it_did_not():
    model, batch = train(network(), 1), first_digits(100)
    assert not measure(model, batch, tol=1e-6, max_products=8).converged
    assert measure(model, batch, tol=1e-2).converged


# --- nothing of the model changes ----------------------------------------------------------------


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 10),
    )


def everything(model, optimizer):
    """All that a measurement could touch, as bytes or plain values."""

    def raw(tensor):
        return None if tensor is None else tensor.detach().numpy().tobytes()

    return (
        {n: (raw(p), raw(p.grad), p.requires_grad) for n, p in model.named_parameters()},
        {n: raw(b) for n, b in model.named_buffers()},
        {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()},
        {
            (k, name): raw(value) if isinstance(value, torch.Tensor) else value
            for k, state in enumerate(optimizer.state.values())
            for name, value in state.items()
        },
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        raw(torch.get_rng_state()),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize(
    ("norm_mode", "training", "matrix"),  # half of the eight, among which each pair is
    [
        ("train", True, "hessian"),
        ("train", False, "ggn"),
        ("eval", True, "ggn"),
        ("eval", False, "hessian"),
    ],
)
def test_a_measurement_leaves_training_bit_identical(kind, norm_mode, training, matrix):
    model = conv_net()
    model[1].bias.requires_grad_(False)
    x, y = first_digits(32)
    x = x.float().reshape(-1, 1, 8, 8)
    optimizer = kind(model.parameters(), lr=0.01)
    CROSS_ENTROPY(model, (x, y)).backward()
    optimizer.step()
    model.train(training)
    model[5].train(not training)
    before = everything(model, optimizer)
    with torch.no_grad():  # as a user's evaluation loop might
        report = measure_curvature(
            model,
            CROSS_ENTROPY,
            [(x, y)],
            optimizer=optimizer,
            norm_mode=norm_mode,
            matrix=matrix,
            max_products=4,
            num_small_batches=2,
        )
    assert report.num_products > 0
    assert everything(model, optimizer) == before


def test_the_same_measurement_twice_is_the_same_report():
    model, batch = train(network(), 1), first_digits(120)
    one, two = (measure(model, batch, batch_size=30, num_small_batches=4) for _ in range(2))
    assert (one.largest, one.smallest, one.noise, one.kappa, one.small_batch) == (
        two.largest,
        two.smallest,
        two.noise,
        two.kappa,
        two.small_batch,
    )
    seeded = measure(model, batch, batch_size=30, generator=torch.Generator().manual_seed(5))
    assert seeded.noise.random_direction != one.noise.random_direction


# --- kappa: how the largest eigenvalue grows as batches shrink -----------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_the_least_budget_gives_the_same_curvature(optimizer, matrix):
    """A basis that restarts, at half precision for a Hessian, no graphs, products made twice."""
    model, batch = train(network(), 3), first_digits(400)
    options = {"optimizer": optimizer, "matrix": matrix, "num_eigenpairs": 1, "tol": 1e-4}
    free = measure(model, batch, **options)
    with pytest.raises(MemoryBudgetError, match="memory_budget=1 B does not hold") as caught:
        measure(model, batch, memory_budget=1, **options)
    tight = measure(model, batch, memory_budget=caught.value.needed, **options)
    assert tight.converged
    assert tight.largest == pytest.approx(free.largest, rel=1e-4)
    assert tight.noise.parallel == pytest.approx(free.noise.parallel, rel=0.02)
    assert tight.noise.orthogonal == pytest.approx(free.noise.orthogonal, rel=0.02)
    assert tight.num_products > free.num_products
    rates = [r.max_lr(50, optimizer=optimizer).value for r in (free, tight)]
    assert rates[1] == pytest.approx(rates[0], rel=0.1)  # the spaces differ in their bulk


def test_a_large_budget_changes_nothing():
    model, batch = network(), first_digits(200)
    free, budgeted = measure(model, batch), measure(model, batch, memory_budget=2**40)
    assert budgeted.num_products == free.num_products
    assert budgeted.ritz_values == pytest.approx(free.ritz_values, rel=1e-9, abs=1e-12)
    assert budgeted.noise.total == pytest.approx(free.noise.total, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_budget_holds_the_searches_of_small_batches_too(optimizer):
    """Their 20 products need ten vectors, also where the whole is allowed four."""
    model, batch = network(), first_digits(200)
    options = {"optimizer": optimizer, "max_products": 4, "num_small_batches": 4}
    with pytest.raises(MemoryBudgetError) as caught:
        measure(model, batch, memory_budget=1, **options)
    for budget in (caught.value.needed, 2**40):
        report = measure(model, batch, memory_budget=budget, **options)
        assert report.small_batch is not None


def test_a_budget_does_not_mind_a_batch_whose_targets_are_all_ignored():
    model, (x, y) = network(), first_digits(64)
    y = y.clone()
    y[:16] = -100
    batches = list(zip(x.split(16), y.split(16), strict=True))
    loss_fn = supervised(nn.CrossEntropyLoss())
    options = {"max_products": 10, "optimizer": "sgd"}
    free = measure_curvature(model, loss_fn, batches, **options)
    budgeted = measure_curvature(model, loss_fn, batches, memory_budget=2**30, **options)
    assert budgeted.largest == pytest.approx(free.largest, rel=1e-9)


def test_micro_batches_give_the_same_curvature():
    model, batch = network(), first_digits(200)
    whole, cut = measure(model, batch), measure(model, batch, micro_batch=7)
    assert cut.largest == pytest.approx(whole.largest, rel=1e-8)
    assert cut.noise.total == pytest.approx(whole.noise.total, rel=1e-6)
    assert cut.num_batches == whole.num_batches
    parts = measure(model, batch, micro_batch=7, memory_budget=2**30)
    assert parts.largest == pytest.approx(whole.largest, rel=1e-8)


def half_mse(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def least_squares(num_samples, spectrum, seed=0):
    """A linear model without bias; the Hessian of sample ``i`` is ``x_i x_i^T``."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_samples, len(spectrum))) * np.sqrt(spectrum)
    model = nn.Linear(len(spectrum), 1, bias=False, dtype=torch.float64)
    return model, torch.from_numpy(x), torch.zeros(num_samples, 1, dtype=torch.float64)


def second_order_coefficient(features, count):
    """Kappa of ``x x^T``: the ``count`` top pairs at their gaps, the rest at lambda_1."""
    hessian = features.T @ features / len(features)
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(0), vectors.flip(1)
    products = (features @ vectors[:, :1]) * features
    projected = (products - products.mean(0)) @ vectors
    q = projected.square().sum(0) / (len(features) - 1)
    gaps = values[0] - values
    gaps[count:] = values[0]
    return float((q[1:] / gaps[1:]).sum())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_kappa_takes_every_direction_of_the_krylov_space_at_its_gap(count):
    model, x, y = least_squares(40, [5.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    batches = list(zip(x.split(1), y.split(1), strict=True))  # exact per-sample variances
    report = measure_curvature(
        model, half_mse, batches, num_eigenpairs=count, tol=1e-9, optimizer="sgd"
    )
    # All six directions are in it, however few pairs were asked for.
    assert report.kappa == pytest.approx(second_order_coefficient(x, 6), rel=1e-8)
    assert report.kappa_smallest == 0.0  # positive semi-definite: zero repels nothing


@pytest.mark.parametrize("count", [1, 3])
def test_the_lower_end_of_minus_a_loss_is_its_upper_end(count):
    model, x, y = least_squares(40, [5.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    batches = list(zip(x.split(1), y.split(1), strict=True))
    options = {"num_eigenpairs": count, "tol": 1e-9, "optimizer": "sgd", "dataset_size": 400}
    upper = measure_curvature(model, half_mse, batches, **options)
    lower = measure_curvature(model, lambda m, b: -half_mse(m, b), batches, **options)
    assert lower.smallest == pytest.approx(-upper.largest, rel=1e-9)
    assert lower.smallest.stderr == pytest.approx(upper.largest.stderr, rel=1e-6)
    assert lower.kappa_smallest == pytest.approx(-upper.kappa, rel=1e-8)
    assert lower.smallest_at(50) == pytest.approx(-upper.largest_at(50), rel=1e-8)


def test_copies_of_the_largest_eigenvalue_do_not_repel_it():
    basis = torch.eye(4, dtype=torch.float64) * torch.tensor([2.0, 2.0, 1.0, 1.0]).sqrt()
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    x = torch.cat([basis * 2, sign[:, None] * basis * 2, -basis * 2]).double()
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    batches = list(zip(x.split(1), torch.zeros(12, 1).double().split(1), strict=True))
    report = measure_curvature(model, half_mse, batches, num_eigenpairs=2, optimizer="sgd")
    assert report.ritz_values[:2] == pytest.approx((2.0, 2.0))
    # The samples fluctuate along their own axes only: nothing couples the top to the rest.
    assert report.kappa == pytest.approx(0.0, abs=1e-12)


SPECTRA = {
    "three spikes": lambda p: np.r_[20.0, 10.0, 5.0, np.full(p - 3, 0.1)],
    "a spike on a unit bulk": lambda p: np.r_[20.0, np.ones(p - 1)],
    "a power law": lambda p: 10 * np.arange(1, p + 1) ** -1.5,
}


def mean_largest_of_grams(features, batch_size, draws, rng):
    """Mean largest eigenvalue of batches, with the fluctuation along ``v_1`` taken out.

    Along ``v_1`` a batch's curvature has the exact mean lambda_1; what is left scatters less.
    """
    values, vectors = np.linalg.eigh(features.T @ features / len(features))
    excess = []
    for _ in range(draws):
        z = features[rng.choice(len(features), batch_size, replace=False)]
        gram = z @ z.T if batch_size < z.shape[1] else z.T @ z
        along = np.square(z @ vectors[:, -1]).mean()
        excess.append(np.linalg.eigvalsh(gram)[-1] / batch_size - along)
    return values[-1] + np.mean(excess), np.std(excess) / math.sqrt(draws)


def check_least_squares(spectrum, size, num_samples, batch_size, tolerance):
    model, x, y = least_squares(num_samples, SPECTRA[spectrum](size))
    report = measure_curvature(
        model, half_mse, [(x, y)], batch_size=batch_size, optimizer="sgd", max_products=200
    )
    rng = np.random.default_rng(1)
    for other in (4, 16, 64, 256):
        mean, error = mean_largest_of_grams(x.numpy(), other, 200, rng)
        assert error < 0.02 * mean
        largest = report.largest_at(other)
        # At 4 it is the mean of eight measured batches, whose scatter is most of the error.
        assert abs(largest - mean) < tolerance * mean + 2 * (largest.stderr if other == 4 else 0)
    return report


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_largest_at_is_the_mean_over_batches_in_least_squares(spectrum):
    # The second order itself is off by up to 7 % at 4; kappa from 100 batches by about 5 %.
    report = check_least_squares(spectrum, 60, 800, batch_size=8, tolerance=0.10)
    assert report.noise.parallel == pytest.approx(2 * report.largest**2, rel=0.2)  # Isserlis


def test_kappa_of_gaussian_features_is_the_rest_of_the_trace():
    model, x, y = least_squares(2000, np.r_[50.0, np.ones(40)])  # one spike far above the rest
    report = measure_curvature(model, half_mse, [(x, y)], batch_size=10, optimizer="sgd")
    rest = float(x.square().sum() / len(x)) - report.largest
    assert report.kappa == pytest.approx(rest, rel=0.1)  # 200 batches, and lambda_1/gap = 1.02


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_largest_at_is_the_mean_over_batches_in_large_least_squares(spectrum):
    check_least_squares(spectrum, 500, 4000, batch_size=40, tolerance=0.12)


def hessian_product(model, rows):
    """``v -> H_B v`` on numpy vectors, by plain double backward."""
    x, y = digits()
    loss, flat = loss_of_flat(model, (x[rows], y[rows]))
    flat.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat, create_graph=True)

    def multiply(vector):
        vector = torch.from_numpy(np.ascontiguousarray(vector.reshape(-1)))
        return torch.autograd.grad(gradient, flat, vector, retain_graph=True)[0].numpy()

    return LinearOperator((len(flat),) * 2, matvec=multiply, dtype=np.float64)


def mean_largest(model, batch_size, draws, seed=3):
    """Mean largest eigenvalue of random batches, and its standard error, without the library."""
    x, _ = digits()
    start = np.random.default_rng(0).normal(size=sum(p.numel() for p in model.parameters()))
    whole = hessian_product(model, torch.arange(len(x)))
    (top,), vectors = eigsh(whole, k=1, which="LA", v0=start)
    generator = torch.Generator().manual_seed(seed)
    excess = []
    for _ in range(draws):
        rows = torch.randperm(len(x), generator=generator)[:batch_size]
        product = hessian_product(model, rows)
        (value,), _ = eigsh(product, k=1, which="LA", tol=1e-4, v0=vectors[:, 0] + 0.01 * start)
        along = vectors[:, 0] @ product.matvec(vectors[:, 0])
        excess.append(value - along)  # its mean has lambda_1 taken out, see above
    return top + np.mean(excess), np.std(excess) / math.sqrt(draws)


CASES = {  # hidden units, epochs, and draws of batches: a network's curvature scatters less
    "logistic regression at initialisation": (0, 0, 40),
    "logistic regression trained": (0, 15, 40),
    "network at initialisation": (16, 0, 20),
    "network trained": (16, 3, 20),
}


@pytest.fixture(scope="module", params=CASES)
def digits_case(request):
    hidden, epochs, _ = CASES[request.param]
    model = train(network(hidden), epochs)
    report = measure(model, digits(), batch_size=32, tol=1e-2, num_small_batches=8)
    return request.param, model, report


def test_largest_at_is_the_mean_over_batches_of_digits(digits_case):
    name, model, report = digits_case
    for batch_size in (16, 64):
        assert batch_size > report.critical_batch_size
        mean, error = mean_largest(model, batch_size, draws=CASES[name][-1])
        assert error < 0.04 * mean
        # 10 %: the second order's own error from the critical size on, in exact arithmetic.
        assert report.largest_at(batch_size) == pytest.approx(mean, rel=0.10)


def test_the_random_direction_misses_most_of_the_noise(digits_case):
    name, _, report = digits_case
    ratio = report.noise.total / report.noise.random_direction
    assert ratio > (50 if "trained" in name else 15)


def test_larger_batches_never_have_larger_curvature(digits_case):
    _, _, report = digits_case
    sizes = np.unique(np.geomspace(1, report.dataset_size, 200).astype(int))
    largest = [report.largest_at(int(size)) for size in sizes]
    smallest = [report.smallest_at(int(size)) for size in sizes]
    assert np.all(np.diff(largest) <= 0)
    assert np.all(np.diff(smallest) >= 0)
    assert largest[-1] == report.largest
    assert smallest[-1] == report.smallest


def test_small_batches_lead_the_law_below_the_size_measured(digits_case):
    _, model, report = digits_case
    size, measured = report.small_batch
    assert size == 4
    mean, error = mean_largest(model, 4, draws=20)
    spread = 8**-0.5 * error * math.sqrt(20)  # of the report's own 8 batches, without v_1's part
    along = math.sqrt(report.noise.parallel / 4 / 8)
    assert abs(measured - mean) < 3 * math.hypot(spread, along)
    # What fluctuates along v_1 is taken off if that helps: never more scatter than plain batches'.
    assert 0 < measured.stderr < 1.6 * math.hypot(spread, along)
    assert report.largest_at(4) == pytest.approx(max(measured, report.largest_at(32)), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 3, 20, 60])
def test_largest_at_holds_from_the_critical_size_on_throughout_training(epochs):
    model = train(network(16), epochs)
    report = measure(model, digits(), batch_size=8, tol=1e-3, num_small_batches=8)
    for batch_size in (8, 16, 32, 64, 128, 256):
        if batch_size < report.critical_batch_size:
            continue
        mean, error = mean_largest(model, batch_size, draws=200)
        assert abs(report.largest_at(batch_size) / mean - 1) < 0.19 + 2 * error / mean


# --- what other laws need ------------------------------------------------------------------------


def scaled(matrix, ratios):
    return ratios.sqrt()[:, None] * matrix * ratios.sqrt()


def grouped(model):
    """SGD whose second layer learns at a quarter of the rate, and each weight's share of it."""
    groups = [
        {"params": model[0].parameters(), "lr": 0.4},
        {"params": model[2].parameters(), "lr": 0.1},
    ]
    ratios = [torch.full((p.numel(),), 1.0).double() for p in model[0].parameters()]
    ratios += [torch.full((p.numel(),), 0.25).double() for p in model[2].parameters()]
    return torch.optim.SGD(groups), torch.cat(ratios)


@pytest.mark.parametrize("unequal", [False, True])
def test_the_trace_is_the_dense_one_within_its_error(unequal):
    model, batch = train(network(), 1), first_digits(200)
    optimizer, ratios = grouped(model) if unequal else ("sgd", torch.ones(310).double())
    exact = float(scaled(dense_hessian(model, batch), ratios).trace())
    traces = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        options = {"optimizer": optimizer, "generator": generator, "max_products": 6}
        traces.append(measure(model, batch, **options).trace)
    scatter = np.std(traces, ddof=1)
    assert abs(np.mean(traces) - exact) < 3 * scatter / math.sqrt(12)
    # Twelve scatters from four directions each tell the error to 30 %.
    error = math.sqrt(np.mean([trace.stderr**2 for trace in traces]))
    assert error == pytest.approx(scatter, rel=0.6)


def test_the_trace_of_a_multiple_of_one_is_exact():
    model = Bowl([1.0, 0.5, 0.3], [2.0, 2.0, 2.0])
    report = model.measure(optimizer="sgd")
    assert report.trace == pytest.approx(6.0, rel=1e-12)
    assert report.trace.stderr == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("unequal", [False, True])
def test_the_gauss_newton_part_along_the_top_is_its_rayleigh_quotient(unequal):
    model, batch = train(network(), 1), first_digits(200)
    optimizer, ratios = grouped(model) if unequal else ("sgd", torch.ones(310).double())
    report = measure(model, batch, optimizer=optimizer, tol=1e-6, max_products=200)
    hessian, ggn = (
        scaled(dense(model, batch), ratios) for dense in (dense_hessian, dense_gauss_newton)
    )
    top = torch.linalg.eigh(hessian).eigenvectors[:, -1]
    want = float(top @ ggn @ top)
    # An eigenvector is as good as the residual over its gap: 1e-5.
    assert report.ggn_along_top == pytest.approx(want, rel=1e-4)
    residual = float((ggn @ top - want * top).norm())
    assert report.ggn_along_top.stderr == pytest.approx(residual, rel=1e-3)


def test_of_the_gauss_newton_matrix_itself_the_top_is_all():
    report = measure(network(), first_digits(100), matrix="ggn", tol=1e-6, max_products=200)
    assert report.ggn_along_top == pytest.approx(report.largest, rel=1e-9)
    assert report.ggn_along_top.stderr < 1e-4 * report.largest


def test_a_loss_without_halves_has_no_gauss_newton_part():
    model, x, y = least_squares(20, [2.0, 1.0])
    report = measure_curvature(model, half_mse, [(x, y)], optimizer="sgd")
    assert math.isnan(report.ggn_along_top)
    assert math.isfinite(report.trace)


def test_the_weights_of_the_ritz_values_are_of_a_random_start_only():
    model, batch = network(), first_digits(100)
    report = measure(model, batch)
    assert len(report.ritz_weights) == len(report.ritz_values)
    assert sum(report.ritz_weights) == pytest.approx(1, rel=1e-9)
    assert track(tracker(), model, batch).ritz_weights == ()


def test_the_error_of_small_batches_is_their_scatter():
    model, batch = train(network(), 1), first_digits(200)
    means, errors = [], []
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        report = measure(model, batch, num_small_batches=8, generator=generator, max_products=6)
        size, mean = report.small_batch
        assert size == 4
        means.append(mean)
        errors.append(mean.stderr)
    # The scatter of 16 is good to 18 %.
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.45)


# --- samples and batches -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_small_batches": 1}, "must be 0, or at least 2 for a standard error, got 1"),
        ({"num_small_batches": -2}, "must be finite and at least 0, got -2"),
        ({"num_eigenpairs": 0}, "num_eigenpairs must be"),
        ({"max_products": 0}, "max_products must be"),
    ],
)
def test_counts_that_show_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        measure_curvature(network(), CROSS_ENTROPY, [first_digits(80)], **options)


def test_a_single_batch_is_cut_into_four():
    report = measure_curvature(network(), CROSS_ENTROPY, [first_digits(80)], num_small_batches=0)
    assert (report.num_batches, report.batch_size, report.num_samples) == (4, 20, 80)


def test_batches_are_kept_unless_a_batch_size_is_asked_for():
    x, y = first_digits(60)
    batches = [(x[:30], y[:30]), (x[30:40], y[30:40]), (x[40:], y[40:])]
    options = {"optimizer": "sgd", "num_small_batches": 0}
    report = measure_curvature(network(), CROSS_ENTROPY, batches, **options)
    assert (report.num_batches, report.batch_size, report.num_samples) == (3, 20, 60)
    report = measure_curvature(network(), CROSS_ENTROPY, batches, batch_size=12, **options)
    assert (report.num_batches, report.batch_size, report.num_samples) == (5, 12, 60)


@pytest.mark.parametrize("batch_size", [31, 45, 60])
def test_a_batch_size_above_half_the_samples_still_leaves_two_batches(batch_size):
    report = measure(network(), first_digits(60), batch_size=batch_size)
    assert (report.num_batches, report.batch_size) == (2, 30)


def test_dict_batches_and_their_cuts_are_the_same_samples():
    x, y = first_digits(60)
    want = measure(network(), (x, y), batch_size=20)
    got = measure(network(), {"x": x, "y": y}, batch_size=20)
    assert got.largest == want.largest


def test_batches_that_cannot_be_cut_have_no_cap():
    x, y = first_digits(60)
    named = [(x[k : k + 20], y[k : k + 20], ["sample"] * 20) for k in (0, 20, 40)]

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = measure_curvature(network(), loss_fn, named)
    assert report.small_batch is None
    assert report.num_batches == 3
    with pytest.raises(TypeError, match="cannot join batches of type str"):
        measure_curvature(network(), loss_fn, named, batch_size=10)


def test_a_subsample_s_largest_eigenvalue_is_corrected_for_being_a_batch():
    model = network(16)
    x, y = digits()
    options = {"optimizer": "sgd", "tol": 1e-2, "num_small_batches": 0}
    exact = measure(model, (x, y), 300, **options).largest
    generator = torch.Generator().manual_seed(0)
    raw, corrected = [], []
    for _ in range(12):
        rows = torch.randperm(len(x), generator=generator)[:96]
        report = measure(model, (x[rows], y[rows]), 12, dataset_size=len(x), **options)
        raw.append(report.ritz_values[0])
        corrected.append(report.largest)
    error = np.std(corrected, ddof=1) / math.sqrt(12)
    assert np.mean(raw) > exact + 3 * error  # as Jensen's inequality says
    assert abs(np.mean(corrected) - exact) < 3 * error


def test_the_sampling_error_of_a_subsample_is_that_along_the_top():
    model, batch = network(), first_digits(120)
    all_of_it = measure(model, batch, batch_size=20)
    part = measure(model, batch, batch_size=20, dataset_size=1200)
    variance = part.noise.parallel * (1 / 120 - 1 / 1200)
    assert part.largest.stderr == pytest.approx(math.sqrt(variance), rel=1e-3)
    assert all_of_it.largest.stderr < 1e-3 * all_of_it.largest
    assert part.noise.parallel == all_of_it.noise.parallel  # unbiased for either


def test_the_correction_of_a_tiny_subsample_is_at_most_half():
    # Two samples 80 degrees apart: the second order would take off 70 % of what there is.
    angle = math.radians(40)
    x = torch.tensor([[math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]])
    batches = [(row.reshape(1, 2).double(), torch.zeros(1, 1).double()) for row in x]
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    report = measure_curvature(model, half_mse, batches, dataset_size=10**6, optimizer="sgd")
    assert report.kappa / 2 > 0.5 * report.ritz_values[0]
    assert report.largest == pytest.approx(0.5 * math.cos(angle) ** 2, rel=1e-6)


# --- what the optimizer has to say ---------------------------------------------------------------


def test_momentum_and_weight_decay_are_the_largest_over_groups():
    model, batch = network(), first_digits(60)
    groups = [
        {"params": list(model[0].parameters()), "momentum": 0.5, "weight_decay": 1e-2},
        {"params": list(model[2].parameters()), "momentum": 0.9},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-3)
    report = measure(model, batch, batch_size=20, optimizer=optimizer)
    assert (report.momentum, report.weight_decay, report.adam) == (0.9, 1e-2, None)
    plain = measure(model, batch, batch_size=20)
    assert (plain.momentum, plain.weight_decay) == (0.0, 0.0)
    assert report.largest == plain.largest
    limit = report.max_lr(32)
    assert (limit.momentum, limit.value) == (
        0.9,
        report.max_lr(32, optimizer="sgd", momentum=0.9).value,
    )


def test_unequal_group_rates_measure_their_own_metric():
    model, batch = train(network(), 1), first_digits(200)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.4},
        {"params": list(model[2].parameters()), "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups)
    scale = torch.cat(
        [
            torch.full((p.numel(),), ratio**0.5, dtype=torch.float64)
            for group, ratio in zip(groups, (1.0, 0.25), strict=True)
            for p in group["params"]
        ]
    )
    dense = scale[:, None] * dense_hessian(model, batch) * scale
    exact = torch.linalg.eigvalsh(dense)
    report = measure(model, batch, optimizer=optimizer, tol=1e-5, num_small_batches=4)
    assert report.largest == pytest.approx(float(exact[-1]), rel=1e-8)
    assert report.smallest == pytest.approx(float(exact[0]), abs=1e-6 * float(exact[-1]))
    plain = measure(model, batch, num_small_batches=4)
    # Small batches are seen in the same metric (and are the same ones).
    assert 0.25 * plain.small_batch[1] < report.small_batch[1] < plain.small_batch[1]

    BatchAwareLR(optimizer, 0.2, lambda o: LambdaLR(o, lambda step: step / 10))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]  # a warm-up's start
    again = measure(model, batch, optimizer=optimizer, tol=1e-5)
    assert again.largest == pytest.approx(float(exact[-1]), rel=1e-8)


def test_a_parameter_the_optimizer_does_not_hold_counts_as_still():
    model, batch = network(), first_digits(100)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.3)
    report = measure(model, batch, optimizer=optimizer, tol=1e-5)
    model[0].requires_grad_(False)
    frozen = measure(model, batch, tol=1e-5)
    assert report.largest == pytest.approx(frozen.largest, rel=1e-9)
    assert report.noise.total == pytest.approx(frozen.noise.total, rel=1e-6)


TOP = {"tol": 1e-5, "num_eigenpairs": 1}


def batch_gradients(model, batch, batch_size, numbers):
    """Of some batches ``(K, P)``, by plain autograd."""
    gradients = []
    for k in numbers:
        part = [t[k * batch_size : (k + 1) * batch_size] for t in batch]
        pieces = torch.autograd.grad(CROSS_ENTROPY(model, part), list(model.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in pieces]))
    return torch.stack(gradients)


def batch_second_moment(model, batch, batch_size, numbers, dataset_size):
    """``E g_B^2`` of a batch like the ones given, from per-batch gradients by plain autograd."""
    stacked = batch_gradients(model, batch, batch_size, numbers)
    total = batch_size * len(stacked)
    variance = batch_size * stacked.var(0, unbiased=True)  # of one sample
    mean_square = stacked.mean(0).square() - variance * (1 / total - 1 / dataset_size)

    def at(size):
        return (mean_square + variance * (1 / size - 1 / dataset_size)).clamp(min=0)

    return at


def preconditioned_hessian(model, batch, metric):
    """``D^-1/2 H D^-1/2``, without what fewer than one sample in twenty moves.

    Of eight batches of 25 that is a gradient in five or fewer: ``8 (1 - 0.95^25) = 5.8``.
    """
    moved = (batch_gradients(model, batch, 25, range(8)) != 0).sum(0)
    assert 0 < (moved <= 5).sum() < 100  # pixels that are dark in most images
    scale = metric.rsqrt() * (moved > 5)
    return scale[:, None] * dense_hessian(model, batch) * scale


@pytest.mark.parametrize("dataset_size", [200, 5000])
def test_adam_without_a_step_takes_its_preconditioner_from_gradients(dataset_size, monkeypatch):
    monkeypatch.setattr("batchlr.measurement.adam_measurement.selection_bias", lambda *_: 1.0)
    model, batch = train(network(), 1), first_digits(200)
    report = measure(model, batch, 25, optimizer="adam", dataset_size=dataset_size, **TOP)
    at = batch_second_moment(model, batch, 25, range(8), dataset_size)
    dense = preconditioned_hessian(model, batch, at(25).sqrt() + 1e-8)
    values, vectors = torch.linalg.eigh(dense)
    adam = report.adam
    assert adam.source == "gradients"
    assert (adam.batch_size, adam.beta1) == (25, 0.9)
    top = float(values[-1])
    if dataset_size == 200:
        assert adam.largest == pytest.approx(top, rel=1e-8)
    else:
        assert 0.5 * top <= adam.largest < top  # corrected for being a batch
    # How the preconditioner stretches along the top vector; interpolated. Beyond the 200 samples
    # measured the squares of some mean gradients come out negative and count as zero.
    for size, precision in ((1, 0.02), (4, 0.02), (25, 0.02), (100, 0.03), (200, 0.1)):
        stretch = (at(size).sqrt() + 1e-8) / (at(25).sqrt() + 1e-8)
        want = float((vectors[:, -1].square() * stretch).sum())
        assert adam.stretch_at(size) == pytest.approx(want, rel=precision)


def test_adam_s_metric_is_judged_by_halves_of_the_batches(monkeypatch):
    """Even and odd ones; what is found multiplies the metric."""
    asked = []

    def judge(values, metrics):
        asked.append((values, metrics))
        return 1 + len(asked) / 100

    model, batch = train(network(), 1), first_digits(200)
    options = {"optimizer": "adam", **TOP}
    monkeypatch.setattr("batchlr.measurement.adam_measurement.selection_bias", lambda *_: 1.0)
    plain = measure(model, batch, 25, **options).adam
    monkeypatch.setattr("batchlr.measurement.adam_measurement.selection_bias", judge)
    judged = measure(model, batch, 25, **options).adam
    count = len(judged.batch_sizes)
    places = [0, 2, 4, 6, 7]  # every other one and the last; straight lines between
    assert (len(asked), count) == (5, 8)
    numbers = np.interp(range(count), places, range(1, 6))
    factors = 1 + numbers / 100
    assert judged.optimism == pytest.approx(factors)
    assert plain.optimism == (1.0,) * count
    assert judged.metrics == pytest.approx(plain.metrics * factors[:, None, None], rel=1e-12)

    every, *halves = (
        batch_second_moment(model, batch, 25, numbers, 200)
        for numbers in (range(8), range(0, 8, 2), range(1, 8, 2))
    )
    scale = every(25).sqrt() + 1e-8
    dense = preconditioned_hessian(model, batch, scale)
    top = torch.linalg.eigh(dense).eigenvectors[:, -1]
    for place, (values, metrics) in zip(places, asked, strict=True):
        size = judged.batch_sizes[place]
        assert np.array_equal(values, judged.projected.values)
        assert len(metrics) == 2
        for at, metric in zip(halves, metrics, strict=True):
            want = float((top.square() * (at(size).sqrt() + 1e-8) / scale).sum())
            assert metric[0, 0] == pytest.approx(want, rel=1e-3)  # of the eigenvector


def test_adam_s_metric_is_measured_without_each_batch_in_turn(monkeypatch):
    """Its factor for having been chosen stays: it is the whole's."""
    monkeypatch.setattr("batchlr.measurement.adam_measurement.selection_bias", lambda *_: 1.25)
    model, batch = train(network(), 1), first_digits(200)
    options = {"optimizer": "adam", **TOP}
    adam = measure(model, batch, 25, **options).adam
    every = batch_second_moment(model, batch, 25, range(8), 200)
    scale = every(25).sqrt() + 1e-8
    dense = preconditioned_hessian(model, batch, scale)
    top = torch.linalg.eigh(dense).eigenvectors[:, -1]
    assert adam.metrics_without.shape == (8, 8, *adam.projected.matrices.shape[1:])
    for left_out in range(8):
        rest = [number for number in range(8) if number != left_out]
        at = batch_second_moment(model, batch, 25, rest, 200)
        for index in (0, 2, 4, 7):
            seen = at(adam.batch_sizes[index]).sqrt() + 1e-8
            want = 1.25 * float((top.square() * seen / scale).sum())
            got = adam.metrics_without[index, left_out, 0, 0]
            assert got == pytest.approx(want, rel=1e-3)  # of the eigenvector


@pytest.mark.parametrize("num_batches", [2, 3])
def test_few_batches_have_no_halves(num_batches):
    model, batch = train(network(), 1), first_digits(60)
    size = 60 // num_batches
    adam = measure(model, batch, size, optimizer="adam", **TOP).adam
    assert set(adam.optimism) == {1.0}
    assert adam.metrics_without is None
    here = adam.projected_at(size)
    assert float(here.values[0]) == pytest.approx(float(adam.projected.values[0]), rel=0.02)


def test_curvature_under_adam_at_another_batch_size_is_a_lower_bound():
    model, batch = train(network(), 1), first_digits(200)
    report = measure(model, batch, 25, optimizer="adam", **TOP)
    at = batch_second_moment(model, batch, 25, range(8), 200)
    for size in (4, 12, 50, 150):
        dense = preconditioned_hessian(model, batch, at(size).sqrt() + 1e-8)
        exact = float(torch.linalg.eigvalsh(dense)[-1])
        claimed = report.adam.largest / report.adam.stretch_at(size)
        assert claimed < exact * 1.01  # 1 %: the interpolation
        assert claimed > 0.5 * exact


def adam_after(steps, model, batch, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(batch[0]), generator=generator)[:25]
        optimizer.zero_grad()
        CROSS_ENTROPY(model, (batch[0][rows], batch[1][rows])).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("steps", [3, 200])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_s_own_second_moments_are_pooled_with_the_batches_by_age(steps, eps):
    model, batch = network(), first_digits(200)
    optimizer = adam_after(steps, model, batch, betas=(0.8, 0.99), eps=eps)
    report = measure(model, batch, 25, optimizer=optimizer, **TOP)
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
    moments = moments / (1 - 0.99**steps)
    here = batch_second_moment(model, batch, 25, range(8), 200)(25)
    metric = ((steps * moments + 8 * here) / (steps + 8)).sqrt() + eps
    assert report.adam.largest == pytest.approx(
        preconditioned_largest(model, batch, metric), rel=1e-8
    )
    assert (report.adam.source, report.adam.beta1) == ("state", 0.8)
    assert report.momentum == 0.0  # SGD's


def rmsprop_after(steps, model, batch, **options):
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(batch[0]), generator=generator)[:25]
        optimizer.zero_grad()
        CROSS_ENTROPY(model, (batch[0][rows], batch[1][rows])).backward()
        optimizer.step()
    return optimizer


def preconditioned_largest(model, batch, metric):
    return float(torch.linalg.eigvalsh(preconditioned_hessian(model, batch, metric))[-1])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("steps", [3, 200])
def test_rmsprop_s_root_is_of_its_own_average_without_correction(steps, centred):
    model, batch = network(), first_digits(200)
    options = {"alpha": 0.97, "momentum": 0.6, "eps": 1e-4, "centered": centred}
    optimizer = rmsprop_after(steps, model, batch, **options)
    report = measure(model, batch, 25, optimizer=optimizer, **TOP)

    def flat(key):
        return torch.cat([optimizer.state[p][key].reshape(-1) for p in model.parameters()])

    average = flat("square_avg")
    if centred:
        average = average - flat("grad_avg").square()
    at = batch_second_moment(model, batch, 25, range(8), 200)
    here = at(25)
    if centred:  # of batches out of 200: E g_B^2 less its value for the full batch
        here = batch_variance(model, batch, 25, 8) * (1 / 25 - 1 / 200)
    share = 1 - 0.97**steps  # what the average has of its steady size
    metric = ((steps * average + share * 8 * here) / (steps + 8)).sqrt() + 1e-4
    want = preconditioned_largest(model, batch, metric)
    assert report.adam.largest == pytest.approx(want, rel=1e-8)
    assert (report.adam.source, report.adam.optimizer, report.adam.beta1) == (
        "state",
        "rmsprop",
        0.6,
    )
    assert report.momentum == 0.0  # SGD's
    assert report.max_lr(25, optimizer="rmsprop").momentum == 0.6
    assert report.max_lr(25, optimizer="adam").momentum == 0.9


def batch_variance(model, batch, batch_size, num_batches):
    """Per-sample variance ``(P,)`` of the gradient, from batch gradients by plain autograd."""
    gradients = batch_gradients(model, batch, batch_size, range(num_batches))
    return batch_size * gradients.var(0, unbiased=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_diverges_just_above_its_rate_and_not_below(momentum):
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64).repeat(8, 1)
    batch = (x, torch.zeros(16, 1, dtype=torch.float64))  # batches of two are all alike
    eps = 1e9  # next to which the root of the second moment vanishes: D = eps throughout

    def run(factor, steps=400):
        model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1.0, eps=eps, momentum=momentum)
        report = measure_curvature(model, half_mse, [batch], batch_size=2, optimizer=optimizer)
        optimizer.param_groups[0]["lr"] = factor * report.max_lr(2, optimizer="rmsprop").value
        for _ in range(steps):
            optimizer.zero_grad()
            half_mse(model, batch).backward()
            optimizer.step()
        return float(model.weight.detach().abs().max())

    assert run(0.95) < 1.0 < 10.0 < run(1.05)


def test_rmsprop_by_name_takes_its_preconditioner_from_gradients():
    model, batch = train(network(), 1), first_digits(200)
    named = measure(model, batch, 25, optimizer="rmsprop", **TOP)
    fresh = measure(model, batch, 25, optimizer=torch.optim.RMSprop(model.parameters()), **TOP)
    want = preconditioned_largest(
        model, batch, batch_second_moment(model, batch, 25, range(8), 200)(25).sqrt() + 1e-8
    )
    for report in (named, fresh):
        assert report.adam.largest == pytest.approx(want, rel=1e-8)
        assert (report.adam.source, report.adam.optimizer) == ("gradients", "rmsprop")
        assert report.max_lr(25, optimizer="rmsprop").momentum == 0.0


@pytest.mark.parametrize(("size", "seed"), [(2, 2), (5, 1)])
def test_where_no_gradient_of_all_data_stands_out_adam_can_be_measured(size, seed):
    """In single precision ``D`` of all the data is ``eps`` there, and rounding around it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(size, 1, bias=False)
    inputs = torch.randn(64, size, generator=generator)
    targets = inputs @ torch.randn(size, 1, generator=generator) * 0.3
    targets += torch.randn(64, 1, generator=generator)
    loss_fn = supervised(nn.MSELoss())
    report = measure_curvature(model, loss_fn, [(inputs, targets)], dataset_size=100_000)
    for batch_size in (8, 100_000):
        limit = report.max_lr(batch_size, optimizer="adam")
        assert 0 < limit.low <= limit.value <= limit.high < math.inf


def test_adam_with_a_large_eps_sees_the_hessian_over_it():
    model, batch = network(), first_digits(200)
    optimizer = adam_after(5, model, batch, eps=1e6)
    report = measure(model, batch, 25, optimizer=optimizer, tol=1e-5)
    assert report.adam.largest == pytest.approx(report.largest / 1e6, rel=1e-5)
    count, size = len(report.adam.batch_sizes), len(report.adam.projected.values)
    assert report.adam.metrics == pytest.approx(np.tile(np.eye(size), (count, 1, 1)), abs=1e-5)


def test_adam_with_unequal_groups_measures_both_metrics_at_once():
    model, batch = train(network(), 1), first_digits(200)
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.1)
    report = measure(model, batch, 25, optimizer=optimizer, **TOP)
    ratio = torch.cat([torch.ones(64 * 4 + 4), torch.full((50,), 0.5)]).double()
    metric = batch_second_moment(model, batch, 25, range(8), 200)(25).sqrt() + 1e-8
    want = preconditioned_largest(model, batch, metric / ratio)
    assert report.adam.largest == pytest.approx(want, rel=1e-8)
    assert report.adam.source == "gradients"  # before its first step there is no state
    assert report.weight_decay == 0.0  # decoupled


def test_the_gradient_norm_is_the_mean_over_batches_and_decides_whether_clipping_is_active():
    model, batch = train(network(), 1), first_digits(100)
    norms = []
    for k in range(4):
        part = [t[25 * k : 25 * (k + 1)] for t in batch]
        pieces = torch.autograd.grad(CROSS_ENTROPY(model, part), list(model.parameters()))
        norms.append(torch.stack([piece.norm() for piece in pieces]).norm())
    mean = float(torch.stack(norms).mean())
    plain = measure(model, batch, 25)
    assert plain.gradient_norm == pytest.approx(mean, rel=1e-12)
    assert plain.clip_norm is None
    for clip_norm, active in ((0.99 * mean, True), (1.01 * mean, False)):
        clipped = measure(model, batch, 25, clip_norm=clip_norm)
        limit = clipped.max_lr(25)
        assert limit.value == plain.max_lr(25).value  # clipping changes no number
        assert any(f"gradient clipping at {clip_norm}" in r for r in limit.reasons) == active


def test_a_piecewise_linear_criterion_is_a_reason_for_distrust():
    model, x, y = least_squares(40, [2.0, 1.0, 0.5])
    kinked = supervised(nn.L1Loss())
    for loss_fn, words in ((half_mse, ""), (supervised(nn.MSELoss()), ""), (kinked, "L1Loss is")):
        report = measure_curvature(model, loss_fn, [(x, y - 1)], optimizer="sgd")
        assert report.kinked == (words.split(" ")[0] or None)
    # Without weights in it the second derivative of the absolute error is zero almost everywhere.
    assert report.largest == 0.0
    deeper = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    report = measure_curvature(deeper, kinked, [(x, y - 1)], optimizer="sgd")
    assert any(reason.startswith("L1Loss is piecew") for reason in report.max_lr(10).reasons)


def test_by_default_both_kinds_of_optimizer_are_measured():
    report = measure_curvature(network(), CROSS_ENTROPY, [first_digits(60)], num_small_batches=0)
    assert report.adam is not None
    assert report.max_lr(10).value > 0
    assert report.max_lr(10, optimizer="adam").value > 0


# --- followed along training ---------------------------------------------------------------------


def tracker(tol=1e-2):
    return CurvatureTracker(tol=tol, explore_every=1, with_noise=True)


def track(tracker, model, batch, **options):
    return track_curvature(tracker, model, CROSS_ENTROPY, [batch], batch_size=50, **options)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_following_takes_fewer_products_than_finding(kind):
    model, batch = train(network(), 2), first_digits(200)
    known = tracker()
    first = track(known, model, batch, optimizer=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    cold = track(tracker(), model, batch, optimizer=kind)
    warm = track(known, model, batch, optimizer=kind)
    assert warm.num_products < cold.num_products
    assert warm.num_products <= (3 if kind == "sgd" else 4) < first.num_products
    limits = [report.max_lr(50, optimizer=kind).value for report in (warm, cold)]
    # What the choice of Adam's metric adds is judged on the axes found, which are not the same.
    assert limits[0] == pytest.approx(limits[1], rel=1e-2 if kind == "sgd" else 3e-2)


class Bowl(nn.Module):
    """A quadratic without noise: ``sum_i curvature_i w_i^2 / 2``."""

    def __init__(self, weights, curvature):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        self.curvature = torch.tensor(curvature, dtype=torch.float64)

    def batches(self):
        return [torch.ones(2, 3, dtype=torch.float64) for _ in range(4)]

    def measure(self, **options):
        return measure_curvature(self, bowl_loss, self.batches(), **options)

    def follow(self, known, **options):
        return track_curvature(known, self, bowl_loss, self.batches(), **options)


def bowl_loss(model, batch):
    return 0.5 * (model.curvature * (model.w * batch).square()).sum(1).mean()


def test_an_overtaken_eigenvector_is_left():
    known = tracker(tol=0.1)
    Bowl([1.0, 0.5, 0.3], [4.0, 1.0, 0.1]).follow(known)
    assert abs(known.vectors[0][0]) > 0.99
    again = Bowl([1.0, 0.5, 0.3], [1.0, 4.0, 0.1]).follow(known)
    assert again.largest == pytest.approx(4.0, rel=0.02)


def test_an_overtaken_eigenvector_of_adam_s_matrix_is_left():
    # Without noise D is |curvature w|, and the preconditioned curvature 1/w.
    known = tracker(tol=0.1)
    Bowl([0.2, 0.5, 1.0], [1.0, 1.0, 1.0]).follow(known, optimizer="adam")
    assert abs(known.vectors[0][0]) > 0.99
    again = Bowl([1.0, 0.2, 0.5], [1.0, 1.0, 1.0]).follow(known, optimizer="adam")
    assert again.adam.largest == pytest.approx(5.0, rel=0.02)


def test_the_largest_is_found_beside_far_stronger_negative_curvature():
    # Relative to the strongest curvature any value would do.
    known = tracker(tol=0.1)
    report = Bowl([0.1, 0.2, 1.0], [1.0, 0.5, -100.0]).follow(known)
    assert report.converged
    assert report.largest == pytest.approx(1.0, rel=0.1)
    assert report.max_lr(1).value == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
def test_a_gradient_along_one_eigenvector_is_not_the_whole_spectrum(weights):
    # Of a curvature of 1, or of none: its Krylov space is closed after one product.
    report = Bowl(weights, [100.0, 1.0, 0.0]).follow(tracker(tol=0.1))
    assert report.largest == pytest.approx(100.0, rel=1e-2)


def test_following_needs_an_optimizer():
    with pytest.raises(ValueError, match="follows one optimizer's limit: pass it"):
        track(tracker(), network(), first_digits(40), optimizer=None)


def test_with_adam_the_plain_matrix_is_seen_along_adam_s_direction_by_one_product():
    model, batch = train(network(), 1), first_digits(200)
    adam = track(tracker(1e-3), model, batch, optimizer="adam")
    plain = track(tracker(1e-3), model, batch, optimizer="sgd")
    assert len(adam.ritz_values) == 1
    assert 0 < adam.largest < plain.largest  # a Rayleigh quotient, from below
    assert adam.adam.converged
    # An unhurried measurement of the same: the rate is that of Adam's own matrix alone.
    full = measure(model, batch, optimizer="adam", num_eigenpairs=1, tol=1e-3)
    assert adam.adam.largest == pytest.approx(full.adam.largest, rel=1e-3)
    assert adam.num_products < full.num_products


def test_following_leaves_out_what_only_other_batch_sizes_need():
    model, batch = train(network(), 1), first_digits(200)
    full = measure(model, batch, num_small_batches=4)
    followed = track(tracker(1e-3), model, batch)
    assert followed.num_products < full.num_products
    assert followed.small_batch is None
    assert followed.adam is None
    for value in (followed.kappa_smallest, followed.smallest, followed.noise.random_direction):
        assert math.isnan(value)
    limits = [report.max_lr(32, rule="top-direction").value for report in (followed, full)]
    assert limits[0] == pytest.approx(limits[1], rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"with_noise": True, "ends": "both"}])
def test_a_tracker_that_does_not_fit_is_refused(options):
    with pytest.raises(ValueError, match="with_noise=True\\), got ends="):
        track(CurvatureTracker(**options), network(), first_digits(40))


def test_the_cost_is_counted():
    report = measure(network(), first_digits(60), batch_size=20)
    assert 3 <= report.num_products <= 101
    assert report.seconds > 0


# --- refusals ------------------------------------------------------------------------------------


def test_one_bare_batch_is_refused():
    with pytest.raises(TypeError, match=r"got one tuple of tensors; pass \[\(x, y\)\]"):
        measure_curvature(network(), CROSS_ENTROPY, first_digits(40))


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        measure_curvature(network(), CROSS_ENTROPY, [])


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="needs at least two samples, got 1"):
        measure_curvature(network(), CROSS_ENTROPY, [first_digits(1)])


@pytest.mark.parametrize("batch_size", [0, -1, 41])
def test_a_batch_size_outside_the_samples_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must lie in \[1, 40\].*got {batch_size}"):
        measure(network(), first_digits(40), batch_size=batch_size)


def test_a_negative_number_of_small_batches_is_refused():
    with pytest.raises(ValueError, match="num_small_batches must be finite and at least 0, got -1"):
        measure_curvature(network(), CROSS_ENTROPY, [first_digits(8)], num_small_batches=-1)


def test_a_data_set_smaller_than_its_samples_is_refused():
    with pytest.raises(ValueError, match="dataset_size must be at least the 40 samples given, got"):
        measure(network(), first_digits(40), batch_size=10, dataset_size=39)


@pytest.mark.parametrize(
    ("where", "way_out"),
    [
        ("weights", "some weights are not finite, either: go back"),
        ("data", "the weights are finite: look at inputs and targets"),
    ],
)
def test_a_loss_that_is_not_finite_is_an_arithmetic_error(where, way_out):
    model, (x, y) = network(), first_digits(40)
    x = x.clone()
    target = model[0].weight.data if where == "weights" else x
    target[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match=f"the loss is nan on the batches given.*{way_out}"):
        measure(model, (x, y), batch_size=10)


def test_a_finite_loss_with_infinite_curvature_is_an_arithmetic_error():
    weight = nn.Module()
    weight.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ArithmeticError, match="products are not finite"):
        measure_curvature(
            weight, lambda m, b: (m.w * b).abs().pow(1.5).mean(), list(torch.ones(4, 2, 3).double())
        )


def test_an_unknown_optimizer_is_refused_before_anything_is_measured():
    def untouched(model, batch):
        raise AssertionError

    model, batches = network(), [first_digits(40)]
    with pytest.raises(ValueError, match="'rmsprop' or a torch optimizer, got 'lion'"):
        measure_curvature(model, untouched, batches, optimizer="lion")
    optimizer = torch.optim.Adagrad(model.parameters())
    with pytest.raises(ValueError, match="for SGD, Adam, AdamW and RMSprop, got Adagrad; pass opt"):
        measure_curvature(model, untouched, batches, optimizer=optimizer)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan])
def test_clipping_at_no_positive_number_is_refused(clip_norm):
    with pytest.raises(
        ValueError, match=f"clip_norm must be positive and finite, got {clip_norm}; None is no cl"
    ):
        measure(network(), first_digits(40), batch_size=10, clip_norm=clip_norm)


def test_other_matrices_and_norm_modes_are_refused():
    with pytest.raises(ValueError, match="matrix must be 'hessian' or 'ggn', got 'fisher'"):
        measure(network(), first_digits(40), batch_size=10, matrix="fisher")
    with pytest.raises(ValueError, match="norm_mode must be 'train' or 'eval', got 'batch'"):
        measure(network(), first_digits(40), batch_size=10, norm_mode="batch")
    with pytest.raises(TypeError, match="needs the loss in two halves"):
        measure_curvature(network(), lambda m, b: m(b[0]).sum(), [first_digits(40)], matrix="ggn")
    with pytest.raises(ValueError, match="norm in train mode needs more than one value per ch"):
        measure_curvature(
            nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10)).double(),
            CROSS_ENTROPY,
            [first_digits(4)],
        )


def test_autocast_around_a_measurement_changes_nothing():
    with seeded():
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(4)]
    loss_fn = supervised(nn.CrossEntropyLoss())
    plain = measure_curvature(model, loss_fn, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure_curvature(model, loss_fn, batches)
        assert torch.is_autocast_enabled("cpu")
    assert inside.ritz_values == plain.ritz_values


def test_batches_whose_samples_cannot_be_told_are_pointed_out():
    """Time comes first: seven steps, not four samples."""
    with seeded():
        model = nn.Linear(3, 2)
        batches = [(torch.randn(7, 4, 3), torch.randn(4, 2)) for _ in range(4)]

    def loss_fn(m, batch):
        return (m(batch[0]).tanh().mean(0) - batch[1]).square().mean()

    with pytest.warns(UserWarning, match=r"counted as 7 samples, but its tensors have.*\(4,\)"):
        report = measure_curvature(model, loss_fn, batches)
    assert report.num_samples == 28
    assert report.small_batch is None
