"""A run in words."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from batchlr.on_the_fly.safeguard import EVENTS
from batchlr.report.record import RunRecord

_LISTED = 8  # assumed: more steps are counted only


@dataclass(frozen=True)
class Verdict:
    """How a run went."""

    state: Literal["finished", "diverged", "unfinished", "measured"]
    headline: str
    sentences: tuple[str, ...]


def verdict(record: RunRecord) -> Verdict:
    """What became of the run, who chose its rate, what measuring cost and what went wrong."""
    state, headline = _outcome(record)
    told = [_rate(record), _limit(record), _cost(record), _events(record), _failures(record)]
    told += [_curvature(record), _spectrum(record), _grid(record)]
    return Verdict(state, headline, tuple(filter(None, told)))


def _outcome(
    record: RunRecord,
) -> tuple[Literal["finished", "diverged", "unfinished", "measured"], str]:
    summary = record.summary
    if summary is not None and summary.get("diverged"):
        return "diverged", f"Diverged after {summary['steps']} steps: {summary.get('failure')}."
    if summary is not None:
        planned = record.setting("train.epochs")
        whole = not isinstance(planned, int) or summary["epochs"] >= planned
        epochs = f"{summary['epochs']} epochs" if whole else f"{summary['epochs']} of {planned}"
        return "finished", (
            f"Finished: test accuracy {_percent(summary.get('test_accuracy'))} after "
            f"{summary['steps']} steps ({epochs if whole else epochs + ' epochs'})."
        )
    if not record.entries:
        return "measured", "Measured, not trained."
    last = record.entries[-1]
    words = f"Not finished: {last['step'] + 1} steps are on record, the last in epoch "
    words += f"{last['epoch'] + 1}"
    result = (record.progress or {}).get("result")
    if result:
        words += f"; test accuracy {_percent(result.get('test_accuracy'))} when last tested"
    return "unfinished", words + "."


def _rate(record: RunRecord) -> str | None:
    rate = record.setting("optim.lr")
    if not record.entries or rate is None:
        return None
    shape = f"in the shape of the schedule {record.setting('schedule.name')}"
    if isinstance(rate, int | float):
        extra = " Curvature was measured beside it, not applied." if record.measured else ""
        return f"The rate was given: {rate:g} at its peak, {shape}.{extra}"
    peaks = [e["peak_lr"] for e in record.measured if e.get("peak_lr") is not None]
    words = "The rate was chosen while training, by measured curvature (policy "
    words += f"{record.setting('curvature.policy')})"
    if peaks:
        words += f": its peak went from {peaks[0]:.3g} to {peaks[-1]:.3g}"
        words += f", {max(peaks):.3g} at most" if max(peaks) > max(peaks[0], peaks[-1]) else ""
    return f"{words}, {shape}."


def _limit(record: RunRecord) -> str | None:
    """How the rate stood to the limits measured."""
    ratios = [e["lr"] / e["max_lr"] for e in record.measured if e.get("max_lr")]
    if not ratios:
        return None
    above = sum(ratio > 1 for ratio in ratios)
    most = f"at most {max(ratios):.2g} times the limit"
    if not above:
        return f"At all {len(ratios)} measured limits of stability the rate was below: {most}."
    return f"At {above} of {len(ratios)} measured limits of stability the rate was above: {most}."


def _cost(record: RunRecord) -> str | None:
    if not record.entries:
        return None
    if not record.measured:
        return "Nothing was measured while training."
    number = len(record.measured)
    products = sum(e.get("products") or 0 for e in record.measured)
    seconds = sum(e.get("measurement_seconds") or 0.0 for e in record.measured)
    wall = None
    if record.summary is not None:
        products, wall = record.summary["curvature_products"], record.summary["wall_seconds"]
        seconds = record.summary["curvature_seconds"]
    elif record.progress is not None:
        wall = record.progress["wall_seconds"]
        early = [e for e in record.measured if e["step"] < record.progress["step"]]
        number, products = len(early), sum(e.get("products") or 0 for e in early)
        seconds = sum(e.get("measurement_seconds") or 0.0 for e in early)
    share = f", {100 * seconds / wall:.0f} % of {wall:.1f} s" if wall else ""
    return f"{number} measurements cost {products} products and {seconds:.1f} s{share}."


def _events(record: RunRecord) -> str | None:
    source = record.summary or record.progress or {}
    events: Any = source.get("events")
    if not record.measured or events is None:
        return None
    if not events:
        return "The controller never had to slow down or to go back."
    names = [str(event.get("event")) for event in events]
    said: dict[str, str] = {**EVENTS}
    parts = []
    for name, count in Counter(names).items():
        steps = [str(e["step"]) for e, own in zip(events, names, strict=True) if own == name]
        more = f" and {count - _LISTED} more" if count > _LISTED else ""
        plural = "s" if count > 1 else ""
        parts.append(
            f"{name} {count} time{plural} ({said.get(name, 'unknown')}; step{plural} "
            f"{', '.join(steps[:_LISTED])}{more})"
        )
    return f"The controller stepped in: {'; '.join(parts)}."


def _failures(record: RunRecord) -> str | None:
    failures = [str(e["failure"]) for e in record.measured if e.get("failure")]
    if not failures:
        return None
    return (
        f"{len(failures)} of {len(record.measured)} measurements failed and left the rate as it "
        f"was; the last: {failures[-1]}."
    )


def _curvature(record: RunRecord) -> str | None:
    """What `batchlr lr` found."""
    found = record.curvature
    if found.get("largest_eigenvalue") is None:
        return None
    words = f"Measured alone, the largest eigenvalue is {found['largest_eigenvalue']:.4g}"
    critical = found.get("critical_batch_size")
    if critical is not None and critical == critical:
        words += f"; noise of a batch of {critical:.3g}, the critical size, shifts it by as much"
    if record.bounds:
        doubtful = sum(not bound.reliable for bound in record.bounds)
        words += f". Of {len(record.bounds)} tabulated rates {doubtful} are not reliable"
    return f"{words}."


def _spectrum(record: RunRecord) -> str | None:
    spectrum = record.spectrum
    if spectrum is None:
        return None
    ends = [spectrum.get("smallest_eigenvalue"), spectrum.get("largest_eigenvalue")]
    low, high = ("unknown" if end is None else f"{end:.4g}" for end in ends)
    ending = "" if spectrum.get("converged") else "; the search for its ends did not converge"
    return (
        f"The spectrum ({spectrum.get('matrix')}, {spectrum.get('num_params')} parameters, "
        f"{spectrum.get('num_samples')} samples) reaches from {low} to {high}{ending}."
    )


def _grid(record: RunRecord) -> str | None:
    if not record.grid:
        return None
    sizes = sorted({cell["batch_size"] for cell in record.grid})
    return f"{len(record.grid)} spectra of single batches of {', '.join(map(str, sizes))} samples."


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"
