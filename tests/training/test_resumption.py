"""Where a run starts, from checkpoints written here by hand."""

import math
from dataclasses import asdict

import pytest
import torch
from runs import assert_same, tiny

from batchlr.training.checkpoint import CheckpointError, save_checkpoint
from batchlr.training.config import load_config
from batchlr.training.distributed import Processes
from batchlr.training.experiment import build_experiment
from batchlr.training.resumption import Progress, _in_samples, flat, start_run
from batchlr.training.run_folder import write_measured

KEPT = Progress(
    step=17,
    epoch=5,
    samples=800,
    trained=6800,
    loss_sum=1.5,
    counted=2,
    first_loss=2.3,
    undone=4,
    events=[{"step": 3, "event": "undone"}],
    last_lr=0.07,
    wall_seconds=3.5,
    result={"test_accuracy": 0.9},
)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def started(tmp_path, out):
    """A function that starts the tiny run, as changed by overrides: experiment and progress."""

    def start(*overrides, rank=0):
        experiment = build_experiment(tiny(tmp_path, *overrides), Processes(rank))
        return experiment, start_run(experiment, out, ["a note"])

    return start


@pytest.fixture
def saved(tmp_path):
    """A function that writes a checkpoint of the tiny run after a step: its path and content."""

    def save(folder, *overrides, progress=None, forget=(), **others):
        config = tiny(tmp_path, *overrides)
        experiment = build_experiment(config)
        with torch.no_grad():
            for parameter in experiment.model.parameters():
                parameter.fill_(0.25)
        experiment.sampler.manual_seed(99)
        settings = config.model_dump(mode="json")
        for key in forget:
            section, _, name = key.rpartition(".")
            del (settings[section] if section else settings)[name]
        state = {
            "config": settings,
            "progress": asdict(KEPT) if progress is None else progress,
            "experiment": experiment.state_dict(),
            **others,
        }
        return save_checkpoint(folder, 17, state, keep=9), state

    return save


def named(tmp_path):
    """The folders beside ``out``, with what a file in each says."""
    return {
        path.name: (path / "mine").read_text() if (path / "mine").exists() else None
        for path in tmp_path.iterdir()
        if path.is_dir()
    }


def earlier_run(out, words):
    out.mkdir()
    (out / "config.yaml").write_text("{}")
    (out / "mine").write_text(words)


# Progress --------------------------------------------------------------------------------------


def test_progress_counts_steps_samples_and_epochs():
    progress = Progress(first_loss=2.0)
    assert math.isnan(progress.mean_loss)
    progress.advance(32, lr=0.1)
    progress.advance(64, lr=0.05)
    progress.loss_sum, progress.counted = 3.0, 4
    assert progress.mean_loss == 0.75
    made = Progress(
        step=2, samples=96, trained=96, loss_sum=3.0, counted=4, first_loss=2.0, last_lr=0.05
    )
    assert progress == made
    progress.close_epoch()
    assert math.isnan(progress.mean_loss)
    assert progress == Progress(step=2, epoch=1, trained=96, first_loss=2.0, last_lr=0.05)
    progress.advance(64, lr=0.01)
    assert (progress.step, progress.samples, progress.trained) == (3, 64, 160)


def test_each_progress_has_events_of_its_own():
    Progress().events.append({"step": 1, "event": "undone"})
    Progress().result["test_loss"] = 1.0
    assert Progress().events == []
    assert Progress().result == {}


def test_a_checkpoint_that_counted_batches_is_read_in_samples():
    old = {"step": 17, "epoch": 1, "batch": 3, "last_lr": 0.1}
    assert _in_samples(old, 400) == {
        "step": 17,
        "epoch": 1,
        "last_lr": 0.1,
        "samples": 1200,
        "trained": 6800,
    }
    today = {"step": 17, "samples": 5}
    assert _in_samples(today, 400) is today


# Anew ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["resume=false"], ["resume=auto"]])
def test_a_new_run_begins_at_zero_and_writes_its_settings(started, out, overrides):
    experiment, progress = started(*overrides)
    fresh = Progress()
    assert math.isnan(progress.last_lr)
    progress.last_lr = fresh.last_lr = 0.0
    assert progress == fresh
    assert load_config(out / "config.yaml").config == experiment.config
    assert '"a note"' in (out / "env.json").read_text()


def test_earlier_runs_move_aside_one_after_another(started, tmp_path, out):
    (tmp_path / "out-2").mkdir()  # of somebody else
    for words in ("first", "second"):
        earlier_run(out, words)
        started()
        out.rename(tmp_path / f"after {words}")
    assert named(tmp_path) == {
        "out-1": "first",
        "out-2": None,
        "out-3": "second",
        "after first": None,
        "after second": None,
    }


def test_without_being_asked_no_checkpoint_is_taken_up(started, saved, tmp_path, out):
    saved(out / "checkpoints")
    (out / "config.yaml").write_text("{}")
    _, progress = started()
    assert progress.step == 0
    assert (tmp_path / "out-1" / "checkpoints").is_dir()


def test_measurements_alone_stay_where_they_are(started, tmp_path, out):
    write_measured(tiny(tmp_path, "seed=3"), out)
    (out / "mine").write_text("a measurement")
    experiment, _ = started()
    assert named(tmp_path) == {"out": "a measurement"}
    assert load_config(out / "config.yaml").config == experiment.config


def test_the_present_folder_cannot_be_moved_aside(started, tmp_path, out, monkeypatch):
    earlier_run(out, "mine")
    monkeypatch.chdir(out)
    words = rf"{out} has a config\.yaml, so it holds an earlier run, .* choose another --out"
    with pytest.raises(ValueError, match=words):
        started()
    experiment = build_experiment(tiny(tmp_path))
    with pytest.raises(ValueError, match=words):
        start_run(experiment, out.relative_to(out), [])
    assert named(tmp_path) == {"out": "mine"}
    assert (out / "config.yaml").read_text() == "{}"


def test_only_the_first_process_touches_the_folder(started, tmp_path, out):
    earlier_run(out, "mine")
    started(rank=1)
    assert named(tmp_path) == {"out": "mine"}
    assert (out / "config.yaml").read_text() == "{}"


# From a checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["auto", "folder", "file", "link"])
def test_a_run_goes_on_in_its_folder_with_all_that_was_saved(
    started, saved, tmp_path, out, way, rank
):
    path, state = saved(out / "checkpoints")
    (out / "config.yaml").write_text("{}")
    (tmp_path / "link").symlink_to(out)
    source = {
        "auto": "auto",
        "folder": path.parent,
        "file": path,
        "link": tmp_path / "link" / "checkpoints" / path.name,
    }[way]
    experiment, progress = started(f"resume={source}", rank=rank)
    assert progress == KEPT
    assert_same(experiment.state_dict(), state["experiment"])
    assert not list(tmp_path.glob("out-*"))
    written = (out / "config.yaml").read_text() != "{}"
    assert written == (rank == 0)


def test_the_newest_checkpoint_is_taken(started, saved, out):
    folder = out / "checkpoints"
    _, state = saved(folder)
    later = {**state, "progress": asdict(KEPT) | {"step": 23}}
    save_checkpoint(folder, 23, later, keep=9)
    assert started("resume=auto")[1].step == 23
    assert started(f"resume={folder}")[1].step == 23


def test_from_another_runs_checkpoint_it_goes_on_in_a_folder_of_its_own(
    started, saved, tmp_path, out
):
    path, _ = saved(tmp_path / "other" / "checkpoints")
    earlier_run(out, "mine")
    _, progress = started(f"resume={path}")
    assert progress == KEPT
    assert named(tmp_path) == {"out": None, "out-1": "mine", "other": None}
    assert path.exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere/step-1.pt", r"nowhere/step-1\.pt does not exist"),
        ("empty", "resume: no checkpoint in .*empty; give the path of one, or resume=auto"),
    ],
)
def test_what_is_not_there_cannot_be_resumed(started, tmp_path, out, place, words):
    (tmp_path / "empty").mkdir()
    earlier_run(out, "mine")
    with pytest.raises(CheckpointError, match=words):
        started(f"resume={tmp_path / place}")
    assert named(tmp_path) == {"empty": None, "out": "mine"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"weights": torch.zeros(2)}, "KeyError"),
        ({"config": {"seed": 0}, "progress": {}}, "KeyError"),
        ({"config": {"batch": {"global_size": 4}}, "progress": {"steps": 3}}, "TypeError"),
        ({"config": {"batch": None}, "progress": {}}, "TypeError"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(started, tmp_path, content, error):
    path = save_checkpoint(tmp_path / "strange", 1, content, keep=3)
    with pytest.raises(CheckpointError, match=rf"step-00000001\.pt is not .* of a run: {error}\("):
        started(f"resume={path}")


# The same run ----------------------------------------------------------------------------------


def test_a_section_becomes_keys_with_points():
    tree = {"a": {"b": 1, "c": {"d": (1, 2), "e": None}}, "f": [3], "g": {}}
    assert flat(tree) == {"a.b": 1, "a.c.d": [1, 2], "a.c.e": None, "f": [3]}


@pytest.mark.parametrize(
    "change",
    [
        "name=other",
        "train.max_steps=5",
        "train.device=cpu",
        "log.every_steps=7",
        "checkpoint.keep=1",
        "dist.strategy=single",
        "spectrum.draws=3",
    ],
)
def test_what_does_not_change_the_run_may_change(started, saved, out, change):
    saved(out / "checkpoints")
    assert started("resume=auto", change)[1] == KEPT


@pytest.mark.parametrize("key", ["root", "path", "download", "workers"])
def test_where_data_come_from_may_change(started, saved, out, key):
    path, state = saved(out / "checkpoints")
    state["config"]["data"][key] = "as on the other machine"
    save_checkpoint(path.parent, 17, state, keep=9)
    assert started("resume=auto")[1] == KEPT


def test_every_other_change_is_refused_by_name_and_changes_nothing(started, saved, tmp_path, out):
    path, _ = saved(out / "checkpoints")
    (out / "config.yaml").write_text("{}")
    changes = ["seed=1", "optim.lr=0.2", "model.hidden=[8]", "train.max_steps=3", "name=other"]
    with pytest.raises(ValueError, match="belongs to a run configured otherwise") as caught:
        started("resume=auto", *changes)
    assert str(caught.value) == (
        f"{path} belongs to a run configured otherwise:\n"
        "  model.hidden: [16] then, [8] now\n"
        "  optim.lr: 0.1 then, 0.2 now\n"
        "  seed: 0 then, 1 now\n"
        "go on with the same configuration, or start anew with resume=false"
    )
    assert (out / "config.yaml").read_text() == "{}"
    assert not list(tmp_path.glob("out-*"))


def test_keys_that_a_version_did_not_know_were_at_their_defaults(started, saved, out):
    forgotten = ["curvature.fixed_samples", "seed"]
    saved(out / "checkpoints", forget=forgotten)
    with pytest.raises(ValueError, match="otherwise:\n  seed: 0 then, 1 now\n"):
        started("resume=auto", "seed=1")
    with pytest.raises(ValueError, match=r"fixed_samples: False then, True now"):
        started("resume=auto", "curvature.fixed_samples=true")
    assert started("resume=auto")[1] == KEPT


def test_keys_that_are_known_no_more_are_named(started, saved, out):
    path, state = saved(out / "checkpoints")
    state["config"]["optim"]["warp"] = 9
    save_checkpoint(path.parent, 18, state, keep=9)
    with pytest.raises(ValueError, match=r"otherwise:\n  optim\.warp: 9 then, None now\n"):
        started("resume=auto")


def test_older_progress_is_resumed_in_samples(started, saved, out):
    old = {key: value for key, value in asdict(KEPT).items() if key not in ("samples", "trained")}
    saved(out / "checkpoints", progress=old | {"batch": 2})
    progress = started("resume=auto")[1]
    assert (progress.samples, progress.trained) == (800, 17 * 400)
