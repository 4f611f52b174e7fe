"""Batches of any common form: counting, cutting and joining their samples."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


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
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed
        listed = list(batches)
    if not listed:
        msg = "batches is empty; pass at least one batch"
        raise ValueError(msg)
    kinds = {(b.dtype, b.ndim) if isinstance(b, Tensor) else None for b in listed}
    if None not in kinds and len(kinds) > 1:
        msg = (
            "batches must be a list of batches, got a list of tensors that differ in dtype or "
            "dimensions, such as one batch [x, y]; pass [(x, y)]"
        )
        raise TypeError(msg)
    return listed


def count_samples(batch: Any) -> int:
    """Number of samples of a batch.

    That is the first dimension of the first tensor in it, in tuples, lists, dicts and dataclasses;
    of a packed sequence, its sequences. Of another object it is its ``batch_size``, if that is a
    number (graphs of PyG and DGL), or its length.

    Raises:
        TypeError: no tensor is found.
        ValueError: the batch is empty.
    """
    first = next(_leaves(batch), None)
    if isinstance(first, int):
        shape: tuple[int, ...] = (first,)
    elif isinstance(first, PackedSequence):
        shape = (int(first.batch_sizes[0]),)
    elif first is not None:
        shape = tuple(first.shape)
    else:
        msg = (
            f"cannot count the samples of a batch of type {type(batch).__name__}: no tensor in it; "
            "give its class a __len__ that does"
        )
        raise TypeError(msg)
    if not shape or shape[0] == 0:
        msg = f"a batch needs at least one sample along dimension 0, got a tensor of shape {shape}"
        raise ValueError(msg)
    return shape[0]


def ambiguity(batch: Any) -> str | None:
    """What leaves open how many samples ``batch`` has: tensors of unlike lengths; else None."""
    lengths = [leaf.shape[:1] for leaf in _leaves(batch) if isinstance(leaf, Tensor)]
    if len({tuple(length) for length in lengths}) < 2:
        return None
    return f"its tensors have {[tuple(length) for length in lengths]} rows"


def take(batch: Any, rows: Tensor | slice) -> Any:
    """The samples ``rows`` of a tensor, or of each tensor of a tuple, list or dict.

    Raises:
        TypeError: the batch is none of these, or its tensors differ in their numbers of rows.
    """
    unlike = ambiguity(batch)
    if unlike is not None:
        msg = f"cannot cut a batch into samples: {unlike}; pass four or more batches"
        raise TypeError(msg)
    return _take(batch, rows)


def _take(batch: Any, rows: Tensor | slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {key: _take(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return _like(batch, [_take(value, rows) for value in batch])
    msg = f"cannot cut a batch of type {type(batch).__name__}: pass batches of the size wanted"
    raise TypeError(msg)


def join(batches: Sequence[Any]) -> Any:
    """One batch of all the samples, of the form of the first.

    Raises:
        TypeError: the batches are not tensors, or tuples, lists or dicts of them.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = {tuple(tensor.shape[1:]) for tensor in batches}
        if len(shapes) > 1:
            msg = f"cannot join batches whose samples differ in shape: {sorted(shapes)}"
            raise TypeError(msg)
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: join([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)) and not isinstance(first, PackedSequence):
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


def _leaves(batch: Any) -> Iterator[Tensor | PackedSequence | int]:
    """What tells the number of samples: tensors, packed sequences, sizes of unknown objects."""
    if isinstance(batch, (Tensor, PackedSequence)):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(value)
    elif isinstance(size := getattr(batch, "batch_size", None), int):
        yield size
    elif isinstance(batch, Sized) and not isinstance(batch, (str, bytes)):
        yield len(batch)
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from _leaves(getattr(batch, field.name))
