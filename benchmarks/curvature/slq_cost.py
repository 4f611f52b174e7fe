"""A spectral density of 30 Lanczos steps and one probe, over one batch and over a loader of four.

python benchmarks/curvature/slq_cost.py --models MLP
"""

from collections.abc import Callable, Sequence

import part
import results
import rivals
import timing
import torch
from models import Case

import batchlr

PART = "slq_cost"
TITLE = "Cost of a spectral density"
STEPS = 30
BATCHES = 4
FAR = 2.5  # times ours: beyond it a call is measured once only, beside our first

Call = Callable[[Case], object]


def ours(case: Case) -> object:
    operator = rivals.our_operator(batchlr.HessianOperator, case)
    return batchlr.stochastic_lanczos_quadrature(operator, num_steps=STEPS, num_probes=1)


def pyhessian(loader: bool) -> Call:
    def call(case: Case) -> object:
        with rivals.eig_of_old():
            return rivals.pyhessian_object(case, loader=loader).density(iter=STEPS, n_v=1)

    return call


def curvlinops(case: Case) -> object:
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    operator = rivals.curvlinops_operator("Hessian", case, check=True)
    return lanczos_approximate_spectrum(operator, STEPS)


def curvlinops_told(case: Case) -> object:
    """Its Lanczos alone, as if the edges of the spectrum were known."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    return fast_lanczos(rivals.curvlinops_operator("Hessian", case), STEPS)


def eigenthings(case: Case) -> object:
    operator = rivals.eigenthings_hessian_operator(case)
    return rivals.eigenthings.spectral_density(operator, num_runs=1, lanczos_steps=STEPS)


def calls(case: Case) -> dict[str, Call]:
    found: dict[str, Call] = {}
    if rivals.pyhessian:
        found["PyHessian"] = pyhessian(loader=len(case.batches) > 1)
    if rivals.curvlinops:
        found["curvlinops"] = curvlinops
        found["curvlinops, edges given"] = curvlinops_told
    if rivals.eigenthings:
        found["hessian-eigenthings"] = eigenthings
    if case.attention:
        found = {
            f"{name}, math attention by hand": rivals.in_context(call, rivals.math_attention)
            for name, call in found.items()
        }
    return {"batchlr": ours, **found}


def measure(case: Case, rounds: int, device: str) -> list[results.Row]:
    parts = split(case)
    return [row for data, one in parts.items() for row in measure_one(one, data, rounds, device)]


def split(case: Case) -> dict[str, Case]:
    """The same samples as one batch and as a loader of four."""
    x, y = case.batches[0]
    quarters = list(zip(x.chunk(BATCHES), y.chunk(BATCHES), strict=True))
    loader = Case(
        case.name, case.model, quarters, case.norm_mode, case.attention, case.criterion
    )  # fmt: skip
    return {"one batch": case, f"loader of {BATCHES}": loader}


def measure_one(case: Case, data: str, rounds: int, device: str) -> list[results.Row]:
    rows: dict[str, results.Row] = {}
    turns: dict[str, Callable[[], object]] = {"gradient": rivals.all_gradients(case)}
    turns["gradient"]()
    first: dict[str, timing.Timed] = {}
    for name, call in calls(case).items():
        rows[name] = {
            "model": case.name,
            "data": data,
            "contestant": name,
            "samples": sum(len(y) for _, y in case.batches),
        }
        turns[name] = lambda c=call: attempt(c, case)
        first[name] = timing.clock(turns[name], device)
        print(f"{case.name}, {data}, {name}: {first[name]}", flush=True)
    limit = FAR * first["batchlr"].seconds
    close = {n: t for n, t in turns.items() if n not in first or first[n].seconds <= limit}
    times = timing.take_turns(close, rounds, device)
    for name in first.keys() - times.keys():
        times[name] = [first[name]]
    unit = timing.quartiles([t.seconds for t in times["gradient"]])[1]
    for name, row in rows.items():
        failures = [t.result for t in times[name] if t.result is not None]
        if failures:
            row["failure"] = failures[0]
        else:
            row["seconds"] = [t.seconds for t in times[name]]
            row["gradients"] = [s / unit for s in row["seconds"]]
            mine = [t.seconds for t in times["batchlr"]][: len(row["seconds"])]
            if len(mine) < rounds:
                mine = [first["batchlr"].seconds]
            row["ratios"] = timing.ratios(row["seconds"], mine)
    return list(rows.values())


def attempt(call: Call, case: Case) -> str | None:
    """What a call died of, if it did."""
    torch.manual_seed(0)
    try:
        call(case)
    except Exception as error:  # a rival's failure is a result
        return rivals.reason(error)
    return None


def render(rows: Sequence[results.Row]) -> str:
    lines = []
    for row in rows:
        cells = (
            [f"fails: {row['failure']}", ""]
            if "failure" in row
            else [timing.spread(row["gradients"], 0), timing.spread(row["ratios"])]
        )
        lines.append([row["model"], row["data"], row["samples"], row["contestant"], *cells])
    note = (
        f"{STEPS} Lanczos steps from one random vector, set-up included, in gradients of the same "
        "samples and as multiples of our time within the round: medians (quartiles). PyHessian "
        "0.1 ends in `torch.eig`, which torch no longer has, and is lent one. The curvlinops call "
        f"finds the edges of the spectrum first, as documented. Calls that take more than {FAR} "
        "times as long as ours are measured once."
    )
    header = ["network", "data", "samples", "contestant", "gradients", "times batchlr"]
    return f"{note}\n\n{results.table(header, lines)}"


if __name__ == "__main__":
    part.run(PART, TITLE, __doc__, measure, render, small=True)
