"""A run that was stopped goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import (
    NETWORKS,
    assert_same,
    assert_same_end,
    metrics,
    run,
    state,
    summary,
    tiny,
)
from typer.testing import CliRunner

from batchlr.cli import app
from batchlr.training import loop
from batchlr.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from batchlr.training.config import load_config
from batchlr.training.distributed import Processes
from batchlr.training.loop import InterruptedRun

_ADAPTIVE = (  # from 96 to 192, 384, 400 after steps 3, 6, 9
    "batch={global_size: 96, adaptive: {max_size: 400, tolerance: 0.2, test_every: 3, "
    "observe_every: 2}}"
)
SPARSE = ["curvature.max_overhead=0"]  # before steps 0, 1, 2, 4, 8
RUNS = {
    "batch norm": [*NETWORKS["batch norm"], "optim.lr=auto", *SPARSE],
    "batch norm, adam": [*NETWORKS["batch norm"], "optim={name: adam, lr: auto}", *SPARSE],
    "dropout": [*NETWORKS["dropout"], "schedule={name: step, milestones: [0.5]}"],
    "published": [
        *NETWORKS["dropout"],
        "optim.lr=auto",
        "curvature={policy: paper_nesterov, every_epochs: 1, fixed_samples: true, max_products: 8}",
    ],
    "adaptive": [_ADAPTIVE, "train.epochs=2"],
    "adaptive, auto": [_ADAPTIVE, "optim.lr=auto", "train.epochs=2"],
    "augmented": ["data.augment=standard", "optim={name: adamw, lr: auto}"],
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that makes an uninterrupted run, once for each kind."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = run(tmp_path_factory.mktemp("whole"), *RUNS[kind])
        return made[kind]

    return make


@pytest.fixture
def stop_at(monkeypatch):
    """A function that has a signal sent while batch number ``k`` of the process is fetched."""

    def stop(*numbers: int, sent: signal.Signals = signal.SIGINT) -> None:
        batches, fetched = loop.train_batches, [-1]

        def signalling(*args, **kwargs):
            for batch in batches(*args, **kwargs):
                fetched[0] += 1
                if fetched[0] in numbers:
                    os.kill(os.getpid(), sent)
                yield batch

        monkeypatch.setattr(loop, "train_batches", signalling)

    return stop


# Going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("batch norm", 4),  # within the second epoch
        ("batch norm, adam", 7),
        ("dropout", 4),
        ("published", 3),  # between two measurements
        ("published", 5),  # before one
        ("adaptive", 1),  # between two tests
        ("adaptive", 2),  # at one
        ("adaptive", 5),
        ("adaptive, auto", 3),
        ("adaptive, auto", 6),
        ("augmented", 1),
        ("augmented", 5),  # the last of an epoch
        ("augmented", 11),  # the last of all
    ],
)
def test_a_run_interrupted_and_resumed_ends_with_the_same_bits(
    tmp_path, whole, stop_at, kind, number
):
    expected = whole(kind)
    stop_at(number)
    with pytest.raises(InterruptedRun, match=rf"interrupted at step {number + 1}; go on with resu"):
        run(tmp_path, *RUNS[kind])
    out = tmp_path / "out"
    assert len(metrics(out)) == number + 1
    assert not (out / "summary.json").exists()
    assert run(tmp_path, *RUNS[kind], "resume=auto") == out
    assert [line["step"] for line in metrics(out)] == list(range(len(metrics(expected))))
    assert_same_end(out, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "out"}  # nothing moved


def test_the_comparison_sees_what_matters(whole):
    """State of the optimizer, of the controller and of every generator is among what is equal."""
    saved = state(whole("batch norm, adam"))
    assert saved["optimizer"]["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert any("running_var" in name for name in saved["model"])
    assert saved["controller"]["limit"]["tracker"]["trails"]["largest"]["vector"].norm() > 0
    assert {"generator", "cadence", "filter", "guard", "cdat"} <= saved["controller"].keys()
    assert {"sampler", "random_state", "scheduler"} <= saved.keys()
    with pytest.raises(AssertionError, match=r"stem\.weight differs"):
        assert_same(saved, state(whole("batch norm")))


def test_a_run_interrupted_after_every_step_ends_with_the_same_bits(tmp_path, whole, stop_at):
    expected = whole("batch norm, adam")
    stop_at(*range(11))
    for step in range(11):
        with pytest.raises(InterruptedRun, match=f"at step {step + 1};"):
            run(tmp_path, *RUNS["batch norm, adam"], "resume=auto")
    assert_same_end(run(tmp_path, *RUNS["batch norm, adam"], "resume=auto"), expected)


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """A whole run whose network is destroyed in step 7, and what destroys that of another."""
    update = loop._Run.update_weights

    def poisoned(self, batch):
        loss = update(self, batch)
        if self.progress.step == 7:
            with torch.no_grad():
                next(iter(self.experiment.model.parameters())).fill_(torch.nan)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "draw", lambda self: None)
        patch.setattr(loop._Run, "update_weights", poisoned)
        whole = run(tmp_path_factory.mktemp("rolled_back"), *RUNS["batch norm, adam"])
    return whole, poisoned


@pytest.mark.parametrize("number", [3, 6, 8])
def test_a_run_resumed_before_or_after_a_rollback_ends_with_the_same_bits(
    tmp_path, monkeypatch, stop_at, rolled_back, number
):
    expected, poisoned = rolled_back
    assert summary(expected)["diverged"] is False
    assert any(line["loss"] is None for line in metrics(expected))
    monkeypatch.setattr(loop._Run, "update_weights", poisoned)
    stop_at(number)
    with pytest.raises(InterruptedRun):
        run(tmp_path, *RUNS["batch norm, adam"])
    assert_same_end(run(tmp_path, *RUNS["batch norm, adam"], "resume=auto"), expected)


def test_a_termination_is_an_interruption(tmp_path, stop_at):
    stop_at(1, sent=signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="at step 2;"):
        run(tmp_path)


def test_the_handlers_of_the_program_come_back(tmp_path, stop_at):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_at(0)
    with pytest.raises(InterruptedRun):
        run(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_may_train(tmp_path):
    """Only the main thread can handle signals."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(run, tmp_path, "train.max_steps=1").result()
    assert summary(out)["steps"] == 1


def test_the_command_exits_130(tmp_path, stop_at):
    tiny(tmp_path)
    stop_at(1)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["train", str(tmp_path / "tiny.yaml"), "--out", str(out)])
    assert result.exit_code == 130
    assert result.stderr == (
        f"interrupted at step 2; go on with resume=auto (checkpoint in {out / 'checkpoints'})\n"
    )


def test_resuming_drops_the_lines_of_steps_it_repeats(tmp_path, whole):
    """As after a kill: the record is ahead of the checkpoint, its last line torn."""
    expected = whole("augmented")
    out = run(tmp_path, *RUNS["augmented"], "train.max_steps=6")
    with (out / "metrics.jsonl").open("a") as file:
        for step in (6, 7):
            file.write(json.dumps({"step": step, "loss": 9.0}) + "\n")
        file.write('{"step": 8, "lo')
    assert_same_end(run(tmp_path, *RUNS["augmented"], "resume=auto"), expected)


def test_a_run_resumes_from_an_older_checkpoint_or_into_another_folder(tmp_path, whole):
    expected = whole("augmented")
    keep = "checkpoint.keep=9"
    first = run(tmp_path, *RUNS["augmented"], keep, out="first")
    older = first / "checkpoints" / "step-00000006.pt"
    run(tmp_path, "train.max_steps=1", out="other")
    other = run(tmp_path, *RUNS["augmented"], keep, f"resume={older}", out="other")
    assert_same(state(other), state(expected))
    assert [line["step"] for line in metrics(other)] == list(range(6, 12))
    assert len(metrics(tmp_path / "other-1")) == 1  # the run that lay there
    again = run(tmp_path, *RUNS["augmented"], keep, f"resume={older}", out="first")
    assert_same_end(again, expected)
    assert not (tmp_path / "first-1").exists()


def test_resume_may_name_the_folder_of_checkpoints(tmp_path, whole):
    first = run(tmp_path, *RUNS["augmented"], "train.max_steps=4")
    resume = f"resume={first / 'checkpoints'}"
    assert_same_end(run(tmp_path, *RUNS["augmented"], resume), whole("augmented"))


def test_with_nothing_to_resume_auto_starts_anew(tmp_path, whole):
    assert_same_end(run(tmp_path, *RUNS["augmented"], "resume=auto"), whole("augmented"))


def test_a_finished_run_resumed_stays_as_it_is(tmp_path):
    out = run(tmp_path, "train.max_steps=4")
    before = state(out), metrics(out), summary(out)
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    run(tmp_path, "train.max_steps=4", "resume=auto")
    assert_same((state(out), metrics(out), summary(out)), before)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == checkpoints
    other = run(tmp_path, "train.max_steps=4", f"resume={out / 'checkpoints'}", out="other")
    assert_same(state(other), state(out))


def test_what_does_not_matter_may_change(tmp_path):
    run(tmp_path, "train.max_steps=2")
    changes = ["name=other", "log.every_steps=2", "checkpoint.keep=5", "train.device=cpu"]
    changes.append("spectrum.draws=3")
    out = run(tmp_path, "resume=auto", "train.max_steps=5", *changes)
    assert summary(out)["steps"] == 5
    assert load_config(out / "config.yaml").config.name == "other"


def test_a_run_of_a_version_that_knew_fewer_keys_resumes(tmp_path, whole):
    """What it did then is what the new keys do by default; with another value it is refused."""
    out = run(tmp_path, *RUNS["augmented"], "train.max_steps=6")
    folder = out / "checkpoints"
    saved = load_checkpoint(folder)
    for key in ("policy", "every_epochs", "fixed_samples"):
        del saved["config"]["curvature"][key]
    del saved["config"]["spectrum"]
    save_checkpoint(folder, 6, saved, keep=1)
    with pytest.raises(ValueError, match=r"curvature\.fixed_samples: False then, True now"):
        run(tmp_path, *RUNS["augmented"], "curvature.fixed_samples=true", "resume=auto")
    assert_same_end(run(tmp_path, *RUNS["augmented"], "resume=auto"), whole("augmented"))


# Refusals --------------------------------------------------------------------------------------


def test_another_configuration_is_refused_and_the_keys_are_named(tmp_path):
    out = run(tmp_path, "train.max_steps=2")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changes = ["resume=auto", "seed=1", "optim.lr=0.2", "model.hidden=[8]", "train.epochs=5"]
    with pytest.raises(ValueError, match="belongs to a run configured otherwise") as caught:
        run(tmp_path, *changes)
    first, *differing, way_out = str(caught.value).splitlines()
    assert first.startswith(str(out / "checkpoints" / "step-00000002.pt"))
    assert differing == [
        "  model.hidden: [16] then, [8] now",
        "  optim.lr: 0.1 then, 0.2 now",
        "  seed: 0 then, 1 now",
        "  train.epochs: 4 then, 5 now",
    ]
    assert way_out.endswith("or start anew with resume=false")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    tiny(tmp_path)
    command = ["train", str(tmp_path / "tiny.yaml"), *changes, "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stderr) == (2, f"{caught.value}\n")


def test_another_optimizer_is_refused(tmp_path):
    run(tmp_path, "train.max_steps=1")
    with pytest.raises(ValueError, match=r"optim\.betas: None then, \[0\.9, 0\.999\] now"):
        run(tmp_path, "resume=auto", "optim.name=adam")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_corrupt_checkpoint_exits_3_and_names_the_good_one(tmp_path):
    config = tmp_path / "tiny.yaml"
    checkpoints = run(tmp_path, "train.max_steps=4") / "checkpoints"
    flip(checkpoints / "step-00000004.pt")
    for resume in ("auto", checkpoints, checkpoints / "step-00000004.pt"):
        command = ["train", str(config), f"resume={resume}", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 3
        assert "step-00000004.pt is corrupt: SHA-256 is " in result.stderr
        good = checkpoints / "step-00000003.pt"
        assert f"the newest good checkpoint before it is {good} (step 3)" in result.stderr
    run(tmp_path, f"resume={good}")
    assert summary(tmp_path / "out")["steps"] == 12


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ("none.pt", r"none\.pt does not exist"),
        ("empty", "resume: no checkpoint in .*empty; give the path of one, or resume=auto"),
    ],
)
def test_a_missing_checkpoint_is_refused_and_leaves_the_earlier_run(tmp_path, resume, words):
    (tmp_path / "empty").mkdir()
    out = run(tmp_path, "train.max_steps=1")
    with pytest.raises(CheckpointError, match=words):
        run(tmp_path, f"resume={tmp_path / resume}")
    assert len(metrics(out)) == 1
    assert not (tmp_path / "out-1").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    for content in ({"weights": torch.zeros(2)}, {"config": {}, "progress": {"steps": 3}}):
        path = save_checkpoint(tmp_path / "strange", 1, content, keep=3)
        with pytest.raises(CheckpointError, match="is not a checkpoint of a run: "):
            run(tmp_path, f"resume={path}")


# Other processes -------------------------------------------------------------------------------


def test_no_process_changes_the_folder_while_another_may_be_reading(tmp_path, monkeypatch):
    """All wait for one another between finding the checkpoint and touching the folder."""
    out, seen = run(tmp_path, "train.max_steps=1"), []
    together = Processes.together

    def watched(*arguments):
        made = together(*arguments)
        seen.append((out / "summary.json").exists())
        return made

    monkeypatch.setattr(Processes, "together", watched)
    run(tmp_path, "train.max_steps=1")
    assert seen == [True, True, False]  # after reading data and checkpoint, and moving aside


@pytest.mark.slow
def test_the_program_interrupted_from_outside_goes_on(tmp_path):
    """SIGINT as a terminal sends it, at an arbitrary moment."""
    tiny(tmp_path)
    overrides = ["optim.lr=auto", "train.epochs=60"]

    def command(out: Path, *more: str) -> list[str]:
        start = [sys.executable, "-m", "batchlr", "train", str(tmp_path / "tiny.yaml")]
        return [*start, *overrides, *more, "--out", str(out)]

    out = tmp_path / "stopped"
    program = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").exists() and len(metrics(out)) >= 3):
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 130
    assert said.startswith("interrupted at step ")
    assert "Traceback" not in said
    assert 0 < len(metrics(out)) < 180
    resumed = subprocess.run(command(out, "resume=auto"), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    assert_same_end(out, tmp_path / "whole")
