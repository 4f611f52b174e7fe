"""The largest eigenvalue along 200 steps of training: products, error and share of the time.

python benchmarks/curvature/tracking.py --models MLP
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import results
import rivals
import timing
import top_eigenvalue
import torch
import truth
from models import LEARNING_RATE, RECIPES, Case, make_case
from torch import Tensor

import batchlr

PART = "tracking"
TITLE = "Following the largest eigenvalue in training"
STEPS = 200
RARELY = 20  # steps between the updates of what starts from nothing, and between true values

Update = Callable[[], tuple[float, int]]  # -> value, products


@dataclass
class Record:
    """What one contestant did along the run."""

    every: int
    update: Update
    seconds: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def tracker(case: Case, tol: float) -> Update:
    operator = our_operator(case)
    followed = batchlr.CurvatureTracker(tol=tol)

    def update() -> tuple[float, int]:
        found = followed.update(operator)
        return found.largest.value, found.num_products

    return update


def warm_lanczos(case: Case) -> Update:
    """Three steps from the last vector, unchecked."""
    operator = our_operator(case)
    last: list[Tensor | None] = [None]

    def update() -> tuple[float, int]:
        steps = 20 if last[0] is None else 3
        pairs = batchlr.top_eigenpairs(operator, tol=0.1, max_steps=steps, start=last[0])
        last[0] = pairs.vectors[:, 0]
        return float(pairs.values[0]), pairs.num_products

    return update


def our_operator(case: Case) -> batchlr.HessianOperator:
    """Of the network in training itself, not of a copy."""
    return batchlr.HessianOperator(
        case.model, batchlr.supervised(case.criterion), case.batches, norm_mode=case.norm_mode
    )


def cold(call: top_eigenvalue.Call, case: Case) -> Update:
    """A rival's own call, from nothing, on a copy of the network."""

    def update() -> tuple[float, int]:
        answer = call(case, 1)
        return answer.value, answer.products

    return update


def warm_power_iteration(case: Case) -> Update:
    """The one warm start a rival has: power iteration from the last vector, to 1e-2."""
    last: list[Tensor | None] = [None]

    def update() -> tuple[float, int]:
        operator = rivals.eigenthings_hessian_operator(case)
        value, vector, _, iterations, _ = power_iteration_one(
            operator, init=last[0], tol=1e-2, seed=1
        )
        last[0] = vector
        return value, iterations

    from hessian_eigenthings import power_iteration_one

    return update


def contestants(case: Case) -> dict[str, Record]:
    found = {
        "batchlr tracker": Record(1, tracker(case, 0.03)),
        f"batchlr tracker, every {RARELY} steps": Record(RARELY, tracker(case, 0.03)),
        "batchlr, three warm Lanczos steps": Record(1, warm_lanczos(case)),
    }
    if case.attention:
        return found  # the rivals fail
    if rivals.pyhessian and case.norm_mode != "train":
        found["PyHessian"] = Record(RARELY, cold(top_eigenvalue.pyhessian(), case))
    if rivals.curvlinops and case.norm_mode != "train":
        found["curvlinops and eigsh"] = Record(
            RARELY, cold(top_eigenvalue.curvlinops(1e-2), case)
        )  # fmt: skip
    if rivals.eigenthings:
        name = "hessian-eigenthings, lanczos default"
        found[name] = Record(RARELY, cold(top_eigenvalue.eigenthings("lanczos"), case))
        found["hessian-eigenthings, warm power iteration"] = Record(
            RARELY, warm_power_iteration(case)
        )
    return found


def training(case: Case, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Callable[[], None]]:
    """The steps of the run, to be called one by one."""
    optimizer = torch.optim.SGD(case.model.parameters(), LEARNING_RATE, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> None:
        training = case.model.training
        case.model.train()
        optimizer.zero_grad()
        case.criterion(case.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        case.model.train(training)

    for x, y in batches:
        yield lambda x=x, y=y: step(x, y)


def measure(case: Case, device: str) -> list[results.Row]:
    measured, *trained_on = case.batches
    case.batches[:] = [measured]
    records = contestants(case)
    steps: list[float] = []
    guess = torch.randn(case.size, generator=torch.Generator().manual_seed(0)).to(device)
    data = [trained_on[index % len(trained_on)] for index in range(STEPS)]
    for index, step in enumerate(training(case, data)):
        values = {}
        for name, record in records.items():
            if index % record.every == 0:
                timed = timing.clock(record.update, device)
                values[name], products = timed.result
                record.seconds.append(timed.seconds)
                record.products.append(products)
        if index % RARELY == RARELY - 1 or index % RARELY == 0:
            exact, guess = truth.by_arpack(case, guess, torch.float32)
            for name, value in values.items():
                records[name].errors.append(abs(value / exact - 1))
        steps.append(timing.clock(step, device).seconds)
    typical = statistics.median(steps)
    return [
        {
            "model": case.name,
            "contestant": name,
            "samples": len(measured[1]),
            "every": record.every,
            "products": record.products[1:],
            "first_products": record.products[0],
            "share": statistics.fmean(record.seconds[1:]) / (record.every * typical),
            "share_every_20": statistics.fmean(record.seconds[1:]) / (RARELY * typical),
            "errors": record.errors[1:],
        }
        for name, record in records.items()
    ]


def render(rows: Sequence[results.Row]) -> str:
    lines = [
        [
            row["model"],
            row["samples"],
            row["contestant"],
            row["every"],
            f"{statistics.fmean(row['products']):.1f}" if any(row["products"]) else "not told",
            f"{statistics.fmean(row['errors']):.1%}",
            f"{max(row['errors']):.1%}",
            f"{row['share_every_20']:.0%}",
        ]
        for row in rows
    ]
    note = (
        f"{STEPS} steps of SGD with momentum from the initial weights; the Hessian is that of one "
        "fixed batch of the size trained with. Products and time are means over the updates after "
        f"the first. Errors are against eigsh (float32, tol 1e-4) at 20 points. Last column: time "
        f"of an update over that of {RARELY} training steps."
    )
    header = ["network", "samples", "contestant", "every", "products", "mean error",
              "worst error", "share of 20 steps"]  # fmt: skip
    return f"{note}\n\n{results.table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["MLP", "PreResNet-20, eval", "transformer", "VGG-11"]
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=models)
    parser.add_argument("--samples", type=int, help="batch size, where not the network's own")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the rivals'
    for name in options.models:
        samples = options.samples or RECIPES[name].small
        case = make_case(name, samples=samples, steps=0, num_batches=21, device=options.device)
        rows = results.store(PART, measure(case, options.device), ["model"], options.device)
        results.publish(PART, rows, TITLE, render, options.device)


if __name__ == "__main__":
    main()
