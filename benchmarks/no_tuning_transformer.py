"""The table of `no_tuning.py` for what no rule of `auto` was ever chosen on: a transformer.

Each image of the digits is a sequence of eight rows, read by two pre-norm encoder layers. Training
is a loop of its own with `BatchAwareLR` and `CurvatureController`, nothing of the trainer's. Rates,
seeds, epochs and shape are those of `no_tuning.py`; finished runs are kept and skipped.

    python benchmarks/no_tuning_transformer.py --batches 64
    python benchmarks/no_tuning_transformer.py --table
"""

import argparse
import itertools
import json
import math
import time
from functools import partial
from pathlib import Path

import no_tuning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import batchlr

RESULTS = Path(__file__).parent / "results" / "no_tuning_transformer.jsonl"
TEST, SPLIT_SEED, WARMUP = 360, 0, 0.05
WIDTH, HEADS, LAYERS = 48, 4, 2


class Rows(nn.Module):
    """Classifies images by their rows."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.embedding = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(9, WIDTH))
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, rows):
        tokens = torch.cat([self.token.expand(len(rows), -1, -1), self.embedding(rows)], 1)
        return self.head(self.layers(tokens + self.place)[:, 0])


def data():
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images = (pixels.float() / 16).reshape(-1, 8, 8)[order]
    return (images[TEST:], labels[order][TEST:]), (images[:TEST], labels[order][:TEST])


def shape(step, steps):
    """A cosine with warm-up, as `schedule: {name: cosine, warmup: 0.05}`."""
    rise = max(1, math.ceil(WARMUP * steps))
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def optimizer_of(name, model):
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    return torch.optim.Adam(model.parameters(), lr=1.0)


def run(cell):
    """One run in this process; its cell with what came out."""
    began, spent = time.process_time(), 0.0
    (images, labels), (test_images, test_labels) = data()
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    batch, auto = cell["batch"], cell["rate"] == "auto"
    per_epoch = len(labels) // batch
    steps = no_tuning.EPOCHS[batch] * per_epoch
    model, loss_fn = Rows(), batchlr.supervised(nn.CrossEntropyLoss())
    scheduler = batchlr.BatchAwareLR(
        optimizer_of(cell["optimizer"], model),
        peak=1.0 if auto else cell["rate"],
        shape=lambda optimizer: LambdaLR(optimizer, partial(shape, steps=steps)),
    )
    controller = batchlr.CurvatureController(
        scheduler, loss_fn, total_steps=steps, batch_size=batch, dataset_size=len(labels)
    )

    def to_measure():
        """Half a batch, or 64 samples, in four or more parts."""
        chosen = torch.randperm(len(labels), generator=generator)[: max(64, batch // 2)]
        return [(images[part], labels[part]) for part in chosen.chunk(max(4, 64 // batch))]

    losses = []
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator)
        rows = order[step % per_epoch * batch :][:batch]
        if auto:
            start = time.process_time()
            controller.maybe_update(model, to_measure)
            spent += time.process_time() - start
        scheduler.optimizer.zero_grad()
        loss = loss_fn(model, (images[rows], labels[rows]))
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
        if auto:
            controller.observe(loss)
        elif not math.isfinite(losses[-1]):
            break
    with torch.no_grad():
        outputs = model.eval()(test_images)
    accuracy = float((outputs.argmax(1) == test_labels).double().mean())
    test_loss = float(nn.functional.cross_entropy(outputs, test_labels))
    diverged = not math.isfinite(test_loss)
    last = losses[-max(1, steps // 20) :]
    return cell | {
        "test_accuracy": None if diverged else accuracy,
        "test_loss": None if diverged else test_loss,
        "steps": len(losses),
        "peak_lr": scheduler.peak,
        "diverged": diverged,
        "curvature_products": controller.num_products,
        "final_loss": None if diverged else sum(last) / len(last),
        "overhead": spent / (time.process_time() - began),
        "cpu_seconds": time.process_time() - began,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--optimizers", nargs="+", default=list(no_tuning.RATES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(no_tuning.EPOCHS))
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = no_tuning.load(options.out)
    for optimizer, batch in (
        [] if options.table else itertools.product(options.optimizers, options.batches)
    ):
        for cell in no_tuning.wanted(
            ("digits", "transformer", optimizer, batch), rows, no_tuning.JUDGES
        ):
            if no_tuning.key(cell) in rows:
                continue
            row = run(cell)
            rows[no_tuning.key(row)] = row
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*no_tuning.key(row), f"{no_tuning.accuracy(row):.1f} %", flush=True)
    no_tuning.table(rows, no_tuning.JUDGES)


if __name__ == "__main__":
    main()
