"""Time to the largest eigenvalue within 1 % and 0.1 %, beside the other libraries' own calls.

The rivals run with their defaults or a documented tolerance: none of them is told how many
products the answer takes. The true error is that against scipy in float64 on the same samples.

    python benchmarks/curvature/top_eigenvalue.py --models MLP
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import part
import results
import rivals
import timing
import torch
import truth
from models import TRAINING_STEPS, Case
from scipy.sparse.linalg import LinearOperator, eigsh

import batchlr

PART = "top_eigenvalue"
TITLE = "Time to the largest eigenvalue"
TARGETS = ("1e-2", "1e-3")
OURS = (("error", "1e-2"), ("error", "1e-3"), ("bound", "1e-2"), ("bound", "1e-3"))
FAR = 3.0  # times our dearest: beyond it a call is measured once only


@dataclass(frozen=True)
class Answer:
    value: float
    products: int
    bound: float = math.nan  # what the call itself says of its relative error


Call = Callable[[Case, int], Answer]


def ours(criterion: str, tol: float) -> Call:
    """From the gradient, which the operator has anyway; noise tells the rounds apart."""

    def call(case: Case, seed: int) -> Answer:
        operator = rivals.our_operator(batchlr.HessianOperator, case)
        (gradient,) = operator.batch_gradients()
        start = gradient / gradient.norm() + 0.1 * noise(case.size, seed).to(gradient)
        pairs = batchlr.top_eigenpairs(operator, criterion=criterion, tol=tol, start=start)
        value = float(pairs.values[0])
        bounds = pairs.bounds if criterion == "bound" else pairs.errors
        return Answer(value, pairs.num_products, float(bounds[0]) / value)

    return call


@cache
def noise(size: int, seed: int) -> torch.Tensor:
    """A random direction: there only for the rounds to differ, so its time does not count."""
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def pyhessian(**options: float) -> Call:
    def call(case: Case, seed: int) -> Answer:
        torch.manual_seed(seed)
        measured = rivals.pyhessian_object(case)
        values, _ = measured.eigenvalues(**options)
        return Answer(values[0], 0)

    return call


def curvlinops(tol: float) -> Call:
    def call(case: Case, seed: int) -> Answer:
        operator = rivals.curvlinops_operator("Hessian", case, check=True).to_scipy()
        count = itertools.count()

        def multiply(vector: np.ndarray) -> np.ndarray:
            next(count)
            return operator @ vector

        counted = LinearOperator(operator.shape, matvec=multiply, dtype=operator.dtype)
        start = np.random.default_rng(seed).standard_normal(case.size).astype(operator.dtype)
        values = eigsh(counted, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)
        return Answer(float(values[0]), next(count))

    return call


def eigenthings(algorithm: str, **options: float) -> Call:
    def call(case: Case, seed: int) -> Answer:
        operator = rivals.eigenthings_hessian_operator(case)
        found = getattr(rivals.eigenthings, algorithm)(operator, seed=seed, **options)
        value = float(found.eigenvalues[0])
        return Answer(value, int(found.iterations), float(found.residuals[0]) / abs(value))

    return call


def calls(case: Case) -> dict[str, Call]:
    found: dict[str, Call] = {}
    if rivals.pyhessian:
        found["PyHessian, default"] = pyhessian()
        found["PyHessian, tol 1e-4"] = pyhessian(tol=1e-4)
    if rivals.curvlinops:
        found["curvlinops and eigsh, tol 1e-2"] = curvlinops(1e-2)
    if rivals.eigenthings:
        found["hessian-eigenthings, lanczos k=1"] = eigenthings("lanczos", k=1)
        found["hessian-eigenthings, lanczos default"] = eigenthings("lanczos")
    if case.attention:
        found |= {
            f"{name}, math attention by hand": rivals.in_context(call, rivals.math_attention)
            for name, call in found.items()
        }
    mine = {f"batchlr, {c} {t}": ours(c, float(t)) for c, t in OURS}
    return {**mine, **found}


def measure(case: Case, rounds: int, device: str) -> list[results.Row]:
    operator = rivals.our_operator(batchlr.HessianOperator, case)
    vector = batchlr.top_eigenpairs(operator, tol=1e-3).vectors[:, 0]
    exact = truth.largest_eigenvalue(case, vector)
    del operator
    for seed in range(1, rounds + 1):
        noise(case.size, seed)
    rows: dict[str, results.Row] = {}
    turns: dict[str, Callable[[], Answer]] = {"gradient": rivals.gradient(case)}
    turns["gradient"]()
    first: dict[str, timing.Timed] = {}
    for name, call in calls(case).items():
        rows[name] = {
            "model": case.name,
            "contestant": name,
            "samples": len(case.batches[0][1]),
            "truth": exact,
        }
        seeds = itertools.count(1)
        turn = lambda c=call, s=seeds: c(case, next(s))  # noqa: E731
        try:
            first[name] = timing.clock(turn, device)
        except Exception as error:  # a rival's failure is a result
            rows[name]["failure"] = rivals.reason(error)
            continue
        print(f"{case.name}, {name}: {first[name]}", flush=True)
        turns[name] = turn
    limit = FAR * first["batchlr, bound 1e-3"].seconds
    close = {n: t for n, t in turns.items() if n not in first or first[n].seconds <= limit}
    times = timing.take_turns(close, rounds - 1, device)
    unit = timing.quartiles([t.seconds for t in times["gradient"]])[1]
    for name, row in rows.items():
        taken = ([first[name]] if name in first else []) + times.get(name, [])
        if taken:
            row["seconds"] = [t.seconds for t in taken]
            row["gradients"] = [t.seconds / unit for t in taken]
            row["products"] = [t.result.products for t in taken]
            row["errors"] = [abs(t.result.value / exact - 1) for t in taken]
            row["bounds"] = [t.result.bound for t in taken]
    return list(rows.values())


def render(rows: Sequence[results.Row]) -> str:
    lines = []
    for row in rows:
        if "failure" in row:
            cells = [f"fails: {row['failure']}", "", "", ""]
        else:
            products = [p for p in row["products"] if p]
            cells = [
                timing.spread(row["gradients"], 0),
                f"{min(products)} - {max(products)}" if products else "not told",
                f"{max(row['errors']):.1e}",
                len(row["seconds"]),
            ]
        lines.append([row["model"], row["samples"], row["contestant"], *cells])
    header = ["network", "samples", "call", "gradients", "products", "worst error", "rounds"]
    return f"{NOTE}\n\n{results.table(header, lines)}\n\n{verdicts(rows)}"


NOTE = (
    f"After {TRAINING_STEPS} steps of SGD. Time of the whole call, set-up included, in gradients "
    "of the same batch: median (quartiles); every round has a start of its own. The worst error "
    "over the rounds is that against scipy's eigsh in float64. Calls that take more than "
    f"{FAR} times as long as our dearest are measured once."
)


def verdicts(rows: Sequence[results.Row]) -> str:
    """For each network and accuracy, our calls of that tolerance against the fastest of theirs.

    The bound certifies, the error is an estimate.
    """
    lines = []
    every = [(c, t) for t in TARGETS for c in ("bound", "error")]
    for model in dict.fromkeys(row["model"] for row in rows):
        for criterion, target in every:
            taken = [r for r in rows if r["model"] == model and "errors" in r]
            name = f"batchlr, {criterion} {target}"
            mine = next((r for r in taken if r["contestant"] == name), None)
            if mine is None:
                continue
            there = [r for r in taken if max(r["errors"]) <= float(target)]
            theirs = [r for r in there if not r["contestant"].startswith("batchlr")]
            rival = min(theirs, key=middle, default=None)
            cells = [label(mine), "yes" if mine in there else "no", label(rival)]
            ratio = "" if rival is None else f"{middle(rival) / middle(mine):.2f}"
            lines.append([model, f"{float(target):.1%}", *cells, ratio])
    header = ["network", "error at most", "our call of that tolerance", "reached",
              "fastest rival call that reached it", "times batchlr"]  # fmt: skip
    return results.table(header, lines)


def middle(row: results.Row) -> float:
    return timing.quartiles(row["gradients"])[1]


def label(row: results.Row | None) -> str:
    return "none" if row is None else f"{row['contestant']}: {middle(row):.0f}"


if __name__ == "__main__":
    part.run(PART, TITLE, __doc__, measure, render, small=True)
