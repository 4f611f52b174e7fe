"""What a measurement during training found, and what was made of it."""

import math
from dataclasses import dataclass, field

from batchlr.curvature_report import CurvatureReport
from batchlr.lr_bound import LRBound
from batchlr.on_the_fly.learned_step_size import LearnedStepSize
from batchlr.on_the_fly.update_curvature import UpdateCurvature


@dataclass(frozen=True)
class CurvatureUpdate:
    """One measurement during training and what was made of it."""

    step: int  # optimizer steps made before it
    peak: float  # of the scheduler, after it
    momentum: float  # of the optimizer, after it
    failure: str | None = None  # why the last good rate was kept; None if the measurement succeeded
    bound: LRBound | None = None  # with a policy that keeps to a limit; None after a failure
    report: CurvatureReport | None = field(default=None, repr=False)  # likewise
    learned: LearnedStepSize | None = None  # with a policy of the paper; None after a failure
    along: UpdateCurvature | None = None  # with CDAT; None after a failure
    num_products: int = 0  # matrix-vector products spent, on a failure, too
    seconds: float = 0.0  # likewise
    overhead: float = (
        0.0  # cost of all measurements so far over that of the steps made, in gradients
    )

    def __str__(self) -> str:
        words = [f"step {self.step}: peak {self.peak:.3g}, momentum {self.momentum:g}"]
        if self.failure is not None:
            words.append(f"measurement failed, the last good rate kept: {self.failure}")
        if not math.isnan(self.largest_eigenvalue):
            words.append(f"largest eigenvalue {self.largest_eigenvalue:.4g}")
        if self.bound is not None:
            words.append(f"limit {self.bound}")
        words.append(f"{self.num_products} products in {self.seconds:.2g} s")
        return "; ".join(words)

    @property
    def largest_eigenvalue(self) -> float:
        """Of the matrix that limits the optimizer (Adam's is preconditioned); NaN if not known."""
        if self.learned is not None:
            return self.learned.largest
        if self.report is None:
            return math.nan
        return float(self.report.largest if self.report.adam is None else self.report.adam.largest)

    @property
    def smallest_eigenvalue(self) -> float:
        """Smallest Ritz value of a published policy's Lanczos run; NaN without one."""
        return math.nan if self.learned is None else self.learned.smallest
