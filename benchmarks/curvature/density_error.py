"""How far a density of 30 steps and one probe lies from the exact spectrum, for small networks.

The exact eigenvalues are those of the dense float64 Hessian. The distance is Wasserstein's, in
units of the mean absolute eigenvalue.

    python benchmarks/curvature/density_error.py
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import results
import rivals
import timing
import torch
from models import CLASSES, Case
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.utils import parameters_to_vector

import batchlr
from batchlr.training.models import build_model

PART = "density_error"
TITLE = "Error of a spectral density"
STEPS = 30
OURS = "batchlr"
AT_ZERO = "batchlr, a node at zero"
SETTLED = "batchlr, a node at zero, settled weights"
FIRST_SEED = 1000  # far from those of weights and samples, lest a probe be part of the matrix

Measure = tuple[np.ndarray, np.ndarray]  # points, weights


@dataclass(frozen=True)
class Network:
    """A network small enough for its dense Hessian, and its data."""

    build: Callable[[], nn.Module]
    side: int
    samples: int
    norm_mode: str | None = None


def small(name: str, side: int, **options) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=CLASSES, in_channels=1, image_size=side, **options)


NETWORKS = {
    "tanh MLP": Network(small("mlp", 8, hidden=[32, 16]), 8, 64),
    "ReLU VGG-11": Network(small("vgg", 32, depth=11, width=1 / 50), 32, 16),
    "PreResNet-20, eval": Network(
        small("preresnet", 16, depth=20, block="basic", width=1 / 8), 16, 16, "eval"
    ),
}


def make(name: str) -> Case:
    """The network ``name`` after 50 steps of descent on the samples measured."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build()
    generator = torch.Generator().manual_seed(1)
    shape = (1, network.side, network.side)
    prototypes = torch.randn(CLASSES, *shape, generator=generator)
    y = torch.randint(CLASSES, (network.samples,), generator=generator)
    x = prototypes[y] + torch.randn(network.samples, *shape, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.train(network.norm_mode == "train")
    return Case(name, model, [(x, y)], network.norm_mode, False, nn.CrossEntropyLoss())


def exact_spectrum(case: Case) -> np.ndarray:
    doubled = case.double()
    product = rivals.plain_hessian(doubled)
    size = parameters_to_vector(doubled.model.parameters()).numel()
    rows = [product(row) for row in torch.eye(size, dtype=torch.float64)]
    return torch.linalg.eigvalsh(torch.stack(rows)).numpy()


def measured(case: Case, seed: int, fixed_node: float | None = None) -> batchlr.SpectralMeasure:
    operator = rivals.our_operator(batchlr.HessianOperator, case)
    generator = torch.Generator().manual_seed(seed)
    return batchlr.stochastic_lanczos_quadrature(
        operator, num_steps=STEPS, num_probes=1, fixed_node=fixed_node, generator=generator
    )


def ours(case: Case, seed: int) -> Measure:
    found = measured(case, seed)
    return found.nodes.numpy(), found.weights.numpy()


def ours_at_zero(case: Case, seed: int) -> Measure:
    """With a node where the spectrum has most of its weight."""
    found = measured(case, seed, 0.0)
    return found.nodes.numpy(), found.weights.numpy()


def ours_settled(case: Case, seed: int) -> Measure:
    """The same with the weight of one eigenvalue on what is one."""
    found = measured(case, seed, 0.0).settled()
    return found.nodes.numpy(), found.weights.numpy()


def pyhessian(case: Case, seed: int) -> Measure:
    torch.manual_seed(seed)
    with rivals.eig_of_old():
        nodes, weights = rivals.pyhessian_object(case).density(iter=STEPS, n_v=1)
    return np.array(nodes[0]), np.array(weights[0])


def curvlinops(case: Case, seed: int) -> Measure:
    """The curve it returns, broadened as documented."""
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    torch.manual_seed(seed)
    operator = rivals.curvlinops_operator("Hessian", case)
    grid, density = lanczos_approximate_spectrum(operator, STEPS)
    return grid.numpy(), density.numpy()


def curvlinops_nodes(case: Case, seed: int) -> Measure:
    """The nodes and weights under that curve."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    torch.manual_seed(seed)
    values, vectors = fast_lanczos(rivals.curvlinops_operator("Hessian", case), STEPS)
    return values.numpy(), vectors[0].square().numpy()


def eigenthings(case: Case, seed: int) -> Measure:
    """The nodes and weights it returns beside its curve."""
    operator = rivals.eigenthings_hessian_operator(case)
    found = rivals.eigenthings.spectral_density(
        operator, num_runs=1, lanczos_steps=STEPS, seed=seed
    )
    return found.raw_eigenvalues[0].numpy(), found.raw_weights[0].numpy()


def calls() -> dict[str, Callable[[Case, int], Measure]]:
    found: dict[str, Callable[[Case, int], Measure]] = {
        OURS: ours,
        AT_ZERO: ours_at_zero,
        SETTLED: ours_settled,
    }
    if rivals.pyhessian:
        found["PyHessian"] = pyhessian
    if rivals.curvlinops:
        found |= {"curvlinops, its curve": curvlinops, "curvlinops, nodes": curvlinops_nodes}
    if rivals.eigenthings:
        found["hessian-eigenthings"] = eigenthings
    return found


def measure(case: Case, seeds: int) -> list[results.Row]:
    truth = exact_spectrum(case)
    unit = np.abs(truth).mean()
    rows = []
    for name, call in calls().items():
        errors = []
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            points, weights = call(case, seed)
            distance = wasserstein_distance(truth, points, v_weights=np.clip(weights, 0, None))
            errors.append(distance / unit)
        rows.append({"model": case.name, "size": case.size, "contestant": name, "errors": errors})
    return rows


def differences(rows: Sequence[results.Row], row: results.Row) -> list[str]:
    """Ours less theirs, seed by seed: mean and standard error, of each of our calls."""
    cells = []
    for name in (OURS, AT_ZERO, SETTLED):
        mine = next(r for r in rows if (r["model"], r["contestant"]) == (row["model"], name))
        gaps = [a - b for a, b in zip(mine["errors"], row["errors"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        cells.append("" if mine is row else f"{statistics.fmean(gaps):+.4f} +- {error:.4f}")
    return cells


def render(rows: Sequence[results.Row]) -> str:
    lines = [
        [row["model"], row["size"], row["contestant"], len(row["errors"]),
         timing.spread(row["errors"], 3), f"{max(row['errors']):.3f}", *differences(rows, row)]
        for row in rows
    ]  # fmt: skip
    note = (
        f"{STEPS} steps, one probe: Wasserstein distance from the exact spectrum over the mean "
        "absolute eigenvalue, median (quartiles) and worst over the seeds. Last columns: ours less "
        "that row's, mean over the seeds and standard error. A seed is another probe in each "
        "library, but the same in PyHessian and hessian-eigenthings."
    )
    header = ["network", "weights", "contestant", "seeds", "distance", "worst",
              "ours less it", "a node at zero less it", "settled less it"]  # fmt: skip
    return f"{note}\n\n{results.table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the rivals'
    for name in options.models:
        rows = results.store(PART, measure(make(name), options.seeds), ["model"], "cpu")
        results.publish(PART, rows, TITLE, render, "cpu")


if __name__ == "__main__":
    main()
