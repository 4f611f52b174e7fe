"""Cost of a curvature product by route, in gradients of the same batch.

Every figure is the CPU time of all threads over that of one gradient in the same round; median and
range over the rounds, whose order alternates. "rebuilt" records the batch for the product, "set-up"
only records it. Train-mode figures are in gradients of the train-mode network.

    python benchmarks/product_routes.py --models mlp,vgg --rounds 5
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import batchlr
from batchlr.training.models import build_model

IMAGES = {"num_classes": 100, "in_channels": 3, "image_size": 32}


def mlp():
    layers = [nn.Linear(3072, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100)]
    return nn.Sequential(nn.Flatten(), *layers)


MODELS = {  # builder, batch size
    "mlp": (mlp, 512),
    "vgg": (lambda: build_model("vgg", depth=11, batch_norm=False, **IMAGES), 64),
    "vgg-bn": (lambda: build_model("vgg", depth=11, width=0.5, batch_norm=True, **IMAGES), 32),
    "wrn": (lambda: build_model("wide_resnet", depth=10, widen_factor=2, **IMAGES), 32),
    "preresnet": (lambda: build_model("preresnet", depth=20, **IMAGES), 32),
}


def cpu_seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def routes(model, batch, mode):
    """What is compared, by name; the gradient first."""
    loss_fn = batchlr.supervised(nn.CrossEntropyLoss())
    # A copy: in train mode its running statistics move, which would record the operators anew.
    twin = copy.deepcopy(model).train(mode != "eval")
    parameters = list(twin.parameters())
    vector = torch.randn(sum(p.numel() for p in parameters))
    kinds = {"Hessian": batchlr.HessianOperator, "GGN": batchlr.GGNOperator}

    def build(name, **options):
        return kinds[name](model, loss_fn, [batch], norm_mode=mode, **options)

    found = {"gradient": lambda: torch.autograd.grad(loss_fn(twin, batch), parameters)}
    for name in kinds:
        kept = build(name)
        found[f"{name} kept"] = lambda kept=kept: kept @ vector
        found[f"{name} rebuilt"] = lambda name=name: build(name, expected_products=1) @ vector
        found[f"{name} set-up"] = lambda name=name: build(name).loss()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("| model | norms | route | gradients (median) | range |")
    print("|---|---|---|---|---|")
    for name in arguments.models.split(","):
        builder, samples = MODELS[name]
        model = builder()
        batch = (torch.randn(samples, 3, 32, 32), torch.randint(100, (samples,)))
        normalises = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        with torch.no_grad():
            for _ in range(4 * normalises):
                model.train()(batch[0])
        for mode in ("eval", "train") if normalises else (None,):
            compared = routes(model, batch, mode)
            for function in compared.values():
                function()
            times = {route: [] for route in compared}
            for number in range(arguments.rounds):
                for route in list(compared)[:: 1 if number % 2 else -1]:
                    times[route].append(cpu_seconds(compared[route]))
            gradient = times.pop("gradient")
            for route, seconds in times.items():
                ratios = [s / g for s, g in zip(seconds, gradient, strict=True)]
                print(
                    f"| {name} | {mode or '-'} | {route} | {statistics.median(ratios):.2f} | "
                    f"{min(ratios):.2f} - {max(ratios):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
