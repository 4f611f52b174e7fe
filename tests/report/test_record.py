"""What is read of a folder, and what is refused."""

import json

import pytest
import torch
from run_folders import (
    BOUND,
    CELL,
    CONFIG,
    RATES,
    STEPS,
    SUMMARY,
    entry,
    measured,
    write_lines,
    write_measurements,
    write_run,
)

from batchlr.report.record import read_record
from batchlr.training.checkpoint import CheckpointError, save_checkpoint
from batchlr.training.data import DataError


def test_a_finished_run_is_read_whole(tmp_path):
    record = read_record(write_run(tmp_path))
    assert (record.config, record.summary, record.entries) == (CONFIG, SUMMARY, STEPS)
    assert record.config_text == (tmp_path / "config.yaml").read_text()
    assert record.environment["packages"] == {"torch": "2.9"}
    assert record.measured == STEPS[:1]
    assert (record.setting("optim.lr"), record.setting("optim.none.deeper")) == ("auto", None)
    assert (record.progress, record.rates, record.report, record.spectrum) == (None,) * 4


def test_measurements_alone_are_read(tmp_path):
    record = read_record(write_measurements(tmp_path))
    (bound,) = record.bounds
    assert (bound.value, bound.low, bound.reasons, bound.regime) == (0.5, 0.25, (), "noise")
    assert record.curvature == RATES
    assert record.measure.nodes.tolist() == [-1.0, 0.0, 4.0]
    assert record.measure.num_products == 9
    assert [cell["batch_size"] for cell in record.grid] == [8, 16]
    assert record.sweep == [CELL]
    assert (record.config, record.summary, record.entries) == (None, None, [])


def test_a_rate_without_end_has_none(tmp_path):
    write_measurements(tmp_path)
    bounds = [BOUND | {"high": None, "reasons": ["few batches"]}]
    (tmp_path / "curvature" / "rates.json").write_text(json.dumps(RATES | {"bounds": bounds}))
    (bound,) = read_record(tmp_path).bounds
    assert bound.high != bound.high
    assert bound.reasons == ("few batches",)


def test_a_torn_last_line_is_left_out(tmp_path):
    write_run(tmp_path, summary=None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ep')
    assert read_record(tmp_path).entries == STEPS


def test_steps_without_a_loss_have_none(tmp_path):
    line = entry(0)
    del line["loss"]
    assert read_record(write_run(tmp_path, steps=[line])).entries[0]["loss"] is None


def test_a_summary_that_the_run_has_outlived_is_none(tmp_path):
    record = read_record(write_run(tmp_path, steps=[*STEPS, entry(6)]))
    assert record.summary is None


def test_an_unfinished_run_has_its_newest_checkpoint_s_progress(tmp_path):
    write_run(tmp_path, summary=None)
    assert read_record(tmp_path).progress is None
    progress = {"step": 4, "epoch": 2, "wall_seconds": 5.0}
    state = {"progress": progress, "experiment": torch.zeros(2)}
    path = save_checkpoint(tmp_path / "checkpoints", 4, state, keep=1)
    assert read_record(tmp_path).progress == progress
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is corrupt: SHA-256 is"):
        read_record(tmp_path)


def test_a_checkpoint_without_progress_is_refused(tmp_path):
    write_run(tmp_path, summary=None)
    save_checkpoint(tmp_path / "checkpoints", 4, {"progress": {"step": 4}}, keep=1)
    with pytest.raises(
        DataError, match=r"step-00000004\.pt: it must have a number epoch, got None"
    ):
        read_record(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(DataError, match=f"{path} is not a folder; give that of a run, such as"):
            read_record(path)


def test_an_empty_folder_is_refused_with_what_it_should_hold(tmp_path):
    words = r"nothing to report: neither metrics\.jsonl with a step, nor summary\.json, nor a meas"
    with pytest.raises(DataError, match=words):
        read_record(tmp_path)
    write_run(tmp_path, summary=None, steps=[])
    with pytest.raises(DataError, match=words):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.yaml", "a: [", "it is not YAML"),
        ("config.yaml", "3", "it must be a mapping of keys, got 3"),
        ("env.json", "{", "it is not JSON"),
        ("env.json", b"\xff", "it is no text"),
        ("summary.json", "[]", r"it must be an object of JSON, got \[\]"),
        ("summary.json", "{}", "it must have a number steps, got None"),
        ("summary.json", SUMMARY | {"test_loss": "x"}, "a number or null test_loss, got 'x'"),
        ("summary.json", SUMMARY | {"steps": True}, "must have a number steps, got True"),
        ("summary.json", SUMMARY | {"events": 3}, "events must be a list, got 3"),
        ("summary.json", SUMMARY | {"events": [{}]}, "one of events must have a number step"),
        ("metrics.jsonl", "torn\n{}\n", "line 1 is not JSON"),
        ("metrics.jsonl", entry(0) | {"lr": None}, "line 1 must have a number lr, got None"),
        ("metrics.jsonl", measured(0, max_lr=[]), r"line 1 must have .* null max_lr, got \[\]"),
        ("metrics.jsonl", measured(0, max_lr=2), r"max_lr 2 must lie in its .*, \[0\.3, 0\.6\]"),
        ("metrics.jsonl", measured(0, reasons="x"), "reasons must be a list of sentences, got 'x'"),
        ("curvature/rates.json", RATES | {"bounds": [3]}, "one of bounds must be an obj"),
        ("curvature/rates.json", RATES | {"bounds": [{"x": 1}]}, "one of bounds must have a num"),
        ("curvature/rates.json", RATES | {"bounds": [BOUND | {"x": 1}]}, "of bounds is none .*'x'"),
        ("curvature/report.json", "{}", "is not a CurvatureReport of format"),
        ("curvature/spectrum.npz", "torn", "it holds no spectrum"),
        ("curvature/spectra.jsonl", {"epoch": 0}, "line 1 must have a number batch_size, got None"),
        ("curvature/sweep.jsonl", CELL | {"optimizer": "$"}, "must be sgd or adam, got '\\$'"),
        ("curvature/sweep.jsonl", CELL | {"reasons": [1]}, r"must be a list of sentences, got \[1"),
    ],
)
def test_a_corrupt_file_is_named_with_what_is_wrong(tmp_path, file, text, words):
    path = write_measurements(write_run(tmp_path)) / file
    content = json.dumps(text) if isinstance(text, dict) else text
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        read_record(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; remove the file, or write it anew")


def test_a_spectrum_without_its_arrays_is_corrupt(tmp_path):
    (write_measurements(tmp_path) / "curvature" / "spectrum.npz").unlink()
    with pytest.raises(DataError, match=r"spectrum\.npz: it holds no spectrum .*No such file"):
        read_record(tmp_path)


def test_lines_are_complete_or_absent(tmp_path):
    write_run(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [])
    assert read_record(tmp_path).entries == []
