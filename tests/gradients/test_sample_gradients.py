"""Per-sample gradients against one backward pass a sample."""

import pytest
import torch
from torch import nn

from batchlr import sample_gradients, supervised

LOSS = supervised(nn.CrossEntropyLoss())


def problem(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), *layers, nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))


def one_by_one(model, x, y):
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(LOSS(model, (x[k : k + 1], y[k : k + 1])), parameters)
        for k in range(len(x))
    ]
    return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("as_dict", [False, True])
def test_they_are_those_of_the_samples(chunk_size, as_dict):
    model, x, y = problem(nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    batch = {"x": x, "y": y} if as_dict else (x, y)
    found = sample_gradients(model, LOSS, batch, chunk_size=chunk_size)
    torch.testing.assert_close(found, one_by_one(model, x, y))
    assert all(p.grad is None for p in model.parameters())


def test_batch_norm_in_eval_mode_is_a_function_of_the_sample():
    model, x, y = problem(nn.BatchNorm1d(4))
    model(x)
    model.eval()
    before = [buffer.clone() for buffer in model.buffers()]
    torch.testing.assert_close(sample_gradients(model, LOSS, (x, y)), one_by_one(model, x, y))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("tracks", [True, False])
def test_batch_statistics_are_refused(tracks):
    """The published code differentiates another function there: each sample normalised alone."""
    model, x, y = problem(nn.BatchNorm1d(4, track_running_stats=tracks))
    if not tracks:
        model.eval()  # which keeps to the batch's statistics all the same
    with pytest.raises(ValueError, match=r"no gradient of its own .*1 layers, first '1'.*GroupG"):
        sample_gradients(model, LOSS, (x, y))


def test_dropout_draws_anew_for_each_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64, bias=False), nn.Dropout(0.5), nn.Linear(64, 2))
    x, y = torch.ones(2, 1), torch.zeros(2, dtype=torch.long)
    first, second = sample_gradients(model, LOSS, (x, y))[0]
    assert not torch.equal(first, second)


def test_a_criterion_in_place_of_a_loss_is_refused():
    model, x, y = problem()
    with pytest.raises(TypeError, match=r"CrossEntropyLoss, .* batchlr\.supervised\(criterion\)"):
        sample_gradients(model, nn.CrossEntropyLoss(), (x, y))
