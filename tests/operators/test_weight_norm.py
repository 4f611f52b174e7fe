import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as parametrized

from batchlr import HessianOperator, supervised
from cases import seeded
from reference import hessian_of

LOSS = supervised(nn.MSELoss())


class Elementary(nn.Module):
    """The same weights, ``g v / |v|`` written out."""

    def __init__(self, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.bias = layer.bias
        self.g, self.v = layer.parametrizations.weight.parameters()
        self.others = [d for d in range(2) if d != dim]

    def forward(self, x):
        length = self.v.square().sum(self.others, keepdim=True).sqrt()
        return nn.functional.linear(x, self.g * self.v / length, self.bias).tanh()


@pytest.mark.parametrize("dim", [0, 1])
def test_the_hessian_is_that_of_the_elementary_operations(dim):
    with seeded():
        layer = parametrized(nn.Linear(3, 2).double(), dim=dim)
        batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    model = nn.Sequential(layer, nn.Tanh())
    expected = hessian_of(Elementary(layer, dim), LOSS, batch)
    actual = HessianOperator(model, LOSS, [batch]) @ torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
