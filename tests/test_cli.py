"""What the command line parses, prints and exits with; the work itself is replaced by fakes."""

import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from batchlr.cli import app, main
from batchlr.measurement.memory_plan import MemoryBudgetError
from batchlr.training.checkpoint import CheckpointError
from batchlr.training.config import load_config
from batchlr.training.data import DataError
from batchlr.training.loop import DivergedError, InterruptedRun

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in an empty folder that has ``run.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("BATCHLR_TRACEBACK", raising=False)
    Path("run.yaml").write_text("optim: {momentum: 0.5}\n")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def calls(monkeypatch):
    """What the commands ask the library to do, instead of doing it."""
    from batchlr.training import analysis, loop, spectra, sweep

    calls = []
    for module, name in (
        (loop, "train"),
        (analysis, "measure_rates"),
        (analysis, "measure_spectrum"),
        (spectra, "measure_spectra"),
        (sweep, "sweep"),
    ):
        monkeypatch.setattr(
            module, name, lambda *args, _name=name, **kwargs: calls.append((_name, args, kwargs))
        )
    return calls


def failing(monkeypatch, error):
    from batchlr.training import loop

    def train(*_):
        raise error

    monkeypatch.setattr(loop, "train", train)


def test_train_hands_on_configuration_folder_and_notes(run, calls):
    result = run("train", "run.yaml", "optim.name=adam", "train.epochs=3", "--out", "there")
    assert result.exit_code == 0
    ((name, (config, out, notes), _),) = calls
    assert (name, out, config.train.epochs, config.optim.name) == (
        "train",
        Path("there"),
        3,
        "adam",
    )
    assert notes == ("optim.momentum does not apply to adam: left out",)
    assert result.stderr == "note: optim.momentum does not apply to adam: left out\n"
    assert result.stdout == ""


def test_the_run_goes_to_a_folder_of_its_name(run, calls):
    assert run("train", "run.yaml").exit_code == 0
    assert run("train", "run.yaml", "name=other").exit_code == 0
    assert [call[1][1] for call in calls] == [Path("runs/run"), Path("runs/other")]


def test_options_may_stand_between_overrides(run, calls):
    result = run("train", "--out", "o", "run.yaml", "seed=1", "optim.lr=0.1")
    assert result.exit_code == 0, result.output
    config = calls[0][1][0]
    assert (config.seed, config.optim.lr) == (1, 0.1)


def test_lr_and_spectrum_hand_on_their_files(run, calls):
    options = ("--checkpoint", "c.pt", "--out", "o")
    assert run("lr", "run.yaml", "seed=2", "--json", "rates.json", *options).exit_code == 0
    assert run("spectrum", "run.yaml", "seed=3", *options).exit_code == 0
    assert run("lr", "run.yaml").exit_code == 0
    common = {"out": Path("o"), "checkpoint": Path("c.pt"), "notes": ()}
    default = {"out": Path("runs/run"), "checkpoint": None, "notes": ()}
    assert [(name, args[0].seed, kwargs) for name, args, kwargs in calls] == [
        ("measure_rates", 2, common | {"json_file": Path("rates.json")}),
        ("measure_spectrum", 3, common),
        ("measure_rates", 0, default | {"json_file": None}),
    ]


def test_a_grid_of_spectra_takes_many_checkpoints(run, calls):
    grid = "spectrum.batch_sizes=[4, 8]"
    two = ("--checkpoint", "a.pt", "--checkpoint", "folder")
    assert run("spectrum", "run.yaml", grid, *two, "--out", "o").exit_code == 0
    assert run("spectrum", "run.yaml", grid).exit_code == 0
    assert [(name, args[0].spectrum.batch_sizes, kwargs) for name, args, kwargs in calls] == [
        (
            "measure_spectra",
            (4, 8),
            {"out": Path("o"), "checkpoints": [Path("a.pt"), Path("folder")], "notes": ()},
        ),
        ("measure_spectra", (4, 8), {"out": Path("runs/run"), "checkpoints": [], "notes": ()}),
    ]
    result = run("spectrum", "run.yaml", *two)
    assert result.exit_code == 2
    assert result.stderr == "2 checkpoints are measured on a grid: set spectrum.batch_sizes\n"
    assert len(calls) == 2


def test_sweep_hands_on_sizes_optimizers_and_steps(run, calls):
    options = ("--batch-sizes", "8, 32", "--optimizers", "adam", "--steps", "50")
    files = ("--checkpoint", "c.pt", "--out", "o")
    adam = ("seed=2", "optim.name=adam")
    assert run("sweep", "run.yaml", *adam, *options, *files).exit_code == 0
    assert run("sweep", "run.yaml").exit_code == 0
    notes = ("optim.momentum does not apply to adam: left out",)
    common = {"batch_sizes": [8, 32], "optimizers": ["adam"], "steps": 50, "notes": notes}
    default = {"batch_sizes": [4, 16, 64, 256], "optimizers": ["sgd", "adam"], "steps": 200}
    default["notes"] = ()
    assert [(name, args[0].seed, kwargs) for name, args, kwargs in calls] == [
        ("sweep", 2, common | {"out": Path("o"), "checkpoint": Path("c.pt")}),
        ("sweep", 0, default | {"out": Path("runs/run"), "checkpoint": None}),
    ]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--batch-sizes", "4,x"), "batch sizes must be positive integers separated by commas"),
        (("--optimizers", "lion"), "optimizers must be sgd, adam or both, separated by a comma"),
        (("--steps", "4"), "Invalid value for '--steps'"),
    ],
)
def test_a_sweep_of_illegal_settings_exits_2(run, calls, options, complaint):
    result = run("sweep", "run.yaml", *options)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("too large"), 2), (ArithmeticError("diverges everywhere"), 4)]
)
def test_a_sweep_that_fails_has_its_exit_code(run, monkeypatch, error, code):
    from batchlr.training import sweep

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sweep, "sweep", fail)
    result = run("sweep", "run.yaml")
    assert (result.exit_code, result.stderr) == (code, f"{error}\n")


@pytest.mark.parametrize(
    "command", [["train"], ["lr"], ["spectrum"], ["sweep"], ["config", "show"]]
)
def test_configuration_errors_exit_2_with_all_problems(run, calls, command):
    result = run(*command, "run.yaml", "train.epoch=3", "seed=-1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "2 problems in the configuration:",
        "  command line 'train.epoch=3': train.epoch: unknown key; did you mean 'epochs'?",
        "  command line 'seed=-1': seed: must be a whole number in [0, 2^32), got -1",
    ]
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "run.yaml", "--nonsense"], "No such option: --nonsense"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_wrong_usage_exits_2_in_plain_text(run, arguments, complaint):
    result = run(*arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "─" not in result.stderr


def failures():
    from batchlr.training.loop import DivergedError, InterruptedRun

    return [
        (ValueError("sizes do not fit"), 2),
        (MemoryBudgetError("memory_budget=1 B does not hold it", 2), 2),
        (DataError("x.npz is missing"), 3),
        (CheckpointError("c.pt is corrupt"), 3),
        (FileNotFoundError("no such file"), 3),
        (DivergedError("loss became nan"), 4),
        (InterruptedRun("checkpoint written"), 130),
    ]


@pytest.mark.parametrize(
    ("error", "code"), failures(), ids=lambda value: type(value).__name__ + str(value)[:3]
)
def test_expected_failures_have_their_exit_code_and_no_traceback(run, monkeypatch, error, code):
    failing(monkeypatch, error)
    result = run("train", "run.yaml")
    assert result.exit_code == code
    assert result.stderr == f"{error}\n"


def test_an_interrupt_before_the_run_exits_130(run, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = run("train", "run.yaml")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_bugs_keep_their_traceback(run, monkeypatch):
    failing(monkeypatch, AttributeError("a bug"))
    assert isinstance(run("train", "run.yaml").exception, AttributeError)


def test_a_traceback_can_be_asked_for(run, monkeypatch):
    failing(monkeypatch, ValueError("where?"))
    monkeypatch.setenv("BATCHLR_TRACEBACK", "1")
    assert isinstance(run("train", "run.yaml").exception, ValueError)


def test_every_process_exits_but_only_the_first_repeats_the_common_error(run, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    result = run("train", "run.yaml", "seed=-1")
    assert (result.exit_code, result.stderr) == (2, "")
    failing(monkeypatch, DataError("this machine lacks the file"))
    result = run("train", "run.yaml", "optim.name=adam")
    assert (result.exit_code, result.stderr) == (3, "rank 3: this machine lacks the file\n")
    for error, code in ((DivergedError("lost"), 4), (InterruptedRun("stopped"), 130)):
        failing(monkeypatch, error)
        result = run("train", "run.yaml", "optim.name=adam")
        assert (result.exit_code, result.stderr) == (code, "")


def test_a_report_is_written_and_named(run):
    Path("out").mkdir()
    missing = run("report", "out")
    assert (missing.exit_code, missing.stdout) == (3, "")
    assert missing.stderr.startswith("out has nothing to report: ")
    line = {"step": 0, "epoch": 0, "loss": 1.0, "lr": 0.1, "momentum": 0.9, "batch_size": 8}
    Path("out/metrics.jsonl").write_text(json.dumps(line))
    for options, path in (((), "out/report.html"), (("--out", "a/b.html"), "a/b.html")):
        result = run("report", "out", *options)
        assert (result.exit_code, result.stdout) == (0, f"{path}\n")
        assert Path(path).read_text().startswith("<!DOCTYPE html>")
    result = run("report", "out", "--out", "a")
    assert result.exit_code == 2
    assert result.stderr == "out must be a file, a is a folder; give a/report.html\n"
    Path("out/summary.json").write_text("{")
    assert run("report", "out").exit_code == 3


def test_data_are_verified_and_fetched(run):
    result = run("data", "verify", "run.yaml", "data.image_size=8")
    assert result.exit_code == 0
    assert result.stdout.startswith("digits: complete and intact\n1437 training images, 1 x 8 x 8")
    result = run("data", "fetch", "run.yaml")
    assert (result.exit_code, result.stdout[:28]) == (0, "digits: nothing to do, it is")
    for command in ("verify", "fetch"):
        result = run("data", command, "run.yaml", "data={name: imagenet, root: nowhere}")
        assert (result.exit_code, result.stdout) == (3, "")
        assert "imagenet: no images in nowhere/train " in result.stderr
        assert run("data", command, "run.yaml", "data.nam=x").exit_code == 2
    result = run("data", "fetch", "run.yaml", "data.name=cifar10", "--url", "cifar.tar.gz")
    assert result.exit_code == 2
    assert "url must begin with https:// or http://, got 'cifar.tar.gz'" in result.stderr


def test_config_show_prints_yaml_that_loads(run):
    result = run("config", "show", "run.yaml", "optim.name=adamw")
    assert result.exit_code == 0
    assert result.stderr == "note: optim.momentum does not apply to adamw: left out\n"
    Path("shown.yaml").write_text(result.stdout)
    assert load_config("shown.yaml").config == load_config("run.yaml", ["optim.name=adamw"]).config
    assert yaml.safe_load(result.stdout)["name"] == "run"


def test_config_check_reports_on_every_file(run):
    Path("bad.yaml").write_text("seed: x\n")
    good = run("config", "check", "run.yaml")
    assert (good.exit_code, good.stdout) == (0, "run.yaml: ok\n")
    both = run("config", "check", "bad.yaml", "run.yaml", "none.yaml")
    assert (both.exit_code, both.stdout) == (2, "run.yaml: ok\n")
    assert "  bad.yaml:1:1: seed: must be" in both.stderr
    assert "  none.yaml: cannot read: No such file" in both.stderr


def test_config_schema_is_json(run):
    schema = json.loads(run("config", "schema").stdout)
    assert {"base", "optim", "resume"} <= schema["properties"].keys()


def test_env_is_json(run):
    environment = json.loads(run("env").stdout)
    assert environment["packages"].keys() >= {"batchlr", "torch"}
    assert environment["packages"]["torch"].startswith("2.")


def test_the_version_is_that_of_the_package(run):
    result = run("--version")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (result.exit_code, result.output) == (0, f"batchlr {project['version']}\n")


def test_no_command_shows_the_commands(run):
    result = run()
    assert result.exit_code == 2
    for command in ("train", "lr", "spectrum", "sweep", "report", "data", "config", "env"):
        assert f"\n  {command} " in result.output


def test_main_takes_arguments_and_exits(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["config", "check", str(tmp_path / "none.yaml")])
    assert caught.value.code == 2
    assert "none.yaml: cannot read" in capsys.readouterr().err


REFUSAL = "1 problem in the configuration:\n  none.yaml: cannot read: No such file or directory\n"


def test_a_script_starts_its_command(tmp_path):
    answer = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", "none.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stderr) == (2, REFUSAL)


def test_the_package_starts_the_same_command(tmp_path, monkeypatch, capsys):
    """As ``python -m batchlr`` does, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["batchlr", "train", "none.yaml"])
    monkeypatch.delitem(sys.modules, "batchlr.__main__", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("batchlr", run_name="__main__")
    assert (caught.value.code, capsys.readouterr().err) == (2, REFUSAL)


@pytest.mark.parametrize("command", ["train", "lr", "spectrum", "sweep"])
def test_a_script_is_its_command(command):
    text = (ROOT / "scripts" / f"{command}.py").read_text(encoding="utf-8")
    assert f'main(["{command}", *sys.argv[1:]])' in text
