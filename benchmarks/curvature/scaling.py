"""How cost grows with weights, samples and Lanczos steps, and what reorthogonalisation takes.

python benchmarks/curvature/scaling.py --only weights
"""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
import results
import rivals
import timing
import torch
from models import CLASSES, Case, make_case, mlp
from torch import Tensor, nn

import batchlr

PART = "scaling"
TITLE = "Scaling"
WIDTHS = (100, 400, 1000, 2700, 5600)  # of the MLP's first hidden layer: 1e5 to 2e7 weights
SAMPLES = (64, 256, 1024, 4096, 16384)
STEPS = (5, 10, 20, 50, 100, 200)


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 28, 28, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def mlp_case(width: int, samples: int, device: str) -> Case:
    torch.manual_seed(0)
    batch = tuple(t.to(device) for t in images(samples))
    return Case("MLP", mlp(width).to(device), [batch], None, False, nn.CrossEntropyLoss())


def product(case: Case, device: str) -> Callable[[], object]:
    operator = rivals.our_operator(batchlr.HessianOperator, case)
    vector = torch.randn(case.size, generator=torch.Generator().manual_seed(1)).to(device)
    operator @ vector  # the graph is recorded
    return lambda: operator @ vector


def by_weights(rounds: int, device: str) -> list[results.Row]:
    """A product, and a density of 10 steps, of MLPs of growing width."""
    rows = []
    for width in WIDTHS:
        case = mlp_case(width, 64, device)
        operator = rivals.our_operator(batchlr.HessianOperator, case)
        turns: dict[str, Callable[[], object]] = {
            "product, 64 samples": product(case, device),
            "10 Lanczos steps, 64 samples": lambda o=operator: batchlr.lanczos(o, 10),
        }
        rows += grown("weights", case.size, timing.take_turns(turns, rounds, device))
    return rows


def by_samples(rounds: int, device: str) -> list[results.Row]:
    rows = []
    for count in SAMPLES:
        turns = {"product, 1e6 weights": product(mlp_case(800, count, device), device)}
        rows += grown("samples", count, timing.take_turns(turns, rounds, device))
    return rows


def by_steps(rounds: int, device: str) -> list[results.Row]:
    """Lanczos on the MLP of 1e6 weights and 512 samples."""
    operator = rivals.our_operator(batchlr.HessianOperator, mlp_case(800, 512, device))
    rows = []
    for count in STEPS:
        turns = {"Lanczos, 1e6 weights, 512 samples": lambda m=count: batchlr.lanczos(operator, m)}
        rows += grown("steps", count, timing.take_turns(turns, rounds, device))
    return rows


def grown(axis: str, size: int, times: dict[str, list[timing.Timed]]) -> list[results.Row]:
    return [
        {"axis": axis, "what": what, "size": size, "seconds": [t.seconds for t in taken]}
        for what, taken in times.items()
    ]


class Diagonal(batchlr.LinearOperator):
    """A matrix whose product costs next to nothing: what is left is Lanczos' own work."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, dtype=torch.float32, device=device)
        self.entries = torch.linspace(-1, 1, size, device=device)

    def _multiply(self, columns: Tensor) -> Tensor:
        return self.entries.unsqueeze(1) * columns


def reorthogonalisation(rounds: int, device: str) -> list[results.Row]:
    """Lanczos' own time beside that of the products, for VGG-11."""
    case = make_case("VGG-11", samples=64, steps=0, device=device)
    turns: dict[str, Callable[[], object]] = {"product": product(case, device)}
    diagonal = Diagonal(case.size, case.device)
    turns |= {str(m): lambda m=m: batchlr.lanczos(diagonal, m) for m in (30, 100)}
    times = timing.take_turns(turns, rounds, device)
    rows = []
    for steps in (30, 100):
        own = [t.seconds for t in times[str(steps)]]
        products = [steps * t.seconds for t in times["product"]]
        shares = [a / (a + b) for a, b in zip(own, products, strict=True)]
        row = {"axis": "reorthogonalisation", "what": "VGG-11, 64 samples", "size": steps}
        rows.append({**row, "seconds": own, "shares": shares})
    return rows


AXES = {
    "weights": by_weights,
    "samples": by_samples,
    "steps": by_steps,
    "reorthogonalisation": reorthogonalisation,
}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def render(rows: Sequence[results.Row]) -> str:
    lines, shares = [], []
    for what in dict.fromkeys((r["axis"], r["what"]) for r in rows):
        group = sorted((r for r in rows if (r["axis"], r["what"]) == what), key=lambda r: r["size"])
        if what[0] == "reorthogonalisation":
            shares += [[what[1], r["size"], timing.spread(r["shares"])] for r in group]
            continue
        sizes = [r["size"] for r in group]
        times = [timing.quartiles(r["seconds"])[1] for r in group]
        steepest = [
            math.log(times[i + 1] / times[i]) / math.log(sizes[i + 1] / sizes[i])
            for i in range(len(sizes) - 1)
        ]
        lines.append(
            [*what, f"{sizes[0]:,} to {sizes[-1]:,}", f"{exponent(sizes, times):.2f}",
             f"{exponent(sizes[-3:], times[-3:]):.2f}", ", ".join(f"{s:.2f}" for s in steepest)]
        )  # fmt: skip
    header = ["grows", "what", "range", "exponent", "of the last three", "between neighbours"]
    found = [results.table(header, lines)]
    if shares:
        header = ["network", "steps", "share of Lanczos' own work in its time"]
        found.append(results.table(header, shares))
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for axis in options.only:
        rows = AXES[axis](options.rounds, options.device)
        everything = results.store(PART, rows, ["axis"], options.device)
        results.publish(PART, everything, TITLE, render, options.device)


if __name__ == "__main__":
    main()
