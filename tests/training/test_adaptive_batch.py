"""Groups of a growing batch, against a search over all ways to split it."""

import math

import pytest
from runs import tiny

from batchlr.training.adaptive_batch import adaptive_batch_size, group_size
from batchlr.training.distributed import Processes
from batchlr.training.experiment import build_data
from batchlr.training.pass_sizes import micro_size


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return build_data(tiny(tmp_path_factory.mktemp("digits")))


@pytest.fixture
def configured(tmp_path):
    """A function that makes the configuration of a growing batch."""

    def make(size, *, micro="auto", max_size=512, **options):
        inside = ", ".join(f"{key}: {value}" for key, value in options.items())
        adaptive = f"{{max_size: {max_size}, {inside}}}" if options else f"{{max_size: {max_size}}}"
        batch = f"batch={{global_size: {size}, micro_size: {micro}, adaptive: {adaptive}}}"
        return tiny(tmp_path, batch)

    return make


def splits(size, *, most, world, shards):
    """Sizes of groups that split a batch evenly, by definition."""
    share = size // world
    for group in range(1, most + 1):
        in_each = share // group  # groups that a process makes, one after another
        apart = in_each if shards else in_each * world
        if in_each * group == share and apart >= 2 and (group >= 2 or most == 1):
            yield group, apart


@pytest.mark.parametrize(("world", "shards"), [(1, False), (2, False), (4, False), (2, True)])
@pytest.mark.parametrize("micro", ["auto", 1, 3, 8])
@pytest.mark.parametrize("groups", [2, 5])
def test_of_all_even_splits_the_one_nearest_to_the_number_asked_for(
    configured, digits, world, shards, micro, groups
):
    processes = Processes(0, world, 0, shards)
    unit = world if micro == "auto" else world * micro
    accepted = 0
    for size in (unit * times for times in (1, 2, 3, 4, 6, 8, 11)):
        config = configured(size, micro=micro, groups=groups)
        most = micro_size(config, world)
        possible = dict(splits(size, most=most, world=world, shards=shards))
        if not possible:
            with pytest.raises(ValueError, match=f"global_size {size} cannot be split into two"):
                adaptive_batch_size(config, digits, processes)
            continue
        accepted += 1
        adaptive = adaptive_batch_size(config, digits, processes)
        for grown in (size, size + adaptive.multiple_of, 2 * size):
            possible = dict(splits(grown, most=most, world=world, shards=shards))
            chosen = group_size(config, processes, grown)
            nearest = min(abs(apart - groups) for apart in possible.values())
            assert abs(possible[chosen] - groups) == nearest
            tied = [g for g, apart in possible.items() if abs(apart - groups) == nearest]
            assert chosen == max(tied)  # as few passes as will do
    assert accepted >= 3


@pytest.mark.parametrize(("world", "micro", "unit"), [(1, "auto", 24), (2, "auto", 24), (2, 6, 12)])
def test_sizes_grow_in_whole_passes_of_all_processes(configured, digits, world, micro, unit):
    config = configured(24, micro=micro, max_size=128)
    adaptive = adaptive_batch_size(config, digits, Processes(0, world))
    assert adaptive.multiple_of == unit
    assert adaptive.batch_size == 24
    assert adaptive.max_batch_size == 128 // unit * unit


def test_options_reach_what_chooses_sizes(configured, digits):
    options = {"tolerance": 0.3, "debias": "false", "max_growth": 3.5, "test_every": 7}
    config = configured(32, smoothing=0.25, **options)
    adaptive = adaptive_batch_size(config, digits, Processes())
    assert (adaptive.tolerance, adaptive.debias, adaptive.max_growth) == (0.3, False, 3.5)
    assert (adaptive.interval, adaptive.smoothing) == (7, 0.25)
    assert adaptive.dataset_size == len(digits.train)
    unbounded = configured(32, max_growth="null")
    assert adaptive_batch_size(unbounded, digits, Processes()).max_growth == math.inf


def test_without_options_all_batches_are_alike(tmp_path, digits):
    assert adaptive_batch_size(tiny(tmp_path), digits, Processes()) is None


@pytest.mark.parametrize(
    ("size", "options", "world", "words"),
    [
        (8, {"max_size": 1438}, 1, "max_size 1438 is larger than the 1437 samples of digits"),
        (8, {"max_size": 15}, 1, "sizes are multiples of 8, so the next after 8 is 16; allow"),
        (12, {"micro": 3, "max_size": 17}, 2, "sizes are multiples of 6, so the next after 12 is"),
        (31, {}, 1, "global_size 31 cannot be split .* that can: 30 and 32"),
        (3, {"micro": 3}, 1, "global_size 3 cannot be split .* that can: 6"),
    ],
)
def test_what_cannot_grow_or_be_read_is_refused(configured, digits, size, options, world, words):
    with pytest.raises(ValueError, match=words):
        adaptive_batch_size(configured(size, **options), digits, Processes(0, world))


@pytest.mark.parametrize(("world", "shards"), [(1, False), (2, True), (3, True)])
@pytest.mark.parametrize("micro", ["auto", 1, 5])
def test_the_sizes_named_in_a_refusal_can_be_read(configured, digits, world, shards, micro):
    processes = Processes(0, world, 0, shards)
    unit = world if micro == "auto" else world * micro
    refused = 0
    for size in range(unit, 60, unit):
        try:
            adaptive_batch_size(configured(size, micro=micro), digits, processes)
        except ValueError as error:
            refused += 1
            for other in map(int, str(error).rpartition(": ")[2].split(" and ")):
                assert adaptive_batch_size(configured(other, micro=micro), digits, processes)
    assert refused
