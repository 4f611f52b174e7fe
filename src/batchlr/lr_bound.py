"""A largest stable rate with its interval."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Rule = Literal["mean-square", "top-direction", "paper"]

_WIDEST = 50.0  # assumed: half an interval in the logarithm; nothing is known, nothing overflows
_MARKS = "*+#~^&@$"  # of reasons; a ninth has two of the first

_LIMITED = {
    "noise": "limited by noise",
    "transition": "limited by noise and curvature",
    "curvature": "limited by curvature",
}


class Rate(NamedTuple):
    """A rule's rate, and what its `LRBound` is made of."""

    value: float
    error: float  # relative standard error
    exponent: float  # d ln value / d ln B
    noise_share: float  # of what limits the rate
    ends: tuple[float, float] | None = None  # from which the interval reaches; value if None


@dataclass(frozen=True)
class LRBound:
    """The largest stable learning rate at one batch size.

    ``float(bound)`` is its value, ``print(bound)`` says in a line what it is.
    """

    value: float
    low: float  # 90 % interval from the sampling errors of curvature and noise
    high: float
    exponent: float  # d ln value / d ln B: 1 is linear scaling, 1/2 the square root, 0 saturation
    regime: Literal["noise", "transition", "curvature"]  # what limits the rate
    reliable: bool
    reasons: tuple[str, ...]  # why not reliable; empty if it is
    batch_size: int
    optimizer: str
    momentum: float  # SGD's or RMSprop's, or Adam's beta1
    rule: Rule

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        doubt = "" if self.reliable else f"; not reliable: {'; '.join(self.reasons)}"
        return (
            f"{self.value:.3g} ({self.interval}) for {self.setting} at batch {self.batch_size}, "
            f"{_LIMITED[self.regime]}{doubt}"
        )

    @property
    def interval(self) -> str:
        """Both ends of the interval, in words."""
        return f"{self.low:.2g} to {self.high:.2g}"

    @property
    def setting(self) -> str:
        """Optimizer and momentum, in words."""
        name = "beta1" if self.optimizer == "adam" else "momentum"
        return f"{self.optimizer}, {name} {self.momentum:g}"

    @staticmethod
    def of(
        rate: Rate,
        *,
        freedom: int,
        reasons: tuple[str, ...],
        batch_size: int,
        optimizer: str,
        momentum: float,
        rule: Rule,
    ) -> "LRBound":
        """``rate`` with the 90 % interval of Student's t, in the logarithm.

        Args:
            rate: of the rule.
            freedom: degrees of freedom of its error, at least 1.
            reasons: why it is not reliable.
            batch_size: asked for.
            optimizer: asked for.
            momentum: asked for.
            rule: asked for.
        """
        low, high = (rate.value, rate.value) if rate.ends is None else rate.ends
        margin = math.exp(min(_student_95(freedom) * rate.error, _WIDEST))
        return LRBound(
            value=rate.value,
            low=low / margin,
            high=high * margin,
            exponent=rate.exponent,
            regime=_regime(rate.noise_share),
            reliable=not reasons,
            reasons=reasons,
            batch_size=batch_size,
            optimizer=optimizer,
            momentum=momentum,
            rule=rule,
        )


def reason_marks(all_reasons: Iterable[Sequence[str]]) -> dict[str, str]:
    """A mark for each reason, in the order they come.

    >>> reason_marks([(), ("few batches",), ("few batches", "clipped")])
    {'few batches': '*', 'clipped': '+'}
    """
    reasons = dict.fromkeys(reason for reasons in all_reasons for reason in reasons)
    kinds = len(_MARKS)
    return {reason: _MARKS[k % kinds] * (1 + k // kinds) for k, reason in enumerate(reasons)}


def marked_column(
    title: str, rates: Sequence[tuple[float, Sequence[str]]], marks: Mapping[str, str]
) -> list[str]:
    """A title and rates below it, all of one width, each rate with the marks of its reasons.

    Args:
        title: of the column.
        rates: each with why it is not reliable.
        marks: of `reason_marks`.
    """
    rows = [(title, "")]
    for value, reasons in rates:
        own = (mark for reason, mark in marks.items() if reason in reasons)
        rows.append((f"{value:.3g}", "".join(own)))
    width, room = (max(map(len, part)) for part in zip(*rows, strict=True))
    gap = " " if room else ""
    return [f"{figure:>{width}}{gap}{mark:<{room}}" for figure, mark in rows]


def marked_reasons(marks: Mapping[str, str]) -> list[str]:
    """What to print below rates with ``marks``, a line each; nothing where there are none."""
    lines = [f"{mark} {reason}" for reason, mark in marks.items()]
    return ["Marked rates are not reliable:", *lines] if lines else []


def tabulated(rows: Sequence[Sequence[LRBound]]) -> str:
    """A table: a row for each batch size, in it a bound for each optimizer; then what is doubtful.

    Args:
        rows: one or more, the same optimizers in each.
    """
    marks = reason_marks(bound.reasons for row in rows for bound in row)
    columns = [["batch", *(str(row[0].batch_size) for row in rows)]]
    for bounds in zip(*rows, strict=True):
        rates = [(bound.value, bound.reasons) for bound in bounds]
        columns.append(marked_column(bounds[0].setting, rates, marks))
        columns.append(["90 % interval", *(bound.interval for bound in bounds)])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(word.rjust(width) for word, width in zip(words, widths, strict=True))
        for words in zip(*columns, strict=True)
    ]
    return "\n".join([*lines, *marked_reasons(marks)])


def _regime(noise_share: float) -> Literal["noise", "transition", "curvature"]:
    if noise_share > 2 / 3:
        return "noise"
    return "curvature" if noise_share < 1 / 3 else "transition"


def _student_95(freedom: int) -> float:
    """95 % quantile of Student's t; 12 % low at 1 degree of freedom, 0.3 % at 3.

    Errors estimated from few batches are uncertain themselves. Abramowitz & Stegun 26.7.5.
    """
    z, n = 1.6448536, freedom  # the normal quantile
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
