"""Peak memory of a spectral density of 30 steps, and of a full report, each in its own process.

Also a report where activations are large, beside what one and a half training steps take, and
whether 500 measurements leave anything behind.

    python benchmarks/curvature/memory.py --models MLP
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import results
import rivals
import slq_cost
import torch
from models import RECIPES, Case, make_case

import batchlr
from batchlr.measurement.memory_plan import MemoryBudgetError

PART = "memory"
TITLE = "Peak memory"
MEASUREMENTS = 500
TRIMMED = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed is given back
DENSITY, REPORT, LARGE, LEAK = "density", "report", "report, large batches", "left behind"
LARGE_BATCH = {"PreResNet-20, eval": 128, "VGG-11": 64}
SHARE = 1.5  # of a training step, what such a report is to take


def training_step(case: Case) -> None:
    """Gradient and update, without momentum."""
    optimizer = torch.optim.SGD(case.model.parameters(), 1e-3)
    x, y = case.batches[0]
    case.criterion(case.model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tiny(device: str) -> Case:
    """A network whose measurement takes no memory to speak of."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    batches = [(torch.randn(8, 4, device=device), torch.arange(8, device=device) % 2)] * 2
    return Case("tiny", model.to(device), batches, None, False, torch.nn.CrossEntropyLoss())


def report(case: Case, **options: float) -> None:
    batchlr.measure_curvature(
        case.copy(),
        batchlr.supervised(case.criterion),
        case.batches,
        optimizer="sgd",
        norm_mode=case.norm_mode or "eval",
        **options,
    )


def report_in(share: float, **options: int) -> Callable[[Case], None]:
    """A report in ``share`` times the least memory it says that it needs."""

    def call(case: Case) -> None:
        try:
            report(case, memory_budget=1, **options)
        except MemoryBudgetError as error:
            report(case, memory_budget=round(share * error.needed), **options)

    return call


def short_report(case: Case, **options: float) -> None:
    """A report of few products: it takes the same graphs, and less time."""
    report(case, tol=0.5, num_eigenpairs=1, num_small_batches=4, **options)


def tasks(case: Case, budget: int = 0) -> dict[tuple[str, str], Callable[[Case], object]]:
    """All of them; ``budget`` is that of a report on large batches."""
    found: dict[tuple[str, str], Callable[[Case], object]] = {
        (DENSITY, name): call for name, call in slq_cost.calls(case).items()
    }
    steps = {(kind, "training step"): training_step for kind in (DENSITY, REPORT, LARGE)}
    reports = {
        "batchlr": report,
        "batchlr, twice the least budget": report_in(2.0),
        "batchlr, least budget": report_in(1.0),
        "batchlr, one pair, least budget": report_in(1.0, num_eigenpairs=1),
    }
    ours = {(REPORT, name): call for name, call in reports.items()}
    within = f"batchlr, memory_budget={SHARE:g} training steps"
    ours[LARGE, within] = lambda c: short_report(c, memory_budget=budget)
    return {**steps, **found, **ours, (LEAK, "batchlr"): repeatedly}


def repeatedly(case: Case) -> None:
    """Measure until early growth is over, then note, then measure ``MEASUREMENTS`` times."""
    x, y = case.batches[0]
    case.batches[:] = [(x[:8], y[:8])]  # small, for there are many
    for index in range(MEASUREMENTS + 50):
        operator = rivals.our_operator(batchlr.HessianOperator, case)
        batchlr.top_eigenpairs(operator, tol=1e-1)
        if index == 49:
            before = resident(case.device.type)
    del operator
    growth = resident(case.device.type) / before - 1
    print(json.dumps({"growth": growth}))


def resident(device: str) -> int:
    """Bytes held now."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak(device: str) -> int:
    """Most bytes held since `forget_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def one(options: argparse.Namespace) -> None:
    """One task in this process; prints its figures as JSON."""
    (model,), kind = options.models, options.device.split(":")[0]
    batches = {REPORT: 4, LARGE: 2}.get(options.task[0], 1)
    samples = options.samples or RECIPES[model].small
    case = make_case(model, steps=0, samples=samples, num_batches=batches, device=options.device)
    report(tiny(options.device))  # what torch loads at its first use is not the measurement's
    before = resident(kind)
    forget_peak(kind)
    began = time.process_time()
    try:
        tasks(case, options.budget)[tuple(options.task)](case)
    except Exception as error:  # a rival's failure is a result
        print(json.dumps({"failure": rivals.reason(error)}))
        return
    seconds = time.process_time() - began
    print(json.dumps({"megabytes": (peak(kind) - before) / 2**20, "seconds": seconds}))


def measure(model: str, options: argparse.Namespace) -> list[results.Row]:
    case = make_case(model, steps=0, samples=2)
    rows: list[results.Row] = []
    for kind, contestant in tasks(case):
        if (options.only and kind != options.only) or (kind == LARGE and model not in LARGE_BATCH):
            continue
        samples = options.samples or RECIPES[model].small
        command = [sys.executable, __file__, "--models", model, "--device", options.device,
                   "--task", kind, contestant]  # fmt: skip
        if kind == LARGE:
            samples = LARGE_BATCH[model]
            step = max((max(r["megabytes"]) for r in rows if r["kind"] == LARGE and
                        r["contestant"] == "training step"), default=0)  # fmt: skip
            command += ["--budget", str(round(SHARE * step * 2**20))]
        command += ["--samples", str(samples)]
        row: results.Row = {"model": model, "size": case.size, "kind": kind}
        row |= {"contestant": contestant, "samples": samples}
        repeats = 1 if kind == LEAK else options.rounds
        for _ in range(repeats):
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=TRIMMED)
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    for key, value in json.loads(line).items():
                        row.setdefault(key, []).append(value)
        rows.append(row)
    return rows


def render(rows: Sequence[results.Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] == LEAK:
            continue
        step = next(
            r for r in rows
            if r["contestant"] == "training step"
            and (r["model"], r["kind"]) == (row["model"], row["kind"])
        )  # fmt: skip
        if "failure" in row:
            cells = [f"fails: {row['failure'][0]}", "", "", ""]
        else:
            most = max(row["megabytes"])
            basis = 4 * slq_cost.STEPS * row["size"] / 2**20
            cells = [f"{most:.0f}", f"{most / max(step['megabytes']):.2f}", f"{basis:.0f}"]
            cells.append(f"{min(row['seconds']):.1f}" if "seconds" in row else "")
        lines.append([row["model"], row["samples"], row["kind"], row["contestant"], *cells])
    header = ["network", "batch", "of what", "contestant", "MB", "training steps", "basis MB",
              "CPU s"]  # fmt: skip
    left = [
        f"{row['model']}: {MEASUREMENTS} further measurements change the memory held by "
        f"{row['growth'][0]:+.1%}."
        for row in rows
        if row["kind"] == LEAK
    ]
    note = (
        "Largest memory during the call above that before it, and as a multiple of that of a "
        "training step on the same batch; a report measures four batches, with a budget in the "
        "least memory that it says it needs; on large batches it measures two, one pair at each "
        "end to a tolerance of 0.5, for time. What the allocator keeps back counts, but with "
        "MALLOC_MMAP_THRESHOLD_=1048576 it keeps little. The basis is that of "
        f"{slq_cost.STEPS} vectors in float32."
    )
    return "\n\n".join([note, results.table(header, lines), *left])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=1, help="processes a figure")
    parser.add_argument("--samples", type=int, help="batch size, where not the network's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=[DENSITY, REPORT, LARGE, LEAK], help="one kind of figure")
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the rivals'
    if options.task:
        one(options)
        return
    for model in options.models:
        rows = results.store(PART, measure(model, options), ["model", "kind"], options.device)
        results.publish(PART, rows, TITLE, render, options.device)


if __name__ == "__main__":
    main()
