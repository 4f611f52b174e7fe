"""Cost of a full report in gradients of the samples it measures.

python benchmarks/curvature/report_cost.py --models MLP
"""

from collections.abc import Callable, Sequence

import part
import results
import rivals
import timing
from models import Case

import batchlr

PART = "report_cost"
TITLE = "Cost of a full report"
ALLOWED = 150


def report(case: Case, optimizer: str) -> Callable[[], batchlr.CurvatureReport]:
    return lambda: batchlr.measure_curvature(
        case.copy(),
        batchlr.supervised(case.criterion),
        case.batches,
        optimizer=optimizer,
        norm_mode=case.norm_mode or "eval",
    )


def measure(case: Case, rounds: int, device: str) -> list[results.Row]:
    turns: dict[str, Callable[[], object]] = {"gradient": rivals.all_gradients(case)}
    turns["gradient"]()
    turns |= {f"report for {name}": report(case, name) for name in ("sgd", "adam")}
    times = timing.take_turns(turns, rounds, device)
    unit = timing.quartiles([t.seconds for t in times["gradient"]])[1]
    rows = []
    for name in list(turns)[1:]:
        found = times[name][-1].result
        rows.append(
            {
                "model": case.name,
                "contestant": name,
                "samples": sum(len(y) for _, y in case.batches),
                "gradients": [t.seconds / unit for t in times[name]],
                "products": found.num_products,
                "converged": found.converged,
            }
        )
    return rows


def render(rows: Sequence[results.Row]) -> str:
    lines = [
        [row["model"], row["samples"], row["contestant"], timing.spread(row["gradients"], 0),
         row["products"], "yes" if row["converged"] else "no"]
        for row in rows
    ]  # fmt: skip
    note = (
        "`measure_curvature` on four batches, in gradients of all four: median (quartiles). "
        f"Allowed are {ALLOWED}."
    )
    header = ["network", "samples", "what", "gradients", "products", "converged"]
    return f"{note}\n\n{results.table(header, lines)}"


if __name__ == "__main__":
    part.run(PART, TITLE, __doc__, measure, render, small=True, num_batches=4)
