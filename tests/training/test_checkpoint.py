"""A checkpoint is whole or refused, whatever happened while it was written."""

import hashlib
import json
import os
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from batchlr.training import checkpoint
from batchlr.training.checkpoint import (
    CheckpointError,
    checkpoint_digest,
    latest_checkpoint,
    listed_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    path.write_bytes(data)


def test_what_is_saved_loads_equal(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "plain": [1, 2.5, "text", None, True, b"bytes", (1, {3: "x"}), 2**70],
        "weight": model[0].weight,
        "order": OrderedDict(b=1, a=2),
    }
    path = save_checkpoint(tmp_path / "checkpoints", 7, state, keep=1)
    assert path.name == "step-00000007.pt"
    for loaded in (load_checkpoint(path), load_checkpoint(path.parent)):
        assert loaded.keys() == state.keys()
        assert loaded["plain"] == state["plain"]
        assert list(loaded["order"]) == ["b", "a"]
        for key, tensor in state["model"].items():
            assert torch.equal(loaded["model"][key], tensor)
        assert torch.equal(loaded["rng"], state["rng"])
        optimizer.load_state_dict(loaded["optimizer"])


def test_the_newest_stay_and_the_last_is_named(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert names(tmp_path) == {"step-00000002.pt", "step-00000003.pt", "manifest.json"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003.pt"
    assert listed_checkpoints(tmp_path) == [tmp_path / f"step-0000000{step}.pt" for step in (2, 3)]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["last"] == "step-00000003.pt"
    assert [entry["step"] for entry in manifest["checkpoints"]] == [2, 3]


def test_the_digest_on_record_is_that_of_the_file(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    assert checkpoint_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=r"other\.pt does not exist"):
        checkpoint_digest(tmp_path / "other.pt")
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"other\.pt cannot be verified: no manifest"):
        checkpoint_digest(tmp_path / "other.pt")


def test_a_folder_without_checkpoints_lists_none(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in "):
        listed_checkpoints(tmp_path)


def test_newest_means_saved_last_not_the_highest_step(tmp_path):
    save_checkpoint(tmp_path, 100, {"run": "first"}, keep=2)
    save_checkpoint(tmp_path, 5, {"run": "second"}, keep=2)
    assert load_checkpoint(tmp_path) == {"run": "second"}


def test_the_same_step_again_leaves_the_first_file_alone_until_it_is_replaced(tmp_path):
    first = save_checkpoint(tmp_path, 5, {"a": 1}, keep=1)
    second = save_checkpoint(tmp_path, 5, {"a": 2}, keep=1)
    assert second.name == "step-00000005-2.pt"
    assert not first.exists()
    assert load_checkpoint(tmp_path) == {"a": 2}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("owner", "name", "calls_before", "survivor"),
    [
        (torch, "save", 0, 1),  # while writing the checkpoint
        (os, "fsync", 0, 1),
        (Path, "replace", 0, 1),
        (os, "fsync", 1, 1),  # the checkpoint is in place, the manifest does not list it
        (os, "fsync", 2, 1),
        (Path, "replace", 1, 1),
        (os, "fsync", 3, 2),  # the manifest is in place
        (Path, "unlink", 2, 2),  # while pruning
    ],
)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, owner, name, calls_before, survivor
):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    call, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) > calls_before:
            raise Killed
        return call(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert load_checkpoint(tmp_path) == {"step": survivor}
    save_checkpoint(tmp_path, 2, {"step": "again"}, keep=1)
    assert load_checkpoint(tmp_path) == {"step": "again"}


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "step-00000009.pt.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, 10, {}, keep=1)
    assert names(tmp_path) == {"step-00000010.pt", "manifest.json"}


def test_no_checkpoint_yet_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(tmp_path)


def test_a_corrupt_checkpoint_is_refused_and_the_previous_good_one_named(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"weights": torch.zeros(100)}, keep=3)
    for step in (2, 3):
        damage(tmp_path / f"step-0000000{step}.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    expected = json.loads((tmp_path / "manifest.json").read_text())["checkpoints"][2]["sha256"]
    assert f"{tmp_path / 'step-00000003.pt'} is corrupt: SHA-256 is " in message
    assert f", expected {expected}" in message
    assert f"checkpoint before it is {tmp_path / 'step-00000001.pt'} (step 1)" in message


def test_when_no_good_one_is_left_it_says_so(tmp_path):
    damage(save_checkpoint(tmp_path, 1, {"weights": torch.zeros(100)}, keep=1))
    with pytest.raises(CheckpointError, match=r"is corrupt.*; no good checkpoint lies before it"):
        load_checkpoint(tmp_path)


def test_a_missing_or_unlisted_file_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": 1}, keep=1)
    with pytest.raises(CheckpointError, match=r"step-2\.pt does not exist; the newest good .* 1\)"):
        load_checkpoint(tmp_path / "step-2.pt")
    (tmp_path / "copy.pt").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"copy\.pt cannot be verified: no manifest\.json"):
        load_checkpoint(tmp_path / "copy.pt")
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist; no good checkpoint lies before it"):
        load_checkpoint(tmp_path)


def test_a_lost_or_damaged_manifest_is_no_fresh_start(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": 1}, keep=1)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged .*; restore it, or"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is damaged"):
        save_checkpoint(tmp_path, 2, {"a": 2}, keep=1)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has step-00000001\.pt but no manifest\.json; re"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"a": [{"b": np.float64(1)}]}, r"state\['a'\]\[0\]\['b'\] is a numpy\.float64: a check"),
        ({"a": np.zeros(2)}, r"state\['a'\] is a numpy\.ndarray"),
        ({"a": defaultdict(int)}, r"state\['a'\] is a collections\.defaultdict"),
        ({"a": Path("x")}, r"state\['a'\] is a pathlib\.PosixPath"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] has the key \(1, 2\): keys of a checkpoint are text"),
        ({"a": len}, r"state\['a'\] is a builtins\.builtin_function_or_method"),
    ],
)
def test_only_tensors_and_plain_values_are_saved(tmp_path, state, complaint):
    with pytest.raises(TypeError, match=complaint):
        save_checkpoint(tmp_path, 1, state, keep=1)
    assert names(tmp_path) == set()


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_checkpoint(tmp_path, 1, {}, keep=0)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """Even with a valid manifest, only plain data is unpickled."""
    path = save_checkpoint(tmp_path, 1, {"a": 1}, keep=1)
    torch.save({"a": Path("x")}, path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["checkpoints"][0]["sha256"] = checkpoint._sha256(path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        load_checkpoint(path)
