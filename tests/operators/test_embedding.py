import pytest
import torch
from torch import nn

from batchlr import HessianOperator, supervised
from cases import seeded
from reference import hessian_of

LOSS = supervised(nn.CrossEntropyLoss())
WORDS, WIDTH = 7, 3


class Bags(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.output = table, nn.Linear(WIDTH, 4)

    def forward(self, indices):
        return self.output(self.table(indices).tanh())


class OneHot(nn.Module):
    """A table of words looked up by a matrix product."""

    def __init__(self, table: nn.EmbeddingBag | nn.Embedding, mode: str) -> None:
        super().__init__()
        self.weight = table.weight
        self.mode, self.padding = mode, table.padding_idx

    def forward(self, indices):
        chosen = nn.functional.one_hot(indices, WORDS).double()  # (B, length, WORDS)
        if self.padding is not None:
            chosen[..., self.padding] = 0
        counts = chosen.sum(1)
        if self.mode == "mean":
            counts = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return counts @ self.weight


def problem(table: nn.Module):
    with seeded():
        model = Bags(table).double()
        return model, (torch.randint(WORDS, (6, 5)), torch.randint(4, (6,)))


def product(model, batch):
    operator = HessianOperator(model, LOSS, [batch])
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


def reference(model, mode, batch):
    table = model.table
    model.table = OneHot(table, mode)
    expected = hessian_of(model, LOSS, batch)
    model.table = table
    return expected


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, -2])
def test_bags_have_the_hessian_of_a_matrix_product(mode, sparse, padding_idx):
    options = {"sparse": sparse, "padding_idx": padding_idx}
    model, batch = problem(nn.EmbeddingBag(WORDS, WIDTH, mode=mode, **options))
    torch.testing.assert_close(product(model, batch), reference(model, mode, batch))


@pytest.mark.parametrize("include_last", [False, True])
def test_bags_of_a_flat_list_of_words(include_last):
    table = nn.EmbeddingBag(WORDS, WIDTH, mode="sum", include_last_offset=include_last)
    model, (words, classes) = problem(table)
    weights = torch.linspace(0.5, 2, 30).double()
    starts = torch.arange(0, 31 if include_last else 30, 5)

    def flat(m, batch):
        pooled = m.table(words.flatten(), starts, per_sample_weights=weights)
        return nn.functional.cross_entropy(m.output(pooled.tanh()), batch)

    def elementary(m, batch):
        rows = m.table.weight[words] * weights.view(6, 5, 1)
        return nn.functional.cross_entropy(m.output(rows.sum(1).tanh()), batch)

    operator = HessianOperator(model, flat, [classes])
    expected = hessian_of(model, elementary, classes)
    torch.testing.assert_close(operator @ torch.eye(len(expected)).double(), expected)


class Pooled(nn.Embedding):
    def forward(self, indices):
        return super().forward(indices).sum(1)


def test_sparse_gradients_of_an_embedding():
    model, batch = problem(Pooled(WORDS, WIDTH, sparse=True))
    torch.testing.assert_close(product(model, batch), reference(model, "sum", batch))


def test_gradients_scaled_by_frequency_are_refused():
    model, batch = problem(Pooled(WORDS, WIDTH, scale_grad_by_freq=True))
    with pytest.raises(ValueError, match=r"scale_grad_by_freq.*switch that off"):
        product(model, batch)


def test_the_maximum_of_a_bag_is_refused():
    model, batch = problem(nn.EmbeddingBag(WORDS, WIDTH, mode="max"))
    with pytest.raises(NotImplementedError, match=r"mode='max'.*take the maximum"):
        product(model, batch)
