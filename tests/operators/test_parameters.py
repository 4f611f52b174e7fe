"""Parameters as one vector: their order, their dtype, and sums of vectors that come in pieces."""

import pytest
import torch
from torch import nn

from batchlr.operators.parameters import (
    Adder,
    check_device,
    check_module,
    common_dtype,
    named_trainable_parameters,
    split_like,
    trainable_parameters,
)


def test_parameters_come_in_the_model_s_order_without_frozen_ones_and_shared_ones_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad_(False)
    model[2].weight = model[0].weight
    assert list(named_trainable_parameters(model)) == ["0.weight", "0.bias", "1.bias"]
    own = (model[0].weight, model[0].bias, model[1].bias)
    assert all(p is q for p, q in zip(trainable_parameters(model), own, strict=True))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Tanh(), r"no trainable parameters \(0 frozen\), nor any other"),
        (nn.Linear(1, 1).requires_grad_(False), r"\(2 frozen\); set requires_grad=True on the"),
        (nn.Linear(1, 1, dtype=torch.complex64), r"must be real, got complex ones \(first 'weigh"),
        (
            nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")]),
            r"must share one device, got \['cpu', 'meta'\]",
        ),
    ],
)
def test_what_cannot_be_a_real_vector_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        trainable_parameters(model)


def test_a_device_without_float64_is_refused_with_the_way_out():
    check_device(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'mps' cannot be measured.*deepcopy\(model\)\.cpu\(\)"):
        check_device(torch.device("mps"))


def test_what_is_no_module_is_refused():
    check_module(nn.Tanh())
    with pytest.raises(
        TypeError, match=r"must be a torch\.nn\.Module, got builtin_func.*; the order of"
    ):
        check_module(torch.tanh)


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ((torch.bfloat16,), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float64, torch.bfloat16), torch.float64),
    ],
)
def test_vectors_have_the_widest_dtype_and_float32_at_least(dtypes, common):
    assert common_dtype([torch.zeros(2, dtype=dtype) for dtype in dtypes]) == common


SHAPES = [(2, 3), (), (4,)]


def pieces_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def flat(pieces):
    return torch.cat([piece.reshape(-1) for piece in pieces])


def test_pieces_are_views_in_order():
    vector = torch.arange(11.0)
    pieces = split_like(vector, pieces_of(0))
    assert [tuple(piece.shape) for piece in pieces] == SHAPES
    assert torch.equal(flat(pieces), vector)
    pieces[1].fill_(-1)
    assert vector[6] == -1


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_vectors_add_up_whatever_was_there_before(first):
    total = torch.full((11,), torch.nan, dtype=torch.float64)
    adder = Adder(total, pieces_of(0))
    vectors, factors = [pieces_of(seed) for seed in range(3)], (first, -2.0, 0.25)
    for vector, factor in zip(vectors, factors, strict=True):
        adder.add(vector, factor)
    adder.finish()
    expected = sum(f * flat(v) for f, v in zip(factors, vectors, strict=True))
    torch.testing.assert_close(total, expected)


def test_pieces_that_do_not_come_are_zeros():
    total = torch.full((11,), torch.nan, dtype=torch.float64)
    adder = Adder(total, pieces_of(0))
    matrix, scalar, vector = pieces_of(1)
    adder.add([None, None, vector], 2.0)
    adder.add([matrix, None, None], 1.0)
    adder.finish()
    torch.testing.assert_close(total, flat([matrix, torch.zeros_like(scalar), 2 * vector]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pieces_at_half_precision_lose_nothing_to_the_factor(dtype):
    piece, total = torch.tensor([1e-3, 3.0]).to(dtype), torch.empty(2)
    adder = Adder(total, [total])
    adder.add([piece], 1e-5)
    torch.testing.assert_close(total, 1e-5 * piece.float())


def test_what_is_added_stays_what_it_was():
    total = torch.zeros(11, dtype=torch.float64)
    adder, first, second = Adder(total, pieces_of(0)), pieces_of(1), pieces_of(2)
    before = flat(first).clone()
    adder.add(first, 1.0)
    adder.add(second, 1.0)
    assert torch.equal(flat(first), before)
