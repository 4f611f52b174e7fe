"""Every recipe takes two real steps: full networks, real loop, files as they lie on a disk.

Overrides change sizes only. Pixels are random, so nothing is said about accuracy.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from batchlr.cli import app
from batchlr.policies import POLICIES
from batchlr.training import loop, spectra
from batchlr.training.checkpoint import load_checkpoint
from batchlr.training.config import load_config
from training.conftest import fake_cifar_checksums  # noqa: F401 - a fixture
from training.on_disk import write_cifar10, write_cifar100, write_imagefolder

CONFIGS = Path(__file__).parents[1] / "configs"
# The cheapest SGD, auto and Adam recipe, and an ImageNet one; each of the others takes longer.
QUICK = {"vgg16_swa", "preresnet110_auto", "vgg16_adamw_b128", "vgg16_ssgdmn", "resnet50_tv"}
SIZES = ["batch.global_size=4", "train.max_steps=2", "train.device=cpu"]
MEASURED_SIZES = ["curvature.samples=8", "curvature.max_products=4"]
QUICKLY_MEASURED_SIZES = ["curvature.samples=4", "curvature.max_products=2"]


def recipes(folder):
    return [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
        for path in sorted((CONFIGS / folder).glob("*.yaml"))
    ]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Folder of the run, removed afterwards: checkpoints of real networks are large."""
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def assert_two_steps(path, out, overrides):
    config = load_config(path).config
    automatic = config.optim.lr == "auto"
    # Without their 20 Lanczos steps the published rates can be too large by orders of magnitude,
    # except for paper_nesterov's, which is never above 1.
    whole = config.curvature.policy in {
        "paper_sgd",
        "paper_momentum",
        "paper_momentum_as_published",
    }
    measured = QUICKLY_MEASURED_SIZES if path.stem in QUICK else MEASURED_SIZES
    measured = measured[:1] if whole else measured
    sizes = [*SIZES, *overrides, *(measured if automatic else [])]
    result = CliRunner().invoke(app, ["train", str(path), *sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["diverged"]) == (2, False)
    assert math.isfinite(summary["test_loss"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if config.curvature.policy in POLICIES and automatic:
        assert [line.get("failure") for line in lines] == [None]  # measured once; one line in 50
        assert lines[0]["peak_lr"] > 0
    elif automatic:
        assert [line["failure"] for line in lines] == [None, None]
        assert all(line["max_lr"] > 0 for line in lines)
    else:
        assert lines[0]["lr"] == config.optim.lr
    checkpoints = sorted((out / "checkpoints").glob("*.pt"))
    before, after = (load_checkpoint(path)["experiment"]["model"] for path in checkpoints)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    trained = [name for name in before if name.endswith("weight")]
    still = [name for name in trained if torch.equal(before[name], after[name])]
    # A measured rate may be too small to move a batch norm's ones by their last bit.
    assert len(still) < len(trained) if automatic else not still


@pytest.mark.parametrize("path", recipes("cifar100"))
def test_a_cifar_recipe_runs(path, out, tmp_path, request):
    write_cifar100(tmp_path / "data")
    request.getfixturevalue("fake_cifar_checksums")(tmp_path / "data")
    assert_two_steps(path, out, [f"data.root={tmp_path / 'data'}"])


@pytest.mark.parametrize("path", recipes("paper"))
def test_a_recipe_of_the_paper_runs(path, out, tmp_path, request):
    write_cifar100(tmp_path / "data")
    write_cifar10(tmp_path / "data")
    request.getfixturevalue("fake_cifar_checksums")(tmp_path / "data")
    assert_two_steps(path, out, [f"data.root={tmp_path / 'data'}"])


@pytest.mark.parametrize(
    "name", ["vgg16_spectra", pytest.param("wrn28x10_spectra", marks=pytest.mark.slow)]
)
def test_a_grid_of_the_paper_measures(name, out, tmp_path, request, monkeypatch):
    """Its smallest batches: a single image leaves batch norm no other sample."""
    monkeypatch.setattr(spectra, "save_figure", lambda *_: None)
    write_cifar100(tmp_path / "data")
    request.getfixturevalue("fake_cifar_checksums")(tmp_path / "data")
    sizes = ["spectrum.batch_sizes=[1, 2]", "spectrum.draws=1", "spectrum.steps=2"]
    sizes += ["batch.global_size=4", "train.device=cpu"]
    command = [
        "spectrum",
        str(CONFIGS / "paper" / f"{name}.yaml"),
        f"data.root={tmp_path / 'data'}",
    ]
    result = CliRunner().invoke(app, [*command, *sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    text = (out / "curvature" / "spectra.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["batch_size"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["largest"]) for line in lines)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_demo_runs_with_a_published_policy(policy, out):
    path = CONFIGS / "demo" / "digits_vgg.yaml"
    overrides = [f"curvature.policy={policy}", "curvature.samples=8", "train.max_steps=3"]
    overrides.append("model.width=0.03")
    result = CliRunner().invoke(app, ["train", str(path), *overrides, "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["failure"] for line in lines] == [None, None, None]
    assert all(line["products"] == 20 and line["peak_lr"] > 0 for line in lines)
    momenta = {line["momentum"] for line in lines}
    assert momenta == {0.0} if policy == "paper_sgd" else 0.9 not in momenta


@pytest.mark.parametrize("path", recipes("imagenet"))
def test_an_imagenet_recipe_runs(path, out, tmp_path):
    write_imagefolder(tmp_path / "data")
    smaller = ["data.image_size=64", "data.workers=0"]
    assert_two_steps(path, out, [f"data.root={tmp_path / 'data'}", *smaller])


def test_the_quick_ones_are_of_each_kind():
    found = {path.stem: path for path in CONFIGS.rglob("*.yaml") if path.stem in QUICK}
    assert found.keys() == QUICK
    kinds = {
        (path.parent.name, config.optim.name, config.optim.lr == "auto")
        for path in found.values()
        for config in [load_config(path).config]
    }
    assert kinds >= {
        ("cifar100", "sgd", False),
        ("cifar100", "sgd", True),
        ("paper", "adamw", False),
        ("paper", "sgd", True),
        ("imagenet", "sgd", False),
    }
