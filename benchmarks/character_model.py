"""`lr: auto` on a small language model with AdamW, beside fixed rates, in short runs.

A pre-norm transformer of two layers reads the help texts that come with Python, 32 characters at a
time, and guesses each next one. The loss over held-out text after 100 to 400 steps under a cosine
with warm-up, in nats a character. On this problem the rule was chosen by which Adam's peak rises
(docs/log.md).

    python benchmarks/character_model.py                 # about fifteen minutes
    python benchmarks/character_model.py --table
"""

import argparse
import itertools
import json
import logging
import math
from functools import partial
from pathlib import Path
from pydoc_data import topics

import torch
from no_tuning_transformer import shape
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import batchlr

RESULTS = Path(__file__).parent / "results" / "character_model.jsonl"
RUNS = {16: 400, 64: 300, 256: 100}  # steps by batch size
RATES = [0.001, 0.003, 0.01, 0.03, 0.1]
SEEDS = range(1, 6)
LENGTH, WIDTH, HEADS, LAYERS, HELD_OUT = 32, 48, 4, 2, 512


class CharacterModel(nn.Module):
    """Every character from those before it."""

    def __init__(self, characters):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.embedding = nn.Embedding(characters, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, text):
        tokens = self.embedding(text) + self.place
        return self.head(self.layers(tokens, mask=self.mask, is_causal=True))


def loss_fn(model, batch):
    text, following = batch
    return nn.functional.cross_entropy(model(text).flatten(0, 1), following.flatten())


def pieces():
    """All the text in pieces of ``LENGTH`` characters and the one after: those to train on, others.

    Returns:
        Two ``(n, LENGTH + 1)``, and how many different characters there are.
    """
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    encoded = torch.tensor([numbers[character] for character in text])
    cut = encoded.unfold(0, LENGTH + 1, LENGTH)
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))
    return cut[order[HELD_OUT:]], cut[order[:HELD_OUT]], len(numbers)


def run(cell):
    """One run in this process; its cell with what came out."""
    trained_on, held_out, characters = pieces()
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    batch, auto, steps = cell["batch"], cell["rate"] == "auto", RUNS[cell["batch"]]
    model = CharacterModel(characters)
    scheduler = batchlr.BatchAwareLR(
        torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01),
        peak=1.0 if auto else cell["rate"],
        shape=lambda optimizer: LambdaLR(optimizer, partial(shape, steps=steps)),
    )
    controller = batchlr.CurvatureController(
        scheduler, loss_fn, total_steps=steps, batch_size=batch, dataset_size=len(trained_on)
    )

    def drawn(count):
        rows = trained_on[torch.randint(len(trained_on), (count,), generator=generator)]
        return rows[:, :-1], rows[:, 1:]

    def to_measure():
        """Half a batch, or 64 pieces, in four or more parts."""
        text, following = drawn(max(64, batch // 2))
        parts = max(4, 64 // batch)
        return list(zip(text.chunk(parts), following.chunk(parts), strict=True))

    for _ in range(steps):
        taken = drawn(batch)
        if auto:
            controller.maybe_update(model, to_measure)
        scheduler.optimizer.zero_grad()
        loss = loss_fn(model, taken)
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step()
        if auto:
            controller.observe(loss.detach())
    with torch.no_grad():
        found = float(loss_fn(model.eval(), (held_out[:, :-1], held_out[:, 1:])))
    return cell | {"loss": found if math.isfinite(found) else None, "peak_lr": scheduler.peak}


def key(row):
    return tuple(row[name] for name in ("batch", "rate", "seed"))


def load(path):
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {key(row): row for row in rows}


def table(rows):
    """Mean losses over the seeds."""

    def at(batch, rate):
        return [row for (b, r, _), row in rows.items() if (b, r) == (batch, rate)]

    def mean(batch, rate):
        losses = [row["loss"] for row in at(batch, rate)]
        if not losses:
            return ""
        return "diverged" if None in losses else f"{sum(losses) / len(losses):.3f}"

    rates = " | ".join(f"{rate:g}" for rate in RATES)
    print(f"| batch | steps | auto | peaks | {rates} |")
    print("|" + "---|" * (4 + len(RATES)))
    for batch, steps in RUNS.items():
        peaks = sorted(row["peak_lr"] for row in at(batch, "auto"))
        if peaks:
            fixed = " | ".join(mean(batch, rate) for rate in RATES)
            found = f"{mean(batch, 'auto')} | {peaks[0]:.2g} to {peaks[-1]:.2g}"
            print(f"| {batch} | {steps} | {found} | {fixed} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("auto", "fixed"))
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("batchlr").setLevel(logging.ERROR)
    rows = load(options.out)
    rates = {"auto": ["auto"], "fixed": RATES}.get(options.only, ["auto", *RATES])
    for batch, rate, seed in [] if options.table else itertools.product(RUNS, rates, SEEDS):
        cell = {"batch": batch, "rate": rate, "seed": seed}
        if key(cell) in rows:
            continue
        row = run(cell)
        rows[key(row)] = row
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*key(row), row["loss"], flush=True)
    table(rows)


if __name__ == "__main__":
    main()
