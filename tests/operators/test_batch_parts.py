"""Parts of batches: what they hold, and what they weigh in the mean."""

import pytest
import torch
from torch import nn

from batchlr.operators import supervised
from batchlr.operators.batch_parts import BatchParts

MSE = supervised(nn.MSELoss())
TOKENS = supervised(nn.CrossEntropyLoss(ignore_index=-1))


def regression(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, generator=generator).double(), torch.randn(n, 1).double()) for n in sizes
    ]


def labelled(*targets):
    """Batches of one number and one label a sample; label -1 is ignored."""
    return [(torch.arange(len(t)).float()[:, None], torch.tensor(t)) for t in targets]


@pytest.mark.parametrize("most", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("sizes", [(4,), (5, 3), (1, 7, 2, 6)])
def test_parts_hold_every_sample_once_and_no_more_than_allowed(most, sizes):
    batches = regression(*sizes)
    parts = BatchParts(batches, MSE, most=most)
    assert parts.samples == parts.weights == sizes
    joined = []
    for owner, (x, y) in enumerate(batches):
        own = [parts.batch(number) for number, _ in parts.shares(owner)]
        assert torch.equal(torch.cat([part[0] for part in own]), x)
        assert torch.equal(torch.cat([part[1] for part in own]), y)
        counts = [len(part[0]) for part in own]
        if most is None:
            assert len(own) == 1
        else:
            assert max(counts) <= most
            assert len(own) == -(-len(x) // most)  # as few as will do
            assert max(counts) - min(counts) <= 1
        joined += [number for number, _ in parts.shares(owner)]
    assert joined == [number for number, _ in parts.shares()]  # numbered through


@pytest.mark.parametrize("most", [None, 1, 2, 3])
def test_shares_make_the_mean_over_a_batch_and_over_all(most):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    batches = regression(5, 3, 4)
    parts = BatchParts(batches, MSE, most=most)

    def mean(owner=None):
        return sum(share * MSE(model, parts.batch(n)) for n, share in parts.shares(owner))

    for owner, batch in enumerate(batches):
        torch.testing.assert_close(mean(owner), MSE(model, batch))
    whole = tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))
    torch.testing.assert_close(mean(), MSE(model, whole))


@pytest.mark.parametrize("most", [None, 2])
def test_ignored_targets_weigh_nothing(most):
    batches = labelled([0, 1, 1, 0], [-1, -1, -1, 1], [-1, -1])
    parts = BatchParts(batches, TOKENS, most=most)
    assert parts.samples == (4, 4, 2)
    assert parts.weights == pytest.approx((8.0, 2.0, 0.0))  # 4 to 1 to 0, scaled to 10 samples
    shares = [sum(share for _, share in parts.shares(owner)) for owner in (0, 1)]
    assert shares == pytest.approx([1.0, 1.0])
    of_all = parts.shares()
    assert sum(share for _, share in of_all) == pytest.approx(1.0)
    assert all(bool((parts.batch(number)[1] >= 0).any()) for number, _ in of_all)
    by_owner = [dict(of_all), {number for number, _ in parts.shares(0)}]
    assert sum(by_owner[0][number] for number in by_owner[1]) == pytest.approx(0.8)


def test_a_loss_s_own_weights_count():
    def loss(model, batch):
        return model(batch[0]).mean()

    loss.batch_weight = lambda batch: float(batch[0].sum())
    batches = [(torch.tensor([[1.0], [2.0]]),), (torch.tensor([[5.0]]),)]
    parts = BatchParts(batches, loss)
    assert parts.shares() == [(0, pytest.approx(3 / 8)), (1, pytest.approx(5 / 8))]
    assert parts.weights == pytest.approx((9 / 8, 15 / 8))


def test_the_largest_part_is_one_of_some_weight():
    batches = labelled([0, 1], [-1] * 9, [0, 1, 0], [1])
    assert BatchParts(batches, TOKENS).largest() == 2
    cut = BatchParts(batches, TOKENS, most=2)
    assert len(cut.batch(cut.largest())[0]) == 2


def test_batches_without_weight_are_refused():
    with pytest.raises(ValueError, match="all batches have weight zero: are all their targets ig"):
        BatchParts(labelled([-1, -1], [-1]), TOKENS)
