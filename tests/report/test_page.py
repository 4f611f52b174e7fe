"""The page as a whole: well formed, self-contained, escaped, and true to the folder."""

import json
import re
from html import escape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from run_folders import (
    CELL,
    CONFIG,
    STEPS,
    SUMMARY,
    measured,
    write_lines,
    write_measurements,
    write_run,
)
from runs import run, tiny

from batchlr.report import write_report
from batchlr.training.analysis import measure_rates

VOID = {"meta", "br", "hr", "img", "link", "input"}
REFERENCES = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}


class Checker(HTMLParser):
    """Fails on what is not closed, closed twice, named twice, or lies outside the file."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.targets, self.tags, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            assert not key.startswith("on"), f"{tag} has the script {key}"
            if key == "id":
                self.names.append(value)
            if key in REFERENCES:
                assert value.startswith("#"), f"{tag} refers to {value}"
                self.targets.append(value[1:])
            for url in re.findall(r"url\(([^)]*)\)", value or ""):
                assert url.startswith("#"), f"{tag} refers to {url}"
                self.targets.append(url[1:])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data


def checked(path):
    """The page's text, after it has passed as HTML."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    page = Checker()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "object"} & {*page.tags}
    assert len(page.names) == len({*page.names})
    assert {*page.targets} <= {*page.names}
    for once in ("title", "h1", "main", "body"):
        assert page.tags.count(once) == 1
    assert [tag for tag, after in pairwise(page.tags) if tag == "tr" and after not in "th td"] == []
    return "".join(page.text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run whose rate is measured."""
    folder = tmp_path_factory.mktemp("trained")
    return run(folder, "optim.lr=auto", "train.max_steps=6")


def test_a_real_run_becomes_a_page(trained):
    path = write_report(trained)
    assert path == trained / "report.html"
    text = checked(path)
    assert "by measured curvature (policy edge)" in text
    assert (trained / "config.yaml").read_text() in text
    assert f"batchlr train {trained / 'config.yaml'} --out {trained}-again" in text
    assert "CONFIG.yaml" not in text
    assert path.read_text().count("<svg") == 1
    first = path.read_bytes()
    write_report(trained)
    assert path.read_bytes() == first


def test_a_real_measurement_becomes_a_page(tmp_path):
    out = tmp_path / "out"
    measure_rates(tiny(tmp_path), out=out)
    text = checked(write_report(out, tmp_path / "new" / "page.html"))
    assert "Measured, not trained." in text
    assert "Rates by batch size" in text
    assert f"batchlr lr {out / 'config.yaml'} --out {out}-again" in text
    assert "CONFIG.yaml" not in text
    (tmp_path / "out" / "curvature" / "rates.json").unlink()  # a report saved by hand
    text = checked(write_report(tmp_path / "out"))
    assert "critical batch size" in text
    assert "Rates by batch size" not in text


def test_a_run_of_several_processes_is_made_again_by_torchrun(tmp_path):
    config = CONFIG | {"dist": {"strategy": "fsdp"}}
    text = checked(write_report(write_run(tmp_path, config=config)))
    assert f"torchrun --nproc-per-node N -m batchlr train {tmp_path / 'config.yaml'} " in text
    assert "N, the number of processes, is not on record." in text


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"summary": None},
        {"summary": None, "config": None, "steps": STEPS[:1]},
        {"summary": SUMMARY | {"diverged": True, "failure": "x"}, "steps": None},
        {"steps": [measured(0, largest_eigenvalue=None, max_lr=None, failure="no curvature")]},
        {"config": CONFIG | {"optim": {"lr": 0.1}, "resume": "auto"}},
    ],
)
def test_pages_of_all_kinds_are_well_formed(tmp_path, files):
    write_measurements(write_run(tmp_path / "run", **files))
    text = checked(write_report(tmp_path / "run"))
    resumed = (files.get("config") or {}).get("resume") == "auto"
    assert (" resume=false" in text) is resumed


def test_a_measurement_is_a_row(tmp_path):
    page = write_report(write_run(tmp_path)).read_text()
    cells = [
        "0",
        "0",
        "16",
        "2",
        "8",
        "0.4",
        "0.3 to 0.6",
        "transition",
        "0.1",
        "0.2",
        "5",
        "0.5",
        "",
    ]
    assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in page
    assert '<th scope="row">notes</th><td>a; b</td>' in page


def test_a_limit_not_to_rely_on_says_why(tmp_path):
    steps = [measured(0, reasons=[]), measured(1, reasons=["few batches", "clipped"])]
    page = write_report(write_run(tmp_path, steps=steps)).read_text()
    assert page.count("few batches; clipped</td></tr>") == 1


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>&"
    summary = SUMMARY | {"diverged": True, "failure": evil}
    steps = [measured(0, failure=evil, regime=evil)]
    config = CONFIG | {"name": evil, "schedule": {"name": evil}}
    folder = write_run(tmp_path / "a&b <i>", config=config, summary=summary, steps=steps)
    path = write_report(folder)
    assert checked(path).count(evil) >= 6
    assert "<script" not in path.read_text()
    assert escape(f"'{folder}/config.yaml'").replace("&#x27;", "&#39;") in path.read_text()


def test_the_page_goes_into_a_file(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"out must be a file, .* is a folder; give .*report\.html"
    ):
        write_report(folder, tmp_path)


def test_a_measurement_at_checkpoints_is_made_again_there(tmp_path):
    folder = write_measurements(write_run(tmp_path, summary=None, steps=None))
    environment = {"checkpoints": ["a b.pt", "c.pt"]}
    (folder / "env.json").write_text(json.dumps(environment))
    text = checked(write_report(folder))
    assert (
        f"batchlr spectrum {folder / 'config.yaml'} --out {folder}-again --checkpoint 'a b.pt' "
        "--checkpoint c.pt" in text
    )


def test_a_sweep_is_made_again_with_its_options(tmp_path):
    folder = write_measurements(tmp_path / "run")
    cells = [CELL, CELL | {"batch_size": 64}, CELL | {"optimizer": "adam"}]
    write_lines(folder / "curvature" / "sweep.jsonl", cells)
    text = checked(write_report(folder))
    options = "--batch-sizes 4,64 --optimizers sgd,adam --steps 50"
    assert f"batchlr sweep CONFIG.yaml --out {folder}-again {options}" in text
    assert f"batchlr lr CONFIG.yaml --out {folder}-again\n" in text


def test_tables_say_whether_to_rely_on_a_rate_before_they_say_which(tmp_path):
    folder = write_measurements(tmp_path)
    doubted = {"reliable": False, "reasons": ["few batches", "clipped"]}
    write_lines(folder / "curvature" / "sweep.jsonl", [CELL, CELL | {"batch_size": 8} | doubted])
    page = write_report(folder).read_text()
    for words in ("<td>4</td><td>yes</td><td>0.1</td>", "<td>8</td><td>no</td><td>0.1</td>"):
        assert words in page.replace("\n", "")
    assert "<td>few batches; clipped</td>" in page
    assert "<td>16</td><td>yes</td><td>0.5</td>" in page


def test_what_was_measured_in_the_folder_of_a_run_had_settings_of_its_own(tmp_path):
    text = checked(write_report(write_measurements(write_run(tmp_path))))
    assert "batchlr lr CONFIG.yaml --out " in text
    assert "CONFIG.yaml stands for the configuration that was given" in text
