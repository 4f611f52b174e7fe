"""How many samples go through the network at a time."""

import pytest
from runs import tiny

from batchlr.training.distributed import Processes
from batchlr.training.experiment import build_data, build_experiment
from batchlr.training.pass_sizes import (
    check_sharing,
    measurement_sizes,
    micro_size,
    tracking_sizes,
)


@pytest.mark.parametrize(
    ("batch", "samples", "sizes"),
    [
        ("{global_size: 32}", 256, (32, 8)),  # as large as one forward pass
        ("{global_size: 32, micro_size: 8}", 256, (8, 32)),
        ("{global_size: 128}", 256, (64, 4)),  # never fewer than four
        ("{global_size: 30}", 256, (30, 8)),
        ("{global_size: 1}", 256, (1, 256)),
        ("{global_size: 400}", 5000, (359, 4)),  # no more than there are: 1437
        ("{global_size: 400}", 3, (1, 3)),
    ],
)
def test_a_measurement_has_batches_of_the_size_trained_with_but_at_least_four(
    tmp_path, batch, samples, sizes
):
    config = tiny(tmp_path, f"batch={batch}", f"curvature.samples={samples}")
    experiment = build_experiment(config)
    assert measurement_sizes(config, experiment.data) == sizes
    if sizes[0] > 1:
        batches = experiment.measurement_batches(sizes)
        assert [len(labels) for _, labels in batches] == [sizes[0]] * sizes[1]


@pytest.mark.parametrize(
    ("batch", "samples", "sizes"),
    [(16, 256, (16, 4)), (200, 256, (25, 4)), (800, 256, (64, 4)), (800, 48, (12, 4))],
)
def test_while_training_half_a_batch_or_64_are_measured(tmp_path, batch, samples, sizes):
    config = tiny(tmp_path, f"batch.global_size={batch}", f"curvature.samples={samples}")
    experiment = build_experiment(config)
    assert tracking_sizes(config, experiment.data) == sizes
    batches = experiment.measurement_batches()
    assert [len(labels) for _, labels in batches] == [sizes[0]] * sizes[1]


def test_the_share_of_a_process_decides_the_size_measured(tmp_path):
    config = tiny(tmp_path, "batch.global_size=64")
    data = build_experiment(config).data
    assert micro_size(config, 4) == 16
    assert measurement_sizes(config, data, 4) == (16, 4)


@pytest.mark.parametrize(
    ("batch", "world_size", "words"),
    [
        ("{global_size: 100}", 3, "by 3 processes; the nearest shareable sizes are 99 and 102"),
        ("{global_size: 2}", 4, "by 4 processes; the nearest shareable sizes are 4 and 8"),
        (
            "{global_size: 12, micro_size: 4}",
            2,
            "by 2 processes in equal micro-batches of 4; the nearest shareable sizes are 8 and 16",
        ),
    ],
)
def test_batches_that_processes_cannot_share_are_refused(tmp_path, batch, world_size, words):
    config = tiny(tmp_path, f"batch={batch}")
    with pytest.raises(ValueError, match=f"batch.global_size .* cannot be shared {words}"):
        check_sharing(config, build_data(config), Processes(0, world_size))


def test_sharded_runs_need_a_test_image_in_each_process(tmp_path):
    """Else one would not take part in gathering the weights, and the others wait for ever."""
    config = tiny(
        tmp_path,
        "data={name: synthetic, num_samples: 64, num_test_samples: 3, image_size: 4}",
        "batch.global_size=32",
    )
    with pytest.raises(ValueError, match=r"test image in each of its 4 processes, .* has 3"):
        check_sharing(config, build_data(config), Processes(world_size=4, shards=True))


def test_a_micro_batch_larger_than_a_share_is_the_share(tmp_path):
    config = tiny(tmp_path, "batch={global_size: 8, micro_size: 8}")
    assert [micro_size(config, world_size) for world_size in (1, 2, 4)] == [8, 4, 2]
