"""Where the search under Adam's preconditioner starts, against the dense matrix."""

import numpy as np
import pytest
import torch
from torch import nn

from batchlr.measurement.adam_measurement import AdamMeasurement
from batchlr.measurement.curvature_point import CurvaturePoint
from batchlr.measurement.spectral_edges import EdgeSearch
from batchlr.operators.supervised import supervised


def point_and_edges(loss_fn, **options):
    """A point in 18 dimensions, and its whole spectrum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    batches = [(part, part[:, 0].gt(0).long()) for part in x.split(10)]
    point = CurvaturePoint.at(model, loss_fn, batches, **options)
    size = point.matrix.shape[0]
    search = EdgeSearch(size // 2, 1e-12, size, torch.Generator().manual_seed(0))
    return point, search.run(point.matrix, 0.0, gradients=None, largest_only=False)


def test_the_start_is_the_sum_of_the_leading_eigenvectors():
    point, edges = point_and_edges(supervised(nn.CrossEntropyLoss()))
    measured = AdamMeasurement(point)
    values, vectors = np.linalg.eigh((point.matrix @ torch.eye(18).double()).numpy())
    upwards = (vectors * values.clip(0)) @ vectors.T
    scale = measured.matrix.scale.numpy()
    _, expected = np.linalg.eigh(scale[:, None] * upwards * scale)
    start = measured.start(edges).numpy()
    assert np.abs(expected[:, -3:].T @ start) == pytest.approx(1.0, abs=1e-6)
    assert np.linalg.norm(start) == pytest.approx(3**0.5, abs=1e-6)


def test_where_nothing_curves_upwards_there_is_no_start():
    point, edges = point_and_edges(lambda model, batch: -(model[2].weight ** 2).sum())
    assert edges.largest < 1e-9
    assert AdamMeasurement(point).start(edges) is None


def test_a_single_direction_that_curves_upwards_is_the_start():
    def loss_fn(model, batch):
        return model[2].weight[0, 0] ** 2 * batch[0].square().mean() - model[0].bias.square().sum()

    point, edges = point_and_edges(loss_fn)
    start = AdamMeasurement(point).start(edges)
    assert start.norm() == pytest.approx(1.0)
    assert start[-6].abs() == pytest.approx(1.0, abs=1e-6)


def behind_zeros():
    """A network whose head begins at zero, in 20 dimensions, and four batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    nn.init.zeros_(model[2].weight)
    x = torch.randn(40, 3, dtype=torch.float64)
    batches = [(part, part[:, 0].gt(0).long()) for part in x.split(10)]
    return model, batches


def test_parameters_that_never_had_a_gradient_are_left_out():
    """A head of zeros lets no gradient through: the layers before it do not move yet."""
    model, batches = behind_zeros()
    point = CurvaturePoint.at(model, supervised(nn.CrossEntropyLoss()), batches)
    measured = AdamMeasurement(point)
    assert measured.matrix.scale[:12].eq(0).all()  # weights and biases before the head
    assert measured.matrix.scale[12:].gt(0).all()
    # Beside the head's own block the Hessian has blocks that couple it to what does not move.
    hessian = point.matrix @ torch.eye(20).double()
    assert hessian[:12, 12:].abs().max() > 1e-3
    scale = measured.matrix.scale[12:]
    head = scale.unsqueeze(1) * hessian[12:, 12:] * scale
    whole = measured.matrix @ torch.eye(20).double()
    assert torch.linalg.eigvalsh(whole)[-1].item() == pytest.approx(
        torch.linalg.eigvalsh(head)[-1].item(), rel=1e-12
    )


def test_parameters_that_few_samples_move_are_left_out():
    """As if the feature that one sample of 64 has were not there."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, dtype=torch.float64)
    x[:, 2] = 0.0
    x[5, 2] = 1.0
    y = torch.randint(2, (64,))

    def measured(columns):
        torch.manual_seed(1)
        model = nn.Linear(3, 2).double()
        weight = model.weight.detach().clone()
        weight[:, 2] = 0.0  # the feature is not used yet
        model.weight = nn.Parameter(weight[:, :columns])
        batches = list(zip(x[:, :columns].split(16), y.split(16), strict=True))
        point = CurvaturePoint.at(model, supervised(nn.CrossEntropyLoss()), batches)
        matrix = AdamMeasurement(point).matrix
        return matrix.scale, torch.linalg.eigvalsh(matrix @ torch.eye(2 * columns + 2).double())

    scale, values = measured(3)
    assert scale.eq(0).tolist() == [False, False, True, False, False, True, False, False]
    scale, expected = measured(2)
    assert scale.gt(0).all()
    torch.testing.assert_close(values[-3:], expected[-3:])


@pytest.mark.parametrize("bias", [False, True])
def test_where_nearly_every_parameter_is_moved_by_few_all_count(bias):
    x, y = torch.eye(40, dtype=torch.float64), torch.arange(40) % 2
    model = nn.Linear(40, 2, bias=bias).double()
    batches = list(zip(x.split(4), y.split(4), strict=True))
    point = CurvaturePoint.at(model, supervised(nn.CrossEntropyLoss()), batches)
    assert AdamMeasurement(point).matrix.scale.gt(0).all()


def test_without_eps_nothing_may_be_divided_by_zero():
    model, batches = behind_zeros()
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)
    loss_fn = supervised(nn.CrossEntropyLoss())
    point = CurvaturePoint.at(model, loss_fn, batches, optimizer=optimizer)
    with pytest.raises(ValueError, match="eps must be positive where parameters had no gradient"):
        AdamMeasurement(point)
