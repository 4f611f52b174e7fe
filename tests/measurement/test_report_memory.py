"""Batches are cut where memory asks for it, and only where that changes nothing."""

import pytest
import torch
from torch import nn

from batchlr.measurement.memory_plan import MemoryBudgetError
from batchlr.measurement.report_memory import possible_micro_batches, share_of
from batchlr.operators import HessianOperator
from batchlr.operators.supervised import supervised

SAMPLES = 100
CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


def network(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def batches(samples=SAMPLES, count=2):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(samples, 6, generator=generator), torch.arange(samples) % 3)
        for _ in range(count)
    ]


def variance(model, batch):
    """A loss that is no mean over samples."""
    return model(batch[0]).var(0).sum()


def possible(model, loss_fn=CROSS_ENTROPY, listed=None, norm_mode="train"):
    return possible_micro_batches(model, loss_fn, listed or batches(), norm_mode)


def test_a_mean_over_samples_may_be_cut_to_eight_of_them():
    assert possible(network()) == [8, 16, 32, 64, None]
    assert possible(network(), listed=batches(64)) == [8, 16, 32, None]
    assert possible(network(), listed=batches(65)) == [8, 16, 32, 64, None]


@pytest.mark.parametrize("samples", [1, 5, 8])
def test_small_batches_stay_whole(samples):
    assert possible(network(), listed=batches(samples)) == [None]


def test_batch_norm_is_cut_in_eval_mode_only():
    model = network(nn.BatchNorm1d(8))
    assert possible(model, norm_mode="train") == [None]
    assert possible(model, norm_mode="eval") == [8, 16, 32, 64, None]


def test_what_depends_on_the_rest_of_the_batch_stays_whole():
    assert possible(network(), variance) == [None]
    assert possible(network(nn.Dropout(0.5))) == [None]


def test_batches_that_cannot_be_cut_or_weigh_nothing_stay_whole():
    named = [(x, y, "name") for x, y in batches()]
    assert possible(network(), lambda m, b: CROSS_ENTROPY(m, b[:2]), named) == [None]
    ignored = [(x, torch.full_like(y, -100)) for x, y in batches()]
    assert possible(network(), listed=[*ignored, *batches(50)]) == [None]


def test_the_largest_micro_batch_that_fits_is_taken():
    model, listed = network(), batches()

    def cut_to(size):
        return HessianOperator(
            model, CROSS_ENTROPY, listed, norm_mode="train", keep_graph=True, micro_batch=size
        )

    def share(budget, sizes):
        return share_of(
            budget, cut_to, sizes, num_eigenpairs=1, max_products=20,
            small_batch_products=20, with_adam=False, definite=False,
        )  # fmt: skip

    needed = {}
    sizes = [8, 16, 32, 64, None]
    for size in sizes:
        with pytest.raises(MemoryBudgetError) as caught:
            share(1, [size])
        needed[size] = caught.value.needed
    assert list(needed.values()) == sorted(set(needed.values()))
    for size in sizes:
        assert share(needed[size], sizes)[1] == size
    assert share(needed[None] - 1, sizes)[1] == 64
    with pytest.raises(MemoryBudgetError) as caught:
        share(needed[8] - 1, sizes)
    assert caught.value.needed == needed[8]
