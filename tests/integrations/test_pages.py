"""docs/integrations.md is true: its code runs and prints what it says."""

import pytest
from lightning_runs import WARNINGS

from test_readme import FRAMEWORKS_NEEDED, Reader, find_blocks, read_page

BLOCKS = find_blocks(read_page(FRAMEWORKS_NEEDED), FRAMEWORKS_NEEDED)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return Reader(BLOCKS, tmp_path_factory.mktemp("integrations"))


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=map(str, BLOCKS))
def test_block_is_true(index, reader, monkeypatch):
    monkeypatch.chdir(reader.folder)
    reader.reach(index)


def test_every_framework_has_an_example():
    text = "".join(block.text for block in BLOCKS)
    for name in ("lightning", "huggingface", "accelerate"):
        assert f"from batchlr.integrations.{name} import" in text
