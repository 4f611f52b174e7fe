"""Steps and epochs against a run that is made step by step."""

import pytest
from runs import tiny

from batchlr.training.experiment import build_experiment
from batchlr.training.resumption import Progress
from batchlr.training.run_length import RunLength

SAMPLES = 1437
ADAPTIVE = "batch={global_size: 100, adaptive: {max_size: 1400}}"


def walk(length, experiment, progress, sizes):
    """Make the run, its batch size changing after the steps named in ``sizes``."""
    seen = []
    while not length.is_over:
        seen.append((progress.epoch, length.schedule_step, length.total_steps))
        progress.advance(experiment.batch_size, lr=0.1)
        experiment.adaptive.batch_size = sizes.get(progress.step, experiment.batch_size)
        if length.epoch_is_over:
            progress.close_epoch()
    return seen


@pytest.mark.parametrize("sizes", [{}, {3: 300}, {3: 300, 8: 1400}, {13: 700}])
def test_the_steps_foretold_are_those_made_and_epochs_stay(tmp_path, sizes):
    experiment = build_experiment(tiny(tmp_path, ADAPTIVE, "train.epochs=3"))
    progress = Progress()
    length = RunLength(experiment, progress)
    seen = walk(length, experiment, progress, sizes)
    after_last = max(sizes, default=0)
    assert {total for _, _, total in seen[after_last:]} == {progress.step} == {len(seen)}
    assert {epoch for epoch, _, _ in seen} == {0, 1, 2}
    assert length.schedule_step == 3 * (SAMPLES // 100)  # the shape ends with the last epoch
    shape = [step for _, step, _ in seen]
    assert shape == sorted(set(shape))
    assert length.total_steps == length.last_step == progress.step


def test_a_run_ends_at_max_steps(tmp_path):
    experiment = build_experiment(tiny(tmp_path, ADAPTIVE, "train.epochs=3", "train.max_steps=5"))
    progress = Progress()
    length = RunLength(experiment, progress)
    assert (length.last_step, length.total_steps) == (5, 42)
    walk(length, experiment, progress, {})
    assert progress.step == 5
    assert not length.epoch_is_over
