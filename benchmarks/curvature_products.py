"""Cost of one curvature product, beside curvlinops and beside torch's own layers.

Rounds alternate between the contestants in one process; each figure is the ratio of CPU times
within a round (all threads), its median and its range over the rounds.

    python benchmarks/curvature_products.py --rounds 7
"""

import argparse
import statistics
import time
import warnings

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import nn

import batchlr
from batchlr.operators.second_order import torchs_own_layers
from batchlr.training.data import load_data, measurement_batches
from batchlr.training.models import build_model


def cpu_seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def compare(name, ours, rival, rounds):
    """Median and range of rival / ours."""
    ours(), rival()  # warm-up: graphs are recorded, kernels chosen
    ratios = []
    for index in range(rounds):
        first, second = (ours, rival) if index % 2 == 0 else (rival, ours)
        times = {first: cpu_seconds(first), second: cpu_seconds(second)}
        ratios.append(times[rival] / times[ours])
    print(f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} |")


def gradient(model, loss_fn, batch):
    return lambda: torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    data = load_data("digits")
    torch.manual_seed(0)
    model = build_model(
        "vgg", num_classes=10, in_channels=1, image_size=32, depth=11, width=0.25, batch_norm=True
    )
    (batch,) = measurement_batches(
        data, batch_size=128, num_batches=1, generator=torch.Generator().manual_seed(0)
    )
    criterion = nn.CrossEntropyLoss()
    loss_fn = batchlr.supervised(criterion)
    print("| contest (CPU time of the second over the first) | median | range |")
    print("|---|---|---|")

    operators = {
        mode: batchlr.HessianOperator(model, loss_fn, [batch], norm_mode=mode)
        for mode in ("train", "eval")
    }
    vector = torch.randn(operators["eval"].shape[0], generator=torch.Generator().manual_seed(1))
    ggn = batchlr.GGNOperator(model, loss_fn, [batch], norm_mode="eval")
    once = gradient(model, loss_fn, batch)
    compare("gradient : Hessian product, train", once, lambda: operators["train"] @ vector, rounds)

    stock = batchlr.HessianOperator(model, loss_fn, [batch], norm_mode="train")
    with torchs_own_layers():
        stock @ vector  # recorded here
    compare(
        "Hessian product, train : the same with torch's own layers",
        lambda: operators["train"] @ vector, lambda: stock @ vector, rounds,
    )  # fmt: skip

    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rivals = [
            kind(model, criterion, parameters, [batch], check_deterministic=False)
            for kind in (HessianLinearOperator, GGNLinearOperator)
        ]
    for name, ours, rival in (
        ("Hessian product, eval : curvlinops", operators["eval"], rivals[0]),
        ("GGN product, eval : curvlinops", ggn, rivals[1]),
    ):
        compare(name, lambda o=ours: o @ vector, lambda r=rival: r @ vector, rounds)


if __name__ == "__main__":
    main()
