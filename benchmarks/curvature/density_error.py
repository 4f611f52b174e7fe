"""How far a density of 30 steps and one probe lies from the exact spectrum, for small networks.

The exact eigenvalues are those of the dense float64 Hessian. The distance is Wasserstein's, in
units of the mean absolute eigenvalue.

    python benchmarks/curvature/density_error.py
"""

import argparse
import warnings
from collections.abc import Callable, Sequence

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

Measure = tuple[np.ndarray, np.ndarray]  # points, weights


def small_cases() -> list[Case]:
    """A fully connected and a convolutional network, of some 3,000 weights."""
    networks = {
        "tanh MLP": build_model(
            "mlp", num_classes=CLASSES, in_channels=1, image_size=8, hidden=[32, 16]
        ),
        "ReLU VGG-11": build_model(
            "vgg", num_classes=CLASSES, in_channels=1, image_size=32, depth=11, width=1 / 50
        ),
    }
    cases = []
    for name, model in networks.items():
        side, count = (8, 64) if "MLP" in name else (32, 16)
        generator = torch.Generator().manual_seed(1)
        prototypes = torch.randn(CLASSES, 1, side, side, generator=generator)
        y = torch.randint(CLASSES, (count,), generator=generator)
        x = prototypes[y] + torch.randn(count, 1, side, side, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cases.append(Case(name, model, [(x, y)], None, False, nn.CrossEntropyLoss()))
    return cases


def exact_spectrum(case: Case) -> np.ndarray:
    doubled = case.double()
    product = rivals.plain_hessian(doubled)
    size = parameters_to_vector(doubled.model.parameters()).numel()
    rows = [product(row) for row in torch.eye(size, dtype=torch.float64)]
    return torch.linalg.eigvalsh(torch.stack(rows)).numpy()


def ours(case: Case, seed: int) -> Measure:
    operator = rivals.our_operator(batchlr.HessianOperator, case)
    generator = torch.Generator().manual_seed(seed)
    found = batchlr.stochastic_lanczos_quadrature(
        operator, num_steps=STEPS, num_probes=1, generator=generator
    )
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
    found: dict[str, Callable[[Case, int], Measure]] = {"batchlr": ours}
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
        for seed in range(seeds):
            points, weights = call(case, seed)
            distance = wasserstein_distance(truth, points, v_weights=np.clip(weights, 0, None))
            errors.append(distance / unit)
        rows.append({"model": case.name, "size": case.size, "contestant": name, "errors": errors})
    return rows


def render(rows: Sequence[results.Row]) -> str:
    lines = [
        [row["model"], row["size"], row["contestant"], timing.spread(row["errors"], 3),
         f"{max(row['errors']):.3f}"]
        for row in rows
    ]  # fmt: skip
    note = (
        f"{STEPS} steps, one probe, {len(rows[0]['errors'])} seeds: Wasserstein distance from the "
        "exact spectrum over the mean absolute eigenvalue, median (quartiles) and worst."
    )
    header = ["network", "weights", "contestant", "distance", "worst"]
    return f"{note}\n\n{results.table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")  # the rivals'
    torch.manual_seed(0)
    for case in small_cases():
        rows = results.store(PART, measure(case, seeds), ["model"], "cpu")
        results.publish(PART, rows, TITLE, render, "cpu")


if __name__ == "__main__":
    main()
