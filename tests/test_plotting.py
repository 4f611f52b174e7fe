"""What the pictures show, not how they look."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from batchlr.lr_bound import LRBound
from batchlr.plotting import (
    plot_batch_spectra,
    plot_rates,
    plot_run,
    plot_spectrum,
    plot_sweep,
    save_figure,
)
from batchlr.slq import SpectralMeasure


def entries(*measured_at, steps=6, optimizer="adam"):
    """Lines of a ``metrics.jsonl``: losses fall, rates too."""
    lines = [
        {"step": k, "loss": 2.0 / (k + 1), "lr": 0.1 / (k + 1), "momentum": 0.9}
        for k in range(steps)
    ]
    for k in measured_at:
        lines[k] |= {
            "optimizer": optimizer,
            "largest_eigenvalue": 10.0 + k,
            "max_lr": 0.4,
            "max_lr_low": 0.3,
            "max_lr_high": 0.6,
        }
    return lines


def bound(batch_size, value, *, optimizer="sgd", reliable=True, momentum=0.9):
    return LRBound(
        value=value,
        low=value / 2,
        high=value * 3,
        exponent=0.5,
        regime="transition",
        reliable=reliable,
        reasons=() if reliable else ("because",),
        batch_size=batch_size,
        optimizer=optimizer,
        momentum=momentum,
        rule="mean-square",
    )


def points(line):
    return list(
        zip(*(np.asarray(data, dtype=float).tolist() for data in line.get_data()), strict=True)
    )


def labels(figure):
    return [axis.get_ylabel() for axis in figure.axes]


# Runs ------------------------------------------------------------------------------------------


def test_a_run_without_measurements_has_rate_and_loss():
    figure = plot_run(entries())
    assert labels(figure) == ["learning rate", "training loss"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "step"]
    assert {axis.get_yscale() for axis in figure.axes} == {"log"}
    rate, loss = (axis.lines[0] for axis in figure.axes)
    assert points(rate) == [(k, 0.1 / (k + 1)) for k in range(6)]
    assert points(loss) == [(k, 2.0 / (k + 1)) for k in range(6)]


def test_a_measured_run_has_eigenvalues_and_limits_with_intervals():
    figure = plot_run(entries(0, 2, optimizer="sgd"))
    assert labels(figure) == ["learning rate", "training loss", "largest eigenvalue"]
    edge, found = figure.axes[2].lines
    assert points(edge) == [(k, pytest.approx(38 * (k + 1))) for k in range(6)]
    assert points(found) == [(0, 10), (2, 12)]
    (limits,) = figure.axes[0].containers
    line, _, (bars,) = limits
    assert points(line) == [(0, 0.4), (2, 0.4)]
    np.testing.assert_allclose(bars.get_segments(), [[[k, 0.3], [k, 0.6]] for k in (0, 2)])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["rate", "largest stable rate, 90 % interval"]


def test_nesterov_s_edge_is_its_own():
    """Of 0.9: 2 (1 + m) / (1 + 2 m) over the rate."""
    figure = plot_run(entries(0, 2, optimizer="sgd"), nesterov=True)
    edge = figure.axes[2].lines[0]
    assert points(edge) == [(k, pytest.approx(38 / 2.8 * (k + 1))) for k in range(6)]
    assert edge.get_label() == "2 (1 + momentum) / (1 + 2 momentum) / rate"


def test_steps_that_failed_are_left_out():
    """A loss that is no number, a measurement that failed, an interval without an end."""
    lines = entries(0, 2, 4)
    lines[3]["loss"] = None
    lines[2] |= dict.fromkeys(("largest_eigenvalue", "max_lr", "max_lr_low", "max_lr_high"))
    lines[4]["max_lr_high"] = None
    figure = plot_run(lines)
    assert [step for step, _ in points(figure.axes[1].lines[0])] == [0, 1, 2, 4, 5]
    (found,) = figure.axes[2].lines  # Adam's edge lies elsewhere
    assert points(found) == [(0, 10), (4, 14)]
    ((line, _, _),) = figure.axes[0].containers
    assert points(line) == [(0, 0.4)]


@pytest.mark.parametrize("loss", [None, 1e30])
def test_a_run_that_diverged_at_once_is_drawn(tmp_path, loss):
    save_figure(plot_run([{"step": 0, "loss": loss, "lr": 0.1}]), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"there are no steps to draw: metrics\.jsonl is empty"):
        plot_run([])


# Rates -----------------------------------------------------------------------------------------


def test_rates_are_lines_over_the_batch_size_for_each_optimizer():
    bounds = [bound(16, 0.2), bound(4, 0.1), bound(64, 0.3)]
    bounds += [bound(size, size / 1000, optimizer="adam", momentum=0.5) for size in (4, 16)]
    figure = plot_rates(bounds)
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("batch size", "largest stable learning rate")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    named = {line.get_label(): points(line) for line in axis.lines if line.get_label()[0] != "_"}
    assert named == {
        "SGD, momentum 0.9": [(4, 0.1), (16, 0.2), (64, 0.3)],
        "Adam, momentum 0.5": [(4, 0.004), (16, 0.016)],
    }
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(named)


def test_intervals_are_bands():
    figure = plot_rates([bound(4, 0.1), bound(16, 0.2)])
    (band,) = figure.axes[0].collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
    assert corners == {(4, 0.05), (4, 0.3), (16, 0.1), (16, 0.6)}


def test_points_that_are_not_reliable_are_hollow():
    figure = plot_rates([bound(4, 0.1, reliable=False), bound(16, 0.2)])
    markers = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    faces = {line.get_xdata()[0]: to_rgba(line.get_markerfacecolor()) for line in markers}
    edges = {to_rgba(line.get_markeredgecolor()) for line in markers}
    assert faces[4] == to_rgba("white")
    assert edges == {faces[16]} != {faces[4]}


@pytest.mark.parametrize(("optimizer", "name"), [("adam", "Adam"), ("rmsprop", "RMSprop")])
def test_one_optimizer_alone_may_be_drawn(optimizer, name):
    (axis,) = plot_rates([bound(4, 0.1, optimizer=optimizer)]).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [f"{name}, momentum 0.9"]


def test_no_rates_are_refused():
    with pytest.raises(ValueError, match="there are no rates to draw: pass at least one bound"):
        plot_rates([])


# Spectra ---------------------------------------------------------------------------------------


@pytest.fixture
def measure():
    return SpectralMeasure(
        nodes=torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64),
        weights=torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64),
        probes=torch.zeros(3, dtype=torch.int64),
        num_products=3,
    )


def test_a_spectrum_is_its_density_with_the_ritz_values_below(measure):
    figure = plot_spectrum(measure, bandwidth=0.2)
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("eigenvalue", "density")
    assert axis.get_yscale() == "log"
    density, ticks = axis.lines
    grid, values = (np.asarray(data) for data in density.get_data())
    assert (grid[0], grid[-1]) == pytest.approx((-1.8, 4.8))
    heights = np.array([0.25, 0.5, 0.25]) / (0.2 * np.sqrt(2 * np.pi))
    assert np.interp([-1, 0, 4], grid, values) == pytest.approx(heights, rel=1e-3)
    assert np.asarray(ticks.get_xdata()).tolist() == [-1, 0, 4]
    assert ticks.get_ydata()[0] == values.min()


def test_the_bandwidth_is_one_percent_of_the_range_unless_given(measure):
    grid = np.asarray(plot_spectrum(measure).axes[0].lines[0].get_xdata())
    assert (grid[0], grid[-1]) == pytest.approx((-1.2, 4.2))


def test_a_single_eigenvalue_is_drawn(tmp_path):
    ones = torch.ones(1, dtype=torch.float64)
    single = SpectralMeasure(ones, ones, torch.zeros(1, dtype=torch.int64), 1)
    save_figure(plot_spectrum(single, bandwidth=0.1), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_an_illegal_bandwidth_is_refused(measure):
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        plot_spectrum(measure, bandwidth=-1.0)


# Figures ---------------------------------------------------------------------------------------


def test_pictures_go_into_given_axes(measure):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_rates([bound(4, 0.1)], ax=left) is figure
    assert plot_spectrum(measure, ax=right) is figure
    assert [axis.get_xlabel() for axis in figure.axes] == ["batch size", "eigenvalue"]


def test_nothing_is_opened_or_changed_globally(measure):
    settings = dict(matplotlib.rcParams)
    plot_run(entries(0))
    plot_rates([bound(4, 0.1)])
    plot_spectrum(measure)
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize(
    ("suffix", "opening"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_a_figure_is_saved_in_the_format_of_its_suffix(tmp_path, suffix, opening):
    path = tmp_path / "new" / f"figure.{suffix}"
    save_figure(plot_rates([bound(4, 0.1), bound(8, 0.2)]), path)
    assert path.read_bytes().startswith(opening)


# Grids ------------------------------------------------------------------------------------------


def cell(batch_size, largest, *, epoch=0):
    checkpoint = f"{epoch}.pt" if epoch else None
    return {"epoch": epoch, "checkpoint": checkpoint, "batch_size": batch_size, "largest": largest}


def test_a_grid_has_dots_for_draws_and_lines_for_means():
    cells = [cell(8, 4.0), cell(2, 9.0), cell(8, 6.0), cell(2, 7.0, epoch=25)]
    (axis,) = plot_batch_spectra(cells).axes
    lines = {line.get_label(): points(line) for line in axis.lines}
    assert lines["epoch 0"] == [(2, 9), (8, 5)]
    assert lines["epoch 25"] == [(2, 7)]
    dots = [point for line in axis.lines if line.get_marker() == "." for point in points(line)]
    assert sorted(dots) == [(2, 7), (2, 9), (8, 4), (8, 6)]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("batch size", "largest eigenvalue")


def test_a_grid_that_is_not_positive_has_a_linear_axis():
    (axis,) = plot_batch_spectra([cell(2, 1.0), cell(4, -1.0)]).axes
    assert axis.get_yscale() == "linear"


def test_a_grid_is_drawn_where_it_is_told_to_be():
    own = Figure()
    left, right = own.subplots(1, 2)
    assert plot_batch_spectra([cell(8, 4.0), cell(2, 9.0)], ax=right) is own
    assert [len(axis.lines) for axis in own.axes] == [0, 3]
    assert points(right.lines[0]) == [(2, 9), (8, 4)]
    assert (left.get_xscale(), right.get_xscale()) == ("linear", "log")


def test_a_grid_without_cells_is_refused():
    with pytest.raises(ValueError, match=r"no spectra to draw: spectra\.jsonl is empty"):
        plot_batch_spectra([])


# Sweeps -----------------------------------------------------------------------------------------


def swept(optimizer, batch_size, predicted):
    return {
        "optimizer": optimizer,
        "batch_size": batch_size,
        "predicted": predicted,
        "low": predicted / 2,
        "high": predicted * 3,
        "survived": predicted * 1.5,
    }


def test_a_sweep_has_lines_for_predictions_and_dots_for_what_survived(tmp_path):
    cells = [swept("sgd", 16, 0.2), swept("sgd", 4, 0.1), swept("adam", 8, 0.01)]
    figure = plot_sweep(cells)
    (axis,) = figure.axes
    assert {line.get_label(): points(line) for line in axis.lines} == {
        "sgd: predicted": [(4, 0.1), (16, 0.2)],
        "sgd: survived": [(4, pytest.approx(0.15)), (16, pytest.approx(0.3))],
        "adam: predicted": [(8, 0.01)],
        "adam: survived": [(8, 0.015)],
    }
    band = axis.collections[0]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
    assert corners == {(4, 0.05), (4, 0.3), (16, 0.1), (16, 0.6)}
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("batch size", "learning rate")
    save_figure(figure, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    own = Figure()
    assert plot_sweep(cells, ax=own.subplots()) is own
