"""Batches of any common form: counting, cutting and joining their samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_batches(batches: Sequence[Any]) -> list[Any]:
    """``batches`` as a list.

    Raises:
        TypeError: a single batch was given where a list is expected.
        ValueError: there is none.
    """
    if isinstance(batches, (Tensor, Mapping)) or not hasattr(batches, "__iter__"):
        msg = f"batches must be a list of batches, got {type(batches).__name__}; pass [batch]"
        raise TypeError(msg)
    if isinstance(batches, tuple) and all(isinstance(entry, Tensor) for entry in batches):
        msg = "batches must be a list of batches, got one tuple of tensors; pass [(x, y)]"
        raise TypeError(msg)
    listed = list(batches)
    if not listed:
        msg = "batches is empty; pass at least one batch"
        raise ValueError(msg)
    return listed


def count_samples(batch: Any) -> int:
    """Number of samples of a batch: the first dimension of the first tensor in it.

    Raises:
        TypeError: no tensor is found.
        ValueError: the batch is empty.
    """
    tensor = _first_tensor(batch)
    if tensor is None:
        msg = f"cannot count the samples of a batch of type {type(batch).__name__}: no tensor in it"
        raise TypeError(msg)
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        msg = (
            "a batch needs at least one sample along dimension 0, got a tensor of shape "
            f"{tuple(tensor.shape)}"
        )
        raise ValueError(msg)
    return tensor.shape[0]


def take(batch: Any, rows: Tensor | slice) -> Any:
    """The samples ``rows`` of a tensor, or of each tensor of a tuple, list or dict.

    Raises:
        TypeError: the batch is none of these.
    """
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {key: take(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return _like(batch, [take(value, rows) for value in batch])
    msg = f"cannot cut a batch of type {type(batch).__name__}: pass batches of the size wanted"
    raise TypeError(msg)


def join(batches: Sequence[Any]) -> Any:
    """One batch of all the samples, of the form of the first.

    Raises:
        TypeError: the batches are not tensors, or tuples, lists or dicts of them.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: join([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        return _like(first, [join(parts) for parts in zip(*batches, strict=True)])
    msg = f"cannot join batches of type {type(first).__name__}"
    raise TypeError(msg)


def pick(batches: Sequence[Any], numbers: Sequence[int]) -> Any:
    """One batch of the samples of these numbers, counted through all ``batches``.

    Raises:
        TypeError: the batches cannot be cut.
    """
    sizes = [count_samples(batch) for batch in batches]
    chosen = []
    for number in numbers:
        owner = 0
        while number >= sizes[owner]:
            number -= sizes[owner]
            owner += 1
        chosen.append(take(batches[owner], slice(number, number + 1)))
    return join(chosen)


def recut(batches: Sequence[Any], batch_size: int) -> list[Any]:
    """The same samples in batches of ``batch_size``; a short rest joins the last batch.

    Raises:
        TypeError: the batches cannot be cut.
        ValueError: ``batch_size`` is not in [1, number of samples].
    """
    whole = join(batches)
    total = count_samples(whole)
    if not 1 <= batch_size <= total:
        msg = (
            f"batch_size must lie in [1, {total}], the number of samples given, got {batch_size}; "
            "pass more batches"
        )
        raise ValueError(msg)
    starts = [k * batch_size for k in range(total // batch_size)]
    ends = [*starts[1:], total]
    return [take(whole, slice(a, b)) for a, b in zip(starts, ends, strict=True)]


def cut(batch: Any, size: int) -> list[Any]:
    """A batch in as few batches of at most ``size`` samples as will do, of nearly equal sizes.

    Raises:
        TypeError: the batch cannot be cut.
    """
    total = count_samples(batch)
    count = -(-total // size)
    if count == 1:
        return [batch]
    ends = [total * (k + 1) // count for k in range(count)]
    return [take(batch, slice(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _like(batch: Any, parts: list[Any]) -> Any:
    """``parts`` in the sequence type of ``batch``, which may be a named tuple."""
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return next((t for t in map(_first_tensor, batch) if t is not None), None)
    return None
