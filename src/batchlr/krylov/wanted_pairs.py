"""Which eigenpairs a search is for, and whether those of a Krylov space are good enough."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from batchlr.argument_ranges import require_inner_fraction
from batchlr.krylov.lanczos_process import LanczosProcess
from batchlr.krylov.ritz_bounds import certified_bounds, likely_errors

End = Literal["largest", "smallest"]
Which = Literal[End, "both"]
Criterion = Literal["bound", "residual", "error"]

_LEAST_BASIS = 8
"""Vectors a restarting search needs beside twice the wanted ones (assumed)."""


@dataclass(frozen=True)
class JudgedPairs:
    """Where the wanted pairs stand, before any vector is made; see `lanczos.Eigenpairs`."""

    values: Tensor  # (k,) descending; (2k,) for both ends
    coefficients: Tensor  # (m, k) of their vectors on the Krylov basis
    residuals: Tensor  # (k,)
    bounds: Tensor  # (k,)
    errors: Tensor  # (k,)
    converged: bool


@dataclass(frozen=True)
class WantedPairs:
    """``k`` eigenpairs at one end of a spectrum, or at both, to an accuracy.

    What the fields mean says `lanczos.top_eigenpairs`.

    Raises:
        ValueError: a field is illegal.
    """

    k: int
    which: Which
    tol: float
    criterion: Criterion
    settle: Which | None

    def __post_init__(self) -> None:
        if self.which not in (*get_args(End), "both"):
            msg = f"which must be 'largest', 'smallest' or 'both', got {self.which!r}"
            raise ValueError(msg)
        own = self.settle is None or self.settle == self.which
        if not own and (self.which != "both" or self.settle not in get_args(End)):
            msg = f"settle must be an end that is wanted ({self.which}), got {self.settle!r}"
            raise ValueError(msg)
        if self.criterion not in get_args(Criterion):
            msg = f"criterion must be 'bound', 'residual' or 'error', got {self.criterion!r}"
            raise ValueError(msg)
        require_inner_fraction(tol=self.tol)

    @property
    def count(self) -> int:
        """Pairs at all ends together."""
        return 2 * self.k if self.which == "both" else self.k

    @property
    def ends(self) -> tuple[End, ...]:
        """Those wanted, the largest first."""
        return ("largest", "smallest") if self.which == "both" else (self.which,)

    def check_size(self, size: int) -> None:
        """Raise ValueError unless a matrix of ``size`` rows has so many pairs."""
        if self.k < 1 or self.count > size:
            wanted = f"k = {self.k} pairs ({self.which})"
            msg = f"{wanted} are not to be had from a ({size}, {size}) matrix"
            raise ValueError(msg)

    def kept(self, capacity: int) -> dict[str, int]:
        """Ritz vectors a restart keeps at each end: the wanted ones and some to speed them up."""
        count = min(capacity - 2, self.count + max(2, (capacity - self.count) // 2))
        if self.which == "both":
            return {"largest": count - count // 2, "smallest": count // 2}
        return {self.which: count}

    def judge(self, process: LanczosProcess) -> JudgedPairs:
        """The pairs as the Krylov space has them, which must be as large as they are many."""
        values, vectors = process.eigh()  # ascending
        magnitude = values.abs().max()
        # What is below rounding is rounding: claim no more than the arithmetic can give.
        rounding = torch.finfo(process.operator.dtype).eps * magnitude
        residuals = (process.residual * vectors[-1].abs()).clamp(min=rounding)
        places = {end: self._places(end, values.numel()) for end in self.ends}
        chosen = [place for end in self.ends for place in places[end]]
        bounds = torch.cat(
            [
                certified_bounds(values, residuals, end=end, rounding=rounding)[places[end]]
                for end in self.ends
            ]
        ).clamp(min=rounding)
        likely = likely_errors(values, residuals)[chosen]
        errors = torch.minimum(likely, bounds).clamp(min=rounding)
        judged = {"bound": bounds, "residual": residuals[chosen], "error": errors}[self.criterion]
        scale = values[-1].clamp(min=0) if self.settle == "largest" else magnitude
        settled = bool((self._settling(judged) <= self.tol * scale).all())
        return JudgedPairs(
            values=values[chosen],
            coefficients=vectors[:, chosen],
            residuals=residuals[chosen],
            bounds=bounds,
            errors=errors,
            converged=settled or process.count == process.size,
        )

    def _places(self, end: End, size: int) -> list[int]:
        """Of an end's pairs among ascending Ritz values, in descending order."""
        if end == "largest":
            return list(range(size - 1, size - 1 - self.k, -1))
        return list(range(self.k - 1, -1, -1))

    def _settling(self, judged: Tensor) -> Tensor:
        """Of what is known of the pairs the part that decides."""
        if self.which != "both" or self.settle is None or self.settle == "both":
            return judged
        return judged[: self.k] if self.settle == "largest" else judged[self.k :]


def least_basis(wanted: int, steps: int) -> int:
    """Vectors a search for so many pairs, by so many products at most, cannot do without."""
    return min(steps, 2 * wanted + _LEAST_BASIS)
