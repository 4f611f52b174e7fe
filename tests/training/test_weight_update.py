"""One update, against the same step written out with plain autograd."""

import copy
import itertools

import pytest
import torch
from runs import NETWORKS, tiny
from torch.nn import functional

from batchlr import scatter_of_gradients
from batchlr.training.data import train_batches
from batchlr.training.experiment import build_experiment
from batchlr.training.weight_update import update_weights

GROWING = "{global_size: 48, micro_size: %s, adaptive: {max_size: 480, groups: 4, smoothing: 0}}"


def built(folder, *overrides, micro=None):
    batch = "global_size: 48" if micro is None else f"global_size: 48, micro_size: {micro}"
    return build_experiment(tiny(folder, f"batch={{{batch}}}", *overrides))


def batches_of(experiment, size=48):
    return iter(train_batches(experiment.data, batch_size=size, seed=0, epoch=0))


def written_out(experiment, batches, *, clip=None):
    """Weights after steps of SGD with momentum and decay, and the mean losses."""
    group = experiment.optimizer.param_groups[0]
    model = copy.deepcopy(experiment.model)
    weights = list(model.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    losses = []
    for x, y in batches:
        loss = functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        share = 1.0 if clip is None else min(1.0, clip / float(norm))
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, gradients, strict=True):
                v.mul_(group["momentum"]).add_(share * g + group["weight_decay"] * w)
                w -= group["lr"] * v
        losses.append(float(loss.detach()))
    return torch.cat([w.detach().flatten() for w in weights]), losses


def flat(model):
    return torch.cat([w.detach().flatten() for w in model.parameters()])


@pytest.mark.parametrize("micro", [None, 48, 16, 1])
def test_parts_make_the_step_of_the_whole_batch(tmp_path, micro):
    """Two steps, for gradients of the first must be gone in the second."""
    experiment = built(tmp_path, micro=micro)
    batches = list(itertools.islice(batches_of(experiment), 2))
    weights, losses = written_out(experiment, batches)
    found = [float(update_weights(experiment, batch, read=False)) for batch in batches]
    assert found == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(flat(experiment.model), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro", [48, 12])
@pytest.mark.parametrize(("clip", "binds"), [(0.05, True), (1e3, False)])
def test_the_gradient_clipped_is_that_of_the_whole_batch(tmp_path, micro, clip, binds):
    experiment = built(tmp_path, f"train.clip_norm={clip}", micro=micro)
    batch = next(batches_of(experiment))
    weights, _ = written_out(experiment, [batch], clip=clip)
    free, _ = written_out(experiment, [batch])
    assert torch.equal(weights, free) is not binds
    update_weights(experiment, batch, read=False)
    torch.testing.assert_close(flat(experiment.model), weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro", ["auto", 16])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_noise_read_is_that_of_the_groups_before_they_are_clipped(tmp_path, micro, clip):
    clipping = [] if clip is None else [f"train.clip_norm={clip}"]
    experiment = build_experiment(tiny(tmp_path, f"batch={GROWING % micro}", *clipping))
    size = experiment.part_size(read=True)
    x, y = next(batches_of(experiment))
    parameters = list(experiment.model.parameters())
    rows = [
        torch.autograd.grad(functional.cross_entropy(experiment.model(part), own), parameters)
        for part, own in zip(x.split(size), y.split(size), strict=True)
    ]
    expected = scatter_of_gradients(
        [torch.stack(tensors) for tensors in zip(*rows, strict=True)],
        group_size=size,
        dataset_size=len(experiment.data.train),
    )
    weights, (loss,) = written_out(experiment, [(x, y)], clip=clip)
    assert float(update_weights(experiment, (x, y), read=True)) == pytest.approx(loss, rel=1e-5)
    seen = experiment.adaptive.scatter
    assert seen.noise_scale == pytest.approx(expected.noise_scale, rel=1e-3)
    # Sums of gradients that stand divided by their number: the unit is arbitrary, as documented.
    assert seen.trace / seen.square_norm == pytest.approx(
        expected.trace / expected.square_norm, rel=1e-4
    )
    torch.testing.assert_close(flat(experiment.model), weights, rtol=1e-5, atol=1e-7)


def test_an_update_that_is_not_read_shows_nothing(tmp_path):
    experiment = build_experiment(tiny(tmp_path, f"batch={GROWING % 'auto'}"))
    update_weights(experiment, next(batches_of(experiment)), read=False)
    with pytest.raises(ValueError, match="nothing was observed yet"):
        _ = experiment.adaptive.scatter


def test_half_precision_is_for_the_forward_pass_alone(tmp_path):
    half, full = (built(tmp_path, f"train.precision={p}") for p in ("bf16", "fp32"))
    batch = next(batches_of(full))
    types = []
    half.model.register_forward_hook(lambda *call: types.append(call[2].dtype))
    losses = [float(update_weights(one, batch, read=False)) for one in (half, full)]
    assert types == [torch.bfloat16]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # eight bits
    assert all(w.dtype == w.grad.dtype == torch.float32 for w in half.model.parameters())


def test_images_come_in_the_layout_configured(tmp_path):
    seen = []
    for layout in ("false", "true"):
        experiment = build_experiment(
            tiny(tmp_path, *NETWORKS["batch norm"], f"train.channels_last={layout}")
        )
        experiment.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        update_weights(experiment, next(batches_of(experiment, 32)), read=False)
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [False, True]
