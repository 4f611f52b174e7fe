"""The largest eigenvalue along 200 steps of training: products, error and share of the time.

Networks train on scikit-learn's digits, scaled to their size, the transformer on random walks.

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
from models import LEARNING_RATE, RECIPES, Batch, Case, Recipe, make_case, sentences
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchlr

PART = "tracking"
TITLE = "Following the largest eigenvalue in training"
STEPS = 200
RARELY = 20  # steps between the updates of what starts from nothing, and between true values
TIMES = 4  # batches trained with are so many times the samples measured

Update = Callable[[], tuple[float, int]]  # -> value, products


@dataclass
class Record:
    """What one contestant did along the run."""

    every: int
    update: Update
    seconds: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def tracker(case: Case, tol: float | None = None) -> Update:
    operator = our_operator(case)
    followed = batchlr.CurvatureTracker() if tol is None else batchlr.CurvatureTracker(tol=tol)

    def update() -> tuple[float, int]:
        found = followed.update(operator)
        return found.largest.value, found.num_products

    return update


def warm_search(case: Case, tol: float) -> Update:
    """What there is without a tracker: a certified search from the last vector."""
    operator = our_operator(case)
    last: list[Tensor | None] = [None]

    def update() -> tuple[float, int]:
        pairs = batchlr.top_eigenpairs(operator, tol=tol, start=last[0])
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
        "batchlr tracker": Record(1, tracker(case)),
        "batchlr tracker, rarely": Record(RARELY, tracker(case)),
        "batchlr tracker, tol=0.1, rarely": Record(RARELY, tracker(case, 0.1)),
        "batchlr, certified 1 % from the last vector": Record(RARELY, warm_search(case, 1e-2)),
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


def digits(recipe: Recipe) -> Batch:
    """All images, scaled to the network's side and channels, in an order of chance."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(raw.images, dtype=torch.float32)[order].unsqueeze(1)
    images = nn.functional.interpolate((images - images.mean()) / images.std(), recipe.side)
    return images.expand(-1, recipe.channels, -1, -1), torch.tensor(raw.target)[order]


def batches(recipe: Recipe, measured: int, trained: int, device: str) -> Iterator[Batch]:
    """What is measured, then what is trained on."""
    generator = torch.Generator().manual_seed(3)
    x, y = digits(recipe) if recipe.side else sentences(2000, generator)
    yield x[:measured].to(device), y[:measured].to(device)
    while True:
        rows = torch.randperm(len(x), generator=generator)[:trained]
        yield x[rows].to(device), y[rows].to(device)


def train_step(case: Case, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One step in train mode; returns the loss."""
    x, y = batch
    training = case.model.training
    case.model.train()
    optimizer.zero_grad()
    loss = case.criterion(case.model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    case.model.train(training)
    return float(loss)


def measure(
    name: str, samples: int, size: int, steps: int, without: Sequence[str], device: str
) -> list[results.Row]:
    case = make_case(name, samples=samples, steps=0, device=device)
    data = batches(RECIPES[name], samples, size, device)
    case.batches[:] = [next(data)]
    everyone = contestants(case)
    records = {n: r for n, r in everyone.items() if not n.startswith(tuple(without))}
    optimizer = torch.optim.SGD(case.model.parameters(), LEARNING_RATE, momentum=0.9)
    gradient = rivals.gradient(case)
    guess = torch.randn(case.size, generator=torch.Generator().manual_seed(0)).to(device)
    trained: list[timing.Timed] = []
    gradients: list[float] = []
    course: list[float] = []
    for index in range(steps):
        values = {}
        for contestant, record in records.items():
            if index % record.every == 0:
                timed = timing.clock(record.update, device)
                values[contestant], products = timed.result
                record.seconds.append(timed.seconds)
                record.products.append(products)
        if index % RARELY == 0:
            exact, guess = truth.by_arpack(case, guess, torch.float32)
            course.append(exact)
            for contestant, value in values.items():
                records[contestant].errors.append(abs(value / exact - 1))
        batch = next(data)
        gradients.append(timing.clock(gradient, device).seconds)
        trained.append(timing.clock(lambda b=batch: train_step(case, optimizer, b), device))
    step = statistics.median(t.seconds for t in trained)
    return [
        {
            "model": name,
            "contestant": contestant,
            "samples": samples,
            "batch": size,
            "steps": steps,
            "every": record.every,
            "products": record.products[1:],
            "first_products": record.products[0],
            "gradients": statistics.fmean(record.seconds[1:]) / statistics.median(gradients),
            "share_every_20": statistics.fmean(record.seconds[1:]) / (RARELY * step),
            "errors": record.errors[1:],
            "largest": course,
            "losses": [trained[0].result, trained[-1].result],
        }
        for contestant, record in records.items()
    ]


def render(rows: Sequence[results.Row]) -> str:
    lines = [
        [
            row["model"],
            f"{row['samples']} of {row['batch']}",
            row["steps"],
            row["contestant"],
            row["every"],
            f"{statistics.fmean(row['products']):.1f}" if any(row["products"]) else "not told",
            f"{statistics.fmean(row['errors']):.1%}",
            f"{max(row['errors']):.1%}",
            f"{row['gradients']:.0f}" if row["gradients"] > 10 else f"{row['gradients']:.1f}",
            f"{row['share_every_20']:.1%}",
        ]
        for row in rows
    ]
    firsts = [row for row in rows if row["every"] == 1]
    courses = "\n".join(
        f"- {row['model']}: loss {row['losses'][0]:.2g} to {row['losses'][1]:.2g}, largest "
        f"eigenvalue {', '.join(f'{value:.3g}' for value in row['largest'])}"
        for row in firsts
    )
    note = (
        f"SGD with momentum at rate {LEARNING_RATE} from the initial weights, every step on a "
        "fresh batch of the digits (the transformer: of random walks). The Hessian is that of "
        "the same few samples throughout. The tracker's tolerance is 0.05 where not said; rarely "
        f"is every {RARELY} steps. Products and time are means over the updates after the first; "
        "gradients are of the samples measured, set-up included. Errors are against eigsh "
        f"(float32, tol 1e-4) every {RARELY} steps but the first. Last column: time of an update "
        f"over that of {RARELY} training steps."
    )
    header = ["network", "measured", "steps", "contestant", "every", "products", "mean error",
              "worst error", "gradients", "share of 20 steps"]  # fmt: skip
    return f"{note}\n\n{results.table(header, lines)}\n\n{courses}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["MLP", "PreResNet-20, eval", "transformer", "VGG-11"]
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=models)
    parser.add_argument("--samples", type=int, help="measured, where not the network's own")
    parser.add_argument("--times", type=int, default=TIMES, help="trained for each measured")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--without", nargs="+", default=[], help="contestants, by their first words"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.steps <= RARELY:
        parser.error(f"--steps must be more than {RARELY}, got {options.steps}")
    warnings.simplefilter("ignore")  # the rivals'
    for name in options.models:
        samples = options.samples or RECIPES[name].small
        size = options.times * samples
        measured = measure(name, samples, size, options.steps, options.without, options.device)
        rows = results.store(PART, measured, ["model", "samples", "batch"], options.device)
        results.publish(PART, rows, TITLE, render, options.device)


if __name__ == "__main__":
    main()
