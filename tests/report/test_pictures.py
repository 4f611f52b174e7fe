"""The pictures as parts of a page."""

import re

import matplotlib
from run_folders import entry, measured, write_measurements, write_run

from batchlr.plotting import plot_run
from batchlr.report.pictures import inline_svg, pictures, thinned
from batchlr.report.record import read_record


def test_there_is_one_for_each_thing_measured(tmp_path):
    write_measurements(write_run(tmp_path))
    captions = [picture.caption.split()[0] for picture in pictures(read_record(tmp_path))]
    assert captions == ["Learning", "Largest", "Density", "Largest", "Predicted"]


def test_text_stays_text_and_names_nothing_outside():
    svg = inline_svg(plot_run([measured(0), entry(1)]), "run", 'rate & "loss"')
    assert svg.startswith('<svg role="img" aria-label="rate &amp; &quot;loss&quot;" ')
    assert svg.endswith("</svg>")
    assert ">learning rate</text>" in svg
    assert not re.search(r"http|xmlns|xlink|<\?|<!|<style|<metadata", svg)
    targets = re.findall(r'(?:href="|url\()#([^")]+)', svg)
    names = re.findall(r'\sid="([^"]+)"', svg)
    assert targets
    assert {*targets} <= {*names}
    assert len(names) == len({*names})
    assert all(name.startswith("run-") for name in names)


def test_pictures_have_no_ground_of_their_own():
    svg = inline_svg(plot_run([entry(0), entry(1)]), "run", "")
    assert "#ffffff" not in svg


def test_the_same_run_gives_the_same_picture_and_changes_no_setting():
    settings = dict(matplotlib.rcParams)
    first, second = (inline_svg(plot_run([measured(0), entry(1)]), "run", "") for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == settings


def test_a_long_run_keeps_extremes_measurements_and_ends():
    steps = [entry(k, loss=1.0) for k in range(50_000)]
    steps[777]["loss"], steps[778]["loss"], steps[779]["loss"] = 1e6, 1e-6, None
    steps[12_345] = measured(12_345, loss=1.0)
    kept = {line["step"] for line in thinned(steps)}
    assert {0, 777, 778, 12_345, 49_999} <= kept
    assert len(kept) < 2100
    assert len(inline_svg(plot_run(thinned(steps)), "run", "")) < 300_000
    assert thinned(steps[:2000]) == steps[:2000]
