"""What is said of runs."""

import pytest
from run_folders import (
    CONFIG,
    STEPS,
    SUMMARY,
    entry,
    measured,
    write_measurements,
    write_run,
)

from batchlr.report.record import read_record
from batchlr.report.verdict import verdict
from batchlr.training.checkpoint import save_checkpoint

FIXED = CONFIG | {"optim": {"name": "sgd", "lr": 0.1}}


def said_of(folder, **files):
    return verdict(read_record(write_run(folder, **files)))


def test_a_finished_run_has_its_accuracy_rate_limits_cost_and_no_events(tmp_path):
    steps = [*STEPS[:-1], measured(5, peak_lr=0.1)]
    said = said_of(tmp_path, steps=steps)
    assert said.state == "finished"
    assert said.headline == "Finished: test accuracy 87.50 % after 6 steps (3 epochs)."
    assert said.sentences == (
        "The rate was chosen while training, by measured curvature (policy edge): its peak went "
        "from 0.2 to 0.1, in the shape of the schedule cosine.",
        "At all 2 measured limits of stability the rate was below: at most 0.25 times the limit.",
        "2 measurements cost 40 products and 2.5 s, 25 % of 10.0 s.",
        "The controller never had to slow down or to go back.",
    )


def test_a_run_that_stopped_early_says_how_much_was_planned(tmp_path):
    said = said_of(tmp_path, summary=SUMMARY | {"epochs": 1})
    assert said.headline.endswith("after 6 steps (1 of 3 epochs).")


def test_a_diverged_run_says_why(tmp_path):
    summary = SUMMARY | {"diverged": True, "failure": "the loss became nan", "test_accuracy": None}
    said = said_of(tmp_path, summary=summary)
    assert (said.state, said.headline) == (
        "diverged",
        "Diverged after 6 steps: the loss became nan.",
    )


@pytest.mark.parametrize("steps", [[entry(0)], [measured(0, peak_lr=None)]])
def test_a_given_rate_is_said_to_be_given(tmp_path, steps):
    beside = "Curvature was measured beside it, not applied."
    said = said_of(tmp_path, config=FIXED, steps=steps)
    rate = said.sentences[0]
    assert rate.startswith("The rate was given: 0.1 at its peak, in the shape of the schedule cos")
    assert rate.endswith(beside) == ("max_lr" in steps[0])
    assert ("Nothing was measured while training." in said.sentences) == ("max_lr" not in steps[0])


def test_rates_above_the_limit_are_counted(tmp_path):
    steps = [
        measured(0, max_lr=0.05, max_lr_low=None),
        measured(1),
        measured(2, max_lr=None),
        *STEPS[3:],
    ]
    words = "At 1 of 2 measured limits of stability the rate was above: at most 2 times the limit."
    assert words in said_of(tmp_path, steps=steps).sentences


def test_the_highest_peak_is_named_where_it_is_no_end(tmp_path):
    steps = [measured(k, peak_lr=peak) for k, peak in enumerate((0.1, 0.4, 0.2))]
    assert "from 0.1 to 0.2, 0.4 at most," in said_of(tmp_path, steps=steps).sentences[0]


def test_what_the_controller_did_is_told_with_the_steps(tmp_path):
    events = [{"step": step, "event": "slowed"} for step in range(10)]
    events.append({"step": 30, "event": "undone"})
    said = said_of(tmp_path, summary=SUMMARY | {"events": events})
    assert said.sentences[-1] == (
        "The controller stepped in: slowed 10 times (the loss jumped, the rate is halved; steps "
        "0, 1, 2, 3, 4, 5, 6, 7 and 2 more); undone 1 time (the network was lost and is what it "
        "was before, to go on at a lower rate; step 30)."
    )


def test_a_record_without_events_says_nothing_of_them(tmp_path):
    summary = {key: value for key, value in SUMMARY.items() if key != "events"}
    assert not any("controller" in words for words in said_of(tmp_path, summary=summary).sentences)


def test_failed_measurements_are_counted(tmp_path):
    steps = [measured(0), measured(1, failure="no curvature"), *STEPS[2:]]
    words = "1 of 2 measurements failed and left the rate as it was; the last: no curvature."
    assert words in said_of(tmp_path, steps=steps).sentences


def test_an_unfinished_run_is_told_as_far_as_its_checkpoint(tmp_path):
    steps = [measured(0), measured(1), entry(2), measured(3)]
    said = said_of(tmp_path, summary=None, steps=steps)
    assert said.state == "unfinished"
    assert said.headline == "Not finished: 4 steps are on record, the last in epoch 2."
    assert "3 measurements cost 15 products and 1.5 s." in said.sentences
    progress = {
        "step": 2,
        "epoch": 1,
        "wall_seconds": 4.0,
        "result": {"test_accuracy": 0.5},
        "events": [{"step": 1, "event": "slowed"}],
    }
    save_checkpoint(tmp_path / "checkpoints", 2, {"progress": progress}, keep=1)
    said = verdict(read_record(tmp_path))
    assert said.headline.endswith("in epoch 2; test accuracy 50.00 % when last tested.")
    assert "2 measurements cost 10 products and 1.0 s, 25 % of 4.0 s." in said.sentences
    assert said.sentences[-1].startswith("The controller stepped in: slowed 1 time (")


def test_measurements_alone_are_told(tmp_path):
    said = verdict(read_record(write_measurements(tmp_path)))
    assert (said.state, said.headline) == ("measured", "Measured, not trained.")
    assert said.sentences == (
        "Measured alone, the largest eigenvalue is 4; noise of a batch of 32, the critical size, "
        "shifts it by as much. Of 1 tabulated rates 0 are not reliable.",
        "The spectrum (hessian, 10 parameters, 64 samples) reaches from -1 to 4.",
        "2 spectra of single batches of 8, 16 samples.",
    )
