"""A script run by two processes at once, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_fully_shard = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="fully_shard of torch 2.6 needs GPUs"
)


def run_in_two(script: Path, folder: Path, *, timeout: float) -> None:
    """Run ``script FOLDER RANK`` in both; warnings are errors, and a failure shows its words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["OMP_NUM_THREADS"] = "1"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(folder), rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    try:
        for process in running:
            complaints = process.communicate(timeout=timeout)[1]
            assert process.returncode == 0, complaints
    finally:
        for process in running:
            process.kill()
