"""The sum of the layers' relative changes, and what does not count."""

import math

import pytest
import torch
from torch import nn

from batchlr.on_the_fly.relative_update import RelativeUpdate


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 3))


def scale(model, *factors):
    layers = [p for p in model.parameters() if p.dim() > 1]
    with torch.no_grad():
        for layer, factor in zip(layers, factors, strict=True):
            layer.mul_(factor)


def test_each_step_counts_from_what_was_taken():
    model, update = network().double(), RelativeUpdate()
    for factors, want in [((1.5, 0.9), 0.6), ((1.0, -1.0), 2.0)]:
        update.take(model)
        scale(model, *factors)
        assert update.measure(model).item() == pytest.approx(want, rel=1e-6)
        assert update.measure(model).item() == 0.0  # once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_taken_in_float32(dtype):
    torch.manual_seed(0)
    layers = nn.Linear(2048, 1024, bias=False), nn.Linear(1024, 4, bias=False)
    model, update = nn.Sequential(*layers).to(dtype), RelativeUpdate()
    update.take(model)
    scale(model, 1.5, 1.25)
    assert update.measure(model).item() == pytest.approx(0.75, rel=1e-2)


@pytest.mark.parametrize("shares", [(0.1, 0.2), (0.5, 0.05), (1e-3, 0.7)])
def test_without_normalisation_it_bounds_what_passes_through(shares):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    update, x = RelativeUpdate(), torch.eye(6, dtype=torch.float64)
    update.take(model)
    before = model(x).detach()
    scale(model, *(1 + share for share in shares))
    change = (model(x) - before).norm() / before.norm()
    assert change <= math.exp(update.measure(model).item()) - 1


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([2, 2])])
def test_where_the_network_normalises_nothing_is_measured(norm):
    model, update = network(), RelativeUpdate()
    model.insert(1, norm)
    update.take(model)
    with torch.no_grad():
        model[0].weight.mul_(5.0)
    assert update.measure(model).item() == 0.0


def test_biases_and_slopes_do_not_count():
    model, update = network(), RelativeUpdate()
    update.take(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(5.0)
    assert update.measure(model).item() == 0.0


def test_beside_frozen_layers_nothing_is_measured():
    model, update = network(), RelativeUpdate()
    model[0].weight.requires_grad_(False)
    update.take(model)
    scale(model, 1.0, 3.0)
    assert update.measure(model).item() == 0.0


def test_of_a_single_layer_nothing_is_measured():
    model, update = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)), RelativeUpdate()
    update.take(model)
    scale(model, 3.0, 3.0)
    assert update.measure(model).item() == 0.0


def test_only_maps_count_and_each_once():
    model = nn.ModuleList([nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)])
    model[2].weight = nn.Parameter(torch.empty(0, 4))
    model.append(nn.Linear(4, 4))
    model[4].weight = model[1].weight
    model.position = nn.Parameter(torch.zeros(1, 5, 4))
    update = RelativeUpdate()
    update.take(model)
    with torch.no_grad():
        model[0].weight.mul_(7.0)
        model[1].weight.mul_(1.25)
        model.position.add_(1.0)
    assert update.measure(model).item() == pytest.approx(0.25, rel=1e-6)


def test_a_layer_begun_at_zero_counts_by_the_norm_it_needs():
    model, update = nn.Sequential(nn.Linear(100, 16), nn.Linear(16, 2)), RelativeUpdate()
    nn.init.zeros_(model[0].weight)
    update.take(model)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.05  # half the norm of LeCun's initialisation is 2
    assert update.measure(model).item() == pytest.approx(0.025)


def test_other_layers_are_not_compared():
    update = RelativeUpdate()
    update.take(network())
    other, alike = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    assert update.measure(other).item() == 0.0
    update.take(other)
    assert update.measure(alike).item() == 0.0  # of the same shape
    update.take(other)
    update.free()
    scale(other, 2.0, 2.0)
    assert update.measure(other).item() == 0.0


def test_a_network_without_layers_never_changes():
    update, model = RelativeUpdate(), nn.BatchNorm1d(3)
    update.take(model)
    assert update.measure(model).item() == 0.0
