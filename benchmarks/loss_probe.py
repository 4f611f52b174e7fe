"""Losses along steps below, at and above the measured limit, and averages beside decayed rates.

A tanh network (64-32-10) on digits with fresh pixel noise at every draw, so that the expected loss
does not go to zero and training at a constant rate can settle; batches of 32, plain SGD.

- ``vertices``: from weights trained at 0.2 of the limit, runs at other multiples of it. Where does
  the held-out vertex of a step lie, and does it tell descending from standing still?
- ``averages``: from settled runs, the loss of averaged weights beside that of (a) a run whose rate
  decays as the average's weights say (`schedule_from_weights`), and (b) runs at lower constant
  rates, which give the average's effective rate.

    python benchmarks/loss_probe.py vertices averages
"""

import argparse
import copy
import itertools
import math
import statistics

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchlr
from batchlr import ExponentialAverage, LossProbe, UniformAverage, effective_lr, mean_vertex
from batchlr.averaging import schedule_from_weights

BATCH, HELD_OUT, NOISE = 32, 512, 0.5
LOSS = batchlr.supervised(nn.CrossEntropyLoss())


class Digits:
    """Endless digits: fresh noise on every image drawn."""

    def __init__(self, seed):
        pixels, labels = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, size=BATCH):
        rows = torch.randint(len(self.y), (size,), generator=self.generator)
        noise = torch.randn(size, 64, generator=self.generator)
        return self.x[rows] + NOISE * noise, self.y[rows]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


@torch.no_grad()
def loss_on(model, batch):
    return float(LOSS(model, batch))


def train(model, data, rates, each=lambda step: None):
    """One step at each of the ``rates``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        LOSS(model, data.draw()).backward()
        optimizer.step()
        each(step)
    return model


def measure(model, data):
    """Its curvature and largest stable rate."""
    endless = 10**9  # draws do not run out: no correction for a finite data set
    batches = [data.draw(1024)]
    report = batchlr.measure_curvature(
        model, LOSS, batches, batch_size=BATCH, dataset_size=endless, optimizer="sgd"
    )
    return report, report.max_lr(BATCH)


def settled(seed, share, steps):
    """A network after ``steps`` at ``share`` of its own limit, the data, report and limit."""
    data, model = Digits(seed), network(seed)
    train(model, data, [0.3] * 1000)
    _, bound = measure(model, Digits(seed + 1000))
    train(model, data, [share * bound.value] * steps)
    return model, data, *measure(model, Digits(seed + 1000))


# --- vertices ------------------------------------------------------------------------------------

WINDOWS = ((0, 200), (200, 1000), (1000, 3000))
PROBED_EVERY = 10


def probed_run(model, data, optimizer, evaluation):
    """For each window: mean vertices, fits, and the expected loss before and after."""
    probe, other, rows = LossProbe(LOSS), Digits(8), []
    for first, last in WINDOWS:
        before, found = loss_on(model, evaluation), []
        for step in range(first, last):
            batch, looks = data.draw(), step % PROBED_EVERY == 0
            optimizer.zero_grad()
            LOSS(model, batch).backward()
            if looks:
                probe.take(model)
            optimizer.step()
            if looks:
                found.append(probe.measure(model, batch, other.draw(HELD_OUT)))
        rows.append((found, before, loss_on(model, evaluation)))
    return rows


def runs(limit):
    """Names, whether from the initial weights, and optimizers."""
    yield "SGD, 0.3, from the start", True, lambda p: torch.optim.SGD(p, lr=0.3 * limit)
    for share in (0.1, 0.3, 1.0, 1.5):
        yield f"SGD, {share:g}", False, lambda p, lr=share * limit: torch.optim.SGD(p, lr=lr)
    yield "momentum 0.9, 0.03", False, lambda p: torch.optim.SGD(p, lr=0.03 * limit, momentum=0.9)
    yield "Adam, 0.002", False, lambda p: torch.optim.Adam(p, lr=0.002)


def vertices(options):
    start, _, report, bound = settled(0, 0.2, 1000)
    evaluation = Digits(99).draw(20_000)
    print(
        f"limit {bound.value:.2f} ({bound.low:.2f} to {bound.high:.2f}), largest eigenvalue "
        f"{report.largest:.2f}, loss {loss_on(start, evaluation):.4f}\n\n"
        "| rate, in limits | steps | loss before, after | held-out vertex | own vertex "
        "| R^2 held out, own (medians) |\n|---|---|---|---|---|---|"
    )
    for name, anew, build in list(runs(bound.value))[: options.runs]:
        model = network(0) if anew else copy.deepcopy(start)
        rows = probed_run(model, Digits(7), build(model.parameters()), evaluation)
        for (first, last), (found, before, after) in zip(WINDOWS, rows, strict=True):
            held, own = [p.held_out for p in found], [p.own for p in found]
            fits = [statistics.median(line.r_squared for line in lines) for lines in (held, own)]
            print(
                f"| {name} | {first} - {last} | {before:.4f}, {after:.4f} | {mean_vertex(held)} "
                f"| {mean_vertex(own)} | {fits[0]:.5f}, {fits[1]:.5f} |",
                flush=True,
            )


# --- averages ------------------------------------------------------------------------------------

AVERAGES = (
    UniformAverage(2, spacing=10),
    UniformAverage(2, spacing=100),
    UniformAverage(2, spacing=1000),
    UniformAverage(4, spacing=300),
    UniformAverage(10),
    UniformAverage(100),
    UniformAverage(1000),
    ExponentialAverage(0.9),
    ExponentialAverage(0.99),
    ExponentialAverage(0.998),
)
FLATTER = (1.0, 0.1, 0.01)  # directions, by their curvature
LENGTH = 1000  # updates averaged over: of EMAs what is older counts for the first
LOWER = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02)  # constant rates to compare with


def averager(model, averaging):
    """Torch's averaged model, and after which updates it takes part."""
    if isinstance(averaging, ExponentialAverage):
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(averaging.decay)), 1
    return AveragedModel(model), averaging.spacing


def averaged_losses(start, seed, rate, evaluation):
    """Of every average over one run at ``rate``, and of the run's end."""
    model, found = copy.deepcopy(start), []
    for averaging in AVERAGES:
        mean, spacing = averager(model, averaging)
        weights = averaging.weights(LENGTH)
        begin = next(number for number, weight in enumerate(weights) if weight > 0)
        if begin == 0:
            mean.update_parameters(model)
        found.append((mean, spacing, begin))

    def each(step):
        for mean, spacing, begin in found:
            if step + 1 >= begin and (step + 1 - begin) % spacing == 0:
                mean.update_parameters(model)

    train(model, Digits(seed), [rate] * LENGTH, each)
    return loss_on(model, evaluation), [loss_on(mean, evaluation) for mean, _, _ in found]


def side_by_side(start, seed, rates, evaluation):
    """Final losses of a network for each row of ``rates`` ``(n, steps)``, on the same batches."""
    weights = [p.detach().expand(len(rates), *p.shape).clone() for p in start.parameters()]

    def losses(batch):
        first, bias, last, end = weights
        hidden = torch.tanh(batch[0] @ first.mT + bias.unsqueeze(1))
        outputs = hidden @ last.mT + end.unsqueeze(1)
        targets = batch[1].expand(len(rates), -1)
        return nn.functional.cross_entropy(outputs.mT, targets, reduction="none").mean(1)

    data = Digits(seed)
    for step in range(rates.shape[1]):
        for weight in weights:
            weight.requires_grad_()
        gradients = torch.autograd.grad(losses(data.draw()).sum(), weights)
        with torch.no_grad():
            weights = [
                weight - rates[:, step].view(-1, *[1] * (weight.dim() - 1)) * gradient
                for weight, gradient in zip(weights, gradients, strict=True)
            ]
    with torch.no_grad():
        return losses(evaluation).tolist()


def decayed_losses(start, seed, rate, evaluation):
    schedules = [schedule_from_weights(averaging.weights(LENGTH)) for averaging in AVERAGES]
    return side_by_side(start, seed, rate * torch.tensor(schedules), evaluation)


def lower_losses(start, seed, rate, evaluation):
    """Of runs at lower constant rates."""
    rates = rate * torch.tensor(LOWER).unsqueeze(1).expand(-1, LENGTH)
    return side_by_side(start, seed, rates, evaluation)


def rate_with(loss, curve):
    """Share of the rate whose run ends at ``loss``, log-linear between those tried; NaN outside."""
    points = list(zip(LOWER, curve, strict=True))
    for (above, high), (below, low) in itertools.pairwise(points):
        if low <= loss <= high:
            share = (loss - low) / (high - low)
            return math.exp(math.log(below) + share * math.log(above / below))
    return math.nan


def averages(options):
    evaluation = Digits(99).draw(20_000)
    for share in options.shares:
        means, decays, curves, ends, largest = [], [], [], [], []
        for seed in range(options.seeds):
            start, data, report, bound = settled(seed, share, 6000)
            rate = share * bound.value
            largest.append(rate * report.largest)
            for segment in range(options.segments):
                stream = 10_000 * (seed + 1) + segment
                end, mean = averaged_losses(start, stream, rate, evaluation)
                ends.append(end)
                means.append(mean)
                decays.append(decayed_losses(start, stream, rate, evaluation))
                curves.append(lower_losses(start, stream, rate, evaluation))
                train(start, data, [rate] * LENGTH)
        step = statistics.mean(largest)
        curve = [statistics.mean(column) for column in zip(*curves, strict=True)]
        print(
            f"\nrate {share:g} limits, lr x largest eigenvalue {step:.3f}; constant rate "
            f"{statistics.mean(ends):.4f} after {LENGTH} steps; lower rates: "
            + ", ".join(f"{f:g}: {loss:.4f}" for f, loss in zip(LOWER, curve, strict=True))
            + "\n\n| average | its loss | decayed run | average - decayed | effective rate by loss "
            + "".join(f"| law, h = {h:g} largest " for h in FLATTER)
            + "|\n"
            + "|---" * (5 + len(FLATTER))
            + "|"
        )
        for number, averaging in enumerate(AVERAGES):
            mean = [row[number] for row in means]
            decay = [row[number] for row in decays]
            differences = [a - b for a, b in zip(mean, decay, strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            rates = [effective_lr(1.0, h * step, averaging) for h in FLATTER]
            print(
                f"| {averaging} | {statistics.mean(mean):.4f} | {statistics.mean(decay):.4f} "
                f"| {statistics.mean(differences):+.4f} +- {error:.4f} "
                f"| {rate_with(statistics.mean(mean), curve):.3f} | "
                + " | ".join(f"{rate:.3f}" for rate in rates)
                + " |",
                flush=True,
            )


PARTS = {"vertices": vertices, "averages": averages}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--runs", type=int, help="of vertices: only the first so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
