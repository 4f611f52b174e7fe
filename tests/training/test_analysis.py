"""What ``batchlr lr`` and ``batchlr spectrum`` print and write is what was measured."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_disk import write_arrays
from runs import NETWORKS, TINY, run, strict_json, tiny
from torch.func import functional_call
from typer.testing import CliRunner

from batchlr import CurvatureReport, measure_curvature
from batchlr.cli import app
from batchlr.mean_square import Dynamics
from batchlr.training import analysis, loop
from batchlr.training.experiment import build_experiment

SIZES = [4, 8, 16, 32, 64, 128, 256, 512, 1024]  # powers of two up to 1437 samples
SMALL = [  # 80 weights, whose Hessian fits on a page
    "data={name: synthetic, num_samples: 60, num_test_samples: 10, num_classes: 3, "
    "image_size: 4, channels: 1}",
    "model.hidden=[4]",
    "batch.global_size=15",
    "curvature.samples=60",
]


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than measuring; one test of each looks at the picture."""
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    if "picture" not in request.node.name:
        monkeypatch.setattr(analysis, "save_figure", lambda *_: None)


@pytest.fixture
def command(tmp_path):
    """Runs a command on the tiny configuration; its files go to ``out``."""

    def invoke(name, *arguments):
        path = tmp_path / "tiny.yaml"
        path.write_text(TINY)
        options = [str(argument) for argument in arguments]
        return CliRunner().invoke(app, [name, str(path), "--out", str(tmp_path / "out"), *options])

    return invoke


def rates(folder):
    return strict_json((folder / "curvature" / "rates.json").read_text())


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def table(text):
    """The cells of the one table in ``text``; between them lie two spaces or more."""
    lines = text.splitlines()
    (rule,) = [number for number, line in enumerate(lines) if "───" in line]
    rows = [lines[rule - 1], *lines[rule + 1 : rule + 1 + len(SIZES)]]
    return [re.split(" {2,}", row.strip()) for row in rows]


# Rates -----------------------------------------------------------------------------------------


def test_lr_writes_rates_report_and_picture(command, tmp_path):
    result = command("lr", "--json", tmp_path / "deep" / "copy.json")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "curvature"
    assert {path.name for path in folder.iterdir()} == {
        "rates.json",
        "rates.png",
        "report.json",
        "report.npz",
    }
    assert is_picture(folder / "rates.png")
    copy = strict_json((tmp_path / "deep" / "copy.json").read_text())
    assert copy == rates(tmp_path / "out")


def test_the_rates_are_those_of_the_saved_report(command, tmp_path):
    assert command("lr").exit_code == 0
    content = rates(tmp_path / "out")
    report = CurvatureReport.load(tmp_path / "out" / "curvature" / "report.json")
    kinds = [(bound["optimizer"], bound["batch_size"]) for bound in content["bounds"]]
    assert kinds == [(kind, size) for kind in ("sgd", "adam") for size in SIZES]
    for bound in content["bounds"]:
        loaded = report.max_lr(bound["batch_size"], optimizer=bound["optimizer"])
        assert bound["value"] == loaded.value
        assert (bound["low"], bound["high"]) == (loaded.low, loaded.high)
        assert bound["momentum"] == 0.9
        assert bound["reliable"] == loaded.reliable
        assert tuple(bound["reasons"]) == loaded.reasons
    assert content["largest_eigenvalue"] == report.largest
    assert content["critical_batch_size"] == report.critical_batch_size
    assert content["num_samples"] == report.num_samples == 64
    assert report.dataset_size == 1437


def test_the_rates_are_those_of_a_measurement_by_hand(command, tmp_path):
    """At the initial weights, on the samples the experiment draws, with the run's weight decay."""
    assert command("lr", "optim.momentum=0.5").exit_code == 0
    experiment = build_experiment(tiny(tmp_path))
    content = rates(tmp_path / "out")
    size = content["num_samples"] // 16  # samples that do not interact: small batches
    report = measure_curvature(
        experiment.model.train(),
        experiment.loss_fn,
        experiment.measurement_batches((size, 16)),
        dataset_size=1437,
        num_eigenpairs=1,
        num_small_batches=0,
        tol=1e-2,
        max_products=30,
        generator=torch.Generator().manual_seed(0),
    )
    assert content["largest_eigenvalue"] == report.largest
    by_hand = report.projected.mean_square(
        Dynamics(0.5, weight_decay=5e-4),
        1 / 64 - 1 / 1437,
        largest=report.largest,
        population=1437,
    )
    assert content["bounds"][SIZES.index(64)]["value"] == pytest.approx(by_hand.lr, rel=1e-9)


def test_adam_is_measured_with_its_own_options(command, tmp_path):
    assert command("lr", "optim={name: adamw, betas: [0.5, 0.9]}").exit_code == 0
    plain = rates(tmp_path / "out")
    assert {bound["momentum"] for bound in plain["bounds"][:9]} == {0.9}  # SGD's default
    assert {bound["momentum"] for bound in plain["bounds"][9:]} == {0.5}
    assert command("lr", "optim={name: adamw, betas: [0.5, 0.9], eps: 10.0}").exit_code == 0
    damped = rates(tmp_path / "out")
    assert damped["bounds"][:9] == plain["bounds"][:9]
    # Divided by ten instead of by the gradient's small size, a step may be far larger.
    for few, many in zip(plain["bounds"][9:], damped["bounds"][9:], strict=True):
        assert many["value"] > 10 * few["value"]


def test_active_clipping_is_said(command):
    result = command("lr", *SMALL, "train.clip_norm=1e-3")
    assert result.exit_code == 0, result.output
    assert "gradient clipping at 0.001 is active: batch gradients" in result.stdout
    assert "gradient clipping" not in command("lr", *SMALL, "train.clip_norm=1e6").stdout


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_table_has_both_optimizers_and_all_sizes(command, tmp_path, monkeypatch, columns):
    """On a narrow terminal too."""
    monkeypatch.setenv("COLUMNS", columns)
    result = command("lr")
    lines = result.stdout.splitlines()
    header, *rows = table(result.stdout)
    assert header == ["batch", "SGD", "90 % interval", "limited by", "Adam", "90 % interval"]
    content = rates(tmp_path / "out")
    for number, size in enumerate(SIZES):
        sgd, adam = content["bounds"][number], content["bounds"][9 + number]
        near_all = " *" if size > 1437 / 4 else ""  # Adam's limit is then a lower bound
        assert (sgd["reliable"], adam["reliable"]) == (True, not near_all)
        assert rows[number] == [
            f"{size}",
            f"{sgd['value']:.3g}",
            f"{sgd['low']:.2g} .. {sgd['high']:.2g}",
            sgd["regime"],
            f"{adam['value']:.3g}{near_all}",
            f"{adam['low']:.2g} .. {adam['high']:.2g}",
        ]
    assert lines[0].startswith("measuring 64 samples in ")
    assert "critical batch size" in lines[1]
    assert "\nMarked rates are not reliable:\n* Adam's curvature near the full " in result.stdout
    assert lines[-1].startswith(f"Measured with {content['num_products']} products over 64 ")


@pytest.mark.parametrize("samples", [16, 96])
def test_more_samples_than_asked_for_are_explained(command, samples):
    """Batch norm in train mode: eight batches, of at least one batch's size of samples."""
    result = command("lr", *NETWORKS["batch norm"], f"curvature.samples={samples}")
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[0]
    explained = first.endswith(
        f"; curvature.samples asks for {samples}, but with train-mode batch norm the noise does "
        "not show in fewer batches ..."
    )
    assert explained == (samples == 16)


def test_unreliable_rates_are_marked_with_their_reason(command):
    result = command("lr", "curvature.samples=3")
    assert result.exit_code == 0, result.output
    assert "* the noise rests on 3 batches: pass 4 or more" in result.stdout.splitlines()
    _, *rows = table(result.stdout)
    assert all("*" in row[1] and "*" in row[4] for row in rows)


def test_a_rate_of_adam_that_is_unreliable_is_marked_and_sgd_s_is_not(command, monkeypatch):
    measure = analysis.measure_curvature

    def unsettled(*args, **kwargs):
        report = measure(*args, **kwargs)
        return replace(report, adam=replace(report.adam, converged=False))

    monkeypatch.setattr(analysis, "measure_curvature", unsettled)
    result = command("lr")
    reason = "allow more products, and measure for this optimizer"
    assert f"* the largest eigenvalue did not converge: {reason}" in result.stdout.splitlines()
    assert all("*" in row[4] and "*" not in row[1] for row in table(result.stdout)[1:])


def test_a_checkpoint_is_where_it_measures(command, tmp_path):
    trained = run(tmp_path, *SMALL, out="trained")

    def largest(*options):
        assert command("lr", *SMALL, *options).exit_code == 0
        return rates(tmp_path / "out")["largest_eigenvalue"]

    initial, checkpoints = largest(), trained / "checkpoints"
    newest, last, earlier = (
        largest("--checkpoint", where)
        for where in (
            checkpoints,
            checkpoints / "step-00000016.pt",
            checkpoints / "step-00000012.pt",
        )
    )
    assert newest == last != pytest.approx(initial)
    assert earlier != last


@pytest.mark.parametrize("name", ["lr", "spectrum"])
def test_a_checkpoint_of_another_model_exits_3(command, tmp_path, name):
    path = run(tmp_path, "train.max_steps=1", out="trained") / "checkpoints" / "step-00000001.pt"
    result = command(name, "--checkpoint", path, "model.hidden=[8]")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"{path} does not fit the configured model: ")
    assert "layers.1.weight" in result.stderr
    assert not (tmp_path / "out").exists()
    missing = command(name, "--checkpoint", tmp_path / "none.pt")
    assert (missing.exit_code, "none.pt does not exist" in missing.stderr) == (3, True)


def test_few_samples_make_one_row(command, tmp_path):
    data = "data={name: synthetic, num_samples: 3, num_test_samples: 2, num_classes: 3}"
    assert command("lr", data, "batch.global_size=1").exit_code == 0
    assert [bound["batch_size"] for bound in rates(tmp_path / "out")["bounds"]] == [3, 3]


def arrays_of(scale, tmp_path):
    signs = np.random.default_rng(0).choice([-1, 1], (12, 2, 8, 8))
    pixels = (scale * signs).astype(np.float32)
    path = write_arrays(tmp_path / "huge.npz", x_train=pixels, x_test=pixels[:6])
    return [f"data={{name: arrays, path: {path}}}", "model.hidden=[]", "batch.global_size=4"]


@pytest.mark.parametrize("name", ["lr", "spectrum"])
def test_a_loss_that_is_not_finite_exits_4(command, tmp_path, name):
    result = command(name, *arrays_of(3e38, tmp_path))
    assert result.exit_code == 4
    assert "the loss is " in result.stderr
    assert "Traceback" not in result.output


def test_a_budget_that_holds_no_report_exits_2(command):
    result = command("lr", "curvature.memory_budget=1")
    assert result.exit_code == 2
    assert "memory_budget=1 B does not hold a measurement" in result.stderr


def test_a_large_budget_changes_no_rate(command, tmp_path):
    tables = []
    for options in ([], ["curvature.memory_budget=1 GiB"]):
        assert command("lr", *options).exit_code == 0
        tables.append(rates(tmp_path / "out"))
        del tables[-1]["gradient_equivalents"], tables[-1]["seconds"]  # what a clock says
    free, budgeted = tables
    assert budgeted == free


def test_a_loss_without_curvature_exits_4(command, tmp_path):
    """Saturated outputs: the softmax is exactly one or zero."""
    result = command("lr", *arrays_of(1e6, tmp_path))
    assert result.exit_code == 4
    assert "no curvature limits the rate here" in result.stderr


# Spectrum --------------------------------------------------------------------------------------


def dense_hessian(experiment):
    """By torch's own ``hessian``, over all samples measured."""
    images, labels = (
        torch.cat(parts) for parts in zip(*experiment.measurement_batches(), strict=True)
    )
    weights = {name: p.detach().double() for name, p in experiment.model.named_parameters()}
    flat = torch.cat([w.flatten() for w in weights.values()])

    def loss(vector):
        pieces = vector.split([w.numel() for w in weights.values()])
        shaped = {
            name: piece.view_as(w) for (name, w), piece in zip(weights.items(), pieces, strict=True)
        }
        outputs = functional_call(experiment.model.double(), shaped, (images.double(),))
        return F.cross_entropy(outputs, labels)

    return torch.autograd.functional.hessian(loss, flat)


def test_the_spectrum_is_that_of_the_dense_hessian(command, tmp_path):
    result = command("spectrum", *SMALL)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "curvature"
    content = strict_json((folder / "spectrum.json").read_text())
    hessian = dense_hessian(build_experiment(tiny(tmp_path, *SMALL)))
    values = torch.linalg.eigvalsh(hessian)
    scale = float(values[-1])
    assert content["num_params"] == len(hessian) == 16 * 4 + 4 + 4 * 3 + 3
    assert content["num_samples"] == 60
    # An eigenvalue lies within the bound, here the end itself; float32 adds 1e-6 of the norm.
    for key, value, bound in zip(
        ("largest_eigenvalue", "smallest_eigenvalue"),
        (values[-1], values[0]),
        (content["bounds"][0], content["bounds"][-1]),
        strict=True,
    ):
        assert content[key] == pytest.approx(float(value), abs=bound + 1e-5 * scale)
    trace, square = hessian.trace() / len(hessian), hessian.square().sum() / len(hessian)
    assert abs(content["mean"] - trace) < 4 * content["mean_stderr"]
    assert abs(content["second_moment"] - square) < 4 * content["second_moment_stderr"]
    assert content["mean_stderr"] < 0.5 * content["mean"]  # else that says nothing
    with np.load(folder / "spectrum.npz", allow_pickle=False) as arrays:
        nodes, weights, probes = (arrays[name] for name in ("nodes", "weights", "probes"))
    assert weights.sum() == pytest.approx(1, rel=1e-9)
    assert weights @ nodes == pytest.approx(content["mean"], rel=1e-9)
    assert weights @ nodes**2 == pytest.approx(content["second_moment"], rel=1e-9)
    assert set(probes) == set(range(content["num_probes"]))
    assert nodes.max() == pytest.approx(scale, rel=1e-3)
    assert nodes.min() >= float(values[0]) - 1e-4 * scale
    assert np.abs(nodes).min() < 1e-9 * scale  # the node at zero
    first, record = result.stdout.splitlines()
    low, high = content["smallest_eigenvalue"], content["largest_eigenvalue"]
    assert first.startswith(
        f"The Hessian of 60 samples, in 83 parameters, has eigenvalues from {low:.4g} (to within "
    )
    assert f" to {high:.4g} (to within {content['bounds'][0]:.1g}); their mean is " in first
    assert record.startswith(f"It took {content['num_products']} products in ")


def test_the_spectrum_is_of_all_samples_asked_for(command, tmp_path):
    """While training with batches of 400 it would be 200."""
    short = "spectrum={steps: 2, probes: 1}"
    assert command("spectrum", "curvature.samples=900", short).exit_code == 0
    content = strict_json((tmp_path / "out" / "curvature" / "spectrum.json").read_text())
    assert content["num_samples"] == 900


def test_hessian_is_gauss_newton_plus_residual(command, tmp_path):
    """Means are traces over P, and all three are measured with the same probes."""
    means = {}
    for matrix in ("hessian", "ggn", "residual"):
        steps = ["spectrum={steps: 10, probes: 2}", f"spectrum.matrix={matrix}"]
        assert command("spectrum", *SMALL, *steps).exit_code == 0
        content = strict_json((tmp_path / "out" / "curvature" / "spectrum.json").read_text())
        assert (content["matrix"], content["num_probes"]) == (matrix, 2)
        means[matrix] = content["mean"]
        if matrix == "ggn":
            assert content["smallest_eigenvalue"] > -1e-5 * content["largest_eigenvalue"]
    assert abs(means["residual"]) > 1e-3 * means["ggn"]  # else the sum says nothing
    assert means["hessian"] == pytest.approx(means["ggn"] + means["residual"], rel=1e-5)


def test_graphs_of_many_samples_are_not_kept_and_nothing_else_changes(
    command, tmp_path, monkeypatch
):
    path = tmp_path / "out" / "curvature" / "spectrum.json"
    steps = "spectrum={steps: 5, probes: 1}"
    assert command("spectrum", *SMALL, steps).exit_code == 0
    kept = strict_json(path.read_text())
    monkeypatch.setattr(analysis, "_KEPT_SAMPLES", 59)
    assert command("spectrum", *SMALL, steps).exit_code == 0
    again = strict_json(path.read_text())
    assert {**again, "seconds": 0} == {**kept, "seconds": 0}


def test_spectrum_writes_a_picture(command, tmp_path):
    assert command("spectrum", *SMALL).exit_code == 0
    folder = tmp_path / "out" / "curvature"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".npz", ".png"}
    assert is_picture(folder / "spectrum.png")


def test_the_spectrum_of_a_checkpoint_differs(command, tmp_path):
    checkpoints = run(tmp_path, *SMALL, out="trained") / "checkpoints"
    path = tmp_path / "out" / "curvature" / "spectrum.json"
    assert command("spectrum", *SMALL).exit_code == 0
    initial = json.loads(path.read_text())
    assert command("spectrum", *SMALL, "--checkpoint", checkpoints).exit_code == 0
    assert json.loads(path.read_text())["mean"] != pytest.approx(initial["mean"], rel=0.05)


def test_the_mode_of_batch_norm_is_the_configured_one(command, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "_END_STEPS", 5)
    found = {}
    path = tmp_path / "out" / "curvature" / "spectrum.json"
    for mode in ("train", "eval"):
        overrides = [*NETWORKS["batch norm"], f"curvature={{samples: 16, norm_mode: {mode}}}"]
        overrides.append("spectrum={steps: 5, probes: 1}")
        assert command("spectrum", *overrides).exit_code == 0
        found[mode] = json.loads(path.read_text())
        assert found[mode]["norm_mode"] == mode
    ratio = found["train"]["largest_eigenvalue"] / found["eval"]["largest_eigenvalue"]
    assert abs(math.log(ratio)) > 0.1
