"""What is found in data sets, and in broken ones."""

import numpy as np
import pytest
from on_disk import CIFAR100_FOLDER, write_arrays, write_cifar100, write_imagefolder

from batchlr.training.data import DataError, verification
from batchlr.training.data.verification import verify_data


def test_arrays_are_described(tmp_path):
    path = write_arrays(tmp_path / "a.npz", y_train=np.array([0] * 7 + [2] * 5))
    assert verify_data("arrays", path=path, augment="none") == [
        "arrays: complete and intact",
        "12 training images, 2 x 8 x 8 uint8, of 3 classes with 0 to 7 each",
        "6 test images, 2 x 8 x 8 uint8, of 3 classes with 2 to 2 each",
        "  class 0: 7 training, 2 test images",
        "  class 1: 0 training, 2 test images",
        "  class 2: 5 training, 2 test images",
    ]


def test_arrays_that_do_not_fit_are_corrupt(tmp_path):
    path = write_arrays(tmp_path / "a.npz", y_train=np.zeros(12))
    with pytest.raises(DataError, match="y_train must be integers, got float64"):
        verify_data("arrays", path=path)


def test_folders_are_described_with_the_names_of_their_classes(tmp_path):
    assert verify_data("imagefolder", root=write_imagefolder(tmp_path), workers=2) == [
        "imagefolder: complete and intact",
        "12 training images, 3 x 224 x 224 read from files, of 3 classes with 4 to 4 each",
        "6 test images, 3 x 224 x 224 read from files, of 3 classes with 2 to 2 each",
        *(f"  class n0000000{k}: 4 training, 2 test images" for k in range(3)),
    ]


def test_every_broken_picture_is_named(tmp_path):
    root = write_imagefolder(tmp_path)
    torn = root / "train" / "n00000001" / "3.JPEG"  # its header is whole
    torn.write_bytes(torn.read_bytes()[:-200])
    empty = root / "val" / "n00000002" / "0.JPEG"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="incomplete or corrupt: ") as caught:
        verify_data("imagefolder", root=root)
    for path in (torn, empty):
        assert f"{path} is not a readable image (" in str(caught.value)
    assert str(caught.value).count("readable") == 2


def test_a_picture_too_large_for_pillow_is_named(tmp_path, monkeypatch):
    root = write_imagefolder(tmp_path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"0\.JPEG is not a readable image \(Image size \("):
        verify_data("imagefolder", root=root)


def test_of_many_broken_pictures_the_first_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "_LISTED", 2)
    root = write_imagefolder(tmp_path)
    for path in (root / "train" / "n00000001").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"n00000001/1\.JPEG is .*\); and 2 more$"):
        verify_data("imagefolder", root=root)


def test_a_part_of_imagenet_is_incomplete(tmp_path, monkeypatch):
    root = write_imagefolder(tmp_path)
    words = (
        "3 classes, 12 training and 6 test images, where ImageNet has 1000 classes, 1281167 and "
        "50000; for a part of it, set data.name=imagefolder"
    )
    with pytest.raises(DataError, match=words):
        verify_data("imagenet", root=root)
    monkeypatch.setattr(verification, "_IMAGENET", (3, 12, 6))
    assert verify_data("imagenet", root=root)[0] == "imagenet: complete and intact"


def test_cifar_must_have_its_checksums(tmp_path, fake_cifar_checksums):
    write_cifar100(tmp_path)
    fake_cifar_checksums(tmp_path)
    lines = verify_data("cifar100", root=tmp_path, download=True)
    assert lines[0] == "cifar100: complete and intact"
    assert lines[1].startswith("40 training images, 3 x 32 x 32 uint8, of 100 classes with 0 to ")
    assert len(lines) == 3  # a hundred classes are not listed
    (tmp_path / CIFAR100_FOLDER / "test").write_bytes(b"torn")
    (tmp_path / CIFAR100_FOLDER / "meta").unlink()
    words = r"\(missing: meta; unreadable or with a wrong checksum: test\)"
    with pytest.raises(DataError, match=words):
        verify_data("cifar100", root=tmp_path, download=True)


def test_data_that_need_no_files_are_described():
    lines = verify_data("synthetic", seed=3, num_samples=10, num_classes=5)
    assert lines[1] == "10 training images, 3 x 8 x 8 float32, of 5 classes with 2 to 2 each"
    assert verify_data("digits", image_size=8)[2].startswith("360 test images, 1 x 8 x 8 uint8")
