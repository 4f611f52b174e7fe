"""The largest rate that training survives, swept, beside the one that curvature predicts."""

import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from batchlr.curvature import measure_curvature
from batchlr.curvature_report import CurvatureReport
from batchlr.lr_bound import LRBound
from batchlr.operators.curvature_matrix import normalises_over_batches
from batchlr.operators.supervised import LossFunction
from batchlr.plotting import plot_sweep, save_figure
from batchlr.training.analysis import build_at, common_settings
from batchlr.training.checkpoint import latest_checkpoint
from batchlr.training.config import TrainConfig
from batchlr.training.config.variants import SGDOptions
from batchlr.training.data import measurement_batches
from batchlr.training.experiment import Experiment
from batchlr.training.metrics import write_json
from batchlr.training.resumption import flat
from batchlr.training.run_folder import write_measured

Kind = Literal["sgd", "adam"]

_UNCOUPLED_BATCH = 8  # assumed: small batches show the noise best where samples do not interact
_FACTOR = 2.0  # between rates while searching for the limit
_HALVINGS = 2  # bisections after that, in the logarithm: the limit is good to a factor 2^(1/4)
_REACH = 12  # factors tried in either direction
_TABLE_WIDTH = 80
_NORMALISED = (
    "train-mode batch norm: the weights' scale drops out of the function, so that training may "
    "survive far above the limit (1.5 to 95 times it on PreResNet-8: docs/learning_rate_law.md)"
)


class Survival(NamedTuple):
    """What a sweep of rates found."""

    lr: float  # the largest rate survived
    diverged: float  # the smallest found to diverge; infinite if none did
    runs: int


@dataclass(frozen=True)
class SweepCell:
    """One optimizer and batch size: what was predicted, and what training survived."""

    optimizer: Kind
    batch_size: int
    momentum: float
    predicted: float
    low: float
    high: float
    regime: str
    reliable: bool
    reasons: tuple[str, ...]
    paper: float  # the rule 2 / lambda_1' of Granziol, Zohren & Roberts, for comparison
    survived: float
    diverged: float
    steps: int


def largest_survivable_lr(
    model: nn.Module,
    loss_fn: LossFunction,
    samples: tuple[Tensor, Tensor],
    *,
    optimizer: Kind,
    momentum: float,
    batch_size: int,
    start: float,
    steps: int = 200,
    worst_loss: float = 0.0,
    seed: int = 0,
) -> Survival:
    """The largest constant rate at which training from these weights does not diverge.

    A run diverges when its loss is not finite, or its mean over the last fifth of the steps exceeds
    both the first loss and ``worst_loss``. Rates go up or down from ``start`` by factors of two
    until the answer changes, then the gap is halved twice in the logarithm. Every run sees the
    same batches.

    Args:
        model: in the mode to train in; it is left as it was.
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        samples: inputs and targets to draw batches from, without replacement within an epoch.
        optimizer: ``"sgd"`` or ``"adam"``.
        momentum: SGD's, or Adam's ``beta1``.
        batch_size: of one step.
        start: where to begin, for example the predicted limit.
        steps: of one run.
        worst_loss: a loss that is no sign of divergence yet, such as that of a uniform guess.
        seed: of the batches and of dropout; the global random state is left as it was.

    Raises:
        ArithmeticError: training diverges at every rate tried.
        ValueError: ``batch_size`` is not in [1, number of samples].
    """
    total = len(samples[0])
    if not 1 <= batch_size <= total:
        msg = f"batch_size must lie in [1, {total}], the number of samples, got {batch_size}"
        raise ValueError(msg)
    runs = 0

    def survives(lr: float) -> bool:
        nonlocal runs
        runs += 1
        twin = copy.deepcopy(model)
        stepper = _optimizer(optimizer, twin, lr, momentum)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of dropout: every run sees the same masks
            losses = _losses(twin, loss_fn, samples, stepper, batch_size, steps, seed)
        tail = losses[-max(1, steps // 5) :]
        finite = len(losses) == steps and all(map(math.isfinite, losses))
        return finite and sum(tail) / len(tail) <= max(losses[0], worst_loss)

    good, bad = (start, math.inf) if survives(start) else (0.0, start)
    for _ in range(_REACH):
        if good > 0 and math.isfinite(bad):
            break
        guess = good * _FACTOR if math.isinf(bad) else bad / _FACTOR
        good, bad = (guess, bad) if survives(guess) else (good, guess)
    if good == 0:
        msg = f"training diverges at every rate from {start:.3g} down to {bad:.3g}"
        raise ArithmeticError(msg)
    for _ in range(_HALVINGS if math.isfinite(bad) else 0):
        guess = math.sqrt(good * bad)
        good, bad = (guess, bad) if survives(guess) else (good, guess)
    return Survival(good, bad, runs)


def parse_batch_sizes(text: str) -> list[int]:
    """``"4,16"`` as ``[4, 16]``.

    Raises:
        ValueError: a part is not a positive integer.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        msg = f"batch sizes must be positive integers separated by commas, got {text!r}"
        raise ValueError(msg)
    return [int(part) for part in parts]


def parse_optimizers(text: str) -> list[Kind]:
    """``"sgd,adam"`` as a list.

    Raises:
        ValueError: a part is neither.
    """
    kinds: dict[str, Kind] = {"sgd": "sgd", "adam": "adam"}
    parts = [part.strip() for part in text.split(",")]
    if not all(part in kinds for part in parts):
        msg = f"optimizers must be sgd, adam or both, separated by a comma, got {text!r}"
        raise ValueError(msg)
    return [kinds[part] for part in parts]


def sweep(
    config: TrainConfig,
    *,
    out: Path,
    batch_sizes: Sequence[int] = (4, 16, 64, 256),
    optimizers: Sequence[Kind] = ("sgd", "adam"),
    steps: int = 200,
    checkpoint: Path | None = None,
    notes: Sequence[str] = (),
) -> list[SweepCell]:
    """Predicted and survivable rates over batch sizes: table, ``sweep.jsonl`` and a picture.

    Measured and trained from the initial weights or those of ``checkpoint``. Finished cells in
    ``out / "curvature" / "sweep.jsonl"`` are kept, so that a sweep may be stopped and started at
    will. The settings go into ``out`` (`write_measured`, which takes ``notes``).

    Raises:
        ArithmeticError: there is no curvature to limit a rate, or training diverges at every rate.
        ValueError: a batch is larger than the data set, or kept cells are of other settings.
    """
    experiment = build_at(config, checkpoint)
    total = len(experiment.data.train)
    if illegal := [size for size in batch_sizes if not 1 <= size <= total]:
        msg = f"batch sizes must lie in [1, {total}], the size of the data set, got {illegal}"
        raise ValueError(msg)
    folder = out / "curvature"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.jsonl"
    settings = _settings(config, steps, checkpoint)
    _check_settings(path, folder / "sweep.json", settings)
    write_json(folder / "sweep.json", settings)
    write_measured(config, out, notes, at=checkpoint)
    done = {(cell.optimizer, cell.batch_size): cell for cell in _read(path)}
    samples = _all_samples(experiment)
    worst = math.log(experiment.data.num_classes)
    measured: dict[int, CurvatureReport] = {}
    console = Console(highlight=False, soft_wrap=True)
    for kind, size in itertools.product(optimizers, batch_sizes):
        if (kind, size) in done:
            continue
        bound, paper = _predict(experiment, kind, size, measured)
        found = largest_survivable_lr(
            experiment.model,
            experiment.loss_fn,
            samples,
            optimizer=kind,
            momentum=bound.momentum,
            batch_size=size,
            start=bound.value,
            steps=steps,
            worst_loss=worst,
            seed=config.seed,
        )
        cell = SweepCell(
            kind,
            size,
            bound.momentum,
            bound.value,
            bound.low,
            bound.high,
            bound.regime,
            bound.reliable,
            bound.reasons,
            paper,
            found.lr,
            found.diverged,
            steps,
        )
        done[kind, size] = cell
        with path.open("a") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        console.print(
            f"{kind} at batch {size}: predicted {bound.value:.3g}, survived {found.lr:.3g} "
            f"({found.runs} runs)",
            markup=False,
        )
    cells = [done[key] for key in itertools.product(optimizers, batch_sizes)]
    save_figure(plot_sweep([asdict(cell) for cell in cells]), folder / "sweep.png")
    _print(console, cells, folder, normalised=normalises_over_batches(experiment.model))
    return cells


def _predict(
    experiment: Experiment, kind: Kind, size: int, measured: dict[int, CurvatureReport]
) -> tuple[LRBound, float]:
    """The limit at one batch size, and the paper's rule.

    One measurement serves all sizes, unless samples interact through batch normalisation: then each
    size is measured with batches of its own.
    """
    config = experiment.config
    total = len(experiment.data.train)
    samples = min(config.curvature.samples, total)
    coupled = config.curvature.norm_mode == "train" and normalises_over_batches(experiment.model)
    cut = min(size, total // 4) if coupled else min(_UNCOUPLED_BATCH, samples // 4)
    if cut not in measured:
        batches = measurement_batches(
            experiment.data,
            batch_size=cut,
            num_batches=min(max(samples // cut, 4), total // cut),
            generator=experiment.sampler,
            device=experiment.device,
        )
        measured[cut] = measure_curvature(
            experiment.model,
            experiment.loss_fn,
            [(experiment.arranged(x), y) for x, y in batches],
            dataset_size=total,
            norm_mode=config.curvature.norm_mode,
            tol=min(config.curvature.tolerance, 1e-2),
            num_small_batches=0,
            memory_budget=config.curvature.memory_budget,
            generator=torch.Generator().manual_seed(config.seed),
        )
    options = config.optim
    own = kind == ("sgd" if isinstance(options, SGDOptions) else "adam")
    momentum = 0.9
    if own:
        momentum = options.momentum if isinstance(options, SGDOptions) else options.betas[0]
    report = measured[cut]
    if report.largest <= 0:
        msg = f"the largest eigenvalue is {report.largest}: no curvature limits the rate here"
        raise ArithmeticError(msg)
    bound = report.max_lr(size, optimizer=kind, momentum=momentum)
    return bound, report.max_lr(size, optimizer=kind, rule="paper").value


def _losses(
    model: nn.Module,
    loss_fn: LossFunction,
    samples: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    steps: int,
    seed: int,
) -> list[float]:
    """Loss before each step; it ends with the first that is not finite."""
    x, y = samples
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    first = 0
    losses: list[float] = []
    for _ in range(steps):
        if first + batch_size > len(x):
            order, first = torch.randperm(len(x), generator=generator), 0
        rows = order[first : first + batch_size].to(x.device)
        first += batch_size
        optimizer.zero_grad()
        loss = loss_fn(model, (x[rows], y[rows]))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def _optimizer(kind: Kind, model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(momentum, 0.999))


def _all_samples(experiment: Experiment) -> tuple[Tensor, Tensor]:
    total = len(experiment.data.train)
    whole = measurement_batches(
        experiment.data,
        batch_size=total,
        num_batches=1,
        generator=torch.Generator().manual_seed(experiment.config.seed),
        device=experiment.device,
    )
    x, y = whole[0]
    return experiment.arranged(x), y


def _settings(config: TrainConfig, steps: int, checkpoint: Path | None) -> dict[str, Any]:
    """What the cells of a sweep have in common, flat."""
    file = latest_checkpoint(checkpoint) if checkpoint and checkpoint.is_dir() else checkpoint
    content = common_settings(config, file, optim=True, curvature=True)
    content["optim"].pop("lr")  # what is swept
    return {"steps": steps} | flat(content)


def _check_settings(path: Path, record: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless the cells in ``path`` are of ``settings``."""
    if not path.exists():
        return
    found = json.loads(record.read_text()) if record.exists() else {}
    changed = [
        f"{key}: {found.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted(found.keys() | settings.keys())
        if found.get(key) != settings.get(key)
    ]
    if changed:
        listed = "\n  ".join(changed)
        msg = (
            f"{path} holds cells of other settings:\n  {listed}\nremove it or choose another --out"
        )
        raise ValueError(msg)


def _read(path: Path) -> list[SweepCell]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [SweepCell(**row | {"reasons": tuple(row["reasons"])}) for row in rows]


def _print(console: Console, cells: Sequence[SweepCell], folder: Path, *, normalised: bool) -> None:
    console.width = max(console.width, _TABLE_WIDTH)
    table = Table(box=SIMPLE, pad_edge=False)
    titles = ("optimizer", "batch", "predicted", "90 % interval", "survived", "ratio", "paper")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            cell.optimizer,
            f"{cell.batch_size}{'' if cell.reliable else ' *'}",
            f"{cell.predicted:.3g}",
            f"{cell.low:.2g} .. {cell.high:.2g}",
            f"{cell.survived:.3g}{'+' if math.isinf(cell.diverged) else ''}",
            f"{cell.survived / cell.predicted:.2f}",
            f"{cell.paper:.3g}",
        )
    console.print(table)
    for reason in dict.fromkeys(reason for cell in cells for reason in cell.reasons):
        console.print(f"* {reason}", markup=False)
    if normalised:
        console.print(_NORMALISED, markup=False)
    console.print(
        "survived: the largest rate at which training from here does not diverge within "
        f"{cells[0].steps} steps, to a factor 1.2; record in {folder}",
        markup=False,
    )
