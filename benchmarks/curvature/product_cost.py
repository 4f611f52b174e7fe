"""Cost of one curvature product in gradients of the same batch, beside the other libraries.

python benchmarks/curvature/product_cost.py --models MLP VGG-11
"""

from collections.abc import Callable, Sequence

import part
import results
import rivals
import timing
import torch
from models import Case
from rivals import Product

PART = "product_cost"
TITLE = "Cost of a curvature product"


def contestants(case: Case) -> dict[str, Callable[[Case], Product]]:
    found: dict[str, Callable[[Case], Product]] = {
        "Hessian: batchlr": rivals.our_hessian,
        "Hessian: batchlr, graph rebuilt": lambda c: rivals.our_hessian(c, keep_graph=False),
        "Hessian: plain torch, graph kept": rivals.plain_hessian,
        "GGN: batchlr": rivals.our_ggn,
        "GGN: plain torch, linearised": rivals.plain_ggn,
    }
    found |= {f"Hessian: {name}": build for name, build in rivals.hessians(case).items()}
    return found | {f"GGN: {name}": build for name, build in rivals.ggns(case).items()}


def measure(case: Case, rounds: int, device: str) -> list[results.Row]:
    vector = torch.randn(case.size, generator=torch.Generator().manual_seed(3)).to(device)
    rows: dict[str, results.Row] = {}
    turns: dict[str, Callable[[], object]] = {"gradient": rivals.gradient(case)}
    turns["gradient"]()
    unit = timing.clock(turns["gradient"], device).seconds
    answers = {}
    for name, build in contestants(case).items():
        rows[name] = {"model": case.name, "contestant": name, "samples": len(case.batches[0][1])}
        try:
            made = timing.clock(lambda b=build: b(case), device)
            product = made.result
            answers[name] = flat(product(vector))  # ours record their graphs here
        except Exception as error:  # a rival's failure is a result
            rows[name]["failure"] = rivals.reason(error)
            continue
        rows[name]["set_up"] = made.seconds / unit
        turns[name] = lambda p=product: p(vector)
    times = timing.take_turns(turns, rounds, device)
    gradients = [t.seconds for t in times["gradient"]]
    for name, row in rows.items():
        if name in times:
            row["seconds"] = [t.seconds for t in times[name]]
            row["gradients"] = timing.ratios(row["seconds"], gradients)
            truth = answers[f"{name.split(':')[0]}: batchlr"]
            row["difference"] = float((answers[name] - truth).norm() / truth.norm())
    return list(rows.values())


def flat(product: object) -> torch.Tensor:
    if isinstance(product, torch.Tensor):
        return product.detach().clone()
    return torch.cat([p.detach().reshape(-1) for p in product])


def render(rows: Sequence[results.Row]) -> str:
    lines = []
    for row in rows:
        kind = row["contestant"].split(":")[0]
        ours = next(
            r for r in rows
            if (r["model"], r["contestant"]) == (row["model"], f"{kind}: batchlr")
        )  # fmt: skip
        if "failure" in row:
            cells = [f"fails: {row['failure']}", "", ""]
        else:
            beside = timing.ratios(row["seconds"], ours["seconds"])
            cells = [
                timing.spread(row["gradients"]),
                timing.spread(beside),
                f"{row['difference']:.0e}",
            ]
        lines.append([row["model"], row["samples"], row["contestant"], *cells])
    note = (
        "Time of a product over that of a gradient of the same batch, and over that of batchlr's "
        "product: medians (and quartiles) of the ratios within a round. Last column: relative "
        "distance of the product from ours."
    )
    header = ["network", "samples", "contestant", "gradients", "times batchlr", "distance"]
    return f"{note}\n\n{results.table(header, lines)}"


if __name__ == "__main__":
    part.run(PART, TITLE, __doc__, measure, render)
