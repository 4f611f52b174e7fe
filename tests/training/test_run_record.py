"""What a run writes of itself."""

import math
from dataclasses import asdict

import pytest
from runs import tiny

from batchlr import AdaptiveBatchSize, GradientScatter
from batchlr.learning_rates import StepSize
from batchlr.lr_bound import LRBound
from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.on_the_fly.learned_step_size import LearnedStepSize
from batchlr.training import run_record  # whose `tested_entry` would be taken for a test
from batchlr.training.experiment import build_experiment
from batchlr.training.resumption import Progress
from batchlr.training.run_record import measured_entry, run_summary

BOUND = LRBound(
    value=0.5,
    low=0.4,
    high=0.7,
    exponent=0.9,
    regime="noise",
    reliable=False,
    reasons=("few batches", "the gradient is clipped"),
    batch_size=64,
    optimizer="adam",
    momentum=0.9,
    rule="mean-square",
)


def test_a_step_without_measurement_or_test_adds_nothing():
    assert measured_entry(None) == run_record.tested_entry(None) == {}


def test_a_measured_limit_comes_with_its_interval_and_its_cost():
    update = CurvatureUpdate(
        3, peak=0.3, momentum=0.9, bound=BOUND, num_products=7, seconds=1.5, overhead=0.2
    )
    entry = measured_entry(update)
    assert (entry["max_lr_low"], entry["max_lr"], entry["max_lr_high"]) == (0.4, 0.5, 0.7)
    assert (entry["regime"], entry["optimizer"]) == ("noise", "adam")
    assert entry["reasons"] == ("few batches", "the gradient is clipped")
    assert (entry["peak_lr"], entry["products"], entry["overhead"]) == (0.3, 7, 0.2)
    assert entry["measurement_seconds"] == 1.5
    assert entry["failure"] is None
    assert math.isnan(entry["largest_eigenvalue"])  # there is no report


def test_a_published_policy_has_eigenvalues_and_no_limit():
    learned = LearnedStepSize(
        "paper_sgd", StepSize(0.2, 0.0), (-1.5, 4.0), (0.5, 0.5), 2.0, 32, 2, "train", 0.1
    )
    entry = measured_entry(CurvatureUpdate(0, peak=0.2, momentum=0.0, learned=learned))
    assert (entry["smallest_eigenvalue"], entry["largest_eigenvalue"]) == (-1.5, 4.0)
    assert all(math.isnan(entry[name]) for name in ("max_lr", "max_lr_low", "max_lr_high"))
    assert entry["regime"] is entry["optimizer"] is entry["reasons"] is None


def test_a_failure_is_told_in_words_with_the_same_keys():
    failed = CurvatureUpdate(3, 0.3, 0.9, failure="the loss is nan", num_products=2)
    entry = measured_entry(failed)
    assert entry["failure"] == "the loss is nan"
    assert entry["products"] == 2
    assert entry.keys() == measured_entry(CurvatureUpdate(3, 0.3, 0.9, bound=BOUND)).keys()


def test_a_test_of_the_batch_size_tells_what_it_found():
    adaptive = AdaptiveBatchSize(64, max_batch_size=1024, interval=1, smoothing=0.0)
    adaptive.observe(GradientScatter(batch_size=64, square_norm=3.0, trace=128.0))
    entry = run_record.tested_entry(adaptive.step())
    # |G|^2 = 3 - 128 / 64 = 1: noise scale 128, sqrt(128 / 64) the tolerance that would pass.
    assert entry == {
        "norm_test": pytest.approx(math.sqrt(2)),
        "noise_scale": pytest.approx(128.0),
        "next_batch_size": 128,
    }


EVALUATED = {"test_accuracy": 0.9, "test_loss": 0.3, "train_loss": 0.2}


def ended(**changes):
    progress = Progress(
        step=12, epoch=4, samples=5, trained=4800, last_lr=0.07, wall_seconds=3.5, result=EVALUATED
    )
    return Progress(**asdict(progress) | changes)


def test_a_summary_says_how_the_run_ended_and_what_it_took(tmp_path):
    experiment = build_experiment(tiny(tmp_path))
    events = [{"step": 3, "event": "undone"}]
    found = run_summary(experiment, ended(events=events), diverged=False)
    assert found == {
        **EVALUATED,
        "steps": 12,
        "samples": 4800,
        "batch_size": 400,
        "epochs": 4,
        "wall_seconds": 3.5,
        "curvature_seconds": 0.0,  # nothing was measured
        "curvature_products": 0,
        "final_lr": 0.07,
        "peak_lr": 0.1,
        "diverged": False,
        "failure": None,
        "events": events,
    }


@pytest.mark.parametrize("evaluated", [EVALUATED, {}])
def test_of_a_network_that_diverged_no_evaluation_counts(tmp_path, evaluated):
    progress = ended(result=evaluated)
    found = run_summary(build_experiment(tiny(tmp_path)), progress, diverged=True, failure="nan")
    assert all(math.isnan(found[name]) for name in EVALUATED)
    assert found["diverged"] is True
    assert found["failure"] == "nan"


def test_products_and_seconds_are_the_controllers(tmp_path):
    experiment = build_experiment(tiny(tmp_path, "optim.lr=auto"))
    update = experiment.controller.maybe_update(experiment.model, experiment.measurement_batches)
    found = run_summary(experiment, ended(), diverged=False)
    assert found["curvature_products"] == update.num_products > 0
    assert found["curvature_seconds"] == experiment.controller.seconds > 0
    assert found["peak_lr"] == update.peak == measured_entry(update)["peak_lr"]


def test_the_batch_size_is_the_one_it_has_grown_to(tmp_path):
    experiment = build_experiment(
        tiny(tmp_path, "batch={global_size: 48, adaptive: {max_size: 480}}")
    )
    experiment.adaptive.batch_size = 192
    assert run_summary(experiment, ended(), diverged=False)["batch_size"] == 192
