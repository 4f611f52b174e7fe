"""The grid measures what it says, and goes on with what is missing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_disk import write_arrays
from runs import NETWORKS, TINY, run, strict_json, tiny
from torch.func import functional_call
from typer.testing import CliRunner

from batchlr.cli import app
from batchlr.training import loop, spectra
from batchlr.training.data import measurement_batches
from batchlr.training.experiment import build_experiment

SMALL = [
    "data={name: synthetic, num_samples: 60, num_test_samples: 10, num_classes: 3, "
    "image_size: 4, channels: 1}",
    "model.hidden=[4]",
    "batch.global_size=15",
]
GRID = ["spectrum={batch_sizes: [2, 8], draws: 3, steps: 12, probes: 1}"]


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    if "picture" not in request.node.name:
        monkeypatch.setattr(spectra, "save_figure", lambda *_: None)


@pytest.fixture
def grid(tmp_path):
    """Runs ``batchlr spectrum`` on the tiny configuration; its files go to ``out``."""

    def invoke(*arguments, code=0):
        path = tmp_path / "tiny.yaml"
        path.write_text(TINY)
        options = [str(argument) for argument in arguments]
        command = ["spectrum", str(path), "--out", str(tmp_path / "out"), *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, result.output
        return result

    return invoke


def lines(folder):
    path = folder / "out" / "curvature" / "spectra.jsonl"
    return [strict_json(line) for line in path.read_text().splitlines()]


def hessian(experiment, batch):
    """Of the mean loss over a batch, by torch's own ``hessian``."""
    images, labels = batch
    model = experiment.model.double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([w.flatten() for w in weights.values()])

    def loss(vector):
        pieces = vector.split([w.numel() for w in weights.values()])
        shaped = {
            name: piece.view_as(w) for (name, w), piece in zip(weights.items(), pieces, strict=True)
        }
        return F.cross_entropy(functional_call(model, shaped, (images.double(),)), labels)

    return torch.autograd.functional.hessian(loss, flat)


def test_each_cell_is_the_spectrum_of_one_batch(grid, tmp_path):
    result = grid(*SMALL, *GRID, "spectrum.steps=40")
    found = lines(tmp_path)
    cells = [(line["batch_size"], line["draw"]) for line in found]
    assert cells == [(size, draw) for size in (2, 8) for draw in range(3)]
    experiment = build_experiment(tiny(tmp_path, *SMALL))
    for line in found:
        (batch,) = measurement_batches(
            experiment.data,
            batch_size=line["batch_size"],
            num_batches=1,
            generator=torch.Generator().manual_seed(line["draw"]),
        )
        values = torch.linalg.eigvalsh(hessian(experiment, batch))
        # 40 steps resolve the ends of 83 eigenvalues; float32 leaves 1e-5 of the norm.
        scale = float(values[-1])
        assert line["largest"] == pytest.approx(scale, rel=1e-4)
        assert line["smallest"] == pytest.approx(float(values[0]), abs=1e-3 * scale)
        assert (line["matrix"], line["checkpoint"], line["epoch"]) == ("hessian", None, 0)
        assert (line["num_products"], line["num_params"]) == (40, 83)
        with np.load(tmp_path / "out" / "curvature" / line["file"]) as arrays:
            assert arrays["nodes"].max() == line["largest"]
            assert arrays["nodes"].min() == line["smallest"]
            assert arrays["weights"].sum() == pytest.approx(1, rel=1e-9)
    *cells, last = result.stdout.splitlines()
    assert cells[0].startswith("epoch 0  batch 2  draw 0  eigenvalues from ")
    assert len(cells) == 6
    assert last.startswith("6 spectra; record in ")


def test_finished_cells_are_kept_and_missing_ones_measured(grid, tmp_path):
    grid(*SMALL, *GRID)
    record = tmp_path / "out" / "curvature" / "spectra.jsonl"
    whole = record.read_text()
    first = lines(tmp_path)
    assert grid(*SMALL, *GRID).stdout.startswith("6 spectra; record in ")
    assert record.read_text() == whole
    # A kill in the middle of a line, and a file that was lost.
    record.write_text(whole[: whole.rfind("{") + 30])
    (tmp_path / "out" / "curvature" / first[1]["file"]).unlink()
    measured = grid(*SMALL, *GRID).stdout.splitlines()[:-1]
    assert [line.split("  eigen")[0] for line in measured] == [
        "epoch 0  batch 2  draw 1",
        "epoch 0  batch 8  draw 2",
    ]
    again = {(line["batch_size"], line["draw"]): line["largest"] for line in lines(tmp_path)}
    assert again == {(line["batch_size"], line["draw"]): line["largest"] for line in first}
    more = grid(*SMALL, *GRID, "spectrum.draws=4").stdout.splitlines()
    assert len(more) == 3
    assert more[-1].startswith("8 spectra; ")


@pytest.mark.parametrize(
    "change",
    ["spectrum.matrix=ggn", "spectrum.steps=11", "seed=5", "model.hidden=[5]", "data.noise=2"],
)
def test_cells_of_another_setting_are_not_taken_for_finished(grid, tmp_path, change):
    one = ["spectrum={batch_sizes: [4], steps: 12}"]
    grid(*SMALL, *one)
    grid(*SMALL, *one, change)
    before, after = lines(tmp_path)
    assert before["setting"] != after["setting"]
    assert before["largest"] != after["largest"]


def test_a_folder_stands_for_all_its_checkpoints(grid, tmp_path):
    trained = run(tmp_path, *SMALL, "checkpoint={every_epochs: 1, keep: 9}", out="trained")
    folder = trained / "checkpoints"
    one = ["spectrum={batch_sizes: [4], steps: 12}"]
    grid(*SMALL, *one, "--checkpoint", folder)
    found = lines(tmp_path)
    assert [(line["epoch"], line["step"]) for line in found] == [
        (epoch, 4 * epoch) for epoch in range(5)
    ]
    assert len({line["largest"] for line in found}) == 5
    last = folder / "step-00000016.pt"
    result = grid(*SMALL, *one, "--checkpoint", last, "--checkpoint", folder)
    assert result.stdout.startswith("5 spectra; ")  # each once, none anew
    grid(*SMALL, *one)
    start, initial = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert start["checkpoint"].endswith("step-00000000.pt")
    assert initial["checkpoint"] is None
    assert initial["largest"] == start["largest"]


def test_dropout_is_off_and_norms_are_as_configured(grid, tmp_path):
    one = "spectrum={batch_sizes: [4], steps: 3}"
    found = {}
    for share in (0.0, 0.5):
        grid(*NETWORKS["dropout"], f"model.dropout={share}", one)
        found[share] = lines(tmp_path)[-1]["largest"]
    assert found[0.0] == found[0.5]
    for mode in ("train", "eval"):
        grid(*NETWORKS["batch norm"], one, f"curvature.norm_mode={mode}")
        assert lines(tmp_path)[-1]["norm_mode"] == mode
        found[mode] = lines(tmp_path)[-1]["largest"]
    assert found["train"] != pytest.approx(found["eval"], rel=0.05)


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_measured(grid, tmp_path):
    result = grid(*SMALL, "spectrum={batch_sizes: [4, 61]}", code=2)
    assert result.stderr == "batch_size 61 is larger than the 60 samples of synthetic\n"
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_missing_or_of_another_model_exits_3(grid, tmp_path):
    one = "spectrum={batch_sizes: [4], steps: 3}"
    folder = run(tmp_path, *SMALL, "train.max_steps=1", out="trained") / "checkpoints"
    result = grid(*SMALL, one, "model.hidden=[8]", "--checkpoint", folder, code=3)
    assert "does not fit the configured model: " in result.stderr
    missing = grid(*SMALL, one, "--checkpoint", tmp_path / "none.pt", code=3)
    assert "none.pt does not exist" in missing.stderr
    (tmp_path / "empty").mkdir()
    empty = grid(*SMALL, one, "--checkpoint", tmp_path / "empty", code=3)
    assert empty.stderr == f"no checkpoint in {tmp_path / 'empty'}\n"
    (folder / "stray.pt").write_bytes(b"")
    stray = grid(*SMALL, one, "--checkpoint", folder / "stray.pt", code=3)
    assert "stray.pt cannot be verified: no manifest.json beside it lists it" in stray.stderr


def test_a_loss_that_is_not_finite_exits_4(grid, tmp_path):
    signs = np.random.default_rng(0).choice([-1, 1], (12, 2, 8, 8))
    pixels = (3e38 * signs).astype(np.float32)
    path = write_arrays(tmp_path / "huge.npz", x_train=pixels, x_test=pixels[:6])
    data = [f"data={{name: arrays, path: {path}}}", "model.hidden=[]", "batch.global_size=4"]
    result = grid(*data, "spectrum.batch_sizes=[4]", code=4)
    assert "on draw 0 of 4 samples; its curvature has no meaning there" in result.stderr


def test_there_is_a_picture(grid, tmp_path):
    grid(*SMALL, "spectrum={batch_sizes: [2, 4], steps: 3}")
    picture = tmp_path / "out" / "curvature" / "spectra.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_folder_is_named_as_it_is(grid, tmp_path):
    out = tmp_path / ":x:"
    result = grid(*SMALL, "spectrum={batch_sizes: [2], draws: 1, steps: 2}", "--out", out)
    assert result.stdout.splitlines()[-1] == f"1 spectra; record in {out / 'curvature'}"
