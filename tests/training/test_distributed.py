"""Several processes make the run that one process would make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_disk import write_arrays
from runs import metrics, run, state, strict_json, summary, tiny
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from typer.testing import CliRunner

from batchlr.cli import app
from batchlr.training import loop
from batchlr.training.distributed import Processes, processes, shard
from batchlr.training.models import MLP, VGG, PreResNet, WideResNet
from two_processes import run_in_two

CPU = torch.device("cpu")

# What torchrun starts: the run, after which every rank leaves what it ended with.
RANKS = """
import json, math, os, sys
from pathlib import Path
import torch
from batchlr.cli import main
from batchlr.training import loop

out, config, *overrides = sys.argv[1:]
report = loop._Run.report

def leave(self, summary):
    experiment, rank = self.experiment, self.experiment.processes.rank
    torch.save(dict(experiment.model.state_dict()), Path(out) / f"weights-{rank}.pt")
    end = {
        "peaks": [update.peak for update in self.updates],
        "eigenvalues": [update.largest_eigenvalue for update in self.updates],
        "summary": summary,
    }
    (Path(out) / f"end-{rank}.json").write_text(json.dumps(end))
    report(self, summary)

update = loop._Run.update_weights

def poison(self, batch):
    loss = update(self, batch)
    if f"{self.experiment.processes.rank} {self.progress.step}" == os.environ.get("POISONED"):
        with torch.no_grad():
            next(iter(self.experiment.model.parameters())).fill_(math.nan)
    return loss

loop._Run.update_weights = poison
loop._Run.report = leave
loop._Run.draw = lambda self: None
main(["train", config, *overrides, "--out", str(Path(out) / "run")])
"""


# What two processes say and exit with, each with changes of its own.
SPEAKERS = """
import contextlib, io, json, os, sys
from pathlib import Path
from batchlr.cli import main

folder, rank = sys.argv[1], int(sys.argv[2])
os.chdir(folder)
changes = json.loads(Path("changes.json").read_text())[rank]
config = Path(f"config-{rank}.yaml")
settings = "{data: {name: arrays, path: images.npz}, model: {name: mlp}, batch: {global_size: 4}}"
config.write_text(settings)
said = io.StringIO()
with contextlib.redirect_stderr(said):
    try:
        main(["train", str(config), *changes, "train.max_steps=1"])
    except SystemExit as end:
        Path(f"end-{rank}.json").write_text(json.dumps([end.code, said.getvalue()]))
"""


# Slow steps, in the second of which the second process alone is asked to stop.
ASKED = """
import os, signal, sys, time
from pathlib import Path
from batchlr.cli import main
from batchlr.training import loop

folder, rank = Path(sys.argv[1]), sys.argv[2]
update = loop._Run.update_weights

def slowly(self, batch):
    if rank == "1":
        time.sleep(1.7)
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    return update(self, batch)

loop._Run.update_weights = slowly
try:
    main(["train", str(folder / "tiny.yaml"), "train.max_steps=5", "--out", str(folder / "run")])
except SystemExit as end:
    (folder / f"end-{rank}").write_text(str(end.code))
"""


# One process -----------------------------------------------------------------------------------


def test_a_process_alone_shares_with_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes(tiny(tmp_path)) as alone:
        assert alone == Processes(rank=0, world_size=1, local_rank=0)
        assert alone.is_first
        values = torch.tensor([1.0, 2.0])
        assert alone.sum(values) is values
        assert alone.same(0.3, CPU) == 0.3
        assert (alone.any(True, CPU), alone.any(False, CPU)) == (True, False)
        assert alone.together(lambda: 3, CPU) == 3
        model = nn.Linear(2, 2)
        assert alone.wrap(model, CPU) is model
    assert not torch.distributed.is_initialized()


def test_torchrun_with_one_process_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for strategy in ("auto", "single", "ddp", "fsdp"):
        with processes(tiny(tmp_path, f"dist.strategy={strategy}")) as alone:
            assert alone.world_size == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_outside_torchrun_exit_2(tmp_path, monkeypatch, strategy):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tiny(tmp_path)
    command = ["train", str(tmp_path / "tiny.yaml"), f"dist.strategy={strategy}"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr == (
        f"dist.strategy is {strategy}, but this process was not started by torchrun: run "
        "torchrun --nproc-per-node N scripts/train.py CONFIG\n"
    )
    assert not (tmp_path / "out").exists()


def test_single_among_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = tiny(tmp_path, "dist.strategy=single")
    with (
        pytest.raises(ValueError, match="single, but torchrun started 2 processes: use auto"),
        processes(config),
    ):
        pass


def test_weights_are_not_split_over_cpus_by_torch_2_6(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    config = tiny(tmp_path, "dist.strategy=fsdp", "train.device=cpu")
    with (
        pytest.raises(ValueError, match=r"fsdp, which torch 2\.6\.0 can do on GPUs only: take ddp"),
        processes(config),
    ):
        pass


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (VGG(11, num_classes=3, width=0.05, batch_norm=True), 8),  # convolutions
        (PreResNet(8, num_classes=3, block="basic", width=0.25), 3),
        (WideResNet(10, 1, num_classes=3), 3),
        (MLP([4, 4], num_classes=3, in_features=5), 3),
    ],
)
def test_blocks_are_sharded_by_themselves_and_the_rest_together(alone, model, blocks):
    assert shard(model, CPU, 1) is model
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(modules) == blocks + 1
    assert modules[0] is model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


# Two processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("none.npz", "none.npz"), ("none.npz: ", "")),
        (("images.npz", "none.npz"), ("", "rank 1: none.npz: ")),
        (("none.npz", "images.npz"), ("none.npz: ", "")),
        (("one.npz", "two.npz"), ("one.npz: ", "rank 1: two.npz: ")),
    ],
)
def test_missing_data_are_told_once_and_every_process_exits_3(tmp_path, files, told):
    ends = said_in_two(tmp_path, *([f"data.path={file}", "--out", "run"] for file in files))
    for (code, said), words in zip(ends, told, strict=True):
        assert code == 3
        assert said.startswith(words)
        assert said.count("there is no such file") == said.count("\n") == bool(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["resume=none.pt", "--out", "run"], "checkpoint none.pt does not exist; "),
        (["resume=damaged", "--out", "run"], "damaged/manifest.json is damaged "),
        (["--out", "images.npz/run"], "[Errno 20] Not a directory: 'images.npz/run'"),
    ],
)
def test_what_cannot_be_resumed_or_written_is_told_once(tmp_path, changes, told):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    (code, said), other = said_in_two(tmp_path, changes, changes)
    assert code == 3
    assert said.startswith(told)
    assert said.count("\n") == 1
    assert other == [3, ""]
    assert not (tmp_path / "run").exists()


def said_in_two(folder: Path, *changes: list[str]) -> list[tuple[int, str]]:
    """Exit code and words of two processes that train with ``changes``."""
    write_arrays(folder / "images.npz")
    (folder / "changes.json").write_text(json.dumps(changes))
    (folder / "speakers.py").write_text(SPEAKERS)
    run_in_two(folder / "speakers.py", folder, timeout=120)
    return [strict_json((folder / f"end-{rank}.json").read_text()) for rank in (0, 1)]


def torchrun(folder: Path, *overrides: str) -> Path:
    """Two processes train; returns the folder of the run, with what each rank left beside it."""
    tiny(folder)
    (folder / "ranks.py").write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(folder / "ranks.py"), str(folder), str(folder / "tiny.yaml"), *overrides]
    answer = subprocess.run(
        [sys.executable, *launch, *script],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("record in") == 1  # one process speaks
    return folder / "run"


def assert_one_run(folder: Path, alone: Path) -> None:
    """Both ranks hold the same weights, those of one process up to the order of summation."""
    first, second = (torch.load(folder / f"weights-{rank}.pt") for rank in (0, 1))
    expected = state(alone)["model"]
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)  # float32
    lines = metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(4))
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in metrics(alone)], rel=1e-4
    )
    found, wanted = summary(folder / "run"), summary(alone)
    for key in ("test_loss", "train_loss", "final_lr", "peak_lr"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-4)
    assert found["test_accuracy"] == pytest.approx(wanted["test_accuracy"], abs=1.5 / 360)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path, monkeypatch):
    """With a measured rate, the same on both ranks, and gradients accumulated in each."""
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    # Measured on the same samples: two processes of 200 in parts of 100, one of 400 likewise.
    common = ["optim.lr=auto", "train.max_steps=4", "batch.micro_size=100"]
    torchrun(tmp_path, *common)
    ends = [strict_json((tmp_path / f"end-{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0]["peaks"] == ends[1]["peaks"]
    assert len(ends[0]["peaks"]) == 3  # before steps 0, 1 and 2
    assert ends[0]["eigenvalues"] == ends[1]["eigenvalues"]
    assert ends[0]["summary"]["test_loss"] == ends[1]["summary"]["test_loss"]
    assert_one_run(tmp_path, run(tmp_path, *common, out="alone"))
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.pt"))) == 2


@pytest.mark.slow
def test_two_processes_resume_what_two_left(tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Run, "draw", lambda self: None)
    common = ["optim={name: adam, lr: 0.01}"]
    torchrun(tmp_path, *common, "train.max_steps=2")
    torchrun(tmp_path, *common, "train.max_steps=4", "resume=auto")
    assert_one_run(tmp_path, run(tmp_path, *common, "train.max_steps=4", out="alone"))


@pytest.mark.slow
def test_with_slow_steps_all_processes_stop_within_seconds(tmp_path):
    tiny(tmp_path)
    script = tmp_path / "asked.py"
    script.write_text(ASKED)
    run_in_two(script, tmp_path, timeout=180)
    assert [(tmp_path / f"end-{rank}").read_text() for rank in (0, 1)] == ["130", "130"]
    written = sorted(path.stem for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert written[-1] in ("step-00000002", "step-00000003")


@pytest.mark.slow
def test_all_processes_go_back_when_one_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("POISONED", "1 4")  # the second process, after its fifth step
    out = torchrun(tmp_path, "optim.lr=auto", "train.max_steps=9")
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert weight.isfinite().all()
    ends = [strict_json((tmp_path / f"end-{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0]["peaks"] == ends[1]["peaks"]
    assert [line["loss"] is None for line in metrics(out)] == [step == 5 for step in range(9)]
    assert summary(out)["diverged"] is False
