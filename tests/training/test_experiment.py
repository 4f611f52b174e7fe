"""A configuration becomes what it says, or is refused with a way out."""

import pytest
import torch
import torch.nn.functional as F
from runs import NETWORKS, tiny
from typer.testing import CliRunner

from batchlr.cli import app
from batchlr.training.distributed import Processes
from batchlr.training.experiment import (
    build_experiment,
    find_device,
)


def built(folder, *overrides):
    return build_experiment(tiny(folder, *overrides))


# Sizes -----------------------------------------------------------------------------------------


def test_steps_are_whole_batches_of_all_epochs(tmp_path):
    experiment = built(tmp_path, "batch.global_size=100", "train.epochs=3")
    assert experiment.steps_per_epoch == 14  # of 1437 samples


def test_measured_batches_are_disjoint_fresh_and_reproducible(tmp_path):
    augmented = ["data.augment=standard", "batch.global_size=16"]
    first, again = built(tmp_path, *augmented), built(tmp_path, *augmented)
    batches, later = first.measurement_batches(), first.measurement_batches()
    images = torch.cat([x for x, _ in batches]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 64
    assert not torch.equal(images, torch.cat([x for x, _ in later]).flatten(1))
    for (x, y), (x_again, y_again) in zip(batches, again.measurement_batches(), strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    known = {tuple(x.flatten().tolist()) for x, _ in map(first.data.train.__getitem__, range(1437))}
    assert all(tuple(row.tolist()) in known for row in images)  # training samples, not augmented


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    tiny(tmp_path)
    command = ["train", str(tmp_path / "tiny.yaml"), "batch.global_size=1438"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr == "batch_size 1438 is larger than the 1437 samples of digits\n"
    assert not (tmp_path / "out").exists()


# Devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cuda"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    tiny(tmp_path)
    command = ["train", str(tmp_path / "tiny.yaml"), f"train.device={device}"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith("train.device 'cuda" if "cuda" in device else "train.device ")
    assert " is not available: " in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_the_accelerator_of_its_own_number(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    third = Processes(rank=6, world_size=8, local_rank=2)
    assert find_device(tiny(tmp_path, f"train.device={name}"), third) == torch.device("cuda:2")
    second = tiny(tmp_path, "train.device=cuda:1")
    assert find_device(second, Processes()) == torch.device("cuda:1")


def test_without_an_accelerator_auto_is_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(tiny(tmp_path), Processes()) == torch.device("cpu")


# Parts -----------------------------------------------------------------------------------------


def test_optimizers_get_their_options(tmp_path):
    sgd = built(tmp_path, "optim={momentum: 0.5, nesterov: true, weight_decay: 0.1}").optimizer
    assert type(sgd) is torch.optim.SGD
    group = sgd.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 0.1)
    options = "betas: [0.8, 0.95], eps: 1.0e-4, weight_decay: 0.1"
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        adam = built(tmp_path, f"optim={{name: {name}, {options}}}").optimizer
        assert type(adam) is kind
        group = adam.param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-4, 0.1)


def test_a_rate_is_a_number_or_the_controllers(tmp_path):
    fixed = built(tmp_path, "optim.lr=0.3")
    assert (fixed.controller, fixed.scheduler.peak) == (None, 0.3)
    measured = built(tmp_path, "optim.lr=0.3", "curvature.measure=true").controller
    assert not measured.apply
    assert measured.scheduler.peak == 0.3
    assert built(tmp_path, "optim.lr=auto").controller.apply


def test_the_controller_gets_its_options(tmp_path):
    controller = built(
        tmp_path,
        "optim.lr=auto",
        "curvature={max_overhead: 0.3, tolerance: 0.2, max_products: 7, growth: 1.2, safety: 0.5, "
        "adjust_momentum: true, norm_mode: eval}",
    ).controller
    assert (controller.cadence.max_overhead, controller.cadence.total_steps) == (0.3, 12)
    limit = controller.limit
    assert (limit.batch_size, limit.dataset_size) == (400, 1437)
    assert (limit.tol, limit.max_products, controller.bounds.growth) == (0.2, 7, 1.2)
    assert (controller.bounds.safety, limit.adjust_momentum) == (0.5, True)
    assert controller.norm_mode == "eval"
    assert limit.clip_norm is None


def test_the_controller_knows_of_clipping(tmp_path):
    assert built(tmp_path, "optim.lr=auto", "train.clip_norm=0.5").controller.limit.clip_norm == 0.5


def test_the_controller_gets_its_policy_and_cadence(tmp_path):
    plain = built(tmp_path, "optim.lr=auto").controller
    assert (plain.policy, plain.every_steps) == ("edge", None)
    published = built(
        tmp_path, "optim.lr=auto", "curvature={policy: paper_momentum, every_epochs: 2}"
    ).controller
    assert (published.policy, published.every_steps) == ("paper_momentum", 6)  # 3 an epoch
    assert published.max_products == 6


def test_a_published_policy_measures_one_batch_of_all_samples(tmp_path):
    policy = ["optim.lr=auto", "curvature.policy=paper_sgd"]
    ((_, labels),) = built(tmp_path, *policy, "curvature.samples=32").measurement_batches()
    assert len(labels) == 32
    ((_, labels),) = built(tmp_path, *policy, "curvature.samples=9999").measurement_batches()
    assert len(labels) == 1437


def test_fixed_samples_are_the_same_each_time_and_in_each_run_of_a_seed(tmp_path):
    fixed = "curvature.fixed_samples=true"
    first, again = built(tmp_path, fixed), built(tmp_path, fixed)
    experiments = (first, first, again, built(tmp_path, fixed, "seed=1"))
    drawn = [[x for x, _ in one.measurement_batches()] for one in experiments]
    for images in drawn[1:3]:
        assert all(torch.equal(x, y) for x, y in zip(drawn[0], images, strict=True))
    assert not torch.equal(drawn[0][0], drawn[3][0])


def test_weights_depend_on_the_seed_only(tmp_path):
    torch.manual_seed(7)
    first = built(tmp_path).model.state_dict()
    torch.manual_seed(8)
    again, other = built(tmp_path).model.state_dict(), built(tmp_path, "seed=1").model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_label_smoothing_is_part_of_the_loss(tmp_path):
    experiment = built(tmp_path, "train.label_smoothing=0.1")
    images, labels = next(experiment.data.test.batches([torch.arange(20)]))
    outputs = experiment.model(images)
    shares = 0.9 * F.one_hot(labels, 10) + 0.01
    expected = -(shares * outputs.log_softmax(1)).sum(1).mean()
    loss = experiment.loss_fn(experiment.model, (images, labels))
    torch.testing.assert_close(loss, expected)


def test_channels_last_is_the_layout_of_weights_and_batches(tmp_path):
    experiment = built(tmp_path, *NETWORKS["batch norm"], "train.channels_last=true")
    weight = experiment.model.stem.weight
    images, _ = experiment.measurement_batches()[0]
    for tensor in (weight, images):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_saved_state_goes_into_a_fresh_experiment(tmp_path):
    overrides = [*NETWORKS["batch norm"], "optim.lr=auto"]
    first, second = built(tmp_path, *overrides), built(tmp_path, *overrides, "seed=3")
    batches = first.measurement_batches()
    first.controller.maybe_update(first.model.train(), batches)
    first.loss_fn(first.model, batches[0]).backward()
    first.optimizer.step()
    first.scheduler.step()
    torch.rand(3)
    saved = first.state_dict()
    drawn = torch.rand(2)
    second.load_state_dict(saved)
    assert torch.equal(torch.rand(2), drawn)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()
    assert second.optimizer.param_groups[0]["lr"] == first.scheduler.get_last_lr()[0]
    assert second.controller.num_products == first.controller.num_products > 0
    for (x, _), (y, _) in zip(
        first.measurement_batches(), second.measurement_batches(), strict=True
    ):
        assert x.shape == y.shape
    assert torch.equal(first.sampler.get_state(), second.sampler.get_state())
