"""A run whose weights are sharded over processes is the run of DDP, and goes on as any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    NETWORKS,
    assert_same,
    assert_same_end,
    metrics,
    run,
    state,
    strict_json,
    summary,
)

from batchlr.training import loop
from batchlr.training.analysis import load_weights
from batchlr.training.config import load_config
from batchlr.training.evaluation import evaluate
from batchlr.training.experiment import build_experiment
from two_processes import needs_fully_shard, run_in_two

pytestmark = needs_fully_shard

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("sharded_runs.py")
HALF = "train.max_steps=4"
# Shares of the test set of 257 and 256: a pass of 256 at most leaves one process more to do.
DATA = "data={name: synthetic, num_samples: 96, num_test_samples: 513, image_size: 4}"
KINDS = {
    "everything": [
        *NETWORKS["batch norm"],
        DATA,
        "curvature.norm_mode=eval",  # with running means, which have to be the same
        "optim.lr=auto",
        "batch.micro_size=8",  # of a share of 16
        "train.clip_norm=0.5",
        "train.epochs=2",
    ],
    "adam": ["optim={name: adam, lr: auto}"],
    "low": [
        *NETWORKS["batch norm"],
        "train.precision=bf16",
        "train.channels_last=true",
    ],
    "growing": [
        "optim.lr=auto",
        "batch={global_size: 96, adaptive: {max_size: 400, tolerance: 0.25, test_every: 3, "
        "observe_every: 2}}",
        "train.clip_norm=1.0",  # after the noise was read
        "train.epochs=2",
    ],
}
# Folder of the run, strategy, kind, what else is set; the step after which weights are lost.
RUNS = [
    ("everything-ddp", "ddp", "everything", [], -1),
    ("everything-fsdp", "fsdp", "everything", [], -1),
    ("everything-resumed", "fsdp", "everything", [HALF], -1),
    ("everything-resumed", "fsdp", "everything", ["resume=auto"], -1),
    ("half", "fsdp", "adam", [HALF], -1),
    ("lost-fsdp", "fsdp", "adam", [], 7),
    ("lost-resumed", "fsdp", "adam", ["resume={}/half/checkpoints"], 7),
    ("one-to-two", "fsdp", "adam", ["resume={}/one-half/checkpoints"], -1),
    ("low-ddp", "ddp", "low", ["train.max_steps=3"], -1),
    ("low-fsdp", "fsdp", "low", ["train.max_steps=3"], -1),
    ("growing-ddp", "ddp", "growing", [], -1),
    ("growing-fsdp", "fsdp", "growing", [], -1),
    ("growing-resumed", "ddp", "growing", [HALF], -1),
    ("growing-resumed", "ddp", "growing", ["resume=auto"], -1),
]


@pytest.fixture(autouse=True, scope="module")
def no_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "draw", lambda self: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs of two processes, made one after another by the same two, and half one of one."""
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, *KINDS["adam"], HALF, out="one-half")
    runs = [
        (
            out,
            [*KINDS[kind], f"dist.strategy={strategy}", *(o.format(folder) for o in others)],
            lost,
        )
        for out, strategy, kind, others, lost in RUNS
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    run_in_two(SCRIPT, folder, timeout=240)
    return folder


def ends(folder: Path, out: str) -> list[dict[str, Any]]:
    """What each of the processes of a run ended with."""
    return [strict_json((folder / f"{out}-{rank}.json").read_text()) for rank in (0, 1)]


def assert_close_end(left: Path, right: Path, tolerance: float) -> None:
    """The same weights, optimizer state, losses and rates up to rounding."""
    found, expected = state(left), state(right)
    assert found["model"].keys() == expected["model"].keys()
    assert found["optimizer"]["param_groups"][0].keys() == (
        expected["optimizer"]["param_groups"][0].keys()
    )
    close = {"rtol": tolerance, "atol": tolerance / 10}
    torch.testing.assert_close(found["model"], expected["model"], **close)
    torch.testing.assert_close(found["optimizer"]["state"], expected["optimizer"]["state"], **close)
    for key in ("test_loss", "train_loss", "final_lr", "peak_lr"):
        assert summary(left)[key] == pytest.approx(summary(right)[key], rel=tolerance), key
    losses = {line["step"]: line["loss"] for line in metrics(right)}
    for line in metrics(left):
        assert line["loss"] == pytest.approx(losses[line["step"]], rel=tolerance)


def test_each_process_keeps_its_part_of_weights_and_optimizer_state(folder):
    parts = [end["weights"] for end in ends(folder, "everything-fsdp")]
    whole = [end["weights"] for end in ends(folder, "everything-ddp")]
    assert whole[0] == whole[1] == sum(parts)
    assert max(parts) < 0.6 * whole[0]
    assert [end["moments"] for end in ends(folder, "half")] == [8, 8]  # 4 tensors, 2 averages


def test_residual_blocks_and_linear_layers_are_gathered_one_at_a_time(folder):
    assert ends(folder, "everything-fsdp")[0]["groups"] == 4  # three blocks and the rest
    assert ends(folder, "half")[0]["groups"] == 3  # two layers and the network


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("everything", 1e-4), ("low", 2e-2)],  # of float32; of bfloat16
)
def test_sharded_runs_are_those_of_ddp(folder, kind, tolerance):
    """With measured rates, accumulated and clipped gradients, batch norm, mixed precision."""
    assert_close_end(folder / f"{kind}-fsdp", folder / f"{kind}-ddp", tolerance)


@pytest.mark.parametrize("out", ["everything-fsdp", "everything-ddp"])
def test_processes_apply_the_same_rates_and_judge_the_same_network(folder, out):
    first, second = ends(folder, out)
    assert first["peaks"] == second["peaks"]
    assert len(first["peaks"]) == 4  # before steps 0, 1, 2 and 4
    assert first["eigenvalues"] == second["eigenvalues"]
    assert first["buffers"] == second["buffers"]
    for key in ("test_loss", "test_accuracy", "train_loss", "final_lr"):
        assert first["summary"][key] == second["summary"][key]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_clipped_by_their_norm_over_all_processes(folder, strategy):
    for end in ends(folder, f"everything-{strategy}"):
        assert end["gradient_norm"] == pytest.approx(0.5, rel=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(folder):
    assert_same_end(folder / "everything-resumed", folder / "everything-fsdp")


def test_a_network_lost_after_resuming_goes_back_to_the_same_bits(folder):
    """To a snapshot that was gathered for the checkpoint, and sharded again."""
    assert [line["loss"] is None for line in metrics(folder / "lost-fsdp")].count(True) >= 1
    assert summary(folder / "lost-fsdp")["diverged"] is False
    assert_same(state(folder / "lost-resumed"), state(folder / "lost-fsdp"))
    assert_same(metrics(folder / "lost-resumed"), metrics(folder / "lost-fsdp")[4:])


def test_two_processes_go_on_from_one_and_one_from_two(folder, tmp_path):
    whole = run(tmp_path, *KINDS["adam"], out="whole")
    assert_close_end(folder / "one-to-two", whole, 1e-3)
    half = f"resume={folder / 'half' / 'checkpoints'}"
    two_to_one = run(tmp_path, *KINDS["adam"], half, out="two-to-one")
    assert [line["step"] for line in metrics(two_to_one)] == list(range(4, 12))
    assert_close_end(two_to_one, whole, 1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_agree_on_batches_that_grow(folder, strategy):
    first, second = ends(folder, f"growing-{strategy}")
    for key in ("steps", "samples", "batch_size", "final_lr", "peak_lr", "test_loss"):
        assert first["summary"][key] == second["summary"][key], key
    assert first["peaks"] == second["peaks"]
    sizes = [line["batch_size"] for line in metrics(folder / f"growing-{strategy}")]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2 * sizes[0] == 192


def test_two_processes_compare_the_groups_that_one_would(folder, tmp_path):
    """Two of each process are one's four, so that both make the same run up to rounding."""
    whole = run(tmp_path, *KINDS["growing"], out="whole")
    assert_close_end(folder / "growing-ddp", whole, 1e-3)
    found, expected = metrics(folder / "growing-ddp"), metrics(whole)
    assert [line["batch_size"] for line in found] == [line["batch_size"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line.get("norm_test", 0) == pytest.approx(other.get("norm_test", 0), rel=1e-3)


def test_a_growing_run_of_two_processes_resumes_with_the_same_bits(folder):
    assert_same_end(folder / "growing-resumed", folder / "growing-ddp")


def test_a_checkpoint_of_sharded_weights_is_as_any_other(folder):
    one, two = (state(folder / out) for out in ("one-half", "half"))
    assert one.keys() == two.keys()
    for key in ("model", "optimizer", "scheduler"):
        assert_alike(one[key], two[key])
    assert_alike(one["controller"]["guard"], two["controller"]["guard"])


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """The same keys, kinds and shapes."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    if isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where


def test_all_processes_test_the_network_that_is_saved(folder):
    """Each one's own running means are of its own share of the batches."""
    out = folder / "everything-ddp"
    experiment = build_experiment(load_config(out / "config.yaml").config)
    load_weights(experiment, out / "checkpoints")
    assert summary(out)["test_loss"] == pytest.approx(evaluate(experiment).loss, rel=1e-5)
