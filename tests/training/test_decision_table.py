"""The table that `batchlr explain` prints."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from batchlr import measure_curvature, supervised
from batchlr.batch_size_change import scaling_reach
from batchlr.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_explain_prints_the_table(run):
    result = run("explain", "--from", "128", "--to", "1024", "--optimizer", "adamw", "--lr", "1e-3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].split("  ")[0].strip() == "adamw, batch 128 -> 1024"
    (rate,) = (line for line in lines if line.startswith(" learning rate"))
    assert rate.split()[2] == "0.002828"
    assert "only a measurement tells: run batchlr lr CONFIG" in result.stdout


def test_explain_with_a_report_says_how_far_the_rule_holds(run):
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(64, 3), torch.randint(2, (64,))
    batches = list(zip(x.split(8), y.split(8), strict=True))
    report = measure_curvature(model, supervised(torch.nn.CrossEntropyLoss()), batches)
    report.save(Path("report.json"))
    result = run("explain", "--from", 8, "--to", 64, "--report", "report.json")
    assert result.exit_code == 0, result.output
    assert f"largest stable rate is {report.max_lr(8).value:.3g} at batch 8 (" in result.stdout
    assert "momentum 0, limited by" in result.stdout
    assert f"and {report.max_lr(64).value:.3g} at batch 64 (" in result.stdout
    assert "Carried over from batch 8, the linear rule holds" in result.stdout
    assert "Do not rely" not in result.stdout
    limit = report.max_lr(8).value
    rated = run("explain", "--from", 8, "--to", 64, "--lr", 2 * limit, "--report", "report.json")
    assert f"Your rate of {2 * limit:.4g} is 2 times the limit at batch 8; carr" in rated.stdout
    assert "Noise goes with 1/B - 1/64" in rated.stdout
    beside = ("--optimizer", "adam", "--momentum", 0.95, "--report", "report.json")
    adam = run("explain", "--from", 8, "--to", 64, *beside)
    assert adam.exit_code == 0, adam.output
    beta1 = 0.95**8
    limit = report.max_lr(64, optimizer="adam", momentum=beta1).value
    assert f"and {limit:.3g} at batch 64 (" in adam.stdout
    (row,) = (line for line in adam.stdout.splitlines() if line.startswith(" beta1"))
    assert row.split()[1] == f"{beta1:.4g}"
    refused = run("explain", "--from", 8, "--to", 640, "--report", "report.json")
    assert refused.exit_code == 2
    assert "batch_size must lie in [1, 64], the size of the data set" in refused.stderr


def test_explain_says_first_on_which_limits_not_to_rely(run):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(64, 3), torch.randint(2, (64,))
    loss_fn = supervised(torch.nn.CrossEntropyLoss())
    batches = list(zip(x.split(8), y.split(8), strict=True))
    few = measure_curvature(model, loss_fn, batches[:3], dataset_size=24)
    few.save(Path("few.json"))
    lines = run("explain", "--from", 8, "--to", 16, "--report", "few.json").stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Do not rely"))
    assert lines[first].endswith(": the noise rests on 3 batches: pass 4 or more.")
    assert {"8", "16"} < set(re.findall(r"\d+", lines[first].split(":")[0]))
    assert lines[first + 1].startswith("Measured: ")
    assert "the linear rule would hold" in lines[first + 2]
    # Both limits are near the batches measured, the ends of the rule's reach are not.
    whole = replace(measure_curvature(model, loss_fn, batches), coupled=True)
    whole.save(Path("coupled.json"))
    far = [str(size) for size in scaling_reach(whole, 8) if not 2 <= size <= 32]
    assert far
    told = run("explain", "--from", 8, "--to", 16, "--report", "coupled.json").stdout
    assert f"\nDo not rely on limits at batch {', '.join(far)}: samples of a batch interact" in told
    assert "the linear rule would hold" in told


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (("--from", 0, "--to", 8), 2, "Invalid value for '--from'"),
        (("--from", 8, "--to", 8, "--optimizer", "lion"), 2, "optimizer must be one of sgd, adam"),
        (("--from", 8, "--to", 8, "--report", "no.json"), 3, "no.json is no report; batchlr lr"),
    ],
)
def test_explain_refuses(run, options, code, complaint):
    result = run("explain", *options)
    assert result.exit_code == code
    assert complaint in result.stderr
