"""What a run does to the weights, and what it leaves behind."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_disk import write_arrays
from runs import (
    NETWORKS,
    assert_same,
    metrics,
    run,
    state,
    strict_json,
    summary,
    tiny,
)
from typer.testing import CliRunner

from batchlr import CurvatureReport
from batchlr.cli import app
from batchlr.on_the_fly.falling_shape import FallingShape
from batchlr.on_the_fly.peak_bounds import PeakBounds
from batchlr.on_the_fly.rate_filter import RateFilter
from batchlr.policies import POLICIES
from batchlr.training import loop
from batchlr.training.checkpoint import load_checkpoint
from batchlr.training.config import load_config
from batchlr.training.data import train_batches
from batchlr.training.experiment import build_experiment
from batchlr.training.loop import DivergedError

REQUIRED = {"step", "epoch", "loss", "lr", "momentum", "batch_size"}
MEASURED = {"largest_eigenvalue", "smallest_eigenvalue", "max_lr"}
SUMMARY = {
    "test_accuracy",
    "test_loss",
    "train_loss",
    "steps",
    "epochs",
    "wall_seconds",
    "curvature_seconds",
    "curvature_products",
    "final_lr",
    "diverged",
}
AUTO = "optim.lr=auto"


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than such a run; one test looks at the picture."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(loop._Run, "draw", lambda self: None)


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    """A run of 12 steps whose rate is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "draw", lambda self: None)
        return run(tmp_path_factory.mktemp("automatic"), AUTO)


# The record ------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_picture(tmp_path):
    config = tiny(tmp_path, AUTO, "train.max_steps=3")
    out = tmp_path / "runs" / "deep"
    result = loop.train(config, out, ["a note"])
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "run.png",
        "checkpoints",
        "curvature",
    }
    assert load_config(out / "config.yaml").config == config
    environment = strict_json((out / "env.json").read_text())
    assert environment["notes"] == ["a note"]
    assert environment["packages"].keys() >= {"batchlr", "torch"}
    assert (out / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert summary(out) == result


def test_every_step_has_a_line(automatic):
    lines = metrics(automatic)
    assert [line["step"] for line in lines] == list(range(12))
    assert [line["epoch"] for line in lines] == [step // 3 for step in range(12)]
    for line in lines:
        assert line.keys() >= REQUIRED
        assert (line["momentum"], line["batch_size"]) == (0.9, 400)
        assert math.isfinite(line["loss"])
        assert line["lr"] > 0


def test_lines_of_a_measurement_say_what_was_measured(automatic):
    lines = metrics(automatic)
    measured = [line for line in lines if "max_lr" in line]
    assert {0, 1, 2, 4, 8} <= {line["step"] for line in measured}
    for line in measured:
        assert line.keys() >= MEASURED | {"max_lr_low", "max_lr_high", "regime", "peak_lr"}
        assert line["failure"] is None
        assert line["smallest_eigenvalue"] is None  # it is not looked for
        assert line["largest_eigenvalue"] > 0
        assert 0 < line["max_lr_low"] < line["max_lr"] < line["max_lr_high"]
        assert line["overhead"] > 0


def test_lines_without_a_measurement_do_not(tmp_path):
    lines = metrics(run(tmp_path, AUTO, "curvature.max_overhead=0", "train.epochs=4"))
    assert [line["step"] for line in lines if "max_lr" in line] == [0, 1, 2, 4, 8]
    for line in lines:
        assert (line.keys() & MEASURED == MEASURED) == (line["step"] in (0, 1, 2, 4, 8))
        assert line.keys() & MEASURED in (MEASURED, set())


def test_every_measurement_is_kept_as_a_report(automatic):
    for line in metrics(automatic):
        if "max_lr" not in line:
            continue
        report = CurvatureReport.load(automatic / "curvature" / f"step-{line['step']:08d}.json")
        assert report.largest == line["largest_eigenvalue"]
        limits = [report.max_lr(size, rule="top-direction").value for size in (400, 800)]
        assert line["max_lr"] in limits[: 1 if line["step"] == 0 else 2]  # twice, once settled


@pytest.mark.parametrize("policy", POLICIES)
def test_a_published_policy_sets_rate_and_momentum_every_few_epochs(tmp_path, capsys, policy):
    options = f"curvature={{policy: {policy}, every_epochs: 2, fixed_samples: true, samples: 32}}"
    constant = "schedule.name=constant"
    out = run(tmp_path, AUTO, options, constant, "curvature.max_products=20", "train.max_steps=8")
    lines = metrics(out)
    measured = [line for line in lines if "largest_eigenvalue" in line]
    assert [line["step"] for line in measured] == [0, 6]  # 3 steps an epoch
    for line in measured:
        assert (line["failure"], line["max_lr"], line["products"]) == (None, None, 20)
        record = out / "curvature" / f"step-{line['step']:08d}.json"
        learned = strict_json(record.read_text())
        step = POLICIES[policy](learned["ritz_values"], learned["weights"])
        assert learned["step_size"] == {"lr": step.lr, "momentum": step.momentum}
        assert (learned["policy"], learned["num_samples"]) == (policy, 32)
        assert line["largest_eigenvalue"] == learned["ritz_values"][-1]
        applied = lines[line["step"] : line["step"] + 6]
        assert {(one["lr"], one["momentum"]) for one in applied} == {(step.lr, step.momentum)}
    assert summary(out)["curvature_products"] == 40
    said = capsys.readouterr().out
    assert f"{policy}: rate " in said
    assert "measured: Ritz values from " in said


def test_the_rate_is_the_measured_limit_times_the_shape(automatic):
    """12 steps, warm-up 0.05: one step, at half the peak; then a cosine to zero over 11."""
    peak, estimate, held, bounds = None, RateFilter(), FallingShape(), PeakBounds()
    for line in metrics(automatic):
        step = line["step"]
        shape = 0.5 if step == 0 else (1 + math.cos(math.pi * (step - 1) / 11)) / 2
        held.see(shape)
        if "max_lr" in line:
            error = math.log(line["max_lr_high"] / line["max_lr_low"]) / (2 * 1.645)
            doubt = estimate.doubt
            limit = held.limit_of_peak(estimate.update(step, line["max_lr"], error))
            peak = bounds.peak(limit, peak, doubt)
            assert line["peak_lr"] == pytest.approx(peak, rel=1e-12)
        assert line["lr"] == pytest.approx(peak * shape, rel=1e-12)


def test_the_summary_agrees_with_the_lines_and_the_weights(automatic):
    lines, result = metrics(automatic), summary(automatic)
    assert result.keys() >= SUMMARY
    assert (result["steps"], result["epochs"], result["diverged"]) == (12, 4, False)
    assert result["final_lr"] == lines[-1]["lr"]
    measured = [line for line in lines if "peak_lr" in line]
    assert result["peak_lr"] == measured[-1]["peak_lr"]
    assert result["curvature_products"] == sum(line["products"] for line in measured)
    assert result["curvature_seconds"] == sum(line["measurement_seconds"] for line in measured)
    assert 0 < result["curvature_seconds"] < result["wall_seconds"]
    last_epoch = [line["loss"] for line in lines[-3:]]
    assert result["train_loss"] == pytest.approx(sum(last_epoch) / 3, rel=1e-12)
    assert_tested(automatic, result)


def assert_tested(out: Path, result: dict) -> None:
    """``result`` has the accuracy and loss of the weights in the last checkpoint."""
    experiment = build_experiment(load_config(out / "config.yaml").config)
    experiment.model.load_state_dict(state(out)["model"])
    experiment.model.eval()
    test = experiment.data.test
    images, labels = zip(*(test[i] for i in range(len(test))), strict=True)
    with torch.no_grad():
        outputs = experiment.model(torch.stack(images)).double()
    labels = torch.stack(labels)
    accuracy = (outputs.argmax(1) == labels).double().mean()
    assert result["test_accuracy"] == pytest.approx(float(accuracy), abs=1e-9)
    loss = F.cross_entropy(outputs, labels)
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-4)  # float32


def test_sparse_lines_lose_nothing_of_the_summary(tmp_path):
    """With every fifth line written: also those of measurements, and the last rate is the last."""
    every = run(tmp_path, "train.max_steps=8", out="every")
    fifth = run(tmp_path, "train.max_steps=8", "log.every_steps=5", out="fifth")
    assert [line["step"] for line in metrics(fifth)] == [0, 5]
    assert_same(summary(every), summary(fifth))
    measured = run(
        tmp_path, "train.max_steps=5", "log.every_steps=5", "curvature.measure=true", out="measured"
    )
    assert [line["step"] for line in metrics(measured)] == [0, 1, 2, 4]


@pytest.mark.parametrize("network", ["mlp", "batch norm"])
def test_a_run_cut_within_an_epoch_is_tested_at_its_last_weights(tmp_path, network):
    out = run(tmp_path, *NETWORKS[network], "train.max_steps=5")
    result = summary(out)
    assert (result["steps"], result["epochs"]) == (5, 1)
    assert_tested(out, result)
    losses = [line["loss"] for line in metrics(out)]
    assert result["train_loss"] == pytest.approx(sum(losses[3:]) / 2, rel=1e-12)


def test_the_terminal_shows_measurement_epochs_and_end(tmp_path, capsys):
    run(tmp_path, AUTO, "train.epochs=2")
    first, limit, peak, *epochs, end, record = capsys.readouterr().out.splitlines()
    assert first.startswith("measured: largest eigenvalue ")
    assert limit.startswith("largest stable rate at batch 400 with momentum 0.9: ")
    assert peak.endswith("averaged by their errors: it may lie above the last one")
    assert [line[:11] for line in epochs] == ["epoch   1/2", "epoch   2/2"]
    assert end.startswith("test accuracy 0.")
    assert record.startswith(f"record in {tmp_path / 'out'}: ")


def test_an_epoch_without_a_measurement_shows_of_which_step_its_limit_is(tmp_path, capsys):
    out = run(tmp_path, AUTO, "curvature.every_epochs=2")
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    measured = [line for line in metrics(out) if "max_lr" in line]
    assert [line["step"] for line in measured] == [0, 6]
    for number, line in enumerate(epochs):
        last = measured[number // 2]
        assert f"  limit {last['max_lr']:.3g} [" in line
        assert line.endswith(f"  (both of step {last['step']})") == (number % 2 == 1)


def test_a_rate_given_follows_no_limits(tmp_path, capsys):
    run(tmp_path, "curvature.measure=true", "train.max_steps=2")
    printed = capsys.readouterr().out
    assert "largest stable rate at batch 400" in printed
    assert "follows all limits" not in printed


def test_checkpoints_at_the_start_every_few_epochs_and_at_the_end(tmp_path):
    def steps(out):
        return [path.stem for path in sorted((out / "checkpoints").glob("*.pt"))]

    many = ["checkpoint.every_epochs=2", "checkpoint.keep=9", "train.epochs=5"]
    assert steps(run(tmp_path, *many)) == [f"step-000000{n:02d}" for n in (0, 6, 12, 15)]
    assert steps(run(tmp_path, "train.epochs=3", out="two")) == ["step-00000006", "step-00000009"]
    assert steps(run(tmp_path, "checkpoint.every_epochs=0", out="end")) == ["step-00000012"]


def test_an_earlier_run_is_moved_aside(tmp_path):
    for seed in range(3):
        run(tmp_path, f"seed={seed}", "train.max_steps=1")
    folders = [tmp_path / name for name in ("out-1", "out-2", "out")]
    seeds = [load_config(folder / "config.yaml").config.seed for folder in folders]
    assert seeds == [0, 1, 2]
    for folder in folders:
        assert summary(folder)["steps"] == len(metrics(folder)) == 1
        assert load_checkpoint(folder / "checkpoints")["progress"]["step"] == 1


def test_files_that_are_no_run_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    run(tmp_path, "train.max_steps=1")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_the_present_folder_cannot_be_moved_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"has a config\.yaml, so it holds an earlier run, and as"):
        loop.train(tiny(tmp_path, "train.max_steps=1"), Path())
    assert (tmp_path / "config.yaml").read_text() == "{}"


# The weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "optimizer", "smoothing", "clip"),
    [
        ([], {"momentum": 0.9, "weight_decay": 5e-4}, 0.0, None),
        (["optim.nesterov=true"], {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}, 0, 0),
        (["train.label_smoothing=0.2"], {"momentum": 0.9, "weight_decay": 5e-4}, 0.2, None),
        (["train.clip_norm=0.3"], {"momentum": 0.9, "weight_decay": 5e-4}, 0.0, 0.3),
        (["optim={name: adam, eps: 1.0e-3}"], {"eps": 1e-3, "weight_decay": 5e-4}, 0.0, None),
        (
            ["optim={name: adamw, betas: [0.8, 0.99], weight_decay: 0.1}"],
            {"betas": (0.8, 0.99), "weight_decay": 0.1},
            0.0,
            None,
        ),
    ],
    ids=["sgd", "nesterov", "smoothing", "clipped", "adam", "adamw"],
)
def test_a_run_is_the_plain_training_loop(tmp_path, overrides, optimizer, smoothing, clip):
    """Written out with torch's own optimizers, on the batches of the data set."""
    steps = ["train.max_steps=5", "schedule.name=constant", "optim.lr=0.1"]
    config = tiny(tmp_path, *overrides, *steps)
    loop.train(config, tmp_path / "out")
    model = build_experiment(config).model.train()
    data = build_experiment(config).data
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    plain = kind[config.optim.name](model.parameters(), lr=0.1, **optimizer)
    losses = []
    for step in range(5):
        batches = list(train_batches(data, batch_size=400, seed=0, epoch=step // 3))
        images, labels = batches[step % 3]
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        losses.append(loss.item())
        plain.zero_grad()
        loss.backward()
        if clip:
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            shrink = min(1.0, clip / gradient.norm().item())
            assert shrink < 1  # else the test would show nothing
            for p in model.parameters():
                p.grad.mul_(shrink)
        plain.step()
    weights = state(tmp_path / "out")["model"]
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)  # float32
    found = [line["loss"] for line in metrics(tmp_path / "out")]
    assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_measuring_without_applying_changes_no_bit(tmp_path, network):
    """Weights, buffers, optimizer, schedule and random state, after four measurements or more."""
    common = [*NETWORKS[network], "train.max_steps=5"]
    without = run(tmp_path, *common, out="without")
    measured = run(tmp_path, *common, "curvature.measure=true", out="with")
    assert sum("max_lr" in line for line in metrics(measured)) >= 4
    left, right = state(without), state(measured)
    for own in ("controller", "sampler"):  # what belongs to measuring
        del left[own], right[own]
    assert left.keys() >= {"model", "optimizer", "scheduler", "random_state"}
    assert_same(left, right)
    plain = [{key: line[key] for key in REQUIRED} for line in metrics(measured)]
    assert plain == metrics(without)
    tested = ("test_accuracy", "test_loss", "train_loss", "final_lr", "peak_lr", "steps", "epochs")
    assert [summary(without)[key] for key in tested] == [summary(measured)[key] for key in tested]


def test_the_dropout_network_does_draw_random_numbers(tmp_path):
    """Without that, the test above would say nothing about the random state."""
    config = tiny(tmp_path, *NETWORKS["dropout"])
    loop.train(config, tmp_path / "out")
    build_experiment(config)
    assert not torch.equal(torch.get_rng_state(), state(tmp_path / "out")["random_state"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_micro_batches_are_the_whole_batch(tmp_path, optimizer):
    common = [f"optim.name={optimizer}", "optim.lr=0.01", "train.max_steps=6"]
    whole = run(tmp_path, *common, out="whole")
    parts = run(tmp_path, *common, "batch.micro_size=25", out="parts")
    assert [line["loss"] for line in metrics(parts)] == pytest.approx(
        [line["loss"] for line in metrics(whole)],
        rel=1e-5,  # float32
    )
    left, right = state(whole)["model"], state(parts)["model"]
    for name in left:
        # Adam divides by the gradient's size, which rounding may dominate in dead pixels.
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=2e-5)
    assert {line["batch_size"] for line in metrics(parts)} == {400}


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=bf16"],
        ["train.channels_last=true"],
        ["train.precision=bf16", "train.channels_last=true", "train.clip_norm=1.0", AUTO],
        ["curvature.adjust_momentum=true", AUTO],
        ["curvature.norm_mode=eval", AUTO],
    ],
    ids=["bf16", "channels_last", "both", "momentum", "eval"],
)
def test_options_run_and_stay_near_the_plain_run(tmp_path, options):
    common = [*NETWORKS["batch norm"], "train.max_steps=2"]
    out = run(tmp_path, *common, *options)
    plain = run(tmp_path, *common, out="plain")
    weights = state(out)["model"]
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights.values())
    first, expected = metrics(out)[0]["loss"], metrics(plain)[0]["loss"]
    assert first == pytest.approx(expected, rel=0.02)  # bf16 has 8 bits
    if options == ["train.channels_last=true"]:
        assert [line["loss"] for line in metrics(out)] == pytest.approx(
            [line["loss"] for line in metrics(plain)], rel=1e-4
        )
    if "train.precision=bf16" in options:
        assert first != expected


def test_deterministic_runs_are_equal(tmp_path):
    try:
        runs = [run(tmp_path, AUTO, "deterministic=true", out=name) for name in ("a", "b")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(state(runs[0]), state(runs[1]))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("batch_size", [16, 256])
def test_the_measured_rate_learns(tmp_path, optimizer, batch_size):
    out = run(
        tmp_path,
        f"optim={{name: {optimizer}, lr: auto}}",
        f"batch.global_size={batch_size}",
        "model.hidden=[32]",
        "train.epochs=30",
        "train.max_steps=60",
        "curvature={samples: 256, max_products: 20}",
    )
    losses, result = [line["loss"] for line in metrics(out)], summary(out)
    assert not result["diverged"]
    assert sum(losses[-10:]) / 10 < 1.0  # guessing costs ln 10 = 2.3
    assert max(losses) < 2 * losses[0]


# Divergence ------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_gave_up(result, out: Path, *, checkpoint: str) -> dict:
    """Exit code 4, one message that names the checkpoint, and a summary that says so."""
    assert result.exit_code == 4
    path = out / "checkpoints" / checkpoint
    assert result.stderr.endswith(f"; the last good checkpoint is {path}\n")
    assert "\ndiverged by step " in f"\n{result.stderr}"  # perhaps after a note
    assert "Traceback" not in result.output
    said = summary(out)
    assert said.keys() >= SUMMARY
    assert said["diverged"] is True
    assert said["failure"] in result.stderr
    assert said["test_accuracy"] is None
    weights = load_checkpoint(path)["experiment"]["model"].values()
    assert all(bool(w.isfinite().all()) for w in weights)
    return said


@pytest.mark.parametrize(
    ("rate", "words"), [("1e6", "became [0-9.]+e[+]"), ("1.0e38", "became (inf|nan)")]
)
def test_a_rate_far_too_large_exits_4(tmp_path, rate, words):
    """A loss a thousand times the first is as lost as one that is not finite."""
    tiny(tmp_path)
    out = tmp_path / "out"
    result = invoke("train", tmp_path / "tiny.yaml", f"optim.lr={rate}", "--out", out)
    said = assert_gave_up(result, out, checkpoint="step-00000000.pt")
    assert re.search(rf"the training loss {words}.* in step 1 \(first loss 2\.", said["failure"])
    assert said["steps"] == 3  # it looks at the end of each epoch at the latest


def test_a_run_that_diverges_shows_its_picture(tmp_path):
    with pytest.raises(DivergedError):
        run(tmp_path, "optim.lr=1e6", "train.max_steps=2")
    assert (tmp_path / "out" / "run.png").exists()


def test_the_last_good_checkpoint_is_of_the_last_good_epoch(tmp_path, monkeypatch):
    """The rate explodes in the third epoch."""
    update = loop._Run.update_weights

    def exploding(self, batch):
        if self.progress.step == 7:
            self.experiment.scheduler.set_peak(1e9)
        return update(self, batch)

    monkeypatch.setattr(loop._Run, "update_weights", exploding)
    with pytest.raises(DivergedError, match=r"in step 8 .*good checkpoint is .*step-00000006\.pt"):
        run(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    assert_same(state(tmp_path / "out"), state(run(tmp_path, "train.max_steps=6", out="six")))


def poisoned(monkeypatch, *steps):
    """Has the weights turn into no numbers in the given steps of every run."""
    update = loop._Run.update_weights

    def update_weights(self, batch):
        loss = update(self, batch)
        if self.progress.step in steps:
            with torch.no_grad():
                next(iter(self.experiment.model.parameters())).fill_(math.nan)
        return loss

    monkeypatch.setattr(loop._Run, "update_weights", update_weights)


def test_a_network_destroyed_once_goes_back_and_is_trained_on(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 4)
    out = run(tmp_path, AUTO)
    losses = [line["loss"] for line in metrics(out)]
    bad = [step for step, loss in enumerate(losses) if loss is None]
    assert bad == [5]
    assert losses[-1] < losses[0]
    assert summary(out)["diverged"] is False
    assert math.isfinite(summary(out)["train_loss"])
    assert "the network was lost and is what it was before" in capsys.readouterr().out
    assert summary(out)["events"] == [
        {"step": 5, "event": "undone"},
        {"step": 8, "event": "recovered"},
    ]
    for name, weight in state(out)["model"].items():
        assert weight.isfinite().all(), name


def test_a_network_destroyed_in_the_last_step_of_an_epoch_is_tested_whole(tmp_path, monkeypatch):
    poisoned(monkeypatch, 5)  # of three an epoch: no loss has shown it yet
    out = run(tmp_path, AUTO)
    assert summary(out)["diverged"] is False
    assert summary(out)["events"] == [{"step": 5, "event": "undone"}]


def test_a_network_destroyed_again_and_again_is_given_up(tmp_path, monkeypatch):
    poisoned(monkeypatch, *range(60))
    with pytest.raises(DivergedError, match="the training loss became nan"):
        run(tmp_path, AUTO, "train.epochs=20")
    assert summary(tmp_path / "out")["steps"] > 8


def test_without_rollback_it_is_given_up_at_once(tmp_path, monkeypatch):
    poisoned(monkeypatch, 4)
    with pytest.raises(DivergedError, match="the training loss became nan in step 5"):
        run(tmp_path, AUTO, "curvature.rollback=false")


def test_a_last_step_that_spoils_the_weights_is_no_success(tmp_path):
    """Its own loss was fine; the test shows the damage, and no checkpoint keeps it."""
    with pytest.raises(DivergedError, match=r"the test loss became (nan|inf); .*step-00000000\.pt"):
        run(tmp_path, "optim.lr=1.0e38", "train.max_steps=1")
    assert summary(tmp_path / "out")["diverged"]
    with pytest.raises(DivergedError, match=r"the test loss became (nan|inf); .*step-00000000\.pt"):
        run(tmp_path, "optim.lr=1.0e38", "batch.global_size=1400", out="epoch")


@pytest.mark.parametrize("rate", ["auto", "0.1"])
def test_a_loss_that_is_not_finite_at_the_first_step_exits_4(tmp_path, rate):
    tiny(tmp_path)
    signs = np.random.default_rng(0).choice([-1, 1], (12, 2, 8, 8))
    pixels = (3e38 * signs).astype(np.float32)  # finite, but their sums are not
    write_arrays(tmp_path / "huge.npz", x_train=pixels, x_test=pixels[:6])
    result = invoke(
        "train",
        tmp_path / "tiny.yaml",
        f"data={{name: arrays, path: {tmp_path / 'huge.npz'}}}",
        "batch.global_size=4",
        "model.activation=relu",
        f"optim.lr={rate}",
        "--out",
        tmp_path / "out",
    )
    said = assert_gave_up(result, tmp_path / "out", checkpoint="step-00000000.pt")
    assert said["steps"] == (0 if rate == "auto" else 1)
    assert re.search("loss (is|became) (inf|nan)", said["failure"])


def saturated(tmp_path):
    """Outputs so large that the softmax is exactly zero or one: slope, but no curvature."""
    signs = np.random.default_rng(0).choice([-1, 1], (12, 2, 8, 8))
    pixels = (1e6 * signs).astype(np.float32)
    path = write_arrays(tmp_path / "large.npz", x_train=pixels, x_test=pixels[:6])
    return [f"data={{name: arrays, path: {path}}}", "model.hidden=[]", "batch.global_size=4"]


def test_without_curvature_there_is_no_rate_to_find(tmp_path):
    tiny(tmp_path)
    arguments = ["train", tmp_path / "tiny.yaml", *saturated(tmp_path), AUTO]
    result = invoke(*arguments, "--out", tmp_path / "out")
    said = assert_gave_up(result, tmp_path / "out", checkpoint="step-00000000.pt")
    assert said["failure"].endswith(": nothing limits the rate")


def test_a_measurement_that_fails_does_not_stop_a_run_with_a_rate_of_its_own(tmp_path):
    common = [*saturated(tmp_path), "optim.lr=1e-12"]
    out = run(tmp_path, *common, "curvature.measure=true")
    lines = metrics(out)
    assert len(lines) == 12
    failures = [line["failure"] for line in lines if "failure" in line]
    assert len(failures) >= 5
    assert all(failure.endswith(": nothing limits the rate") for failure in failures)
    plain = run(tmp_path, *common, out="plain")
    assert_same(state(out)["model"], state(plain)["model"])


def test_without_checkpoints_none_is_named(tmp_path):
    with pytest.raises(DivergedError, match=r"\(first loss 2\.\d+\)$"):
        run(tmp_path, "optim.lr=1e6", "checkpoint.every_epochs=0")


def test_a_measurement_that_fails_later_keeps_the_rate_and_says_so(tmp_path, monkeypatch, capsys):
    from batchlr.on_the_fly import stability_limit

    measure, calls = stability_limit.track_curvature, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise ArithmeticError("no eigenvalue today")
        return measure(*args, **kwargs)

    monkeypatch.setattr(stability_limit, "track_curvature", failing)
    first, second, *_ = metrics(run(tmp_path, AUTO, "train.max_steps=3"))
    assert second["failure"] == "no eigenvalue today"
    assert {second[key] for key in MEASURED} == {None}
    assert second["peak_lr"] == first["peak_lr"]
    assert "step 1: kept the rate: no eigenvalue today" in capsys.readouterr().out
