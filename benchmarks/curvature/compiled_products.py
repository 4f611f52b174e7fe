"""What torch.compile makes of a curvature product: its time, its price, its rounding.

python benchmarks/curvature/compiled_products.py --models MLP transformer --device cuda
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import part
import results
import rivals
import timing
import torch
from models import Case
from product_cost import flat
from rivals import Product, flatten
from torch import Tensor, fx
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module

from batchlr.operators.linear_pass import linear_pass
from batchlr.operators.parameters import split_like
from batchlr.operators.second_order import CheapSecondDerivatives

PART = "compiled_products"
TITLE = "Curvature products under torch.compile"

KINDS = {"Hessian": rivals.our_hessian, "GGN": rivals.our_ggn}


def kept_graph(case: Case, kind: str) -> Product:
    """What the library does: nothing compiled."""
    return KINDS[kind](case)


def through_kept_graph(case: Case, kind: str) -> Product:
    """The library's graph, recorded as ever; backward passes through it by compiled autograd."""
    product = kept_graph(case, kind)
    product(torch.zeros(case.size, device=case.device))  # recording does not compile

    def compiled(vector: Tensor) -> object:
        with compiled_autograd._enable(partial(torch.compile, fullgraph=True), dynamic=False):
            return product(vector)

    return compiled


def traced(case: Case, kind: str, *, compiled: bool) -> Product:
    """The same operations traced: the half that depends on the vector, with nothing around it."""
    parameters = [p.detach() for p in case.model.parameters()]
    vector = torch.zeros(case.size, device=case.device)
    whole = make_fx(lambda ps, v: product_anew(case, kind, ps, v))(parameters, vector)
    whole.graph.set_codegen(fx.graph.CodeGen())  # takes a list of tensors, not a tree
    *_, last = [node for node in whole.graph.nodes if node.op == "placeholder"]
    dependent = {last}
    for node in whole.graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    halves = split_module(whole, whole, lambda node: int(node in dependent))
    inputs: list[Tensor] = []
    halves.submod_1.register_forward_pre_hook(lambda _, given: inputs.extend(given))
    with torch.no_grad():
        halves(*parameters, vector)
    later = halves.submod_1.forward
    if compiled:
        later = torch.compile(later, fullgraph=True, dynamic=False)
    return lambda new: later(*[new if given is vector else given for given in inputs])


def product_anew(case: Case, kind: str, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """A product from nothing: double backward, or push-forward, loss Hessian and pull-back."""
    grad = partial(torch.autograd.grad, create_graph=True)
    (x, y), weights = case.batches[0], [p.requires_grad_() for p in map(torch.clone, parameters)]
    tangents = split_like(vector, weights)
    names = [name for name, _ in case.model.named_parameters()]
    with rivals.math_attention(), CheapSecondDerivatives():
        given = dict(zip(names, weights, strict=True))
        outputs = torch.func.functional_call(case.model, given, (x,))
    if kind == "Hessian":
        gradients = grad(case.criterion(outputs, y), weights)
        return flatten(torch.autograd.grad(gradients, weights, tangents))
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = grad(outputs, weights, u)
    with linear_pass():
        (pushed,) = torch.autograd.grad(pulled, u, tangents, retain_graph=True)
    tip = outputs.detach().requires_grad_()
    (slope,) = grad(case.criterion(tip, y), tip)
    (curved,) = torch.autograd.grad(slope, tip, pushed)
    return flatten(torch.autograd.grad(outputs, weights, curved))


ROUTES: dict[str, Callable[[Case, str], Product]] = {
    "kept graph": kept_graph,
    "kept graph, backward compiled": through_kept_graph,
    "traced": partial(traced, compiled=False),
    "traced and compiled": partial(traced, compiled=True),
}


def seconds_so_far(device: str) -> float:
    """CPU time with that of compilers; on an accelerator, wall time."""
    return time.perf_counter() if device != "cpu" else sum(os.times()[:4])


def measure(case: Case, rounds: int, device: str) -> list[results.Row]:
    torch._inductor.config.force_disable_caches = True  # what compiling costs the first time
    if device == "cpu":
        torch._inductor.config.compile_threads = 1  # in children that end, whose time counts
    vector = torch.randn(case.size, generator=torch.Generator().manual_seed(3)).to(device)
    rows: list[results.Row] = []
    for kind in KINDS:
        turns: dict[str, Callable[[], object]] = {}
        found: dict[str, results.Row] = {}
        torch.compile(torch.neg)(vector)  # loads the compiler, which counts for none
        for route, build in ROUTES.items():
            row = {"model": case.name, "kind": kind, "route": route, "samples": case_samples(case)}
            found[route] = row
            timing.settle(device)
            began = seconds_so_far(device)
            try:
                product = build(case, kind)
                product(vector)
            except Exception as error:  # that a route does not compile is a result
                row["failure"] = rivals.reason(error)
                continue
            timing.settle(device)
            row["set_up"] = seconds_so_far(device) - began
            product(vector)
            turns[route] = partial(product, vector)
        times = timing.take_turns(turns, rounds, device)
        truth = flat(times["kept graph"][-1].result)
        for route, timed in times.items():
            found[route]["seconds"] = [t.seconds for t in timed]
            answer = flat(timed[-1].result)
            found[route]["difference"] = float((answer - truth).norm() / truth.norm())
        rows += found.values()
    return rows


def case_samples(case: Case) -> int:
    return len(case.batches[0][1])


def render(rows: Sequence[results.Row]) -> str:
    lines = []
    for row in rows:
        ours = next(
            r for r in rows
            if (r["model"], r["kind"], r["route"]) == (row["model"], row["kind"], "kept graph")
        )  # fmt: skip
        if "failure" in row:
            cells = [f"fails: {row['failure']}", "", "", ""]
        else:
            faster = timing.ratios(ours["seconds"], row["seconds"])
            cells = [
                timing.spread(faster),
                f"{row['set_up']:.1f}",
                break_even(row, ours),
                f"{row['difference']:.0e}",
            ]
        lines.append([row["model"], row["samples"], row["kind"], row["route"], *cells])
    note = (
        "How many times faster a product is than on the library's kept graph: medians (and "
        "quartiles) of the ratios within a round. Seconds to the first product, compilers "
        "included and nothing cached (CPU time; on a GPU wall time); after how many products they "
        "are won back, by medians; relative distance of the product. A gain whose quartiles "
        "contain 1 is a draw."
    )
    header = ["network", "samples", "product", "route", "faster", "set-up, s", "pays after"]
    return f"{note}\n\n{results.table([*header, 'distance'], lines)}"


def break_even(row: results.Row, ours: results.Row) -> str:
    """Products after which a route has won its set-up back."""
    if row["route"] == ours["route"]:
        return ""
    gain = statistics.median(ours["seconds"]) - statistics.median(row["seconds"])
    return f"{(row['set_up'] - ours['set_up']) / gain:.0f}" if gain > 0 else "never"


if __name__ == "__main__":
    torch.backends.mha.set_fastpath_enabled(False)
    models = ("MLP", "VGG-11", "PreResNet-20, eval", "transformer")
    part.run(PART, TITLE, __doc__, measure, render, models=models)
