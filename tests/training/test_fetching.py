"""Data brought in place; archives are small ones of the tests' own, served by this process."""

import multiprocessing
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from on_disk import CIFAR100_FOLDER, md5, write_arrays, write_cifar100, write_imagefolder

from batchlr.training.data import DataError, load_data
from batchlr.training.data.cifar import fetch_cifar
from batchlr.training.data.fetching import fetch_data


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Where ``tmp_path`` is served."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def archive(tmp_path, address, fake_cifar_checksums, monkeypatch):
    """An archive of CIFAR-100's format, which torchvision takes for the published one."""
    from torchvision.datasets import CIFAR100

    folder = write_cifar100(tmp_path / "source")
    fake_cifar_checksums(tmp_path / "source")
    path = tmp_path / "elsewhere.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(path))
    monkeypatch.setattr(CIFAR100, "url", f"{address}/{path.name}")
    return path


def test_cifar_is_fetched_once(tmp_path, archive):
    root = tmp_path / "new" / "root"
    assert fetch_data("cifar100", root=root) == f"cifar100: fetched to {root / CIFAR100_FOLDER}"
    assert len(load_data("cifar100", root=root).train) == 40
    archive.unlink()
    found = f"cifar100: nothing to do, it is in {root / CIFAR100_FOLDER}"
    assert fetch_data("cifar100", root=root, augment="none", download=True) == found


def test_an_archive_put_in_place_is_unpacked(tmp_path, archive):
    archive.rename(tmp_path / "cifar-100-python.tar.gz")
    assert fetch_cifar("cifar100", tmp_path)
    assert not fetch_cifar("cifar100", tmp_path)


def test_a_mirror_may_be_named(tmp_path, archive, address):
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"missing: train, test, meta; the download of .*404"):
        fetch_data("cifar100", root=root, url=f"{address}/nowhere.tar.gz")
    archive.rename(tmp_path / "mirror.tar.gz")
    fetch_data("cifar100", root=root, url=f"{address}/mirror.tar.gz")
    assert len(load_data("cifar100", root=root).train) == 40


def test_a_mirror_with_something_else_is_refused(tmp_path, archive, address):
    other = tmp_path / "other.tar.gz"
    other.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"the download of .* failed: File not found or"):
        fetch_data("cifar100", root=tmp_path / "root", url=f"{address}/other.tar.gz")
    assert not (tmp_path / "root" / CIFAR100_FOLDER).exists()


def test_a_damaged_file_is_fetched_anew(tmp_path, archive):
    fetch_data("cifar100", root=tmp_path)
    (tmp_path / CIFAR100_FOLDER / "train").write_bytes(b"torn")
    assert fetch_data("cifar100", root=tmp_path).startswith("cifar100: fetched to ")
    assert len(load_data("cifar100", root=tmp_path).train) == 40


def _hold(lock, held, release):
    from filelock import FileLock

    with FileLock(lock):
        held.set()
        release.wait(60)


def test_one_process_of_a_machine_fetches_at_a_time(tmp_path, archive):
    """While another one holds the lock nothing is fetched; what it has brought is taken."""
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    lock = tmp_path / ".cifar-100-python.tar.gz.lock"
    other = context.Process(target=_hold, args=(lock, held, release))
    other.start()
    assert held.wait(60)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(fetch_cifar("cifar100", tmp_path)))
    thread.start()
    thread.join(0.5)
    waiting = thread.is_alive() and not (tmp_path / CIFAR100_FOLDER).exists()
    write_cifar100(tmp_path)  # as the other one would
    release.set()
    thread.join(60)
    other.join(60)
    assert waiting
    assert answers == [False]


@pytest.mark.parametrize("url", ["cifar.tar.gz", "file:///cifar.tar.gz"])
def test_an_address_that_is_none_is_refused(tmp_path, url):
    with pytest.raises(ValueError, match=r"url must begin with https:// or http://, got '"):
        fetch_data("cifar10", root=tmp_path, url=url)


def test_other_data_have_no_archive():
    with pytest.raises(ValueError, match=r"url is for cifar10 and cifar100, .* data are digits"):
        fetch_data("digits", url="https://example.org")


def test_what_is_there_needs_no_fetching(tmp_path):
    words = "digits: nothing to do, it is there (1437 training and 360 test images)"
    assert fetch_data("digits", image_size=8) == words
    path = write_arrays(tmp_path / "a.npz")
    assert "it is there (12 training and 6 test images)" in fetch_data("arrays", path=path)
    root = write_imagefolder(tmp_path)
    assert "it is there (12 training" in fetch_data("imagenet", root=root, workers=0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("imagenet", {}, r"no images in .*train .*ImageNet is given .*https://image-net\.org/down"),
        ("imagefolder", {}, "no images in .*train .*images of your own, which nothing can fetch"),
        ("arrays", {"path": "none.npz"}, r"no such file\..*nothing can fetch: data\.path names"),
    ],
)
def test_what_cannot_be_fetched_is_told_how_to_get(tmp_path, name, options, words):
    with pytest.raises(DataError, match=words):
        fetch_data(name, root=tmp_path, **options)
