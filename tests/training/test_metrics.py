import json
import math

import pytest
import torch

from batchlr.training.metrics import MetricsLog, append_json, read_metrics, write_json


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def add(log, *steps, loss=1.0, **more):
    for step in steps:
        log.add({"step": step, "epoch": 0, **more}, torch.tensor(loss + step))


def strict(line):
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_lines_wait_for_a_flush_which_returns_their_losses(path):
    log = MetricsLog(path, first_step=0)
    add(log, 0, 1)
    assert len(log) == 2
    assert path.read_text() == ""
    assert log.flush() == [1.0, 2.0]
    assert (len(log), log.flush()) == (0, [])
    add(log, 2)
    assert log.flush() == [3.0]
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]


def test_a_line_starts_with_step_epoch_and_loss(path):
    log = MetricsLog(path, first_step=0)
    add(log, 0, lr=0.1)
    log.flush()
    assert path.read_text() == '{"step": 0, "epoch": 0, "loss": 1.0, "lr": 0.1}\n'


def test_losses_count_even_where_no_line_is_written(path):
    log = MetricsLog(path, first_step=0)
    for step in range(4):
        log.add({"step": step, "epoch": 0}, torch.tensor(float(step)), write=step % 2 == 0)
    assert log.flush() == [0.0, 1.0, 2.0, 3.0]
    assert [line["step"] for line in read_metrics(path)] == [0, 2]


def test_a_loss_is_read_only_at_the_flush(path):
    """Reading it before would wait for the device at every step."""
    log, loss = MetricsLog(path, first_step=0), torch.tensor(1.0)
    log.add({"step": 0, "epoch": 0}, loss)
    loss.fill_(2.0)
    assert log.flush() == [2.0]


def test_numbers_that_are_not_finite_become_null(path):
    log = MetricsLog(path, first_step=0)
    entry = {
        "step": 0,
        "epoch": 0,
        "max_lr": math.inf,
        "list": [math.nan, 1.0],
        "deep": {"x": -math.inf},
    }
    log.add(entry, torch.tensor(math.nan))
    (loss,) = log.flush()
    assert math.isnan(loss)  # the caller learns the truth
    assert strict(path.read_text()) == {
        "step": 0,
        "epoch": 0,
        "loss": None,
        "max_lr": None,
        "list": [None, 1.0],
        "deep": {"x": None},
    }


def test_a_resumed_log_writes_each_step_once(path):
    log = MetricsLog(path, first_step=0)
    add(log, 0, 1, 2, 3)
    log.flush()
    resumed = MetricsLog(path, first_step=2)
    add(resumed, 2, 3, loss=5.0)
    resumed.flush()
    lines = read_metrics(path)
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1), (1, 2), (2, 7), (3, 8)]


def test_a_new_log_forgets_the_old_one(path):
    log = MetricsLog(path, first_step=0)
    add(log, 0, 1)
    log.flush()
    MetricsLog(path, first_step=0)
    assert read_metrics(path) == []


def test_a_torn_line_ends_the_record_and_is_removed_on_resumption(path):
    path.parent.mkdir()
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    log = MetricsLog(path, first_step=2)
    add(log, 2)
    log.flush()
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_log_that_is_not_enabled_writes_nothing_but_returns_losses(path):
    log = MetricsLog(path, first_step=0, enabled=False)
    add(log, 0, 1)
    assert log.flush() == [1.0, 2.0]
    assert not path.exists()


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_write_json_makes_folders_and_strict_json(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": (1, math.nan), "y": None, "z": True})
    assert strict(path.read_text()) == {"x": [1, None], "y": None, "z": True}
    assert path.read_text().endswith("}\n")


def test_an_added_line_takes_the_place_of_a_torn_one(path):
    append_json(path, {"cell": 0, "largest": math.nan})
    assert path.read_text() == '{"cell": 0, "largest": null}\n'
    with path.open("a") as file:
        file.write('{"cell": 1, "la')
    append_json(path, {"cell": 1})
    append_json(path, {"cell": 2})
    assert [strict(line)["cell"] for line in path.read_text().splitlines()] == [0, 1, 2]
