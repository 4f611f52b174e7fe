"""What a terminal shows, word for word, of results that are given."""

from dataclasses import replace

import pytest

from batchlr.learning_rates import StepSize
from batchlr.lr_bound import LRBound
from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.on_the_fly.learned_step_size import LearnedStepSize
from batchlr.training import evaluation  # whose `TestResult` would be taken for a test
from batchlr.training.console import RunConsole
from test_curvature_report import make_report

BOUND = LRBound(
    value=0.51234,
    low=0.4,
    high=0.7,
    exponent=0.9,
    regime="noise",
    reliable=True,
    reasons=(),
    batch_size=64,
    optimizer="sgd",
    momentum=0.95,
    rule="mean-square",
)
REPORT = make_report()  # with Adam's curvature, of 50, beside the Hessian's, of 2
MEASURED = CurvatureUpdate(3, 0.25, 0.95, bound=BOUND, report=replace(REPORT, adam=None))
LEARNED = LearnedStepSize(
    "paper_sgd", StepSize(0.2, 0.5), (-1.5, 4.0), (0.5, 0.5), 2.0, 32, 7, "train", 0.25
)
RESULT = evaluation.TestResult(accuracy=0.97654, loss=0.1)
PEAK = (
    "the peak rate follows all limits measured, averaged by their errors: it may lie above the "
    "last one"
)


@pytest.fixture
def console():
    """One that no terminal is behind."""
    made = RunConsole(10, 0, progress=True, enabled=True)
    yield made
    made.close()


@pytest.fixture
def lines(capsys):
    """A function that returns the lines printed since it was last called."""
    return lambda: capsys.readouterr().out.splitlines()


# Lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "interval [0.4, 0.7]",
        "[bold]nothing is markup[/bold] [/nor closes it]",
        "paths like runs/:x:/C:\\a keep their colons",
        "word " * 60 + "end",  # nor is a long line broken
    ],
)
def test_lines_are_printed_as_they_are(console, lines, line):
    console.say(line, "next")
    assert lines() == [line, "next"]


def test_on_a_terminal_numbers_have_no_colours(monkeypatch, lines):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = RunConsole(10, 0, progress=False, enabled=True)
    console.say("loss 0.5 in 'a' at 12:30")
    console.close()
    assert lines() == ["loss 0.5 in 'a' at 12:30"]


def test_of_all_processes_but_the_first_nothing_is_shown(monkeypatch, lines):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = RunConsole(10, 0, progress=True, enabled=False)
    console.say("a line")
    console.step()
    console.measurement(MEASURED, steers=True)
    console.epoch(1, 4, 0.5, RESULT, [MEASURED], 0.25)
    console.close()
    assert lines() == []


# The bar ---------------------------------------------------------------------------------------


def drawn(monkeypatch, capsys, *, progress="1", wanted=True, terminal=True):
    """What a run shows that has made three of ten steps, makes two, and turns out to have 12."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("BATCHLR_PROGRESS", progress)
    console = RunConsole(10, 3, progress=wanted, enabled=True)
    console.step()
    console.step()
    console.expect(12)
    console.close()
    return capsys.readouterr().out


def test_the_bar_counts_from_where_the_run_goes_on(monkeypatch, capsys):
    shown = drawn(monkeypatch, capsys)
    first, last = shown.find("3/10"), shown.find("5/12")
    assert 0 <= first < last
    assert "steps" in shown


def test_the_bar_is_gone_when_the_run_is_over(monkeypatch, capsys):
    """A transient display ends with erasing its line."""
    assert drawn(monkeypatch, capsys).endswith("\x1b[1A\x1b[2K")


@pytest.mark.parametrize("without", [{"progress": "0"}, {"wanted": False}, {"terminal": False}])
def test_there_is_no_bar_where_none_is_wanted_or_can_be_drawn(monkeypatch, capsys, without):
    assert "/12" not in drawn(monkeypatch, capsys, **without)


# Measurements ----------------------------------------------------------------------------------


def test_a_limit_is_told_with_its_interval_and_what_it_cost(console, lines):
    console.measurement(MEASURED, steers=False)
    measured = [
        "measured: largest eigenvalue 2 from 5000 samples, 20 products, 0.1 s",
        "largest stable rate at batch 64 with momentum 0.95: 0.512 (90 % interval 0.4 to 0.7, "
        "limited by noise)",
    ]
    assert lines() == measured
    console.measurement(MEASURED, steers=True)
    assert lines() == [*measured, PEAK]


@pytest.mark.parametrize(("optimizer", "name"), [("adam", "beta1"), ("rmsprop", "momentum")])
def test_the_limit_of_an_adaptive_optimizer_is_told_by_its_own_curvature(
    console, lines, optimizer, name
):
    bound = replace(BOUND, optimizer=optimizer, regime="transition")
    console.measurement(replace(MEASURED, bound=bound, report=REPORT), steers=False)
    first, second = lines()
    assert first.startswith("measured: largest eigenvalue 50 from 5000 samples, ")
    assert f"at batch 64 with {name} 0.95: " in second
    assert second.endswith("limited by transition)")


def test_a_published_policy_is_told_with_its_momentum_and_without_a_limit(console, lines):
    console.measurement(CurvatureUpdate(0, 0.2, 0.5, learned=LEARNED), steers=True)
    assert lines() == [
        "measured: Ritz values from -1.5 to 4 from 32 samples, 7 products, 0.2 s",
        "paper_sgd: rate 0.2, momentum 0.5; no limit of stability",
    ]


@pytest.mark.parametrize("missing", ["bound", "report"])
def test_of_a_measurement_that_failed_nothing_is_told(console, lines, missing):
    console.measurement(replace(MEASURED, **{missing: None}), steers=True)
    assert lines() == []


# Epochs ----------------------------------------------------------------------------------------


def test_an_epoch_is_told_with_the_last_limit(console, lines):
    earlier = replace(MEASURED, step=0, bound=replace(BOUND, value=9.0))
    console.epoch(2, 40, 0.123456, RESULT, [earlier, MEASURED], 0.25)
    assert lines() == [
        "epoch   2/40  loss 0.1235  test accuracy 0.9765  peak rate 0.25  "
        "limit 0.512 [0.4, 0.7]  largest eigenvalue 2"
    ]


def test_an_epoch_without_limits_is_told_without(console, lines):
    learned = CurvatureUpdate(0, 0.2, 0.5, learned=LEARNED)
    for updates in ([], [learned]):
        console.epoch(1, 4, 0.5, RESULT, updates, 0.2)
        assert lines() == ["epoch   1/4  loss 0.5000  test accuracy 0.9765  peak rate 0.2"]


def test_a_limit_of_an_earlier_epoch_is_told_with_its_step(console, lines):
    failed = CurvatureUpdate(6, 0.25, 0.95, failure="the loss is nan")
    later = replace(MEASURED, step=9)
    endings = []
    until = [MEASURED, failed, later]
    for updates in ([MEASURED], [MEASURED], [MEASURED, failed], until, until):
        console.epoch(1, 4, 0.5, RESULT, updates, 0.25)
        (line,) = lines()
        endings.append(line.partition("largest eigenvalue 2")[2])
    three, nine = "  (both of step 3)", "  (both of step 9)"
    assert endings == ["", three, three, "", nine]


# The end ---------------------------------------------------------------------------------------

SUMMARY = {
    "test_accuracy": 0.98765,
    "steps": 120,
    "wall_seconds": 4.0,
    "curvature_seconds": 1.0,
    "curvature_products": 42,
}


def test_the_end_says_what_it_cost_and_where_the_record_is(console, lines, tmp_path):
    console.end(SUMMARY, tmp_path)
    assert lines() == [
        "test accuracy 0.9877 after 120 steps in 4.0 s, of which measuring 25 % (42 products)",
        f"record in {tmp_path}: summary.json, metrics.jsonl, run.png",
    ]


def test_a_run_that_took_no_time_has_an_end_too(console, lines, tmp_path):
    console.end({**SUMMARY, "wall_seconds": 0.0, "curvature_seconds": 0.0}, tmp_path)
    assert lines()[0].endswith("in 0.0 s, of which measuring 0 % (42 products)")
