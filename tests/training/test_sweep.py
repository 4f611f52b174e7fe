"""The rate that training survives: found where it is known, recorded once, drawn and tabulated."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from runs import NETWORKS, run, strict_json, tiny

from batchlr.training import sweep as module
from batchlr.training.experiment import build_experiment
from batchlr.training.survival import Survival
from batchlr.training.sweep import (
    SweepCell,
    parse_batch_sizes,
    parse_optimizers,
    sweep,
)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than a tiny sweep; one test looks at the picture."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(module, "save_figure", lambda *_: None)


# What the command line says -----------------------------------------------------------------------


@pytest.mark.parametrize(("text", "sizes"), [("4", [4]), ("4,16", [4, 16]), (" 64 , 8 ", [64, 8])])
def test_batch_sizes_are_numbers_between_commas(text, sizes):
    assert parse_batch_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "4,", "0", "-4", "4.0", "four", "4;8"])
def test_other_batch_sizes_are_refused(text):
    with pytest.raises(
        ValueError, match=f"batch sizes must be positive integers separated by commas, got '{text}'"
    ):
        parse_batch_sizes(text)


@pytest.mark.parametrize(
    ("text", "kinds"), [("sgd", ["sgd"]), ("adam, sgd", ["adam", "sgd"]), ("adam", ["adam"])]
)
def test_optimizers_are_names_between_commas(text, kinds):
    assert parse_optimizers(text) == kinds


@pytest.mark.parametrize("text", ["", "lion", "sgd,", "SGD", "sgd adam"])
def test_other_optimizers_are_refused(text):
    with pytest.raises(ValueError, match=f"optimizers must be sgd, adam or both, .* got '{text}'"):
        parse_optimizers(text)


# The sweep ---------------------------------------------------------------------------------------

FEW = {"batch_sizes": (16, 64), "optimizers": ("sgd",), "steps": 8}


@pytest.fixture
def training(monkeypatch):
    """Counts the searches and the measurements that a sweep makes; the searches are faked.

    Measurements take few products: how they are asked for is the sweep's, how good they are not.
    """
    calls = SimpleNamespace(searched=[], measured=[])
    measure = module.measure_curvature

    def search(model, loss_fn, samples, **options):
        calls.searched.append((len(samples[0]), options))
        return Survival(options["start"] / 2, options["start"], 3)

    def measured(model, loss_fn, batches, **options):
        calls.measured.append((len(batches), len(batches[0][0]), options))
        return measure(model, loss_fn, batches, **options | {"max_products": 3})

    monkeypatch.setattr(module, "largest_survivable_lr", search)
    monkeypatch.setattr(module, "measure_curvature", measured)
    return calls


def lines(out):
    path = out / "curvature" / "sweep.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sweep_trains_and_writes_cells_table_and_picture(tmp_path, capsys):
    cells = sweep(tiny(tmp_path), out=tmp_path / "out", **FEW)
    assert [(cell.optimizer, cell.batch_size, cell.steps) for cell in cells] == [
        ("sgd", 16, 8),
        ("sgd", 64, 8),
    ]
    for cell in cells:
        assert 0 < cell.low <= cell.predicted <= cell.high
        assert 0 < cell.survived < cell.diverged
        assert cell.momentum == 0.9
        assert cell.paper > 0
    folder = tmp_path / "out" / "curvature"
    assert {p.name for p in folder.iterdir()} == {"sweep.jsonl", "sweep.json", "sweep.png"}
    assert (folder / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    settings = json.loads((folder / "sweep.json").read_text())
    assert (settings["steps"], settings["weights"], settings["model.name"]) == (8, None, "mlp")
    assert lines(tmp_path / "out") == [
        asdict(cell) | {"reasons": list(cell.reasons)} for cell in cells
    ]
    text = capsys.readouterr().out
    for cell in cells:
        assert f"sgd at batch {cell.batch_size}: predicted {cell.predicted:.3g}, survived" in text
    for title in ("optimizer", "predicted", "90 % interval", "survived", "ratio", "paper"):
        assert title in text
    assert "does not diverge within 8 steps, to a factor 1.2" in text
    for reason in {reason for cell in cells for reason in cell.reasons}:
        assert f" {reason}\n" in text


def test_the_rates_predicted_are_where_the_search_starts(tmp_path, training):
    config = tiny(tmp_path, "seed=3")
    cells = sweep(config, out=tmp_path / "out", **FEW | {"optimizers": ("sgd", "adam")})
    assert [(options["optimizer"], options["batch_size"]) for _, options in training.searched] == [
        ("sgd", 16),
        ("sgd", 64),
        ("adam", 16),
        ("adam", 64),
    ]
    for cell, (count, options) in zip(cells, training.searched, strict=True):
        assert count == 1437  # all of the training data
        assert options["start"] == cell.predicted
        assert options["momentum"] == cell.momentum == 0.9
        assert (options["steps"], options["seed"]) == (8, 3)
        assert options["worst_loss"] == math.log(10)
        assert (cell.survived, cell.diverged) == (cell.predicted / 2, cell.predicted)


def test_momentum_is_the_run_s_for_its_own_optimizer(tmp_path, training):
    adam = tiny(tmp_path, "optim={name: adamw, betas: [0.5, 0.99]}")
    cells = sweep(adam, out=tmp_path / "a", **FEW | {"optimizers": ("adam", "sgd")})
    assert [cell.momentum for cell in cells] == [0.5, 0.5, 0.9, 0.9]
    sgd = tiny(tmp_path, "optim.momentum=0.3")
    cells = sweep(sgd, out=tmp_path / "b", **FEW | {"optimizers": ("adam", "sgd")})
    assert [cell.momentum for cell in cells] == [0.9, 0.9, 0.3, 0.3]


def test_one_measurement_serves_all_sizes(tmp_path, training):
    sweep(tiny(tmp_path), out=tmp_path / "out", **FEW | {"optimizers": ("sgd", "adam")})
    ((count, size, options),) = training.measured
    assert (count, size) == (8, 8)  # of curvature.samples = 64
    assert options["dataset_size"] == 1437


def test_a_model_that_normalises_over_batches_is_measured_at_each_size(tmp_path, training):
    config = tiny(tmp_path, *NETWORKS["batch norm"])
    sweep(config, out=tmp_path / "a", **FEW | {"batch_sizes": (4, 8, 64)})
    # At most a quarter of the 96 samples, for the noise needs four batches.
    assert [(count, size) for count, size, _ in training.measured] == [(8, 4), (4, 8), (4, 24)]
    assert {options["norm_mode"] for *_, options in training.measured} == {"train"}
    training.measured.clear()
    still = tiny(tmp_path, *NETWORKS["batch norm"], "curvature.norm_mode=eval")
    sweep(still, out=tmp_path / "b", **FEW | {"batch_sizes": (4, 8, 64)})
    assert len(training.measured) == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_table_says_what_a_limit_means_with_batch_norm(tmp_path, training, capsys, mode):
    """Training runs in train mode whatever the measurement does."""
    note = "train-mode batch norm: the weights' scale drops out of the function"
    config = tiny(tmp_path, *NETWORKS["batch norm"], f"curvature.norm_mode={mode}")
    sweep(config, out=tmp_path / "a", **FEW | {"batch_sizes": (8,)})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if note in line]
    assert line.endswith("(1.5 to 95 times it on PreResNet-8: docs/learning_rate_law.md)")
    sweep(tiny(tmp_path), out=tmp_path / "b", **FEW | {"batch_sizes": (8,)})
    assert note not in capsys.readouterr().out


def test_finished_cells_are_kept(tmp_path, training, monkeypatch):
    config, out = tiny(tmp_path), tmp_path / "out"
    first = sweep(config, out=out, **FEW)
    assert len(training.searched) == 2
    assert sweep(config, out=out, **FEW) == first
    more = sweep(config, out=out, **FEW | {"batch_sizes": (64, 32, 16)})
    assert [options["batch_size"] for _, options in training.searched] == [16, 64, 32]
    assert (more[0], more[2]) == (first[1], first[0])
    assert [line["batch_size"] for line in lines(out)] == [16, 64, 32]
    assert len(training.measured) == 2  # not for cells that are there

    def fail(*_, **__):
        raise ArithmeticError("stopped")

    monkeypatch.setattr(module, "largest_survivable_lr", fail)
    with pytest.raises(ArithmeticError, match="stopped"):
        sweep(config, out=out, **FEW | {"batch_sizes": (16, 128)})
    assert [line["batch_size"] for line in lines(out)] == [16, 64, 32]


def test_a_sweep_goes_on_behind_a_line_that_a_kill_has_torn(tmp_path, training):
    config, out = tiny(tmp_path), tmp_path / "out"
    first = sweep(config, out=out, **FEW)
    path = out / "curvature" / "sweep.jsonl"
    path.write_text(path.read_text()[:-20])
    assert sweep(config, out=out, **FEW)[0] == first[0]
    assert [options["batch_size"] for _, options in training.searched] == [16, 64, 64]
    assert [line["batch_size"] for line in lines(out)] == [16, 64]


def test_a_cell_that_nothing_bounds_comes_back(tmp_path, training, monkeypatch):
    monkeypatch.setattr(
        module, "largest_survivable_lr", lambda *_, **__: Survival(1.0, math.inf, 13)
    )
    config, out = tiny(tmp_path), tmp_path / "out"
    cells = sweep(config, out=out, **FEW)
    assert all(math.isinf(cell.diverged) for cell in cells)
    assert sweep(config, out=out, **FEW) == cells
    for line in (out / "curvature" / "sweep.jsonl").read_text().splitlines():
        assert strict_json(line)["diverged"] is None


def test_cells_of_other_settings_are_refused(tmp_path, training):
    config, out = tiny(tmp_path), tmp_path / "out"
    sweep(config, out=out, **FEW)
    with pytest.raises(
        ValueError, match=r"sweep\.jsonl holds cells of other settings:\n  steps: 8"
    ):
        sweep(config, out=out, **FEW | {"steps": 9})
    other = config.model_copy(update={"seed": config.seed + 1})
    with pytest.raises(ValueError, match=r"seed: 0 then, 1 now\nremove it or choose another --out"):
        sweep(other, out=out, **FEW)


@pytest.mark.parametrize("sizes", [(0, 16), (16, 1438)])
def test_a_batch_larger_than_the_data_set_is_refused(tmp_path, sizes):
    illegal = [size for size in sizes if size != 16]
    with pytest.raises(
        ValueError,
        match=rf"batch sizes must lie in \[1, 1437\], the size of the data set, got \[{illegal[0]}",
    ):
        sweep(tiny(tmp_path), out=tmp_path / "out", **FEW | {"batch_sizes": sizes})
    assert not (tmp_path / "out").exists()


def test_without_curvature_there_is_nothing_to_predict(tmp_path, training, monkeypatch):
    measure = module.measure_curvature
    monkeypatch.setattr(
        module,
        "measure_curvature",
        lambda *args, **options: replace(
            report := measure(*args, **options), largest=-report.largest
        ),
    )
    with pytest.raises(
        ArithmeticError, match=r"the largest eigenvalue is -.*: no curvature limits"
    ):
        sweep(tiny(tmp_path), out=tmp_path / "out", **FEW)
    assert not training.searched


def test_a_checkpoint_is_where_it_starts(tmp_path, training, monkeypatch):
    monkeypatch.setattr("batchlr.training.loop._Run.draw", lambda self: None)
    trained = run(tmp_path, out="run")
    weights = []
    monkeypatch.setattr(
        module,
        "largest_survivable_lr",
        lambda model, *_, **__: (
            weights.append([p.detach().clone() for p in model.parameters()])
            or Survival(1.0, 2.0, 1)
        ),
    )
    config = tiny(tmp_path)
    few = FEW | {"batch_sizes": (16,)}
    sweep(config, out=tmp_path / "a", **few)
    sweep(config, out=tmp_path / "b", checkpoint=trained / "checkpoints", **few)
    initial = build_experiment(config).model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights[0], initial, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_table_marks_what_is_not_reliable_and_what_did_not_diverge(capsys, tmp_path):
    cell = SweepCell("sgd", 8, 0.9, 0.2, 0.1, 0.4, "noise", True, (), 0.05, 0.3, 0.35, 200)
    doubtful = replace(cell, batch_size=16, reliable=False, reasons=("because",), diverged=math.inf)
    cells = [cell, doubtful, doubtful]
    module._print(module.Console(width=40), cells, tmp_path, normalised=False)
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("sgd")]
    assert rows[0] == ["sgd", "8", "0.2", "0.1", "..", "0.4", "0.3", "1.50", "0.05"]
    assert rows[1] == ["sgd", "16", "0.2", "*", "0.1", "..", "0.4", ">=", "0.3", "1.50", "0.05"]
    assert "Marked rates are not reliable:\n* because\n" in text
    assert text.count("because") == 1
    assert "within 200 steps, to a factor 1.2 (>= where none diverged)" in " ".join(text.split())


def test_the_folder_is_named_as_it_is(tmp_path, training, capsys):
    out = tmp_path / ":x:"
    sweep(tiny(tmp_path), out=out, **FEW | {"batch_sizes": (16,)})
    assert capsys.readouterr().out.rstrip().endswith(f"the record is in {out / 'curvature'}")
