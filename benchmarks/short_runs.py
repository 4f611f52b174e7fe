"""`lr: auto` in a loop of one's own, in short runs, beside fixed rates.

Small networks on the digits: a rectified one of two hidden layers, one of two convolutions, one
with layer norm; residual branches and a head that begin at zero, and low-rank adapters (Hu et al.
2021) of a trained network whose pixels were shuffled since. Behind a unit that is off, a pixel that
is dark or a weight that is zero no gradient passes, and what Adam divides by is next to nothing or
nothing there. 120 steps under a cosine with warm-up; the loss over all images after them.

    python benchmarks/short_runs.py                      # about ten minutes
    python benchmarks/short_runs.py --table
"""

import argparse
import itertools
import json
import logging
import math
from functools import partial
from pathlib import Path

import torch
from no_tuning_transformer import shape
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import batchlr

RESULTS = Path(__file__).parent / "results" / "short_runs.jsonl"
STEPS, MEASURED, SEEDS = 120, 64, range(1, 7)
BATCHES = 16, 64
RATES = {
    "adamw": [0.001, 0.003, 0.01, 0.03, 0.1],
    "sgd": [0.01, 0.03, 0.1, 0.3],
}
WIDTH, BRANCHES, RANK = 64, 4, 4


class Residual(nn.Module):
    """Every branch ends in a layer of zeros, and so does the network."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, WIDTH)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(BRANCHES)
        )
        self.head = nn.Linear(WIDTH, 10)
        for parameter in [p for b in self.branches for p in b[2].parameters()]:
            nn.init.zeros_(parameter)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


class Adapted(nn.Module):
    """Linear layers, frozen, each with a low-rank addition that begins at zero."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers.requires_grad_(False)
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.down = nn.ParameterList(
            torch.randn(RANK, one.in_features) / one.in_features**0.5 for one in linear
        )
        self.up = nn.ParameterList(torch.zeros(one.out_features, RANK) for one in linear)

    def forward(self, x):
        added = zip(self.down, self.up, strict=True)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                down, up = next(added)
                x = layer(x) + x @ down.T @ up.T
            else:
                x = layer(x)
        return x


NETWORKS = {
    "rectified": lambda: nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(),
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, 10),
    ),
    "residual": Residual,
}  # fmt: skip


def trained(pixels, labels):
    layers = [nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(len(labels), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()
        optimizer.step()
    return model


def problem(network):
    """The network, its images and labels."""
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    if network in NETWORKS:
        return NETWORKS[network](), pixels, labels
    model = Adapted(trained(pixels, labels))
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return model, pixels[:, shuffled], labels


def run(cell):
    """One run in this process; its cell with what came out."""
    torch.manual_seed(cell["seed"])
    model, pixels, labels = problem(cell["network"])
    generator = torch.Generator().manual_seed(cell["seed"])
    auto, loss_fn = cell["rate"] == "auto", batchlr.supervised(nn.CrossEntropyLoss())
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cell["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1.0)
    scheduler = batchlr.BatchAwareLR(
        optimizer,
        peak=1.0 if auto else cell["rate"],
        shape=lambda optimizer: LambdaLR(optimizer, partial(shape, steps=STEPS)),
    )
    controller = batchlr.CurvatureController(
        scheduler,
        loss_fn,
        total_steps=STEPS,
        batch_size=cell["batch"],
        dataset_size=len(labels),
        apply=auto,
    )

    def drawn(count):
        return torch.randperm(len(labels), generator=generator)[:count]

    undone = 0
    for _ in range(STEPS):
        if auto:
            controller.maybe_update(
                model, lambda: [(pixels[rows], labels[rows]) for rows in drawn(MEASURED).chunk(4)]
            )
        rows = drawn(cell["batch"])
        optimizer.zero_grad()
        loss = loss_fn(model, (pixels[rows], labels[rows]))
        loss.backward()
        optimizer.step()
        scheduler.step()
        if auto:
            undone += controller.observe(loss.detach()) == "undone"
    with torch.no_grad():
        found = float(loss_fn(model, (pixels, labels)))
    return cell | {
        "loss": found if math.isfinite(found) else None,
        "peak_lr": scheduler.peak,
        "undone": undone,
    }


def key(row):
    return tuple(row[name] for name in ("network", "optimizer", "batch", "rate", "seed"))


def load(path):
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {key(row): row for row in rows}


def table(rows):
    """Mean losses over the seeds; a rate at which a run diverged has none."""
    print("| network | optimizer | batch | auto | peaks | steps undone | fixed rates, ascending |")
    print("|---|---|---|---|---|---|---|")
    for network, optimizer, batch in dict.fromkeys(place[:3] for place in rows):

        def at(rate, place=(network, optimizer, batch)):
            return [row for found, row in rows.items() if found[:4] == (*place, rate)]

        def mean(rate, at=at):
            losses = [row["loss"] for row in at(rate)]
            return "diverged" if None in losses else f"{sum(losses) / len(losses):.2f}"

        peaks = sorted(row["peak_lr"] for row in at("auto"))
        undone = sum(row["undone"] for row in at("auto")) / len(peaks)
        fixed = " ".join(mean(rate) for rate in RATES[optimizer])
        print(
            f"| {network} | {optimizer} | {batch} | {mean('auto')} | {peaks[0]:.2g} to "
            f"{peaks[-1]:.2g} | {undone:.1f} | {fixed} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("batchlr").setLevel(logging.ERROR)
    rows = load(options.out)
    places = itertools.product((*NETWORKS, "adapters"), RATES, BATCHES)
    for network, optimizer, batch in [] if options.table else places:
        for rate, seed in itertools.product(["auto", *RATES[optimizer]], SEEDS):
            cell = {"network": network, "optimizer": optimizer, "batch": batch}
            cell |= {"rate": rate, "seed": seed}
            if key(cell) in rows:
                continue
            row = run(cell)
            rows[key(row)] = row
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    table(rows)


if __name__ == "__main__":
    main()
