"""Pictures of runs, rates and spectra; each returns a matplotlib Figure and shows nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from batchlr.lr_bound import LRBound
    from batchlr.slq import SpectralMeasure

_RATE, _LOSS, _EIGENVALUE, _SECOND = "#0b6e99", "#444444", "#b3471d", "#6b4c9a"
_OPTIMIZERS = {"sgd": ("SGD", _RATE), "adam": ("Adam", _SECOND), "rmsprop": ("RMSprop", _LOSS)}


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write ``figure`` in the format of the suffix (png, svg, pdf), making the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(path), dpi=150)


def plot_run(entries: Sequence[dict[str, Any]], *, nesterov: bool = False) -> "Figure":
    """Learning rate, loss and largest eigenvalue over the steps of a run.

    With SGD ``2 (1 + momentum) / rate`` stands beside the eigenvalue, with Nesterov's momentum that
    over ``1 + 2 momentum``: above it steps without noise are unstable.

    Args:
        entries: the lines of its ``metrics.jsonl``.
        nesterov: which momentum SGD had.

    Raises:
        ValueError: there is none.
    """
    if not entries:
        msg = "there are no steps to draw: metrics.jsonl is empty"
        raise ValueError(msg)
    measured = [e for e in entries if e.get("largest_eigenvalue") is not None]
    figure = _figure(7.0, 7.0 if measured else 4.8)
    panels = figure.subplots(3 if measured else 2, 1, sharex=True)
    _draw_rate(panels[0], entries, measured)
    _draw_loss(panels[1], entries)
    if measured:
        _draw_eigenvalue(panels[2], entries, measured, nesterov=nesterov)
    panels[-1].set_xlabel("step")
    return figure


def plot_rates(bounds: Sequence["LRBound"], *, ax: "Axes | None" = None) -> "Figure":
    """Maximal learning rates against the batch size, with their 90 % intervals.

    One line for each optimizer among ``bounds``; points that are not reliable are hollow.

    Raises:
        ValueError: there are no ``bounds``.
    """
    if not bounds:
        msg = "there are no rates to draw: pass at least one bound"
        raise ValueError(msg)
    figure, ax = _canvas(ax)
    for optimizer, (name, colour) in _OPTIMIZERS.items():
        own = sorted((b for b in bounds if b.optimizer == optimizer), key=lambda b: b.batch_size)
        if not own:
            continue
        sizes = [b.batch_size for b in own]
        label = f"{name}, momentum {own[0].momentum:g}"
        ax.fill_between(sizes, [b.low for b in own], [b.high for b in own], color=colour, alpha=0.2)
        ax.plot(sizes, [b.value for b in own], color=colour, label=label)
        for bound in own:
            face = colour if bound.reliable else "white"
            ax.plot(bound.batch_size, bound.value, "o", color=colour, markerfacecolor=face)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size")
    ax.set_ylabel("largest stable learning rate")
    ax.legend(frameon=False)
    return figure


def plot_sweep(cells: Sequence[dict[str, Any]], *, ax: "Axes | None" = None) -> "Figure":
    """Predicted limits with their intervals, and the rates that training survived.

    Args:
        cells: dictionaries with ``optimizer``, ``batch_size``, ``predicted``, ``low``, ``high`` and
            ``survived``.
        ax: where to draw; by default a new figure.
    """
    figure, ax = _canvas(ax)
    for number, kind in enumerate(dict.fromkeys(cell["optimizer"] for cell in cells)):
        rows = sorted(
            (cell for cell in cells if cell["optimizer"] == kind), key=lambda r: r["batch_size"]
        )
        sizes = [row["batch_size"] for row in rows]
        colour = f"C{number}"
        ax.plot(sizes, [row["predicted"] for row in rows], color=colour, label=f"{kind}: predicted")
        lows, highs = [row["low"] for row in rows], [row["high"] for row in rows]
        ax.fill_between(sizes, lows, highs, color=colour, alpha=0.2, linewidth=0)
        survived = [row["survived"] for row in rows]
        ax.plot(sizes, survived, "o", color=colour, label=f"{kind}: survived")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size")
    ax.set_ylabel("learning rate")
    ax.legend()
    return figure


def plot_spectrum(
    measure: "SpectralMeasure", *, bandwidth: float | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Density of a spectral measure on a logarithmic axis, its Ritz values marked below.

    Args:
        measure: from `stochastic_lanczos_quadrature`.
        bandwidth: of the Gaussians; by default one percent of the range.
        ax: where to draw; by default a new figure.
    """
    import torch

    figure, ax = _canvas(ax)
    nodes = measure.nodes.cpu()
    low, high = float(nodes.min()), float(nodes.max())
    width = bandwidth or 0.01 * max(high - low, 1e-12)
    grid = torch.linspace(low - 4 * width, high + 4 * width, 1000, dtype=torch.float64)
    density = measure.density(grid.to(measure.nodes.device), width).cpu()
    floor = float(measure.weights[measure.weights > 0].min()) / width / 10
    ax.semilogy(grid, density.clamp(min=floor), color=_EIGENVALUE)
    ax.plot(nodes, [floor] * len(nodes), "|", color=_LOSS, markersize=8)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    return figure


def plot_batch_spectra(entries: Sequence[dict[str, Any]], *, ax: "Axes | None" = None) -> "Figure":
    """Largest eigenvalue against the batch size: a dot a draw, a line through the means.

    One line for each checkpoint among ``entries``, the later the darker.

    Args:
        entries: the lines of a ``spectra.jsonl``.
        ax: where to draw; by default a new figure.

    Raises:
        ValueError: there is none.
    """
    if not entries:
        msg = "there are no spectra to draw: spectra.jsonl is empty"
        raise ValueError(msg)
    figure, ax = _canvas(ax)
    points = sorted({(entry["epoch"], str(entry["checkpoint"])) for entry in entries})
    for number, (epoch, checkpoint) in enumerate(points):
        largest: dict[int, list[float]] = {}
        for entry in entries:
            if (entry["epoch"], str(entry["checkpoint"])) == (epoch, checkpoint):
                largest.setdefault(entry["batch_size"], []).append(entry["largest"])
        sizes = sorted(largest)
        means = [sum(largest[size]) / len(largest[size]) for size in sizes]
        alpha = (number + 1) / len(points)
        ax.plot(sizes, means, color=_EIGENVALUE, alpha=alpha, label=f"epoch {epoch}")
        for size in sizes:
            draws = largest[size]
            ax.plot([size] * len(draws), draws, ".", color=_EIGENVALUE, alpha=alpha)
    ax.set_xscale("log", base=2)
    if min(entry["largest"] for entry in entries) > 0:
        ax.set_yscale("log")
    ax.set_xlabel("batch size")
    ax.set_ylabel("largest eigenvalue")
    ax.legend(frameon=False)
    return figure


def _draw_rate(
    ax: "Axes", entries: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]
) -> None:
    ax.plot([e["step"] for e in entries], [e["lr"] for e in entries], color=_RATE, label="rate")
    ends = ("max_lr", "max_lr_low", "max_lr_high")
    limits = [e for e in measured if all(e.get(key) is not None for key in ends)]
    if limits:
        steps, values = [e["step"] for e in limits], [e["max_lr"] for e in limits]
        below = [e["max_lr"] - e["max_lr_low"] for e in limits]
        above = [e["max_lr_high"] - e["max_lr"] for e in limits]
        ax.errorbar(
            steps,
            values,
            yerr=[below, above],
            fmt=".",
            color=_EIGENVALUE,
            linewidth=1,
            label="largest stable rate, 90 % interval",
        )
    ax.set_yscale("log")
    ax.set_ylabel("learning rate")
    ax.legend(frameon=False)


def _draw_loss(ax: "Axes", entries: Sequence[dict[str, Any]]) -> None:
    points = [(e["step"], e["loss"]) for e in entries if e["loss"] is not None]
    ax.plot([s for s, _ in points], [x for _, x in points], color=_LOSS, linewidth=0.8)
    ax.set_yscale("log")
    ax.set_ylabel("training loss")


def _draw_eigenvalue(
    ax: "Axes",
    entries: Sequence[dict[str, Any]],
    measured: Sequence[dict[str, Any]],
    *,
    nesterov: bool,
) -> None:
    if all(e.get("optimizer") == "sgd" for e in measured):
        ahead = 2 if nesterov else 0
        moving = [e for e in entries if e["lr"] > 0]
        ax.plot(
            [e["step"] for e in moving],
            [2 * (1 + e["momentum"]) / ((1 + ahead * e["momentum"]) * e["lr"]) for e in moving],
            color=_RATE,
            linewidth=1,
            label="2 (1 + momentum) / " + ("(1 + 2 momentum) / rate" if nesterov else "rate"),
        )
    ax.plot(
        [e["step"] for e in measured],
        [e["largest_eigenvalue"] for e in measured],
        "o-",
        color=_EIGENVALUE,
        markersize=3,
        label="measured",
    )
    ax.set_yscale("log")
    ax.set_ylabel("largest eigenvalue")
    ax.legend(frameon=False)


def _canvas(ax: "Axes | None") -> "tuple[Figure, Axes]":
    if ax is not None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        return figure, ax
    figure = _figure(6.4, 4.2)
    return figure, figure.subplots()


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    return Figure(figsize=(width, height), layout="constrained")
