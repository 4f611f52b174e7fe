"""How often a harmless run looks lost to `CollapseDetector`: linear regression on pure noise.

python benchmarks/false_alarms.py
"""

import argparse

import numpy as np
import torch

from batchlr.on_the_fly.collapse import CollapseDetector

LR, WEIGHTS = 0.002, 10


def alarm(batch_size, seed, steps):
    """The first step after which the network is taken for lost, or None."""
    rng = np.random.default_rng(seed)
    weights, truth = np.zeros(WEIGHTS), 0.3 * rng.normal(size=WEIGHTS)
    detector = CollapseDetector()
    for step in range(steps):
        x = rng.normal(size=(batch_size, WEIGHTS))
        y = x @ truth + rng.normal(size=batch_size)
        residual = x @ weights - y
        gradient = 2 * x.T @ residual / batch_size
        weights -= LR * gradient
        look = detector.observe(torch.tensor((residual**2).mean()), [torch.tensor(gradient)])
        if look is not None and look.lost:
            return step
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    print("| batch | runs | alarms | steps |\n|---|---|---|---|")
    for batch_size in (1, 2, 4, 16, 64):
        found = [alarm(batch_size, seed, options.steps) for seed in range(options.seeds)]
        steps = [step for step in found if step is not None]
        print(f"| {batch_size} | {len(found)} | {len(steps)} | {steps} |")


if __name__ == "__main__":
    main()
