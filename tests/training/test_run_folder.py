"""A folder says how its files were made, and is never taken from a run or a user."""

import pytest
from runs import TINY, run, strict_json, tiny
from typer.testing import CliRunner

from batchlr.cli import app
from batchlr.training import analysis, loop, spectra, sweep
from batchlr.training.config import load_config
from batchlr.training.run_folder import is_taken, write_measured

SWEEP = ("--batch-sizes", "64", "--optimizers", "sgd", "--steps", "5")
MEASUREMENTS = {
    "lr": ("lr",),
    "spectrum": ("spectrum",),
    "grid": ("spectrum", "spectrum={batch_sizes: [4], steps: 3, probes: 1}"),
    "sweep": ("sweep", *SWEEP),
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    for module in (analysis, spectra, sweep):
        monkeypatch.setattr(module, "save_figure", lambda *_: None)


@pytest.fixture
def command(tmp_path):
    """Runs a command on the tiny configuration; its files go to ``out``, which it returns."""

    def invoke(name, *arguments):
        path = tmp_path / "tiny.yaml"
        path.write_text(TINY)
        options = [str(argument) for argument in arguments]
        result = CliRunner().invoke(
            app, [name, str(path), "--out", str(tmp_path / "out"), *options]
        )
        assert result.exit_code == 0, result.output
        return tmp_path / "out"

    return invoke


@pytest.mark.parametrize("arguments", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_a_measurement_leaves_its_settings_and_environment(command, tmp_path, arguments):
    out = command(*arguments, "seed=5", "optim.name=adam")
    overrides = [word for word in arguments[1:] if word.startswith("spectrum=")]
    given = load_config(tmp_path / "tiny.yaml", [*overrides, "seed=5", "optim.name=adam"])
    assert load_config(out / "config.yaml").config == given.config
    environment = strict_json((out / "env.json").read_text())
    assert environment["packages"].keys() >= {"batchlr", "torch"}
    assert environment["checkpoints"] == []
    assert environment["notes"] == list(given.notes) != []


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_checkpoint_is_on_record(command, tmp_path, name):
    checkpoint = max((run(tmp_path, out="trained") / "checkpoints").glob("*.pt"))
    out = command(*MEASUREMENTS[name], "--checkpoint", checkpoint)
    assert strict_json((out / "env.json").read_text())["checkpoints"] == [str(checkpoint)]


def test_a_run_that_is_measured_keeps_its_settings(command, tmp_path):
    out = run(tmp_path)
    before = [(out / name).read_bytes() for name in ("config.yaml", "env.json")]
    command("lr", "seed=5")
    assert [(out / name).read_bytes() for name in ("config.yaml", "env.json")] == before


def test_a_run_takes_over_the_folder_of_a_measurement(command, tmp_path):
    out = command("lr", "seed=5")
    run(tmp_path, "train.max_steps=1")
    assert not (tmp_path / "out-1").exists()
    assert (out / "curvature" / "rates.json").exists()
    assert load_config(out / "config.yaml").config.seed == 0
    assert "checkpoints" not in strict_json((out / "env.json").read_text())


def test_the_last_measurement_gives_the_settings(tmp_path):
    for seed in (1, 2):
        write_measured(tiny(tmp_path, f"seed={seed}"), tmp_path / "out")
    assert load_config(tmp_path / "out" / "config.yaml").config.seed == 2


def test_a_user_s_own_file_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 7")
    write_measured(tiny(tmp_path), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "seed: 7"
    assert not (tmp_path / "env.json").exists()


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ((), False),
        (("env.json",), False),
        (("config.yaml",), True),
        (("config.yaml", "env.json"), False),
        (("config.yaml", "env.json", "metrics.jsonl"), True),
        (("config.yaml", "env.json", "checkpoints"), True),
    ],
)
def test_a_folder_is_taken_by_a_run_or_by_a_file_of_the_user(tmp_path, files, taken):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert is_taken(tmp_path) is taken
