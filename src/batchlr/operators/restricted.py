"""Blocks of a curvature matrix: some parameters' rows and columns."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor

from batchlr.operators.base import BatchedOperator
from batchlr.operators.curvature_matrix import CurvatureMatrix


@final
class RestrictedOperator(BatchedOperator):
    """The sub-matrix of the parameters that ``patterns`` name, in the order of the whole matrix.

    It uses the graphs that ``operator`` has recorded, and computes no more of a product than the
    block: one of the last layer costs a fraction of one of the whole. Its products are counted
    here, not by ``operator``.

    Args:
        operator: the whole matrix.
        patterns: names of parameters or modules, or patterns of them (``"layers.*.weight"``,
            ``*`` also matches dots); one, or several.

    Raises:
        ValueError: a pattern matches nothing.
    """

    def __init__(self, operator: CurvatureMatrix, patterns: str | Sequence[str]) -> None:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            msg = "patterns is empty; name at least one parameter or module"
            raise ValueError(msg)
        names = operator.parameter_names
        matches = [_matching(names, pattern) for pattern in patterns]
        self._chosen = sorted({number for match in matches for number in match})
        self.operator = operator
        self.parameter_names = tuple(names[number] for number in self._chosen)
        sizes = [p.numel() for p in operator.parameters]
        ends = [sum(sizes[: number + 1]) for number in self._chosen]
        self._slices = [
            slice(end - sizes[number], end) for end, number in zip(ends, self._chosen, strict=True)
        ]
        size = sum(sizes[number] for number in self._chosen)
        super().__init__(size, dtype=operator.dtype, device=operator.device)

    def __repr__(self) -> str:
        return f"RestrictedOperator(P={self.shape[0]} of {self.operator!r})"

    @property
    def samples(self) -> tuple[int, ...]:
        """Number of samples of each batch."""
        return self.operator.samples

    @property
    def weights(self) -> tuple[float, ...]:
        """Each batch's weight in the mean, in samples."""
        return self.operator.weights

    def batch_products(self, vectors: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """See `BatchedOperator.batch_products`."""
        for owner, vector in zip(range(len(self.samples)), self._each(vectors), strict=True):
            yield self.operator.chosen_batch_product(owner, vector, self._chosen)

    def restrict(self, vector: Tensor) -> Tensor:
        """The block's part of a vector of the whole matrix."""
        return torch.cat([vector[piece] for piece in self._slices])

    def embed(self, vector: Tensor) -> Tensor:
        """A vector of the whole matrix: ``vector`` in the block, zeros elsewhere."""
        whole = vector.new_zeros(self.operator.shape[0])
        sizes = [piece.stop - piece.start for piece in self._slices]
        for piece, part in zip(self._slices, torch.split(vector, sizes), strict=True):
            whole[piece] = part
        return whole

    def _multiply(self, columns: Tensor) -> Tensor:
        return self.operator.chosen_products(columns.T.contiguous(), self._chosen).T


def layer_blocks(operator: CurvatureMatrix) -> dict[str, RestrictedOperator]:
    """The diagonal block of each module that has parameters of its own, by its name.

    A parameter shared by several modules belongs to the first. Parameters of the model itself are
    the block ``""``.
    """
    layers: dict[str, list[str]] = {}
    for name in operator.parameter_names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {layer: RestrictedOperator(operator, names) for layer, names in layers.items()}


def _matching(names: Sequence[str], pattern: str) -> list[int]:
    if pattern in names:  # which may hold what means something in a pattern
        return [names.index(pattern)]
    found = [
        number
        for number, name in enumerate(names)
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    ]
    if not found:
        near = get_close_matches(pattern, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        msg = f"no trainable parameter is named or matched by {pattern!r} of {shown}{hint}"
        raise ValueError(msg)
    return found
