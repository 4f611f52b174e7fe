from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from batchlr.operators.batches import (
    ambiguity,
    check_batches,
    count_samples,
    join,
    pick,
    recut,
    take,
)

Pair = namedtuple("Pair", ["x", "y"])
X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6)
FORMS = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "named tuple": Pair(X, Y),
    "dict": {"x": X, "y": Y},
    "nested": {"x": (X, {"mask": X > 3}), "y": [Y]},
}


def leaves(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, dict) else batch
    return [leaf for value in values for leaf in leaves(value)]


def assert_same(a, b):
    assert type(a) is type(b)
    for left, right in zip(leaves(a), leaves(b), strict=True):
        assert torch.equal(left, right)


class TestCheckBatches:
    @pytest.mark.parametrize("container", [list, tuple, iter])
    def test_lists_whatever_holds_batches(self, container):
        batches = [(X, Y), (X, Y)]
        assert check_batches(container(batches)) == batches

    def test_takes_a_list_of_tensors_for_a_list_of_batches(self):
        assert len(check_batches([X, X, X])) == 3

    @pytest.mark.parametrize("batch", [X, {"x": X}, OrderedDict(x=X), UserDict(x=X), 3, None])
    def test_refuses_a_single_batch(self, batch):
        name = type(batch).__name__
        with pytest.raises(TypeError, match=rf"a list of batches, got {name}; pass \[batch\]"):
            check_batches(batch)

    @pytest.mark.parametrize("batch", [(X, Y), Pair(X, Y), (X,)])
    def test_refuses_one_tuple_of_tensors(self, batch):
        with pytest.raises(TypeError, match=r"one tuple of tensors; pass \[\(x, y\)\]"):
            check_batches(batch)

    @pytest.mark.parametrize("empty", [[], iter([])])
    def test_refuses_none_at_all(self, empty):
        with pytest.raises(ValueError, match="batches is empty; pass at least one"):
            check_batches(empty)


class TestCountSamples:
    @pytest.mark.parametrize("batch", FORMS.values(), ids=FORMS)
    def test_is_the_first_dimension_of_the_first_tensor(self, batch):
        assert count_samples(batch) == 6

    def test_skips_what_is_no_tensor(self):
        assert count_samples({"ids": ["a", "b"], "epoch": 3, "x": [None, X]}) == 6

    @pytest.mark.parametrize("batch", ["text", 3, None, [], {"x": "text"}, ([], {})])
    def test_refuses_batches_without_a_tensor(self, batch):
        name = type(batch).__name__
        with pytest.raises(TypeError, match=f"cannot count .* of type {name}: no tensor in it"):
            count_samples(batch)

    @pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
    def test_refuses_empty_batches(self, shape):
        with pytest.raises(ValueError, match="at least one sample along dimension 0, got"):
            count_samples((torch.ones(shape), Y))


class TestTakeAndJoin:
    @pytest.mark.parametrize("batch", FORMS.values(), ids=FORMS)
    def test_take_cuts_every_tensor(self, batch):
        part = take(batch, slice(1, 4))
        assert type(part) is type(batch)
        for cut, whole in zip(leaves(part), leaves(batch), strict=True):
            assert torch.equal(cut, whole[1:4])
        picked = take(batch, torch.tensor([5, 0]))
        assert torch.equal(leaves(picked)[0], X[[5, 0]])

    @pytest.mark.parametrize("batch", FORMS.values(), ids=FORMS)
    def test_join_undoes_take(self, batch):
        parts = [take(batch, slice(a, b)) for a, b in ((0, 1), (1, 4), (4, 6))]
        assert_same(join(parts), batch)

    @pytest.mark.parametrize("batch", ["text", {"x": X, "name": "text"}])
    def test_take_refuses_what_it_cannot_cut(self, batch):
        with pytest.raises(TypeError, match="cannot cut a batch of type str: pass batches of"):
            take(batch, slice(0, 1))

    def test_join_refuses_what_it_cannot_join(self):
        with pytest.raises(TypeError, match="cannot join batches of type str"):
            join(["a", "b"])


class TestPick:
    def test_samples_are_counted_through_all_batches(self):
        batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
        x, y = pick(batches, [5, 0, 4])
        assert torch.equal(x, X[[5, 0, 4]])
        assert torch.equal(y, Y[[5, 0, 4]])

    def test_refuses_what_it_cannot_cut(self):
        with pytest.raises(TypeError, match="no tensor in it"):
            pick(["ab"], [0])


class TestRecut:
    @given(
        sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
        data=st.data(),
        form=st.sampled_from([tuple, list]),
    )
    def test_keeps_the_samples_and_lets_the_rest_join_the_last_batch(self, sizes, data, form):
        total = sum(sizes)
        batch_size = data.draw(st.integers(1, total))
        x = torch.arange(total)
        batches = [form((part, -part)) for part in x.split(sizes)]
        cut = recut(batches, batch_size)
        assert torch.equal(torch.cat([x for x, _ in cut]), x)
        assert torch.equal(torch.cat([y for _, y in cut]), -x)
        assert all(len(x) == batch_size for x, _ in cut[:-1])
        assert batch_size <= len(cut[-1][0]) < 2 * batch_size

    @pytest.mark.parametrize("batch_size", [0, 13, -1])
    def test_refuses_impossible_sizes(self, batch_size):
        with pytest.raises(ValueError, match=rf"must lie in \[1, 12\].*got {batch_size}"):
            recut([(X, Y), (X, Y)], batch_size)


@dataclass
class Graphs:
    """As graph networks batch them: nodes and edges of all graphs, a target each."""

    targets: torch.Tensor
    nodes: torch.Tensor


class Lengthy:
    def __len__(self):
        return 3


PACKED = pack_sequence([torch.ones(4, 2), torch.ones(2, 2), torch.ones(1, 2)])
GRAPHS = Graphs(Y, X.repeat(4, 1))


class TestBatchesOfOtherForms:
    @pytest.mark.parametrize(
        ("batch", "count"),
        [
            (PACKED, 3),
            ((PACKED, torch.ones(3)), 3),
            (GRAPHS, 6),
            (SimpleNamespace(batch_size=5), 5),
            (Lengthy(), 3),
            (("name", Lengthy()), 3),
        ],
    )
    def test_count(self, batch, count):
        assert count_samples(batch) == count

    @pytest.mark.parametrize("batch", [(X, Y[:4]), {"x": X, "scalar": torch.ones(())}, GRAPHS])
    def test_unlike_lengths_are_not_cut(self, batch):
        assert "rows" in ambiguity(batch)
        with pytest.raises(TypeError, match=r"cannot cut a batch into samples: its tensors have"):
            take(batch, slice(0, 2))

    @pytest.mark.parametrize("batch", FORMS.values(), ids=FORMS)
    def test_like_lengths_are_not_ambiguous(self, batch):
        assert ambiguity(batch) is None

    def test_packed_sequences_are_not_cut(self):
        with pytest.raises(TypeError, match="cannot cut a batch of type PackedSequence"):
            take((PACKED, torch.ones(3)), slice(0, 2))
        with pytest.raises(TypeError, match="cannot join batches of type PackedSequence"):
            join([PACKED, PACKED])

    def test_samples_of_unlike_shapes_are_not_joined(self):
        with pytest.raises(TypeError, match=r"samples differ in shape: \[\(2,\), \(3,\)\]"):
            join([torch.ones(4, 2), torch.ones(4, 3)])

    def test_a_batch_as_a_list_is_no_list_of_batches(self):
        with pytest.raises(TypeError, match=r"such as one batch \[x, y\]; pass \[\(x, y\)\]"):
            check_batches([X, Y])

    def test_a_loader_does_not_move_the_global_generator(self):
        before = torch.get_rng_state()
        assert len(check_batches(DataLoader(Y, batch_size=2, shuffle=True))) == 3
        assert torch.equal(torch.get_rng_state(), before)
