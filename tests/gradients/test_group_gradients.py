"""What accumulation shows of the gradients' noise, against the gradients themselves."""

import pytest
import torch
from torch import nn

from batchlr import GroupGradients, scatter_of_gradients, supervised

LOSS = supervised(nn.CrossEntropyLoss())


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    return model, torch.randn(12, 5, dtype=dtype), torch.randint(3, (12,))


def gradients_of(model, parts):
    rows = [torch.autograd.grad(LOSS(model, part), list(model.parameters())) for part in parts]
    return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]


def accumulated(model, parts, divisor):
    model.zero_grad()
    groups = GroupGradients(model.parameters())
    for part in parts:
        (LOSS(model, part) / divisor).backward()
        groups.add()
    return groups.scatter(12, dataset_size=100)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_accumulated_gradients_show_what_the_groups_do(size):
    model, x, y = problem()
    parts = list(zip(x.split(size), y.split(size), strict=True))
    expected = scatter_of_gradients(gradients_of(model, parts), group_size=size, dataset_size=100)
    found = accumulated(model, parts, len(parts))
    assert found.square_norm == pytest.approx(expected.square_norm, rel=1e-11)
    assert found.trace == pytest.approx(expected.trace, rel=1e-9)
    assert (found.batch_size, found.dataset_size) == (12, 100)
    assert found.along is None


def test_losses_not_divided_leave_every_ratio():
    model, x, y = problem()
    parts = list(zip(x.split(4), y.split(4), strict=True))
    mean, total = accumulated(model, parts, 3), accumulated(model, parts, 1)
    assert total.square_norm == pytest.approx(9 * mean.square_norm)
    assert total.noise_scale == pytest.approx(mean.noise_scale)


def test_training_is_left_as_it_is():
    model, x, y = problem()
    parts = list(zip(x.split(4), y.split(4), strict=True))
    accumulated(model, parts, 3)
    seen = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in parts:
        (LOSS(model, part) / 3).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), seen, strict=True))


def test_the_next_step_starts_anew():
    model, x, y = problem()
    parts = list(zip(x.split(4), y.split(4), strict=True))
    groups = GroupGradients(model.parameters())
    found = []
    for _ in range(2):
        model.zero_grad()
        for part in parts:
            LOSS(model, part).backward()
            groups.add()
        found.append(groups.scatter(12))
    assert found[0] == found[1]


def test_a_step_that_is_not_read_is_forgotten():
    model, x, y = problem()
    parts = list(zip(x.split(4), y.split(4), strict=True))
    expected = scatter_of_gradients(gradients_of(model, parts), group_size=4)
    groups = GroupGradients(model.parameters())
    for finish in (groups.forget, lambda: groups.scatter(12)):
        model.zero_grad()
        for part in parts:
            LOSS(model, part).backward()
            groups.add()
        found = finish()
    assert found.noise_scale == pytest.approx(expected.noise_scale, rel=1e-9)


def test_parameters_without_a_gradient_count_for_nothing():
    model, x, y = problem()
    parts = list(zip(x.split(4), y.split(4), strict=True))
    model[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    trained = list(model[2].parameters())
    rows = [torch.autograd.grad(LOSS(model, part), trained) for part in parts]
    expected = scatter_of_gradients(
        [torch.stack(tensors) for tensors in zip(*rows, strict=True)], group_size=4
    )
    assert accumulated(model, parts, 3).trace == pytest.approx(expected.trace, rel=1e-9)


def test_half_precision_is_summed_in_more():
    model, x, y = problem(torch.bfloat16)
    parts = list(zip(x.split(4), y.split(4), strict=True))
    model.zero_grad()
    groups = GroupGradients(model.parameters())
    for part in parts:
        (LOSS(model, part) / 3).backward()
        groups.add()
    exact = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    assert groups.scatter(12).square_norm == pytest.approx(exact, rel=1e-6)


def test_sparse_gradients_are_seen_whole():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=sparse)
        groups = GroupGradients(table.parameters())
        for tokens in ([0, 1, 1], [2, 1, 0]):
            table(torch.tensor(tokens)).square().sum().backward()
            groups.add()
        found.append(groups.scatter(6))
    assert found[1].trace == pytest.approx(found[0].trace, rel=1e-6)
    assert found[1].square_norm == pytest.approx(found[0].square_norm, rel=1e-6)


def test_processes_add_their_groups():
    """Two processes of three groups each, whose averages ``.grad`` holds in the end."""
    model, x, y = problem()
    parts = list(zip(x.split(2), y.split(2), strict=True))
    expected = scatter_of_gradients(gradients_of(model, parts), group_size=2)
    meters, averages, sums = [], [], []
    for own in (parts[:3], parts[3:]):
        model.zero_grad()
        meters.append(GroupGradients(model.parameters()))
        for part in own:
            (LOSS(model, part) / 3).backward()
            meters[-1].add()
        averages.append([p.grad.clone() for p in model.parameters()])

    for p, one, other in zip(model.parameters(), *averages, strict=True):
        p.grad = (one + other) / 2
    meters[0].scatter(12, total=lambda own: sums.append(own.clone()) or own)
    found = meters[1].scatter(12, total=lambda own: own + sums[0])
    assert found.trace == pytest.approx(expected.trace, rel=1e-9)
    assert found.square_norm == pytest.approx(expected.square_norm, rel=1e-11)


def test_a_batch_in_one_piece_is_refused():
    model, x, y = problem()
    with pytest.raises(ValueError, match="at least two groups of samples, got 1: split"):
        accumulated(model, [(x, y)], 1)


def test_no_gradient_is_refused():
    model, _, _ = problem()
    with pytest.raises(ValueError, match=r"there are no gradients: call add\(\) after"):
        GroupGradients(model.parameters()).scatter(12)
