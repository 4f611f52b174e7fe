import ast
import inspect
import multiprocessing
import os
import re
import signal
import tarfile
import time
from dataclasses import FrozenInstanceError, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from on_disk import (
    CIFAR10_FOLDER,
    CIFAR100_FOLDER,
    md5,
    write_arrays,
    write_cifar10,
    write_cifar100,
    write_imagefolder,
)
from PIL import Image

from batchlr.training import data, models
from batchlr.training.data import (
    DATA_SETS,
    DataError,
    ImageData,
    TensorImages,
    batches_per_epoch,
    images,
    load_data,
    measurement_batches,
    test_batches,
    train_batches,
)
from batchlr.training.data.randomness import (
    EpochKey,
    Stream,
    permutation,
    random_bits,
    random_integers,
)
from batchlr.training.data.transforms import CropAndFlip


def numbered(num_samples: int, *, num_test: int = 5, augmentation: CropAndFlip | None = None):
    """Data whose sample ``i`` has a label ``i`` and random pixels of its own."""
    generator = torch.Generator().manual_seed(0)

    def images(size):
        shape = (size, 3, 8, 8)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    return ImageData(
        name="numbered",
        train=TensorImages(images(num_samples), torch.arange(num_samples), None, augmentation),
        test=TensorImages(images(num_test), torch.arange(num_test), None, augmentation),
        num_classes=num_samples,
        in_channels=3,
        image_size=8,
    )


def labels(batches):
    return [y.tolist() for _, y in batches]


def by_label(batches):
    """The image that came with each label."""
    return {int(y): x for xs, ys in batches for x, y in zip(xs, ys, strict=True)}


def assert_same_batches(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for (x, y), (other_x, other_y) in zip(left, right, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


# ------------------------------------------------------------------------------- random numbers


def splitmix64(state: int) -> int:
    """SplitMix64 on Python's integers, as its authors give it."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_reference_generator_gives_the_published_first_numbers():
    gamma = 0x9E3779B97F4A7C15
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(gamma) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 5), (2**62, 10**6)])
def test_random_bits_are_those_of_splitmix64_on_the_words_of_the_key(seed, epoch):
    samples = [0, 1, 2, 1_281_166]
    bits = random_bits(torch.tensor(samples), EpochKey(seed, epoch), Stream.MIRROR)
    for sample, got in zip(samples, bits.tolist(), strict=True):
        state = 0
        for word in (seed, epoch, 3, sample):
            state = splitmix64(state + word)
        assert got == state >> 1


def test_random_integers_are_uniform_and_streams_independent():
    samples, key = torch.arange(90_000), EpochKey(0, 0)
    rows = random_integers(samples, key, Stream.CROP_ROW, high=9)
    columns = random_integers(samples, key, Stream.CROP_COLUMN, high=9)
    counts = torch.bincount(9 * rows + columns, minlength=81).double()
    expected = 90_000 / 81
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 80 - 5 * 160**0.5 < chi_square < 80 + 5 * 160**0.5  # 80 degrees of freedom, 5 sigma


def test_a_permutation_holds_every_sample_once_and_depends_on_seed_and_epoch():
    order = permutation(1000, EpochKey(3, 4))
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, permutation(1000, EpochKey(3, 4)))
    for other in (EpochKey(3, 5), EpochKey(4, 4)):
        agreeing = (order == permutation(1000, other)).sum()
        assert agreeing < 10  # one is expected of unrelated orders


# -------------------------------------------------------------------------------------- batches


def test_one_epoch_shows_every_sample_once_in_another_order_each_epoch():
    data = numbered(20)
    epochs = [labels(train_batches(data, batch_size=5, seed=0, epoch=epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [5, 5, 5, 5]
        assert sorted(chain.from_iterable(epoch)) == list(range(20))
    assert epochs[0] != epochs[1]


def test_the_last_batch_is_dropped_or_smaller():
    data = numbered(11)
    kept = labels(train_batches(data, batch_size=4, seed=0, epoch=0, drop_last=False))
    dropped = labels(train_batches(data, batch_size=4, seed=0, epoch=0))
    assert [len(batch) for batch in kept] == [4, 4, 3]
    assert dropped == kept[:2]
    assert batches_per_epoch(data, batch_size=4) == 2
    assert batches_per_epoch(data, batch_size=4, drop_last=False) == 3


@pytest.mark.parametrize("skipped", [0, 1, 3, 4])
def test_starting_late_gives_the_batches_that_would_have_come(skipped):
    data = numbered(20, augmentation=CropAndFlip(2))
    options = {"batch_size": 5, "seed": 7, "epoch": 2}
    whole = list(train_batches(data, **options))
    rest = train_batches(data, **options, start_sample=5 * skipped)
    assert_same_batches(rest, whole[skipped:])


def test_another_batch_size_goes_on_where_the_last_one_stopped():
    data = numbered(20, augmentation=CropAndFlip(2))
    options = {"seed": 7, "epoch": 2}
    singles = by_label(train_batches(data, batch_size=1, **options))
    first = list(train_batches(data, batch_size=3, **options))[:2]
    rest = list(train_batches(data, batch_size=5, start_sample=6, **options))
    assert [len(labels) for _, labels in rest] == [5, 5]  # four are left out
    order = list(singles)
    seen = torch.cat([labels for _, labels in [*first, *rest]]).tolist()
    assert seen == order[:16]
    assert list(train_batches(data, batch_size=5, start_sample=16, **options)) == []


def test_augmentation_is_the_samples_own_whatever_the_batch():
    data = numbered(30, augmentation=CropAndFlip(2))
    one_by_one = by_label(train_batches(data, batch_size=1, seed=0, epoch=1))
    for batch_size in (7, 30):
        batches = train_batches(data, batch_size=batch_size, seed=0, epoch=1, drop_last=False)
        for label, image in by_label(batches).items():
            assert torch.equal(image, one_by_one[label])


def test_augmentation_differs_between_epochs_seeds_and_samples():
    same = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(2000, 1, 8, 8)
    images = TensorImages(same, torch.arange(2000), None, CropAndFlip(2))
    data = ImageData("same", images, images, 2000, 1, 8)

    def augmented(seed, epoch):
        shown = by_label(train_batches(data, batch_size=2000, seed=seed, epoch=epoch))
        return [shown[index].numpy().tobytes() for index in range(2000)]

    first = augmented(0, 0)
    assert len(set(first)) == 2 * 5 * 5  # all offsets, mirrored or not: 40 samples each
    for other in (augmented(0, 1), augmented(1, 0)):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 80  # 40 are expected


def test_crop_and_flip_is_a_shifted_and_mirrored_copy_with_black_beyond_the_border():
    pixels = torch.randint(1, 256, (50, 3, 6, 6), dtype=torch.uint8)
    key, samples = EpochKey(5, 9), torch.arange(50)
    result = CropAndFlip(2)(pixels, samples, key)
    top = random_integers(samples, key, Stream.CROP_ROW, high=5).tolist()
    left = random_integers(samples, key, Stream.CROP_COLUMN, high=5).tolist()
    mirrored = random_integers(samples, key, Stream.MIRROR, high=2).tolist()
    for index in range(50):
        padded = np.pad(pixels[index].numpy(), ((0, 0), (2, 2), (2, 2)))
        crop = padded[:, top[index] : top[index] + 6, left[index] : left[index] + 6]
        if mirrored[index]:
            crop = crop[:, :, ::-1]
        np.testing.assert_array_equal(result[index].numpy(), crop)
    unmirrored = CropAndFlip(2, mirror=False)(pixels, samples, key)
    equal = [torch.equal(a, b) for a, b in zip(result, unmirrored, strict=True)]
    assert equal == [not flag for flag in mirrored]


def test_processes_share_each_batch():
    data = numbered(20, augmentation=CropAndFlip(2))
    options = {"batch_size": 6, "seed": 0, "epoch": 0}
    whole = list(train_batches(data, **options))
    shards = [train_batches(data, **options, rank=rank, world_size=3) for rank in range(3)]
    joined = [
        tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        for batches in zip(*shards, strict=True)
    ]
    assert_same_batches(joined, whole)


def test_test_batches_are_in_order_and_unaugmented():
    data = numbered(4, num_test=5, augmentation=CropAndFlip(2))
    batches = list(test_batches(data, batch_size=2))
    assert labels(batches) == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.test.images)


def test_processes_divide_the_test_set():
    data = numbered(4, num_test=5)
    shares = [labels(test_batches(data, batch_size=2, rank=r, world_size=3)) for r in range(3)]
    assert shares == [[[0, 3]], [[1, 4]], [[2]]]
    assert labels(test_batches(data, batch_size=2, rank=7, world_size=8)) == []


def test_processes_make_equally_many_passes_over_the_test_set():
    """Sharded networks gather their weights in each: shares of 3 and 2 in batches of 2 make two."""
    shares = [
        labels(test_batches(numbered(4), batch_size=2, rank=r, world_size=2)) for r in range(2)
    ]
    assert shares == [[[0, 2], [4]], [[1], [3]]]


def test_measurement_batches_are_disjoint_unaugmented_and_drawn_by_the_generator():
    data = numbered(40, augmentation=CropAndFlip(2))
    options = {"batch_size": 6, "num_batches": 5}
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    first = measurement_batches(data, **options, generator=generator)
    second = measurement_batches(data, **options, generator=generator)
    again = measurement_batches(data, **options, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    seen = list(chain.from_iterable(labels(first)))
    assert len(seen) == len(set(seen)) == 30
    for label, image in by_label(first).items():
        assert torch.equal(image, data.train.images[label])
    assert_same_batches(first, again)
    assert labels(first) != labels(second)


def test_single_samples_are_read_as_tested():
    data = numbered(4, augmentation=CropAndFlip(2))
    image, label = data.train[3]
    assert torch.equal(image, data.train.images[3])
    assert label == 3
    assert len(list(data.train)) == 4
    with pytest.raises(IndexError, match=r"index must lie in \[0, 3\], got -1"):
        data.train[-1]


TRAIN = {"seed": 0, "epoch": 0}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda data: train_batches(data, batch_size=11, drop_last=False, **TRAIN),
            "batch_size 11 is larger than the 10 samples of numbered",
        ),
        (lambda data: train_batches(data, batch_size=0, **TRAIN), "batch_size must be at least 1"),
        (
            lambda data: train_batches(data, batch_size=5, start_sample=-1, **TRAIN),
            r"start_sample must lie in \[0, 10\], got -1",
        ),
        (
            lambda data: train_batches(data, batch_size=5, start_sample=11, **TRAIN),
            r"start_sample must lie in \[0, 10\], got 11",
        ),
        (
            lambda data: train_batches(data, batch_size=5, world_size=2, **TRAIN),
            "2 processes share batches equally only if batch_size is a multiple .* batch_size 5",
        ),
        (
            lambda data: train_batches(data, batch_size=4, world_size=2, drop_last=False, **TRAIN),
            "got batch_size 4, drop_last False",
        ),
        (
            lambda data: train_batches(data, batch_size=4, rank=2, world_size=2, **TRAIN),
            r"rank must lie in \[0, world_size\), got rank 2 of 2",
        ),
        (lambda data: test_batches(data, batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda data: test_batches(data, batch_size=1, rank=0, world_size=0),
            "got rank 0 of 0",
        ),
        (
            lambda data: measurement_batches(
                data, batch_size=4, num_batches=3, generator=torch.Generator()
            ),
            "3 disjoint batches of 4 need 12 training samples, numbered has 10",
        ),
        (
            lambda data: measurement_batches(
                data, batch_size=4, num_batches=0, generator=torch.Generator()
            ),
            "num_batches must be at least 1, got 0",
        ),
    ],
)
def test_illegal_batches_are_refused_before_the_first_one(call, words):
    with pytest.raises(ValueError, match=words):
        call(numbered(10))


# --------------------------------------------------------------------------- names and options


def test_every_data_set_can_be_asked_for_by_name():
    expected = "digits arrays cifar10 cifar100 imagenet imagefolder synthetic"
    assert list(DATA_SETS) == expected.split()
    for loader in DATA_SETS.values():
        kinds = {parameter.kind for parameter in inspect.signature(loader).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "cifar1000",
            {},
            "data must be one of digits, .*, got 'cifar1000'; did you mean 'cifar100'",
        ),
        ("?", {}, r"data must be one of digits, .*, got '\?'$"),
        (
            "digits",
            {"path": "x"},
            "data digits: got an unexpected keyword argument 'path'; its opt",
        ),
        ("arrays", {}, "data arrays: missing a required argument: 'path'; its options are path, a"),
        ("digits", {"image_size": 0}, "image_size must be at least 1, got 0"),
        ("digits", {"augment": True}, "augment must be one of standard, none, got True"),
        ("cifar10", {"augment": "all"}, "augment must be one of standard, none, got 'all'"),
        (
            "cifar10",
            {"statistics": "svhn"},
            "must be one of cifar10, cifar100, imagenet, got 'svhn'",
        ),
        ("imagenet", {"image_size": 0}, "image_size must be at least 1, got 0"),
        ("imagenet", {"workers": -1}, "workers must not be negative, got -1"),
        ("synthetic", {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ("synthetic", {"channels": 0}, "channels must be at least 1, got 0"),
        ("synthetic", {"noise": -1.0}, "noise must be finite and at least 0, got -1.0"),
        ("synthetic", {"noise": float("nan")}, "noise must be finite and at least 0, got nan"),
    ],
)
def test_illegal_names_and_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        load_data(name, **options)


def test_heavy_packages_are_imported_inside_functions_only():
    files = [*Path(data.__file__).parent.glob("*.py"), *Path(models.__file__).parent.glob("*.py")]
    assert len(files) > 10
    for file in files:
        tops = ast.parse(file.read_text()).body
        imported = [
            alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names
        ]
        imported += [str(node.module) for node in tops if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in imported} & {
            "torchvision",
            "sklearn",
            "numpy",
            "PIL",
        }


def test_data_is_frozen_and_moves_only_what_is_in_memory(tmp_path):
    data = numbered(4)
    with pytest.raises(FrozenInstanceError):
        data.name = "other"
    moved = data.to("meta")
    assert moved.train.images.device.type == moved.test.labels.device.type == "meta"
    folders = load_data("imagefolder", root=write_imagefolder(tmp_path))
    assert folders.to("meta").train is folders.train


# --------------------------------------------------------------------------------------- digits


def test_the_digits_have_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    data = load_data("digits", seed=0)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 32)
    assert (len(data.train), len(data.test)) == (1437, 360)
    other = load_data("digits", seed=1)
    assert torch.equal(data.test.images, other.test.images)
    assert torch.equal(data.train.labels, other.train.labels)
    digits = load_digits()
    by_class = sorted(range(1797), key=digits.target.tolist().__getitem__)  # sorted is stable
    originals = torch.from_numpy(digits.images[by_class[::5]] * 255 / 16).round()
    small = load_data("digits", image_size=8)  # not enlarged: pixels can be compared
    assert torch.equal(small.test.images[:, 0], originals.to(torch.uint8))
    of_class = np.bincount(digits.target)
    in_test = torch.bincount(data.test.labels).numpy()
    assert (abs(in_test - of_class / 5) < 1).all()
    assert (torch.bincount(data.train.labels).numpy() + in_test == of_class).all()


def test_the_digits_are_the_originals_enlarged_and_normalised():
    from sklearn.datasets import load_digits

    data = load_data("digits", image_size=8)  # not enlarged: pixels can be compared
    parts = [next(test_batches(data, batch_size=360))]
    parts += train_batches(data, batch_size=1437, seed=0, epoch=0)
    x_train, _ = parts[1]
    assert x_train.mean().abs() < 1e-5
    assert x_train.std() == pytest.approx(1, abs=1e-4)
    x, y = (torch.cat([part[i] for part in parts]) for i in range(2))
    pixels = (x - x.min()) / (x.max() - x.min())  # undoes any normalisation
    ours = {
        (label, image.round().to(int).numpy().tobytes())
        for image, label in zip(16 * pixels, y.tolist(), strict=True)
    }
    digits = load_digits()
    originals = {
        (label, torch.from_numpy(image).to(int).numpy().tobytes())
        for image, label in zip(digits.images, digits.target.tolist(), strict=True)
    }
    assert ours == originals

    first_zero = Image.fromarray(digits.images[0].astype(np.float32) * 255 / 16)
    expected = np.asarray(first_zero.resize((32, 32), Image.Resampling.BILINEAR))
    enlarged = load_data("digits").test
    assert (digits.target[0], enlarged.labels[0]) == (0, 0)
    np.testing.assert_allclose(enlarged.images[0, 0].numpy(), expected, atol=0.51)  # rounding


def test_augmented_digits_are_shifted_but_never_mirrored():
    data = load_data("digits", augment="standard")
    assert data.train.augmentation == CropAndFlip(4, mirror=False)
    assert data.test.augmentation is None
    assert load_data("digits").train.augmentation is None


# ------------------------------------------------------------------------------------ synthetic


def test_synthetic_data_has_the_size_asked_for_and_repeats_with_its_seed():
    options = {"num_samples": 30, "num_test_samples": 9, "num_classes": 3, "image_size": 12}
    data = load_data("synthetic", **options, channels=2, seed=5)
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 2, 12)
    assert data.train.images.shape == (30, 2, 12, 12)
    assert torch.bincount(data.train.labels).tolist() == [10, 10, 10]
    assert torch.bincount(data.test.labels).tolist() == [3, 3, 3]
    again = load_data("synthetic", **options, channels=2, seed=5)
    other = load_data("synthetic", **options, channels=2, seed=6)
    assert torch.equal(data.train.images, again.train.images)
    assert not torch.equal(data.train.images, other.train.images)


def test_synthetic_classes_can_be_learnt_and_noise_has_the_size_asked_for():
    data = load_data("synthetic", num_samples=2000, image_size=16, noise=2.0)
    x, y = data.train.images, data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    # 2000 x 768 values, less the ten means: relative error of the deviation below 1e-3
    assert (x - means[y]).std() == pytest.approx(2.0 * (1 - 10 / 2000) ** 0.5, rel=0.005)
    noise_in_means = 2.0**2 / 200
    assert means.square().mean() == pytest.approx(1 + noise_in_means, rel=0.01)
    distances = (data.test.images[:, None] - means).square().sum((2, 3, 4))
    assert (distances.argmin(1) == data.test.labels).float().mean() > 0.95


# --------------------------------------------------------------------------------------- arrays


def test_uint8_arrays_are_normalised_with_the_statistics_of_the_training_images(tmp_path):
    path = write_arrays(tmp_path / "a.npz")
    data = load_data("arrays", path=path)
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 2, 8)
    arrays = np.load(path)
    scaled = arrays["x_train"] / 255
    mean, std = (f(scaled, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    x, y = next(test_batches(data, batch_size=6))
    np.testing.assert_allclose(x.numpy(), (arrays["x_test"] / 255 - mean) / std, atol=1e-5)
    assert y.tolist() == arrays["y_test"].tolist()
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    train = by_label(train_batches(data, batch_size=12, seed=0, epoch=0))
    assert set(train) == {0, 1, 2}


def test_float_arrays_are_left_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(5, 3, (6, 1, 4, 4)).astype(np.float32)
    path = write_arrays(tmp_path / "a.npz", x_train=x, x_test=x, y_train=np.arange(6) % 3)
    data = load_data("arrays", path=str(path))
    np.testing.assert_array_equal(next(test_batches(data, batch_size=6))[0].numpy(), x)
    measured = measurement_batches(data, batch_size=6, num_batches=1, generator=torch.Generator())
    np.testing.assert_array_equal(np.sort(measured[0][0].flatten()), np.sort(x.flatten()))


def test_a_channel_without_variation_is_only_centred(tmp_path):
    x = np.full((6, 1, 4, 4), 51, np.uint8)
    path = write_arrays(tmp_path / "a.npz", x_train=x, x_test=x + 51, y_train=np.arange(6) % 3)
    image, _ = load_data("arrays", path=path).test[0]
    torch.testing.assert_close(image, torch.full((1, 4, 4), 0.2))


def test_arrays_are_augmented_on_request(tmp_path):
    path = write_arrays(tmp_path / "a.npz")
    data = load_data("arrays", path=path, augment="standard")
    assert data.train.augmentation == CropAndFlip(padding=1)  # an eighth of 8
    assert data.test.augmentation is None
    assert load_data("arrays", path=path).train.augmentation is None


FLOATS = np.zeros((12, 2, 8, 8), np.float32)
BYTES = np.zeros((12, 2, 8, 8), np.uint8)
INFINITE = np.where(np.arange(FLOATS.size) == 5, np.inf, FLOATS.flat).reshape(FLOATS.shape)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"y_test": None, "x_test": None}, "it lacks x_test, y_test; it has .'x_train', 'y_train'"),
        ({"x_train": BYTES[0]}, r"x_train must have shape \(N, C, H, W\), none .* got \(2, 8, 8\)"),
        ({"x_train": BYTES[:0]}, r"none of them 0, got \(0, 2, 8, 8\)"),
        ({"x_test": BYTES.astype(np.int32)}, "x_test must be uint8 or float32, got int32"),
        ({"x_train": FLOATS.astype(np.float64)}, "x_train must be uint8 or float32, got float64"),
        ({"x_train": BYTES[:, :, :4]}, r"x_train must hold square images, got \(4, 8\); pad"),
        ({"x_train": INFINITE.astype(np.float32)}, "x_train has 1 values that are not finite"),
        ({"x_train": np.full_like(FLOATS, np.nan)}, "x_train has 1536 values that are not finite"),
        ({"y_train": np.arange(11)}, r"y_train must have shape \(12,\), one .* got \(11,\)"),
        ({"y_train": np.zeros((12, 1), int)}, r"y_train must have shape \(12,\), .* got \(12, 1\)"),
        ({"y_train": np.zeros(12)}, "y_train must be integers, got float64; use astype"),
        (
            {"y_test": np.arange(6) - 1},
            "y_test must not be negative, got -1; number classes from 0",
        ),
        (
            {"y_train": np.where(np.arange(12) == 5, 10**9, np.arange(12) % 3)},
            "hold 4 different labels, the largest 1000000000; number classes from 0 without gaps",
        ),
        (
            {"x_test": BYTES[:6, :1]},
            r"images \(2, 8, 8\) of uint8, x_test \(1, 8, 8\) of uint8; make them agree",
        ),
        ({"x_test": FLOATS[:6]}, r"of uint8, x_test \(2, 8, 8\) of float32; make them agree"),
        (
            {"y_train": np.array([None] * 12)},
            "cannot be read .*pickle.*; write it with numpy.savez",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_path_and_the_layout(tmp_path, replaced, words):
    path = write_arrays(tmp_path / "a.npz", **replaced)
    with pytest.raises(DataError, match=words) as caught:
        load_data("arrays", path=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "Expected: an NPZ archive with x_train, y_train, x_test, y_test" in str(caught.value)


def test_files_that_are_no_archive_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match=r"a\.npz: there is no such file"):
        load_data("arrays", path=path)
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="it cannot be read"):
        load_data("arrays", path=path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="it cannot be read"):
        load_data("arrays", path=path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="it holds a single array; write it with"):
        load_data("arrays", path=path)


def test_a_damaged_archive_is_refused(tmp_path):
    intact = write_arrays(tmp_path / "a.npz").read_bytes()
    path = tmp_path / "b.npz"
    path.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(DataError, match="it cannot be read"):
        load_data("arrays", path=path)
    middle = len(intact) // 4  # inside the pixels of x_train: the archive's checksum notices
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 255]) + intact[middle + 1 :])
    with pytest.raises(DataError, match="it cannot be read"):
        load_data("arrays", path=path)


# ---------------------------------------------------------------------------------------- cifar

PUBLISHED = {  # per channel, of the training images scaled to [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
CIFAR = {
    "cifar10": (write_cifar10, CIFAR10_FOLDER, "test_batch", "labels", 10),
    "cifar100": (write_cifar100, CIFAR100_FOLDER, "test", "fine_labels", 100),
}


def raw_cifar(path, labels_key):
    import pickle

    with path.open("rb") as file:
        content = pickle.load(file)
    return content["data"].reshape(-1, 3, 32, 32) / 255, content[labels_key]


def normalised(pixels, statistics):
    mean, std = (np.array(values)[:, None, None] for values in PUBLISHED[statistics])
    return (pixels - mean) / std


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_from_its_own_files_and_normalised(tmp_path, fake_cifar_checksums, name):
    write, folder, test_file, labels_key, num_classes = CIFAR[name]
    write(tmp_path)
    fake_cifar_checksums(tmp_path)
    data = load_data(name, root=tmp_path)
    assert (data.name, data.num_classes, data.in_channels, data.image_size) == (
        name,
        num_classes,
        3,
        32,
    )
    assert (len(data.train), len(data.test)) == (40, 8)
    assert data.train.images.dtype == torch.uint8
    pixels, raw_labels = raw_cifar(tmp_path / folder / test_file, labels_key)
    x, y = next(test_batches(data, batch_size=8))
    np.testing.assert_allclose(x.numpy(), normalised(pixels, name), atol=1e-5)
    assert y.tolist() == raw_labels
    other = load_data(name, root=tmp_path, statistics="imagenet")
    x, _ = next(test_batches(other, batch_size=8))
    np.testing.assert_allclose(x.numpy(), normalised(pixels, "imagenet"), atol=1e-5)


def test_cifar_training_images_are_cropped_with_black_padding_unless_told_not_to(
    tmp_path, fake_cifar_checksums
):
    write_cifar100(tmp_path)
    fake_cifar_checksums(tmp_path)
    pixels, _ = raw_cifar(tmp_path / CIFAR100_FOLDER / "train", "fine_labels")
    data = load_data("cifar100", root=tmp_path)
    assert data.train.augmentation == CropAndFlip(padding=4, mirror=True)
    assert data.test.augmentation is None
    black = normalised(np.zeros((3, 32, 32)), "cifar100").astype(np.float32)
    corners = [
        x[:, [0, 0, -1, -1], [0, -1, 0, -1]].numpy()
        for xs, _ in train_batches(data, batch_size=40, seed=0, epoch=0)
        for x in xs
    ]
    is_black = [np.isclose(corner, black[:, :1, 0], atol=1e-6).all(0).any() for corner in corners]
    assert sum(is_black) > 30  # all but one of 81 offsets leave a black corner

    plain = load_data("cifar100", root=tmp_path, augment="none")
    order = permutation(40, EpochKey(0, 0)).numpy()
    x, _ = next(train_batches(plain, batch_size=40, seed=0, epoch=0))
    np.testing.assert_allclose(x.numpy(), normalised(pixels[order], "cifar100"), atol=1e-5)


@pytest.mark.parametrize("name", CIFAR)
def test_missing_cifar_names_the_folder_and_the_way_out(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load_data(name, root=tmp_path)
    message = str(caught.value)
    archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
    assert f"{name} is missing or corrupt in {tmp_path / CIFAR[name][1]} (missing: " in message
    assert f"Unpack {archive} in {tmp_path}" in message
    assert "data.download=true" in message


@pytest.mark.parametrize("name", CIFAR)
def test_corrupt_cifar_names_the_file(tmp_path, fake_cifar_checksums, name):
    write, folder, test_file, *_ = CIFAR[name]
    write(tmp_path)
    fake_cifar_checksums(tmp_path)
    load_data(name, root=tmp_path)
    file = tmp_path / folder / test_file
    file.write_bytes(file.read_bytes() + b"\0")
    words = rf"\(unreadable or with a wrong checksum: {test_file}\)"
    with pytest.raises(DataError, match=words):
        load_data(name, root=tmp_path)


def test_missing_names_of_classes_are_missing_data(tmp_path, fake_cifar_checksums):
    folder = write_cifar100(tmp_path)
    fake_cifar_checksums(tmp_path)
    (folder / "meta").unlink()
    with pytest.raises(DataError, match=r"\(missing: meta\)"):
        load_data("cifar100", root=tmp_path)


def test_download_unpacks_an_archive_put_in_place(tmp_path, fake_cifar_checksums, monkeypatch):
    from torchvision.datasets import CIFAR100

    source, root = tmp_path / "source", tmp_path / "root"
    folder = write_cifar100(source)
    fake_cifar_checksums(source)
    root.mkdir()
    archive = root / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))
    with pytest.raises(DataError, match="missing: train, test, meta"):
        load_data("cifar100", root=root)
    data = load_data("cifar100", root=root, download=True)
    expected = load_data("cifar100", root=source)
    assert torch.equal(data.train.images, expected.train.images)


def test_a_failed_download_is_missing_data(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(
        DataError, match=r"missing: train, test, meta; the download of .* failed: .*nowh"
    ):
        load_data("cifar100", root=tmp_path, download=True)


# -------------------------------------------------------------------------------------- folders


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_imagefolder(tmp_path)


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_folders_are_classes_and_test_images_the_normalised_centre(folders, name):
    data = load_data(name, root=folders, image_size=28)
    assert (data.name, data.num_classes, data.in_channels, data.image_size) == (name, 3, 3, 28)
    assert (len(data.train), len(data.test)) == (12, 6)
    x, y = next(test_batches(data, batch_size=6))
    assert x.shape == (6, 3, 28, 28)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    # 28 is cut out of a shorter side of 32; the files are 40 x 48, so 48 becomes 38
    image = Image.open(folders / "val" / "n00000001" / "0.JPEG")
    resized = np.asarray(image.resize((32, 38), Image.Resampling.BILINEAR)) / 255
    assert image.size == (40, 48)
    centre = resized[5:33, 2:30].transpose(2, 0, 1)
    np.testing.assert_allclose(x[2].numpy(), normalised(centre, "imagenet"), atol=1e-5)


def test_folder_augmentation_is_the_samples_own_whatever_the_batch_and_the_start(folders):
    data = load_data("imagefolder", root=folders, image_size=16)
    state = torch.get_rng_state()
    options = {"seed": 1, "epoch": 3}
    whole = list(train_batches(data, batch_size=4, **options))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)  # the state of the global generator is of no influence
    assert_same_batches(train_batches(data, batch_size=4, **options, start_sample=8), whole[2:])
    large = next(train_batches(data, batch_size=12, **options))
    assert torch.equal(torch.cat([x for x, _ in whole]), large[0])
    next_epoch = next(train_batches(data, batch_size=12, seed=1, epoch=4))
    back = [permutation(12, EpochKey(1, epoch)).argsort() for epoch in (3, 4)]
    assert torch.equal(large[1][back[0]], next_epoch[1][back[1]])
    changed = (large[0][back[0]] != next_epoch[0][back[1]]).flatten(1).any(1)
    assert changed.all()


# Python 3.12 and newer warn of forks beside threads, which is how torch starts its workers
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_change_nothing(folders):
    alone = load_data("imagefolder", root=folders, image_size=16)
    helped = load_data("imagefolder", root=folders, image_size=16, workers=2)
    options = {"batch_size": 5, "seed": 0, "epoch": 0, "drop_last": False}
    assert_same_batches(train_batches(helped, **options), train_batches(alone, **options))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_goes_on_when_its_whole_group_is_asked_to_stop(folders, number):
    folder, here = (
        load_data("imagefolder", root=folders, image_size=16, workers=1).test,
        os.getpid(),
    )

    def read(path):
        if os.getpid() != here:
            os.kill(os.getpid(), number)
        return folder.read(path)

    asked = replace(folder, read=read).batches([torch.tensor([0]), torch.tensor([1])])
    assert_same_batches(asked, folder.batches([torch.tensor([0]), torch.tensor([1])]))


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="no alarm to end a process by")
def test_a_worker_ends_some_seconds_after_it_is_asked_to(monkeypatch):
    """Who exits with its workers alive asks them to end, and waits."""
    monkeypatch.setattr(images, "_GRACE", 1)

    def last():
        images._leave_signals(0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    worker = multiprocessing.get_context("fork").Process(target=last)
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGALRM


def test_unaugmented_folders_train_on_test_images(folders):
    data = load_data("imagefolder", root=folders, image_size=16, augment="none")
    measured = measurement_batches(data, batch_size=12, num_batches=1, generator=torch.Generator())
    order = torch.randperm(12, generator=torch.Generator())
    x, _ = next(train_batches(data, batch_size=12, seed=0, epoch=0))
    assert torch.equal(
        x[permutation(12, EpochKey(0, 0)).argsort()], measured[0][0][order.argsort()]
    )


def test_missing_folders_are_named_with_the_layout(tmp_path, folders):
    with pytest.raises(DataError, match=r"imagenet: no images in .*nowhere/train .*/val/CLASS/\*"):
        load_data("imagenet", root=folders / "nowhere")
    (folders / "train" / "n00000003").mkdir()
    with pytest.raises(DataError, match=r"no images in .*train \(Found no valid file.* n00000003"):
        load_data("imagefolder", root=folders)


def test_classes_of_one_split_only_are_named(folders):
    for index in range(7):
        folder = folders / "val" / f"x{index}"
        folder.mkdir()
        (folder / "0.JPEG").write_bytes((folders / "val" / "n00000000" / "0.JPEG").read_bytes())
    words = "must hold the same classes; only one of them has x0, x1, x2, x3, x4 and 2 more"
    with pytest.raises(DataError, match=words):
        load_data("imagefolder", root=folders)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named(folders, workers):
    picture = folders / "val" / "n00000002" / "1.JPEG"
    picture.write_bytes(picture.read_bytes()[:100])
    data = load_data("imagefolder", root=folders, image_size=16, workers=workers)
    words = rf"{picture} is not a readable image \([^\n]*\); replace or remove it"
    with pytest.raises(DataError) as caught:
        list(test_batches(data, batch_size=2))
    assert re.fullmatch(words, str(caught.value))
