"""The command line all parts share: one network after the other, stored as soon as measured."""

import argparse
import warnings
from collections.abc import Callable, Sequence

import results
from models import RECIPES, Case, make_case

Measure = Callable[[Case, int, str], list[results.Row]]
Render = Callable[[Sequence[results.Row]], str]


def run(
    part: str,
    title: str,
    doc: str,
    measure: Measure,
    render: Render,
    *,
    models: Sequence[str] = tuple(RECIPES),
    small: bool = False,
    num_batches: int = 1,
) -> None:
    """Parse, measure every network asked for, and write the table after each."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(models))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, help="batch size, where not the network's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the rivals'
    if options.table:
        results.publish(part, results.read(part, options.device), title, render, options.device)
        return
    for name in options.models:
        samples = options.samples or (RECIPES[name].small if small else RECIPES[name].batch)
        case = make_case(name, samples=samples, num_batches=num_batches, device=options.device)
        rows = measure(case, options.rounds, options.device)
        everything = results.store(part, rows, ["model"], options.device)
        results.publish(part, everything, title, render, options.device)
