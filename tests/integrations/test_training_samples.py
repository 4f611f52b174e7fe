"""What is measured on is training data, and drawing it changes nothing."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from batchlr.integrations.training_samples import TrainingSamples, num_samples
from batchlr.operators.isolation import forked_random_state


@pytest.mark.parametrize(
    ("total", "batch", "one_pass", "sizes"),
    [
        (1000, 256, 256, [32] * 4),  # half a batch, in four
        (1000, 256, 16, [16] * 8),  # no more at a time than training has
        (1000, 8, 8, [8] * 8),  # 64 if that is more
        (1000, 4096, 4096, [64] * 4),  # 256 at most
        (10, 10, 10, [2] * 5),
        (3, 3, 3, [1] * 3),
    ],
)
def test_sizes_are_the_trainers(total, batch, one_pass, sizes):
    dataset = TensorDataset(torch.arange(total))
    draw = TrainingSamples(dataset, default_collate, batch_size=batch, pass_size=one_pass)
    batches = draw(torch.Generator().manual_seed(0))
    assert [len(batch[0]) for batch in batches] == sizes
    chosen = torch.cat([batch[0] for batch in batches])
    assert len(chosen.unique()) == len(chosen)


def test_random_states_are_as_before():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def numbers():
        return random.random(), np.random.rand(), float(torch.rand(()))

    before, drawn = state(), []
    for _ in range(2):
        with forked_random_state(torch.device("cpu"), 7):
            drawn.append(numbers())
    assert state() == before
    assert drawn[0] == drawn[1]


def test_what_must_be_waited_for_has_no_number():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            return 3

    assert num_samples(Stream()) is None
    assert num_samples(None) is None
    assert num_samples([1, 2]) == 2
