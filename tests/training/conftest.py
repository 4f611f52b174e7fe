import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import the writers of on_disk

from on_disk import CIFAR10_FOLDER, CIFAR100_FOLDER, md5


@pytest.fixture
def fake_cifar_checksums(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes torchvision accept the CIFAR files now under a root.

    torchvision compares each file with the checksum of the original, which files written by a test
    cannot have. The tables of checksums are replaced, the comparison itself still runs: a file
    changed afterwards is refused.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    def accept(root: Path) -> None:
        for dataset, folder in (
            (CIFAR10, root / CIFAR10_FOLDER),
            (CIFAR100, root / CIFAR100_FOLDER),
        ):
            if not folder.is_dir():
                continue
            for table in ("train_list", "test_list"):
                names = [name for name, _ in getattr(dataset, table)]
                monkeypatch.setattr(dataset, table, [[name, md5(folder / name)] for name in names])
            meta = {**dataset.meta, "md5": md5(folder / dataset.meta["filename"])}
            monkeypatch.setattr(dataset, "meta", meta)

    return accept
