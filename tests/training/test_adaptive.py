"""Runs whose batch grows: what decides, what follows, and what stays."""

import itertools
import math

import pytest
import torch
from runs import NETWORKS, assert_same, metrics, run, state, summary, tiny

from batchlr import AdaptiveBatchSize, GradientScatter, scatter_of_gradients
from batchlr.controller import CurvatureController
from batchlr.training import loop
from batchlr.training.config import ConfigError
from batchlr.training.data import train_batches
from batchlr.training.distributed import Processes
from batchlr.training.experiment import build_experiment
from batchlr.training.resumption import Progress
from batchlr.training.shapes import _share

SAMPLES = 1437  # of the digits to train on
LARGEST = 384  # whole micro-batches of 48 in 400
ADAPTIVE = {"max_size": 400, "tolerance": 0.25, "test_every": 4, "observe_every": 1}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)


def adaptive(size=48, micro="auto", **options):
    inside = ", ".join(f"{key}: {value}" for key, value in (ADAPTIVE | options).items())
    return f"batch={{global_size: {size}, micro_size: {micro}, adaptive: {{{inside}}}}}"


def sizes(out):
    return [line["batch_size"] for line in metrics(out)]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run at a fixed rate, whose batch grows from 48."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "draw", lambda self: None)
        return run(tmp_path_factory.mktemp("grown"), adaptive())


# What happens ----------------------------------------------------------------------------------


def test_the_batch_grows_in_tests_up_to_its_bound(grown):
    lines = metrics(grown)
    assert lines[0]["batch_size"] == 48
    assert max(sizes(grown)) == summary(grown)["batch_size"] == LARGEST
    assert sizes(grown) == sorted(sizes(grown))
    for line, after in itertools.pairwise(lines):
        assert after["batch_size"] == line.get("next_batch_size", line["batch_size"])
        assert after["batch_size"] <= 2 * line["batch_size"]
        at_bound = line["batch_size"] == LARGEST
        assert ("norm_test" in line) == ((line["step"] + 1) % 4 == 0 and not at_bound)
        assert line.get("read", False) is not at_bound
    tested = [line for line in lines if line.get("norm_test")]
    assert tested
    for line in tested:
        assert (line["norm_test"] > 0.25) == (line["next_batch_size"] > line["batch_size"])


def test_epochs_stay_what_they_are(grown):
    """In each all samples but a rest that is no whole batch."""
    lines, found = metrics(grown), summary(grown)
    assert found["epochs"] == 4
    assert found["steps"] == len(lines)
    assert found["samples"] == sum(sizes(grown))
    for epoch in range(4):
        own = [line["batch_size"] for line in lines if line["epoch"] == epoch]
        last = [line for line in lines if line["epoch"] == epoch][-1]
        left = SAMPLES - sum(own)
        assert 0 <= left < last.get("next_batch_size", last["batch_size"])


def test_the_schedule_counts_samples(grown, tmp_path):
    """In steps of the first batch size, so that it ends with the last epoch."""
    per_epoch = SAMPLES // 48
    share = _share(tiny(tmp_path).schedule, 4 * per_epoch)
    seen = dict.fromkeys(range(4), 0)
    for line in metrics(grown):
        position = line["epoch"] * per_epoch + seen[line["epoch"]] // 48
        assert line["lr"] == pytest.approx(0.1 * share(position), rel=1e-12)
        seen[line["epoch"]] += line["batch_size"]
    assert state(grown)["scheduler"]["last_epoch"] == 4 * per_epoch
    assert state(grown)["scheduler"]["multipliers"] == [pytest.approx(0, abs=1e-12)]


def test_a_batch_that_may_not_grow_is_the_run_without(tmp_path):
    fixed = run(tmp_path, "batch.global_size=48", out="fixed")
    bounded = run(tmp_path, adaptive(max_size=48), out="bounded")
    assert_same(state(fixed)["model"], state(bounded)["model"])
    assert_same(metrics(fixed), metrics(bounded))


@pytest.mark.parametrize("micro", ["auto", 12])
def test_reading_the_noise_changes_no_weight_beyond_rounding(tmp_path, micro):
    half = "train.max_steps=20"
    fixed = run(tmp_path, "batch.global_size=48", half, out="fixed")
    read = run(tmp_path, adaptive(tolerance=100.0, micro=micro), half, out="read")
    assert set(sizes(read)) == {48}
    weights = state(read)["model"], state(fixed)["model"]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", ["auto", 16])
def test_the_norm_test_written_is_that_of_the_groups_gradients(tmp_path, micro):
    once = {"test_every": 1, "smoothing": 0, "groups": 3}
    overrides = adaptive(micro=micro, **once), "train.max_steps=1"
    line = metrics(run(tmp_path, *overrides))[0]
    experiment = build_experiment(tiny(tmp_path, *overrides))
    experiment.model.train()
    x, y = next(iter(train_batches(experiment.data, batch_size=48, seed=0, epoch=0)))
    parameters = list(experiment.model.parameters())
    rows = [
        torch.autograd.grad(experiment.loss_fn(experiment.model, part), parameters)
        for part in zip(x.split(16), y.split(16), strict=True)
    ]
    scatter = scatter_of_gradients(
        [torch.stack(tensors) for tensors in zip(*rows, strict=True)],
        group_size=16,
        dataset_size=SAMPLES,
    )
    assert line["noise_scale"] == pytest.approx(scatter.noise_scale, rel=1e-4)
    variance = scatter.trace * (1 / 48 - 1 / SAMPLES)
    assert line["norm_test"] == pytest.approx(math.sqrt(variance / scatter.mean_square), rel=1e-4)


# The rate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_a_fixed_rate_stays_or_follows_by_a_rule(tmp_path, rate, power):
    constant = "schedule={name: constant}"
    for line in metrics(run(tmp_path, adaptive(rate=rate), constant, "train.epochs=2")):
        assert line["lr"] == pytest.approx(0.1 * (line["batch_size"] / 48) ** power)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_measured_rate_follows_the_measured_limit(tmp_path, monkeypatch, name):
    resize, changes = CurvatureController.set_batch_size, []

    def noting(self, batch_size, **options):
        # Of effective sizes, those of policy edge: of a batch twice as large.
        here, there = (1 / (2 * size) - 1 / SAMPLES for size in (self.batch_size, batch_size))
        ratio, before = here / there, self.scheduler.peak
        resize(self, batch_size, **options)
        changes.append((ratio, self.scheduler.peak / before, self.cadence.total_steps))

    monkeypatch.setattr(CurvatureController, "set_batch_size", noting)
    out = run(tmp_path, adaptive(), f"optim={{name: {name}, lr: auto}}")
    lines = metrics(out)
    grown = [b for a, b in itertools.pairwise(lines) if b["batch_size"] != a["batch_size"]]
    assert len(changes) == len(grown) >= 2
    for ratio, factor, _ in changes:
        assert 1 <= factor <= ratio * (1 + 1e-9)  # the limit grows no faster than the batch
    assert changes[0][1] > 1.1
    assert all(line["max_lr"] > 0 for line in grown)  # measured again at once
    assert changes[-1][2] == len(lines)
    assert state(out)["controller"]["limit"]["batch_size"] == sizes(out)[-1]
    assert state(out)["scheduler"]["batch_size"] == sizes(out)[-1]


def test_curvature_is_measured_beside_a_fixed_rate(tmp_path):
    out = run(tmp_path, adaptive(), "curvature.measure=true", "schedule={name: constant}")
    lines = metrics(out)
    assert {line["lr"] for line in lines} == {0.1}
    assert max(sizes(out)) == LARGEST
    assert state(out)["controller"]["limit"]["batch_size"] == LARGEST


# Sizes -----------------------------------------------------------------------------------------


def test_sizes_are_whole_micro_batches(tmp_path):
    out = run(tmp_path, adaptive(size=45, micro=15, max_size=320), "train.epochs=2")
    assert max(sizes(out)) == 315
    assert all(size % 15 == 0 for size in sizes(out))


@pytest.mark.parametrize(
    ("options", "world", "shards", "plain", "read"),
    [
        ({}, 1, False, 48, 12),
        ({"groups": 6}, 1, False, 48, 8),
        ({"micro": 24}, 1, False, 24, 12),
        ({"micro": 6}, 1, False, 6, 6),
        ({"size": 50}, 1, False, 50, 10),  # five are nearer to four than two
        ({"size": 22}, 1, False, 22, 11),  # two of eleven, not eleven of two
        ({"size": 4}, 1, False, 4, 2),  # never single samples
        ({"size": 62, "micro": 31}, 1, False, 31, 31),
        ({"size": 4, "micro": 1}, 1, False, 1, 1),  # unless asked for
        ({"size": 62}, 31, False, 2, 2),
        ({}, 2, False, 24, 12),  # two groups of each process
        ({}, 4, False, 12, 12),  # a process is a group
        ({}, 2, True, 24, 6),  # of sharded weights all processes have one gradient
    ],
)
def test_an_update_is_read_in_groups(tmp_path, options, world, shards, plain, read):
    experiment = build_experiment(tiny(tmp_path, adaptive(**options)))
    experiment.processes = Processes(0, world, 0, shards)
    assert experiment.part_size(read=False) == plain
    assert experiment.part_size(read=True) == read


@pytest.mark.parametrize(("micro", "unit"), [("auto", 22), (11, 11), (2, 2)])
@pytest.mark.parametrize("groups", [2, 3, 4, 7])
def test_every_size_a_batch_grows_to_can_be_read(tmp_path, micro, unit, groups):
    experiment = build_experiment(tiny(tmp_path, adaptive(22, micro, groups=groups)))
    assert experiment.adaptive.multiple_of == unit
    for size in range(22, 400, unit):
        experiment.adaptive.batch_size = size
        plain, read = experiment.part_size(read=False), experiment.part_size(read=True)
        assert plain == (22 if micro == "auto" else micro)  # never more than at first
        assert size % plain == size % read == 0
        assert 2 <= read <= min(plain, size // 2)
        assert read == plain or size // plain < groups


def test_updates_are_read_as_often_as_asked_until_the_batch_can_grow_no_more(tmp_path):
    experiment = build_experiment(tiny(tmp_path, adaptive(observe_every=3)))
    assert [experiment.is_read(step) for step in range(7)] == [True, False, False] * 2 + [True]
    experiment.adaptive.batch_size = experiment.adaptive.max_batch_size
    assert not experiment.is_read(0)
    assert not build_experiment(tiny(tmp_path)).is_read(0)


@pytest.mark.parametrize("kind", ["batch norm", "dropout"])
@pytest.mark.parametrize("first", [4, 8])
def test_batch_norm_and_dropout_grow_too(tmp_path, kind, first):
    """VGG normalises maps of a single pixel, of which one sample has no statistics."""
    out = run(tmp_path, *NETWORKS[kind], adaptive(size=first, max_size=32))
    assert max(sizes(out)) == 32


@pytest.mark.parametrize("micro", ["auto", 8])
def test_no_pass_is_of_more_samples_than_the_first(tmp_path, monkeypatch, micro):
    seen = set()
    update = loop._Run.update_weights

    def noting(self, batch):
        hook = self.experiment.model.register_forward_pre_hook(
            lambda _, inputs: seen.add(len(inputs[0]))
        )
        loss = update(self, batch)
        hook.remove()
        return loss

    monkeypatch.setattr(loop._Run, "update_weights", noting)
    out = run(tmp_path, adaptive(16, micro, observe_every=3, groups=2), "train.epochs=1")
    assert max(sizes(out)) == 256
    assert seen == ({8, 16} if micro == "auto" else {8})


def test_losses_of_smaller_batches_statistics_are_marked_and_not_shown_to_the_guards(
    tmp_path, monkeypatch
):
    observe, shown = CurvatureController.observe, []

    def noting(self, loss, same=None):
        shown.append(self._step - 1)
        return observe(self, loss, same)

    monkeypatch.setattr(CurvatureController, "observe", noting)
    every = {"size": 8, "max_size": 32, "observe_every": 3}
    norm, auto = NETWORKS["batch norm"], "optim.lr=auto"
    lines = metrics(run(tmp_path, *norm, adaptive(**every), auto))
    read = {line["step"] for line in lines if line.get("read")}
    small = {line["step"] for line in lines if line["batch_size"] < 32}
    assert read == {step for step in small if step % 3 == 0}
    assert len(read) >= 3
    assert set(range(len(lines))) - set(shown) == read
    for others in (
        [*norm, adaptive(**every | {"observe_every": 1})],  # all losses are alike
        [*norm, adaptive(**every, micro=2)],  # micro-batches are the groups
        [adaptive(**every)],  # without batch norm
    ):
        shown.clear()
        lines = metrics(run(tmp_path, *others, auto, "train.max_steps=9"))
        assert any(line.get("read") for line in lines)
        assert shown == list(range(len(lines)))


@pytest.mark.parametrize("loss", [math.inf, math.nan, 1e9])
def test_a_network_lost_in_a_step_that_the_guards_were_not_shown_is_undone(
    tmp_path, monkeypatch, loss
):
    update = loop._Run.update_weights

    def losing(self, batch):
        found = update(self, batch)
        return found * 0 + loss if self.progress.step == 3 else found

    monkeypatch.setattr(loop._Run, "update_weights", losing)
    every = adaptive(size=8, max_size=32, observe_every=3)
    overrides = *NETWORKS["batch norm"], every, "train.max_steps=4"
    with pytest.raises(loop.DivergedError, match="in step 3"):  # nobody can undo it
        run(tmp_path, *overrides, out="fixed")
    out = run(tmp_path, *overrides, "optim.lr=auto")
    assert summary(out)["events"] == [{"step": 3, "event": "undone"}]
    assert not summary(out)["diverged"]


def test_what_was_seen_of_a_network_that_is_undone_is_forgotten(tmp_path):
    experiment = build_experiment(tiny(tmp_path, adaptive()))
    progress = Progress()
    one = loop._Run(experiment, progress, tmp_path / "out", None)
    experiment.adaptive.observe(GradientScatter(48, 1.0, 1.0))
    one.heed("slowed")
    assert isinstance(experiment.adaptive, AdaptiveBatchSize)
    assert experiment.adaptive.test()
    one.heed("undone")
    one.console.close()
    with pytest.raises(ValueError, match="nothing was observed yet"):
        experiment.adaptive.test()


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([adaptive(max_size=47)], "max_size: must be at least batch.global_size 48, got 47"),
        (["batch.adaptive={tolerance: 1}"], "batch.adaptive.max_size: is required and missing"),
        (["batch.adaptive=true"], "batch.adaptive: must be a mapping of keys, got true"),
        ([adaptive(smothing=0.5)], "smothing: unknown key; did you mean 'smoothing'"),
        ([adaptive(foo=1)], "unknown key; the keys of batch.adaptive are max_size, tolerance, "),
        ([adaptive(tolerance=0)], "tolerance: must be a number above 0, got 0"),
        ([adaptive(max_growth=1)], "must be a number above 1, or null, got 1"),
        ([adaptive(groups=1)], "groups: must be a whole number of at least 2, got 1"),
        (
            [adaptive(rate="linear"), "optim.lr=auto"],
            "batch.adaptive.rate: must be auto when optim.lr is auto: the rate keeps to the "
            "measured limit, got 'linear'",
        ),
        (
            [adaptive(), "optim.lr=auto", "curvature.policy=cdat"],
            "curvature.policy: must be mean_square, edge or heavy_ball with batch.adaptive: no "
            "other says what a larger batch changes, got 'cdat'",
        ),
        (
            [adaptive(), "curvature={measure: true, every_epochs: 1}"],
            "curvature.every_epochs: must be null with batch.adaptive, where epochs differ in "
            "steps, got 1",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_read(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        tiny(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (adaptive(max_size=95), r"max_size 95 leaves no room to grow: .* the next after 48 is 96"),
        (adaptive(max_size=1438), r"adaptive\.max_size 1438 is larger than the 1437 samples"),
        (adaptive(size=1, micro=1), "global_size 1 cannot be split .* that can: 2"),
        (adaptive(size=2), "global_size 2 cannot be split .* that can: 4"),
        (adaptive(size=3), "batch.adaptive reads the noise; the nearest that can: 4"),
        (adaptive(size=31), "global_size 31 cannot be split .* that can: 30 and 32"),
        (adaptive(size=31, micro=31), "global_size 31 cannot be split .* that can: 62"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_when_it_is_built(tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        build_experiment(tiny(tmp_path, override))


def test_published_settings_go_to_the_largest_batch_at_once(tmp_path):
    published = {"tolerance": 0.1, "debias": "false", "max_growth": "null", "test_every": 1}
    out = run(tmp_path, adaptive(size=8, smoothing=0, **published), "train.max_steps=12")
    assert sizes(out).index(400) <= 4
