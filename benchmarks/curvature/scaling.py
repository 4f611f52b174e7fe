"""How cost grows with weights, samples and Lanczos steps, and what reorthogonalisation takes.

python benchmarks/curvature/scaling.py --only weights
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence

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
OWN_WORK = (  # network, samples, Lanczos steps; one round but for VGG-11 at 64
    ("MLP", 256, 200),
    ("VGG-11", 64, 100),
)


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


def by_weights(rounds: int, device: str) -> Iterator[list[results.Row]]:
    """A gradient, a product, and a density of 10 steps, of MLPs of growing width."""
    rows = []
    for width in WIDTHS:
        case = mlp_case(width, 64, device)
        operator = rivals.our_operator(batchlr.HessianOperator, case)
        turns: dict[str, Callable[[], object]] = {
            "gradient, 64 samples": rivals.gradient(case),
            "product, 64 samples": product(case, device),
            "10 Lanczos steps, 64 samples": lambda o=operator: batchlr.lanczos(o, 10),
        }
        rows += grown("weights", case.size, timing.take_turns(turns, rounds, device))
    yield rows


def by_samples(rounds: int, device: str) -> Iterator[list[results.Row]]:
    rows = []
    for count in SAMPLES:
        case = mlp_case(800, count, device)
        turns = {
            "gradient, 1e6 weights": rivals.gradient(case),
            "product, 1e6 weights": product(case, device),
        }
        rows += grown("samples", count, timing.take_turns(turns, rounds, device))
    yield rows


def by_steps(rounds: int, device: str) -> Iterator[list[results.Row]]:
    """Lanczos on the MLP of 1e6 weights and 512 samples."""
    operator = rivals.our_operator(batchlr.HessianOperator, mlp_case(800, 512, device))
    rows = []
    for count in STEPS:
        turns = {"Lanczos, 1e6 weights, 512 samples": lambda m=count: batchlr.lanczos(operator, m)}
        rows += grown("steps", count, timing.take_turns(turns, rounds, device))
    yield rows


def grown(axis: str, size: int, times: dict[str, list[timing.Timed]]) -> list[results.Row]:
    return [
        {"axis": axis, "what": what, "size": size, "seconds": [t.seconds for t in taken]}
        for what, taken in times.items()
    ]


class Timed(batchlr.LinearOperator):
    """An operator and the time its products took: the rest is Lanczos' own."""

    def __init__(self, operator: batchlr.LinearOperator, device: str) -> None:
        super().__init__(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.operator = operator
        self.kind = device
        self.seconds = 0.0

    def _multiply(self, columns: Tensor) -> Tensor:
        timed = timing.clock(lambda: self.operator @ columns, self.kind)
        self.seconds += timed.seconds
        return timed.result


def reorthogonalisation(rounds: int, device: str) -> Iterator[list[results.Row]]:
    """Lanczos' own share of its time, and how orthogonal the basis is in the end."""
    for name, samples, steps in OWN_WORK:
        operator = rivals.our_operator(
            batchlr.HessianOperator, make_case(name, samples=samples, device=device)
        )
        operator @ torch.ones(operator.shape[0], device=operator.device)  # the graph is recorded
        row: results.Row = {"axis": "reorthogonalisation", "size": steps, "samples": samples}
        row |= {"what": f"{name}, {samples} samples", "seconds": [], "shares": [], "overlaps": []}
        for seed in range(rounds if samples == 64 else 1):
            counted = Timed(operator, device)
            generator = torch.Generator().manual_seed(seed)
            run = lambda o=counted, m=steps, g=generator: batchlr.lanczos(o, m, generator=g)  # noqa: E731
            timed = timing.clock(run, device)
            row["seconds"].append(timed.seconds)
            row["shares"].append(1 - counted.seconds / timed.seconds)
            row["overlaps"].append(worst_overlap(timed.result.basis))
            del timed
        yield [row]


def worst_overlap(basis: Tensor) -> float:
    """Largest entry of ``Q Q' - I``, in float64."""
    gram = -torch.eye(len(basis), dtype=torch.float64, device=basis.device)
    for part in torch.split(basis, 1 << 16, dim=1):
        gram += part.double() @ part.double().T
    return float(gram.abs().max())


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
            shares += [
                [what[1], r["size"], timing.spread(r["shares"], 3), len(r["shares"]),
                 f"{max(r['overlaps']):.0e}"]
                for r in group
            ]  # fmt: skip
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
        header = ["network", "steps", "share of Lanczos' own work in its time", "rounds",
                  "worst overlap of two vectors"]  # fmt: skip
        found.append(results.table(header, shares))
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for axis in options.only:
        for rows in AXES[axis](options.rounds, options.device):
            everything = results.store(PART, rows, ["axis", "what"], options.device)
            results.publish(PART, everything, TITLE, render, options.device)


if __name__ == "__main__":
    main()
