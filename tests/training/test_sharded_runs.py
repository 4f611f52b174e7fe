"""A run whose weights are sharded over processes is the run of DDP, and goes on as any other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    NETWORKS,
    assert_same_end,
    metrics,
    run,
    state,
    strict_json,
    summary,
    tiny,
)

from batchlr.training import loop

SCRIPT = Path(__file__).with_name("sharded_runs.py")
HALF = "train.max_steps=5"
# Shares of the test set of 257 and 256: a pass of 256 at most leaves one process more to do.
DATA = "data={name: synthetic, num_samples: 96, num_test_samples: 513, image_size: 4}"
KINDS = {
    "everything": [
        *NETWORKS["batch norm"],
        DATA,
        "optim.lr=auto",
        "batch.micro_size=8",  # of a share of 16
        "train.clip_norm=0.5",
    ],
    "adam": ["optim={name: adam, lr: auto}"],
    "low": [
        *NETWORKS["batch norm"],
        "train.precision=bf16",
        "train.channels_last=true",
    ],
}
# Folder of the run, strategy, kind, what else is set; the step after which weights are lost.
RUNS = [
    ("everything-ddp", "ddp", "everything", [], -1),
    ("everything-fsdp", "fsdp", "everything", [], -1),
    ("everything-resumed", "fsdp", "everything", [HALF], -1),
    ("everything-resumed", "fsdp", "everything", ["resume=auto"], -1),
    ("everything-half-ddp", "ddp", "everything", [HALF], -1),
    ("everything-to-fsdp", "fsdp", "everything", ["resume={}/everything-half-ddp/checkpoints"], -1),
    ("adam-ddp", "ddp", "adam", [], -1),
    ("adam-fsdp", "fsdp", "adam", [], -1),
    ("adam-resumed", "fsdp", "adam", [HALF], -1),
    ("adam-to-ddp", "ddp", "adam", ["resume={}/adam-resumed/checkpoints"], -1),
    ("adam-resumed", "fsdp", "adam", ["resume=auto"], -1),
    ("lost", "fsdp", "adam", [], 7),
    ("lost-resumed", "fsdp", "adam", [HALF], -1),
    ("lost-resumed", "fsdp", "adam", ["resume=auto"], 7),
    ("low-ddp", "ddp", "low", [], -1),
    ("low-fsdp", "fsdp", "low", [], -1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs of two processes, made one after another by the same two."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny(folder)
    runs = [
        (
            out,
            [*KINDS[kind], f"dist.strategy={strategy}", *(o.format(folder) for o in others)],
            lost,
        )
        for out, strategy, kind, others, lost in RUNS
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(SCRIPT), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]
    try:
        for process in running:
            complaints = process.communicate(timeout=150)[1]
            assert process.returncode == 0, complaints
    finally:
        for process in running:
            process.kill()
    return folder

