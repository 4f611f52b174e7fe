"""What a run shows on the terminal."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.training.evaluation import TestResult


@final
class RunConsole:
    """A line an epoch and for the first measurement, and a progress bar where it can be drawn.

    Args:
        total_steps: of the run.
        first_step: already done.
        progress: draw the bar (on a terminal, unless ``BATCHLR_PROGRESS=0``).
        enabled: False shows nothing (every process but the first).
    """

    def __init__(self, total_steps: int, first_step: int, *, progress: bool, enabled: bool) -> None:
        self._console = Console(quiet=not enabled, emoji=False, highlight=False, soft_wrap=True)
        wanted = progress and enabled and os.environ.get("BATCHLR_PROGRESS", "1") != "0"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (wanted and self._console.is_terminal),
        )
        self._task = self._bar.add_task("steps", total=total_steps, completed=first_step)
        self._shown: CurvatureUpdate | None = None  # the measurement of the last epoch's line
        self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def say(self, *lines: str) -> None:
        """Print plain lines."""
        for line in lines:
            self._console.print(line, markup=False)

    def step(self) -> None:
        """Advance the bar."""
        self._bar.advance(self._task)

    def expect(self, total_steps: int) -> None:
        """The run has another number of steps than it seemed."""
        self._bar.update(self._task, total=total_steps)

    def measurement(self, update: CurvatureUpdate, *, steers: bool) -> None:
        """The first measurement, in words.

        Args:
            update: the measurement.
            steers: the peak of the rate follows the limits, from this one on.
        """
        report, bound, learned = update.report, update.bound, update.learned
        if learned is not None:
            self.say(
                f"measured: Ritz values from {learned.smallest:.4g} to {learned.largest:.4g} from "
                f"{learned.num_samples} samples, {learned.num_products} products, "
                f"{learned.seconds:.1f} s",
                f"{learned.policy}: rate {learned.step_size.lr:.3g}, momentum "
                f"{learned.step_size.momentum:.3g}; no limit of stability",
            )
        if report is None or bound is None:
            return
        self.say(
            f"measured: largest eigenvalue {update.largest_eigenvalue:.4g} from "
            f"{report.num_samples} samples, {report.num_products} products, "
            f"{report.seconds:.1f} s",
            f"largest stable rate at batch {bound.batch_size} with "
            f"{'beta1' if bound.optimizer == 'adam' else 'momentum'} {bound.momentum:g}: "
            f"{bound.value:.3g} (90 % interval {bound.low:.3g} to {bound.high:.3g}, "
            f"limited by {bound.regime})",
        )
        if steers:
            self.say(
                "the peak rate follows all limits measured, averaged by their errors: it may lie "
                "above the last one"
            )

    def epoch(
        self,
        number: int,
        total: int,
        train_loss: float,
        result: TestResult,
        updates: Sequence[CurvatureUpdate],
        peak: float,
    ) -> None:
        """One finished epoch; a measurement made in an earlier one is shown with its step."""
        line = (
            f"epoch {number:3d}/{total}  loss {train_loss:.4f}  test accuracy "
            f"{result.accuracy:.4f}  peak rate {peak:.3g}"
        )
        last = next((update for update in reversed(updates) if update.bound is not None), None)
        if last is not None and last.bound is not None:
            bound = last.bound
            line += f"  limit {bound.value:.3g} [{bound.low:.3g}, {bound.high:.3g}]"
            line += f"  largest eigenvalue {last.largest_eigenvalue:.3g}"
            line += f"  (both of step {last.step})" if last is self._shown else ""
        self._shown = last
        self.say(line)

    def end(self, summary: dict[str, Any], out: Path) -> None:
        """A run that went well: its ``summary.json``, in words, and where its record is."""
        share = summary["curvature_seconds"] / max(summary["wall_seconds"], 1e-9)
        self.say(
            f"test accuracy {summary['test_accuracy']:.4f} after {summary['steps']} steps in "
            f"{summary['wall_seconds']:.1f} s, of which measuring {100 * share:.0f} % "
            f"({summary['curvature_products']} products)",
            f"record in {out}: summary.json, metrics.jsonl, run.png",
        )
