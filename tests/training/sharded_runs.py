"""Runs of several processes, one after another; `test_sharded_runs.py` starts it in each process.

Takes a folder with ``tiny.yaml`` and ``runs.json``: of each run its folder, what is configured
otherwise, and the step after which the second process loses its weights.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from batchlr.operators.unsharded import reshard
from batchlr.sharded_tensors import local_part, norms_of_whole
from batchlr.training import loop
from batchlr.training.config import load_config
from batchlr.training.loop import _Run

report, update_weights = _Run.report, _Run.update_weights
poisoned = -1


def leave(run: _Run, summary: dict[str, Any]) -> None:
    """What this process ended with."""
    experiment = run.experiment
    reshard(experiment.model)  # an evaluation leaves the root's weights gathered
    gradients = [p.grad for p in experiment.model.parameters()]
    parts = [local_part(gradient).norm() for gradient in gradients]
    moments = [value for state in experiment.optimizer.state.values() for value in state.values()]
    end = {
        "peaks": [update.peak for update in run.updates],
        "eigenvalues": [update.largest_eigenvalue for update in run.updates],
        "buffers": [float(buffer.double().sum()) for buffer in experiment.model.buffers()],
        "gradient_norm": float(torch.stack(norms_of_whole(parts, gradients)).norm()),
        "summary": summary,
        "weights": sum(local_part(p).numel() for p in experiment.model.parameters()),
        "groups": sum("FSDP" in type(m).__name__ for m in experiment.model.modules()),
        "moments": sum(isinstance(moment, DTensor) for moment in moments),
    }
    rank = experiment.processes.rank
    (run.out.parent / f"{run.out.name}-{rank}.json").write_text(json.dumps(end))
    report(run, summary)


def poison(run: _Run, batch: Any) -> torch.Tensor:
    loss = update_weights(run, batch)
    if run.experiment.processes.rank == 1 and run.progress.step == poisoned:
        with torch.no_grad():
            next(iter(run.experiment.model.parameters())).fill_(math.nan)
    return loss


def meet_once() -> None:
    """One group for all runs: gloo's hung now and then in a process that had left one."""
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_: None


if __name__ == "__main__":
    _Run.draw = lambda self: None  # type: ignore[method-assign]
    _Run.report = leave  # type: ignore[method-assign]
    _Run.update_weights = poison  # type: ignore[method-assign]
    folder, leave_group = Path(sys.argv[1]), dist.destroy_process_group
    meet_once()
    for out, overrides, poisoned in json.loads((folder / "runs.json").read_text()):  # noqa: B007
        loop.train(load_config(folder / "tiny.yaml", overrides).config, folder / out)
    leave_group()
