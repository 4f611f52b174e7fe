"""One point of training, against dense matrices and gradients by plain autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchlr import GGNOperator, supervised
from batchlr.measurement.curvature_point import CurvaturePoint, disjoint, make_operator
from cases import CASES, RAGGED, seeded
from reference import dense, gradients, hessian_of

LOSS = supervised(nn.MSELoss())


def tiny():
    """Linear, 3 to 2: six weights, two biases, and ten samples in three ragged batches."""
    with seeded():
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
        pairs = [torch.randn(n, 5, dtype=torch.float64).split([3, 2], 1) for n in RAGGED]
    return model, [(x, y) for x, y in pairs]


def with_rates(model, weight=0.4, bias=0.1):
    """An optimizer whose parameter groups have these rates, and their ratios ``(P,)``."""
    linear = model[0]
    groups = [{"params": [linear.weight], "lr": weight}, {"params": [linear.bias], "lr": bias}]
    ratios = torch.tensor([weight] * 6 + [bias] * 2, dtype=torch.float64)
    return torch.optim.SGD(groups), ratios / max(weight, bias)


def matrix(operator):
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


def mean(parts):
    return sum(n * part for n, part in zip(RAGGED, parts, strict=True)) / sum(RAGGED)


def slopes(model, batches):
    found = [torch.autograd.grad(LOSS(model, b), list(model.parameters())) for b in batches]
    return [torch.cat([g.flatten() for g in slope]) for slope in found]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# What is there ---------------------------------------------------------------------------------


def test_loss_gradient_and_matrix_are_those_of_all_samples():
    model, batches = tiny()
    point = CurvaturePoint.at(model, LOSS, batches)
    same(matrix(point.matrix), mean([hessian_of(model, LOSS, b) for b in batches]))
    same(point.gradient, mean(slopes(model, batches)))
    losses = [LOSS(model, b).item() for b in batches]
    assert point.loss == pytest.approx(mean(losses), rel=1e-12)
    assert point.matrix is point.operator
    assert point.ratios is None
    for actual, expected in zip(point.batch_gradients(), slopes(model, batches), strict=True):
        same(actual, expected)


def test_unequal_rates_are_equal_in_its_coordinates():
    """Where ``w = R^1/2 u``, plain descent in ``u`` makes the optimizer's steps in ``w``."""
    model, batches = tiny()
    optimizer, ratios = with_rates(model)
    point = CurvaturePoint.at(model, LOSS, batches, optimizer=optimizer)
    root = ratios.sqrt()
    hessian = mean([hessian_of(model, LOSS, b) for b in batches])
    same(point.ratios, ratios)
    same(matrix(point.operator), hessian)
    same(matrix(point.matrix), root[:, None] * hessian * root)
    same(point.gradient, root * mean(slopes(model, batches)))
    for actual, expected in zip(point.batch_gradients(), slopes(model, batches), strict=True):
        same(actual, root * expected)


@pytest.mark.parametrize("case", ["norms-train", "norms-eval", "softmax"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_the_matrix_is_the_one_asked_for_in_the_mode_asked_for(case, kind):
    problem = CASES[case]()
    loss_fn = supervised(problem.criterion)
    mode = problem.norm_mode or "train"
    point = CurvaturePoint.at(problem.model, loss_fn, problem.batches, norm_mode=mode, matrix=kind)
    same(matrix(point.matrix), dense(case, kind))
    same(point.gradient, mean(gradients(problem)))
    assert (point.kind, point.norm_mode) == (kind, mode)


def test_the_sampling_is_what_a_sample_lacks_of_the_data_set():
    model, batches = tiny()
    alone = CurvaturePoint.at(model, LOSS, batches)
    assert (alone.num_samples, alone.dataset_size, alone.sampling) == (10, 10, 0.0)
    assert alone.batch_size == pytest.approx(10 / 3, rel=1e-15)
    of_many = CurvaturePoint.at(model, LOSS, batches, dataset_size=40)
    assert of_many.sampling == pytest.approx(1 / 10 - 1 / 40, rel=1e-15)
    cut = CurvaturePoint.at(model, LOSS, batches, batch_size=2)
    assert (cut.batch_size, len(cut.batches), cut.num_samples) == (2.0, 5, 10)
    same(matrix(cut.matrix), matrix(alone.matrix))


# The same elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.4, 0.1)])
def test_the_same_matrix_of_other_batches_and_of_another_kind(rates):
    model, batches = tiny()
    optimizer, ratios = with_rates(model, *rates)
    root = ratios.sqrt()
    point = CurvaturePoint.at(model, LOSS, batches, optimizer=optimizer)
    other = point.matrix_of(batches[1:2])
    same(matrix(other), root[:, None] * hessian_of(model, LOSS, batches[1]) * root)
    ggn = point.matrix_of(batches[1:2], "ggn")
    same(matrix(ggn), root[:, None] * matrix(GGNOperator(model, LOSS, batches[1:2])) * root)
    assert float((matrix(ggn) - matrix(other)).abs().max()) > 1e-3
    of_ggn = CurvaturePoint.at(model, LOSS, batches, optimizer=optimizer, matrix="ggn")
    same(matrix(of_ggn.matrix_of(batches[1:2])), matrix(ggn))


def test_norms_stay_in_their_mode():
    problem = CASES["norms-eval"]()
    point = CurvaturePoint.at(
        problem.model, supervised(problem.criterion), problem.batches, norm_mode="eval"
    )
    same(matrix(point.matrix_of(problem.batches)), dense("norms-eval", "hessian"))


def test_options_are_those_of_every_operator_made():
    model, batches = tiny()
    sizes = []

    def watched(model, batch):
        sizes.append(len(batch[0]))
        return LOSS(model, batch)

    asked = {"micro_batch": 2}
    point = CurvaturePoint.at(model, watched, batches, options=asked)
    assert max(sizes) == 2
    sizes.clear()
    matrix(point.matrix_of(batches[:1], expected_products=1))
    assert max(sizes) == 2
    with pytest.raises(ValueError, match="expected_products must be at least 1, got 0"):
        point.matrix_of(batches, expected_products=0)
    assert asked == {"micro_batch": 2}  # what the caller gave is the caller's


# The batches -----------------------------------------------------------------------------------


def numbered(sizes):
    """Batches whose samples are the numbers from 0 on."""
    return list(torch.arange(sum(sizes)).split(sizes))


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, batch_size=st.none() | st.integers(1, 60))
def test_batches_are_disjoint_complete_and_at_least_two(sizes, batch_size):
    total = sum(sizes)
    if total < 2:
        with pytest.raises(ValueError, match="noise needs at least two samples, got 1"):
            disjoint(numbered(sizes), batch_size)
        return
    if batch_size is not None and batch_size > total:
        words = rf"batch_size must lie in \[1, {total}\], the number of samples given, got"
        with pytest.raises(ValueError, match=words):
            disjoint(numbered(sizes), batch_size)
        return
    found = disjoint(numbered(sizes), batch_size)
    assert torch.cat(found).tolist() == list(range(total))
    lengths = [len(batch) for batch in found]
    assert len(lengths) >= 2
    if batch_size is None and len(sizes) > 1:
        assert lengths == sizes  # as they came
        return
    wanted = max(1, total // 4) if batch_size is None else min(batch_size, total // 2)
    assert set(lengths[:-1]) == {wanted}
    assert wanted <= lengths[-1] < 2 * wanted  # a rest joins the last


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_no_samples_are_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must lie in \[1, 5\], .* got {batch_size}"):
        disjoint(numbered([2, 3]), batch_size)


def test_a_batch_that_may_be_counted_wrongly_is_told_of():
    """Ten words of three sequences, and a label for each sequence."""
    batches = [(torch.zeros(10), torch.zeros(3)) for _ in range(2)]
    words = r"counted as 10 samples, but its tensors have \[\(10,\), \(3,\)\] rows: if .* __len__"
    with pytest.warns(UserWarning, match=words) as caught:
        assert len(disjoint(batches, None)) == 2
    assert len(caught) == 1
    with (
        pytest.warns(UserWarning, match=words),
        pytest.raises(TypeError, match="cannot cut a batch"),
    ):
        disjoint(batches[:1], None)


# Refusals --------------------------------------------------------------------------------------


def test_a_data_set_smaller_than_the_samples_given_is_refused():
    model, batches = tiny()
    for size in (9, math.inf, math.nan):
        with pytest.raises(ValueError, match="dataset_size must be at least the 10 samples given"):
            CurvaturePoint.at(model, LOSS, batches, dataset_size=size)
    assert CurvaturePoint.at(model, LOSS, batches, dataset_size=10).sampling == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_says_whether_the_weights_are_to_blame(value):
    model, batches = tiny()
    batches[1][1][0, 0] = value
    words = f"the loss is {value} on the batches given: .*; the weights are finite: look at inputs"
    with pytest.raises(ArithmeticError, match=words):
        CurvaturePoint.at(model, LOSS, batches)
    batches[1][1][0, 0] = 0.0
    with torch.no_grad():
        model[0].bias[1] = math.nan
    with pytest.raises(
        ArithmeticError, match=r"loss is nan .* some weights are not finite, either"
    ):
        CurvaturePoint.at(model, LOSS, batches)


def test_other_matrices_are_refused():
    model, batches = tiny()
    with pytest.raises(ValueError, match="matrix must be 'hessian' or 'ggn', got 'fisher'"):
        make_operator("fisher", model, LOSS, batches, "train", {})
