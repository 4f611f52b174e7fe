"""One measurement at one point of a run: the table of rates, and the spectrum."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from batchlr.curvature import measure_curvature
from batchlr.curvature_report import CurvatureReport
from batchlr.lanczos import top_eigenpairs
from batchlr.lr_bound import LRBound, marked_column, marked_reasons, reason_marks
from batchlr.operators import DifferenceOperator, GGNOperator, HessianOperator, LinearOperator
from batchlr.operators.curvature_matrix import CurvatureMatrix
from batchlr.operators.isolation import normalises_over_batches
from batchlr.plotting import plot_rates, plot_spectrum, save_figure
from batchlr.slq import SpectralMeasure, stochastic_lanczos_quadrature
from batchlr.training.checkpoint import CheckpointError, checkpoint_digest, load_checkpoint
from batchlr.training.config import TrainConfig
from batchlr.training.config.variants import SGDOptions
from batchlr.training.data import Batch
from batchlr.training.experiment import Experiment, build_experiment
from batchlr.training.metrics import write_json
from batchlr.training.pass_sizes import measurement_sizes
from batchlr.training.run_folder import write_measured

_SMALLEST_BATCH = 4
_END_STEPS = 40  # assumed: isolated ends take 10-30; the edge of a bulk may stay unconverged
_KEPT_SAMPLES = 4096  # assumed: graphs of more samples are recorded anew for each product
_TABLE_WIDTH = 96  # characters; on a narrower terminal numbers would be cut short
_NOISE_BATCHES = 16  # assumed: least batches that show the noise, where samples do not interact
_COUPLED_BATCHES = 8  # assumed: likewise, where they do and the size is that of training
_MOST_PRODUCTS = 30  # assumed: of one search; the edge of a bulk may stay unconverged
_BETA1 = 0.9  # torch's default, for the optimizer not configured
_MOMENTUM = 0.9  # the default of optim.momentum, likewise
_MATRICES = {  # in words, by spectrum.matrix
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "residual": "Hessian less the Gauss-Newton matrix",
}


def measure_rates(
    config: TrainConfig,
    *,
    out: Path,
    json_file: Path | None = None,
    checkpoint: Path | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Maximal SGD and Adam rates over batch sizes, printed, as JSON and as a picture.

    Measured at the initial weights or those of ``checkpoint``, on ``curvature.samples`` samples.
    Writes ``rates.json``, ``rates.png`` and the report below ``out / "curvature"``, and the
    settings into ``out`` (`write_measured`, which takes ``notes``).

    Returns:
        The content of ``rates.json``.

    Raises:
        ArithmeticError: the loss is not finite, or there is no curvature to limit a rate.
    """
    experiment = build_at(config, checkpoint)
    write_measured(config, out, notes, at=checkpoint)
    report, gradient_seconds = _measure(experiment)
    if report.largest <= 0:
        msg = f"the largest eigenvalue is {report.largest}: no curvature limits the rate here"
        raise ArithmeticError(msg)
    sizes = [_SMALLEST_BATCH << k for k in range(32) if _SMALLEST_BATCH << k <= report.dataset_size]
    sizes = sizes or [report.dataset_size]
    beta1 = _BETA1 if isinstance(config.optim, SGDOptions) else config.optim.betas[0]
    bounds = [report.max_lr(size, optimizer="sgd") for size in sizes]
    bounds += [report.max_lr(size, optimizer="adam", momentum=beta1) for size in sizes]
    content = {
        "critical_batch_size": report.critical_batch_size,
        "largest_eigenvalue": report.largest,
        "largest_eigenvalue_stderr": report.largest.stderr,
        "noise": report.noise.total,
        "num_samples": report.num_samples,
        "num_products": report.num_products,
        "seconds": report.seconds,
        "gradient_equivalents": report.seconds / gradient_seconds,
        "norm_mode": report.norm_mode,
        "bounds": [asdict(bound) for bound in bounds],
    }
    folder = out / "curvature"
    report.save(folder / "report.json")
    write_json(folder / "rates.json", content)
    if json_file is not None:
        write_json(json_file, content)
    save_figure(plot_rates(bounds), folder / "rates.png")
    _print_rates(report, bounds, gradient_seconds, folder)
    return content


def measure_spectrum(
    config: TrainConfig,
    *,
    out: Path,
    checkpoint: Path | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Spectrum of the batch Hessian: JSON, NPZ and a picture below ``out / "curvature"``.

    Of ``curvature.samples`` samples; which matrix, and how many products, ``spectrum`` says. The
    measure has a node at zero, where networks have most of their eigenvalues. The settings go into
    ``out`` (`write_measured`, which takes ``notes``).

    Returns:
        The content of ``spectrum.json``.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    experiment = build_at(config, checkpoint)
    write_measured(config, out, notes, at=checkpoint)
    batches = experiment.measurement_batches(measurement_sizes(config, experiment.data))
    operator, source = curvature_operator(experiment, batches)
    began = time.perf_counter()
    loss = float(source.loss())
    if not math.isfinite(loss):
        msg = f"the loss is {loss} on the samples measured; its Hessian has no meaning there"
        raise ArithmeticError(msg)
    generator = torch.Generator().manual_seed(config.seed)
    steps = min(config.spectrum.steps, operator.shape[0])
    measure = stochastic_lanczos_quadrature(
        operator,
        num_steps=steps,
        num_probes=config.spectrum.probes,
        fixed_node=0.0,
        generator=generator,
    )
    limit = min(_END_STEPS, operator.shape[0])
    ends = top_eigenpairs(operator, which="both", tol=1e-2, max_steps=limit, generator=generator)
    content = {
        "matrix": config.spectrum.matrix,
        "largest_eigenvalue": float(ends.values[0]),
        "smallest_eigenvalue": float(ends.values[-1]),
        "bounds": ends.bounds.tolist(),
        "converged": ends.converged,
        "mean": measure.mean,
        "mean_stderr": measure.mean_stderr,
        "second_moment": measure.second_moment,
        "second_moment_stderr": measure.second_moment_stderr,
        "num_params": operator.shape[0],
        "num_samples": sum(source.samples),
        "num_products": operator.num_products,
        "num_probes": measure.num_probes,
        "norm_mode": source.norm_mode,
        "seconds": time.perf_counter() - began,
    }
    folder = out / "curvature"
    write_json(folder / "spectrum.json", content)
    save_measure(folder / "spectrum.npz", measure)
    save_figure(plot_spectrum(measure), folder / "spectrum.png")
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"The {_MATRICES[config.spectrum.matrix]} of {sum(source.samples)} samples, in "
        f"{operator.shape[0]} parameters, has eigenvalues from {ends.values[-1]:.4g} (to within "
        f"{ends.bounds[-1]:.1g}) to {ends.values[0]:.4g} (to within {ends.bounds[0]:.1g}); their "
        f"mean is {measure.mean:.3g} +- {measure.mean_stderr:.1g}.\n"
        f"It took {operator.num_products} products in {content['seconds']:.1f} s; the record is in "
        f"{folder}",
        markup=False,
    )
    return content


def build_at(config: TrainConfig, checkpoint: Path | None) -> Experiment:
    """The configured experiment, in train mode, at its initial weights or a checkpoint's."""
    experiment = build_experiment(config)
    if checkpoint is not None:
        load_weights(experiment, checkpoint)
    experiment.model.train()
    return experiment


def common_settings(config: TrainConfig, checkpoint: Path | None, **parts: Any) -> dict[str, Any]:
    """What kept figures have in common: what was measured, on which data, at which weights.

    Args:
        config: of the experiment. Seed, data but for where they lie, network and label smoothing
            always count.
        checkpoint: a file; None stands for the initial weights.
        parts: what else does, as in pydantic's ``include``.

    Raises:
        CheckpointError: the checkpoint is not there.
    """
    always = {"seed": True, "data": True, "model": True, "train": {"label_smoothing"}}
    include: Any = always | parts
    content: dict[str, Any] = config.model_dump(mode="json", include=include)
    for key in ("root", "download", "workers"):
        content["data"].pop(key, None)
    content["weights"] = None if checkpoint is None else checkpoint_digest(checkpoint)
    return content


def load_weights(experiment: Experiment, checkpoint: Path) -> dict[str, Any]:
    """Give the model a checkpoint's weights and buffers; returns all that the checkpoint holds.

    Raises:
        CheckpointError: it is missing or corrupt, or of another model.
    """
    state = load_checkpoint(checkpoint)
    try:
        experiment.model.load_state_dict(state["experiment"]["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        msg = f"{checkpoint} does not fit the configured model: {error}"
        raise CheckpointError(msg) from error
    return state


def curvature_operator(
    experiment: Experiment, batches: Sequence[Batch]
) -> tuple[LinearOperator, CurvatureMatrix]:
    """The matrix that ``spectrum.matrix`` names, and the one that knows loss and samples."""
    config = experiment.config
    few = sum(len(labels) for _, labels in batches) <= _KEPT_SAMPLES

    def build(kind: type[HessianOperator] | type[GGNOperator]) -> CurvatureMatrix:
        return kind(
            experiment.model,
            experiment.loss_fn,
            batches,
            norm_mode=config.curvature.norm_mode,
            keep_graph=few,
        )

    if config.spectrum.matrix == "residual":
        hessian = build(HessianOperator)
        return DifferenceOperator(hessian, build(GGNOperator)), hessian
    matrix = build(HessianOperator if config.spectrum.matrix == "hessian" else GGNOperator)
    return matrix, matrix


def save_measure(path: Path, measure: SpectralMeasure) -> None:
    """Write nodes, weights and probes as NPZ, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"nodes": measure.nodes, "weights": measure.weights, "probes": measure.probes}
    np.savez(
        path,
        allow_pickle=False,
        **{name: array.cpu().numpy() for name, array in arrays.items()},
    )


def _measure(experiment: Experiment) -> tuple[CurvatureReport, float]:
    """The report, and the seconds that one gradient of the same batches takes."""
    config = experiment.config
    size, count = measurement_sizes(config, experiment.data)
    if config.curvature.norm_mode == "train" and normalises_over_batches(experiment.model):
        count = min(max(count, _COUPLED_BATCHES), len(experiment.data.train) // size)
    else:  # samples do not interact: more, smaller batches show their noise better
        total = size * count
        size = max(1, min(size, total // _NOISE_BATCHES))
        count = total // size
    batches = experiment.measurement_batches((size, count))
    words = f"measuring {size * count} samples in {count} batches of {size}"
    if size * count > config.curvature.samples:
        words += (
            f"; curvature.samples asks for {config.curvature.samples}, but with train-mode batch "
            "norm the noise does not show in fewer batches"
        )
    Console(highlight=False, soft_wrap=True).print(f"{words} ...", markup=False)
    report = measure_curvature(
        experiment.model,
        experiment.loss_fn,
        batches,
        dataset_size=len(experiment.data.train),
        optimizer=None if isinstance(config.optim, SGDOptions) else experiment.optimizer,
        norm_mode=config.curvature.norm_mode,
        tol=min(config.curvature.tolerance, 1e-2),
        num_eigenpairs=1,
        num_small_batches=0,  # rates do not need them
        memory_budget=config.curvature.memory_budget,
        max_products=_MOST_PRODUCTS,
        clip_norm=config.train.clip_norm,
        generator=torch.Generator().manual_seed(config.seed),
    )
    sgd = config.optim if isinstance(config.optim, SGDOptions) else None
    report = replace(
        report,
        momentum=_MOMENTUM if sgd is None else sgd.momentum,
        weight_decay=0.0 if sgd is None else sgd.weight_decay,
    )
    return report, _gradient_seconds(experiment, batches)


def _gradient_seconds(experiment: Experiment, batches: list[Any]) -> float:
    """Of one forward and backward pass over ``batches``, the median of three."""
    parameters = [p for p in experiment.model.parameters() if p.requires_grad]
    buffers = {name: value.clone() for name, value in experiment.model.named_buffers()}
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for batch in batches:
            loss = experiment.loss_fn(experiment.model, batch)
            gradients = torch.autograd.grad(loss, parameters)
        float(gradients[0].sum())  # waits for the device
        times.append(time.perf_counter() - began)
    with torch.no_grad():
        for name, value in experiment.model.named_buffers():
            value.copy_(buffers[name])
    return sorted(times)[1]


def _print_rates(
    report: CurvatureReport, bounds: list[LRBound], gradient_seconds: float, folder: Path
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _TABLE_WIDTH)
    half = len(bounds) // 2
    sgd, adam = bounds[:half], bounds[half:]
    marks = reason_marks(bound.reasons for bound in bounds)

    def rates(title: str, bounds: list[LRBound]) -> list[str]:
        return marked_column(title, [(bound.value, bound.reasons) for bound in bounds], marks)

    def intervals(bounds: list[LRBound]) -> list[str]:
        return ["90 % interval", *(f"{bound.low:.2g} .. {bound.high:.2g}" for bound in bounds)]

    columns = [
        ["batch", *(str(bound.batch_size) for bound in sgd)],
        rates("SGD", sgd),
        intervals(sgd),
        ["limited by", *(bound.regime for bound in sgd)],
        rates("Adam", adam),
        intervals(adam),
    ]
    console.print(
        f"The largest eigenvalue is {report.largest}, the critical batch size "
        f"{report.critical_batch_size:.3g}. The largest stable rates of SGD with momentum "
        f"{sgd[0].momentum:g} and of Adam with beta1 {adam[0].momentum:g}:",
        markup=False,
    )
    console.print(marked_table(columns))
    for line in marked_reasons(marks):
        console.print(line, markup=False)
    console.print(
        f"Measured with {report.num_products} products over {report.num_samples} samples in "
        f"{report.seconds:.1f} s, as long as {report.seconds / gradient_seconds:.0f} gradients of "
        f"them take; the record is in {folder}",
        markup=False,
    )


def marked_table(columns: Sequence[Sequence[str]]) -> Table:
    """Figures in ``columns``, titles first, right-aligned; marks of `marked_column` stay there."""
    table = Table(box=SIMPLE, pad_edge=False)
    for title, *words in columns:
        width = max(map(len, (title, *words)))
        table.add_column(title.rjust(width), no_wrap=True)
    widths = [max(map(len, column)) for column in columns]
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*(word.rjust(width) for word, width in zip(row, widths, strict=True)))
    return table
