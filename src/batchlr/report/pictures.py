"""The pictures of a record, as SVG that may stand inside a page."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from batchlr.plotting import plot_batch_spectra, plot_rates, plot_run, plot_spectrum, plot_sweep
from batchlr.report.record import Entry, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_STEPS = 2000  # assumed: a picture 500 points wide shows no more
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# What HTML does not want of a file: all before the element, comments, the style of all elements.
_SURPLUS = re.compile(
    r'\A.*?(?=<svg)|<!--.*?-->|<defs>\s*<style.*?</defs>|\sxmlns(:\w+)?="[^"]*"|(?<=\s)xlink:', re.S
)
_NAMES = re.compile(r'(?<=\sid=")|(?<=url\(#)|(?<=href="#)')


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    caption: str
    svg: str  # an element; its names are no other picture's


def pictures(record: RunRecord) -> list[Picture]:
    """One for each thing in the record that can be drawn."""
    return [
        Picture(caption, inline_svg(figure, name, caption))
        for name, figure, caption in _figures(record)
    ]


def inline_svg(figure: "Figure", name: str, title: str) -> str:
    """``figure`` as an element that names nothing outside it, the same each time.

    Args:
        figure: to draw, on no ground of its own.
        name: begins all of its identifiers, for a page has those of all its pictures.
        title: read out in its place.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text stays text
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = _NAMES.sub(f"{name}-", _SURPLUS.sub("", file.getvalue()))
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()


def thinned(entries: Sequence[Entry]) -> Sequence[Entry]:
    """At most some `_MOST_STEPS` lines: of each stretch those of least and greatest loss.

    What follows a measurement stays, and so do both ends.
    """
    if len(entries) <= _MOST_STEPS:
        return entries
    kept = {0, len(entries) - 1}
    kept |= {at for at, entry in enumerate(entries) if "largest_eigenvalue" in entry}
    stretch = -(-2 * len(entries) // _MOST_STEPS)
    losses = [entry["loss"] for entry in entries]
    for first in range(0, len(entries), stretch):
        inside = range(first, min(first + stretch, len(entries)))
        if known := [at for at in inside if losses[at] is not None]:
            kept |= {min(known, key=losses.__getitem__), max(known, key=losses.__getitem__)}
    return [entries[at] for at in sorted(kept)]


def _figures(record: RunRecord) -> Iterator[tuple[str, "Figure", str]]:
    """Name, figure and caption of each."""
    if record.entries:
        caption = "Learning rate and training loss over the steps"
        if record.measured:
            caption += "; the measured limits of the rate, and the largest eigenvalue"
        nesterov = bool(record.setting("optim.nesterov"))
        yield "run", plot_run(thinned(record.entries), nesterov=nesterov), f"{caption}."
    if record.bounds:
        caption = "Largest stable rate over the batch size, with 90 % intervals; hollow points are "
        yield "rates", plot_rates(record.bounds), f"{caption}not reliable."
    if record.measure is not None:
        caption = "Density of the spectrum; the marks below are Ritz values."
        yield "spectrum", plot_spectrum(record.measure), caption
    if record.grid:
        caption = "Largest eigenvalue of single batches; a dot a draw, lines through the means."
        yield "grid", plot_batch_spectra(record.grid), caption
    if record.sweep:
        caption = "Predicted limits with their intervals, and the largest rates survived."
        yield "sweep", plot_sweep(record.sweep), caption
