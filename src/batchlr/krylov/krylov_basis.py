"""Orthonormal vectors in bounded memory: on the device, at half precision, or on the CPU."""

import math
from collections.abc import Iterator
from typing import Literal, Self, final

import torch
from torch import Tensor

from batchlr.inner_products import PART, dots
from batchlr.operators.graphs import free_bytes

BasisForm = Literal["auto", "device", "half", "cpu"]
FORMS = ("auto", "device", "half", "cpu")

_ROWS = 16  # assumed: rows allocated at a time where the number of vectors is not known
_SMALL = 1 << 26  # assumed: bytes that are not worth asking the system for
_HALVES = {torch.float64: torch.float32, torch.float32: torch.float16}


class BasisMemoryError(MemoryError):
    """The vectors asked for do not fit: says what they take, what there is, and the ways out."""


@final
class KrylovBasis:
    """Up to ``capacity`` orthonormal vectors ``(P,)``, allocated as they come.

    ``"half"`` stores half the bits, each vector scaled by ``sqrt(P)`` so that its entries are of
    the size of one (float16 then holds them to 5e-4, for any P below 4e9); products with it widen
    ``2^16`` columns at a time. ``"cpu"`` keeps the vectors in the CPU's memory and does their
    arithmetic there, one vector going over and back for each.
    """

    def __init__(
        self,
        size: int,
        capacity: int,
        *,
        form: Literal["device", "half", "cpu"],
        dtype: torch.dtype,
        device: torch.device,
        at_once: bool = False,
    ) -> None:
        self.form = form
        self.dtype = dtype
        self.device = device
        self.count = 0
        self._size = size
        self._capacity = capacity
        self._stored_on = torch.device("cpu") if form == "cpu" else device
        self._stored_as = _HALVES[dtype] if form == "half" else dtype
        self._scale = math.sqrt(size) if form == "half" else 1.0
        # Main memory is taken where it is written to, so there one block is as good as many.
        at_once = at_once or self._stored_on.type == "cpu"
        self._rows = capacity if at_once else min(_ROWS, capacity)
        self._blocks: list[Tensor] = []

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """The basis of ``rows`` ``(m, P)``, orthonormal, which are not copied."""
        count, size = rows.shape
        basis = cls(size, count, form="device", dtype=rows.dtype, device=rows.device, at_once=True)
        basis._blocks, basis.count = [rows], count
        return basis

    def append(self, vector: Tensor, factor: Tensor | None = None) -> Tensor:
        """Add ``factor`` times ``vector``, orthonormal to the rest, and return it as it is held.

        What is returned must not be changed; where the basis holds vectors differently from what
        they are, it is ``vector``, which is multiplied in place.
        """
        index = self.count % self._rows
        if index == 0 and self.count // self._rows == len(self._blocks):
            rows = min(self._rows, self._capacity - self.count)
            block = torch.empty(rows, self._size, dtype=self._stored_as, device=self._stored_on)
            self._blocks.append(block)
        row = self._blocks[self.count // self._rows][index]
        self.count += 1
        if row.dtype == vector.dtype and row.device == vector.device:
            return row.copy_(vector) if factor is None else torch.mul(vector, factor, out=row)
        if factor is not None:
            vector.mul_(factor)
        row.copy_(vector if self._scale == 1.0 else vector * self._scale)
        return vector

    def project(self, vectors: Tensor) -> Tensor:
        """Inner products ``(m,)`` with a vector ``(P,)``, or ``(m, b)`` with a block; float64."""
        return self._overlaps(vectors.to(self._stored_on)).to(self.device)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``Q' c``: ``(P,)`` for coefficients ``(m,)``, ``(P, k)`` for ``(m, k)``."""
        result = torch.zeros(
            self._size, *coefficients.shape[1:], dtype=self.dtype, device=self._stored_on
        )
        self._subtract(result, -coefficients.to(self._stored_on, self.dtype))
        return result.to(self.device)

    def orthogonalise_(
        self, vector: Tensor, *, known: Tensor | None = None, sweeps: int = 2
    ) -> Tensor:
        """Classical Gram-Schmidt in place; returns what the last sweep found, ``(m,)`` float64.

        A sweep reads all vectors twice.

        Args:
            vector: ``(P,)``.
            known: ``(k,)``, its parts along the last ``k`` vectors, taken off first.
            sweeps: two are always enough (Giraud et al. 2005), one if little is left to take off.
        """
        here = vector.to(self._stored_on)
        if known is not None:
            self._subtract(here, known.to(self._stored_on, self.dtype), self.count - len(known))
        found = torch.zeros(self.count, dtype=torch.float64, device=self._stored_on)
        for _ in range(sweeps if self.count else 0):
            found = self._overlaps(here)
            self._subtract(here, found.to(self.dtype))
        if here is not vector:
            vector.copy_(here)
        return found.to(self.device)

    def keep(self, coefficients: Tensor) -> None:
        """Replace the vectors by ``k`` orthonormal combinations of them, ``(m, k)``, in place."""
        coefficients = coefficients.to(self._stored_on, self.dtype)
        used = self._used()
        kept = coefficients.shape[1]
        for first in range(0, self._size, PART):
            part = slice(first, first + PART)
            turned = coefficients.T @ torch.cat([rows[:, part].to(self.dtype) for rows in used])
            for index in range(kept):
                self._blocks[index // self._rows][index % self._rows, part] = turned[index]
        self.count = kept

    def vector(self, index: int) -> Tensor:
        """The vector ``(P,)`` of this number, in full precision; no copy if it is held so."""
        index = range(self.count)[index]
        row = self._blocks[index // self._rows][index % self._rows]
        if self._stored_as == self.dtype:
            return row.to(self.device)
        return row.to(self.device, self.dtype) / self._scale

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All vectors, in full precision on the device, ``2^16`` columns ``(m, n)`` at a time."""
        for first in range(0, self._size, PART):
            part = slice(first, first + PART)
            rows = [rows[:, part].to(self.device, self.dtype) for rows in self._used()]
            piece = rows[0] if len(rows) == 1 else torch.cat(rows)
            yield part, piece / self._scale if self._scale != 1 else piece

    def truncate(self, count: int) -> None:
        """Forget all but the first ``count`` vectors."""
        self.count = min(self.count, count)

    def tensor(self) -> Tensor:
        """All vectors ``(m, P)``, on the device and in full precision; no copy if it is one."""
        if len(self._blocks) == 1 and self._stored_as == self.dtype:
            return self._blocks[0][: self.count].to(self.device)
        rows = [rows.to(self.device, self.dtype) / self._scale for rows in self._used()]
        return torch.cat(rows)

    def _used(self) -> list[Tensor]:
        """The blocks, cut to what is filled."""
        full, rest = divmod(self.count, self._rows)
        return self._blocks[:full] + ([self._blocks[full][:rest]] if rest else [])

    def _overlaps(self, vectors: Tensor) -> Tensor:
        """`project` where the vectors are stored."""
        if not self.count:
            shape = (0, *vectors.shape[1:])
            return torch.zeros(shape, dtype=torch.float64, device=self._stored_on)
        if self._stored_as == self.dtype:
            return torch.cat([dots(rows, vectors) for rows in self._used()])
        found = []
        for rows in self._used():
            total = torch.zeros(
                len(rows), *vectors.shape[1:], dtype=torch.float64, device=self._stored_on
            )
            for first in range(0, self._size, PART):
                part = slice(first, first + PART)
                total += rows[:, part].to(self.dtype) @ vectors[part]
            found.append(total / self._scale)
        return torch.cat(found)

    def _subtract(self, target: Tensor, coefficients: Tensor, start: int = 0) -> None:
        """``target -= Q' c`` in place, of the vectors from ``start`` on; where they are stored."""
        width = self._size if self._stored_as == self.dtype else PART
        for first in range(0, self._size, width):
            part = slice(first, first + width)
            done = 0
            for number, rows in enumerate(self._used()):
                chosen = rows[max(0, start - number * self._rows) :, part].to(self.dtype)
                shares = coefficients[done : done + len(chosen)]
                if target.ndim == 1:
                    target[part].addmv_(chosen.T, shares, alpha=-1 / self._scale)
                else:
                    target[part].addmm_(chosen.T, shares, alpha=-1 / self._scale)
                done += len(chosen)


def basis_bytes(size: int, count: int, dtype: torch.dtype, form: str) -> int:
    """Memory of ``count`` vectors of ``size`` numbers in ``form``."""
    stored = _HALVES[dtype] if form == "half" else dtype
    return size * count * stored.itemsize


def choose_form(
    form: BasisForm,
    size: int,
    count: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    budget: int | None = None,
    least: int | None = None,
) -> tuple[Literal["device", "half", "cpu"], int]:
    """The form to keep ``count`` vectors in, and how many may be held at a time.

    ``"auto"`` takes the first that fits of: the device, half precision on it, the CPU. Fewer
    vectors (``least`` of them, for those who can restart) come before a coarser form.

    Args:
        form: as asked for.
        size: ``P``.
        count: vectors wanted.
        dtype: of the vectors.
        device: of the vectors.
        budget: bytes they may take; by default what is free where they go.
        least: vectors that must fit; by default all.

    Raises:
        ValueError: ``form`` or ``budget`` is illegal, or the dtype has no half.
        BasisMemoryError: they fit in none of the forms allowed.
    """
    if form not in FORMS:
        msg = f"basis must be one of {', '.join(FORMS)}, got {form!r}"
        raise ValueError(msg)
    if budget is not None and budget < 1:
        msg = f"basis_budget must be a positive number of bytes, got {budget}"
        raise ValueError(msg)
    if form == "half" and dtype not in _HALVES:
        msg = f"basis='half' halves float64 and float32, got {dtype}; use 'device' or 'cpu'"
        raise ValueError(msg)
    forms: list[Literal["device", "half", "cpu"]] = ["device", "half", "cpu"]
    if form == "auto":
        forms = [f for f in forms if f != "half" or dtype in _HALVES]
        forms = [f for f in forms if f != "cpu" or device.type != "cpu"]
    else:
        forms = [form]
    least = count if least is None else min(least, count)
    if budget is None and basis_bytes(size, count, dtype, forms[0]) < _SMALL:
        return forms[0], count
    reports = []
    for candidate in forms:
        place = torch.device("cpu") if candidate == "cpu" else device
        free = free_bytes(place) if budget is None else budget
        each = basis_bytes(size, 1, dtype, candidate)
        if count * each <= free:
            return candidate, count
        if least * each <= free:
            return candidate, free // each
        reports.append(f"{candidate}: {readable(least * each)} of {readable(free)}")
    msg = (
        f"the Krylov basis of {least} vectors of {size} numbers does not fit "
        f"({'; '.join(reports)}). Ways out: fewer steps, basis='half' or basis='cpu', "
        "a larger basis_budget, or max_basis where Lanczos may restart"
    )
    raise BasisMemoryError(msg)


def readable(count: int) -> str:
    """Bytes in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
