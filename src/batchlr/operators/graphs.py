"""Recorded graphs: how large they are, and how many are kept between products."""

import logging
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchlr.argument_ranges import require_count

logger = logging.getLogger("batchlr")

KeepGraph = bool | Literal["auto"]

SHARE_OF_MEMORY = 0.5
"""Of the memory free when the first batch is recorded, what kept graphs may take (assumed)."""

MANY = 1 << 30
"""Products expected where nobody says how many."""


@dataclass(frozen=True)
class Recording:
    """One batch, recorded for differentiation at the weights it was recorded at."""

    # The functions must not refer to the operator: a cycle would keep the graph until collected.
    loss: Tensor  # () mean loss of the batch
    gradient: Callable[[], Sequence[Tensor | None]]  # of that loss, by parameter; None is zero
    product: Callable[[Sequence[Tensor], Sequence[int]], Sequence[Tensor | None]]
    """Tangents of the parameters numbered, to the curvature matrix's image in the same ones."""
    roots: tuple[Tensor, ...]  # all of its graph hangs on these
    runs_model: bool = False  # whether a product runs the model: it must be isolated then
    computed_anew: bool = False  # whether layers hold recipes in place of tensors: `holding_all`


@final
class GraphStore:
    """Keeps recordings, by number, while a budget lasts.

    Raises:
        ValueError: ``keep``, ``budget`` or ``expected`` is illegal.
    """

    def __init__(
        self,
        keep: KeepGraph,
        budget: int | None,
        expected: int | None,
        owned: Iterable[Tensor],
    ) -> None:
        if keep not in (True, False, "auto"):
            msg = f"keep_graph must be True, False or 'auto', got {keep!r}"
            raise ValueError(msg)
        if budget is not None and budget < 0:
            msg = f"memory_budget must be a number of bytes, at least 0, got {budget}"
            raise ValueError(msg)
        if budget is not None and keep != "auto":
            msg = f"memory_budget decides for keep_graph='auto' only, got keep_graph={keep}"
            raise ValueError(msg)
        if expected is not None:
            require_count(expected_products=expected)
        self._keep = keep
        self._budget = budget
        self._owned = list(owned)
        self._used = 0
        self._closed = keep is False or (keep == "auto" and expected == 1)
        self._full = self._closed
        self._told = False
        self._expected = MANY if expected is None else expected
        self._kept: dict[int, Recording] = {}

    def get(self, number: int) -> Recording | None:
        """The recording kept under ``number``."""
        return self._kept.get(number)

    def uses(self, columns: int) -> int:
        """How many products the next recording will serve, of which ``columns`` are due now."""
        return columns if self._full else max(columns, self._expected)

    def offer(self, number: int, recording: Recording) -> None:
        """Keep ``recording`` if there is room."""
        if self._full:
            return
        if self._keep == "auto":
            size = self.bytes_of(recording)
            if self._budget is None:
                self._budget = default_budget(recording.loss.device)
            self._used += size
            logger.debug(
                "graph of batch %d: %.3g MB; kept so far %.3g of %.3g MB",
                number, size / 1e6, self._used / 1e6, self._budget / 1e6,
            )  # fmt: skip
            if self._used > self._budget:
                self._full = True
                if not self._told:
                    logger.info(
                        "the graphs of %d batches fill the memory budget of %.3g MB; those of the "
                        "others are recorded anew for each product",
                        len(self._kept), self._budget / 1e6,
                    )  # fmt: skip
                self._told = True
                return
        self._kept[number] = recording

    def bytes_of(self, recording: Recording) -> int:
        """What keeping ``recording`` takes, `graph_bytes`."""
        return graph_bytes(recording.roots, self._owned, computed_anew=recording.computed_anew)

    def clear(self) -> None:
        """Forget all recordings; there is room again."""
        self._kept.clear()
        self._used = 0
        self._full = self._closed


@contextmanager
def offloaded(resident: Sequence[Tensor]) -> Iterator[None]:
    """What is recorded inside holds its tensors in main memory, but for ``resident`` ones."""
    owned = {t.untyped_storage().data_ptr() for t in resident}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        stays = tensor.untyped_storage().data_ptr() in owned
        # Detached: an output that holds itself would never be freed.
        return tensor.device, tensor.detach() if stays else tensor.detach().cpu()

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def default_budget(device: torch.device) -> int:
    """`SHARE_OF_MEMORY` of what is free on ``device``, in bytes."""
    return int(SHARE_OF_MEMORY * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Memory free on ``device``; main memory for all but CUDA."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return free_main_memory()


_CONTROL_GROUPS = {  # limit and use, of version 2 and of version 1
    "memory.max": "memory.current",
    "memory/memory.limit_in_bytes": "memory/memory.usage_in_bytes",
}


def free_main_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free bytes of the machine or of the container, whichever are fewer.

    What the container has read from files and can forget counts as free.

    Args:
        groups: where the system tells of control groups.
    """
    machine = _entry(Path("/proc/meminfo"), "MemAvailable:")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = pages // 2 if machine is None else 1024 * machine  # not Linux
    for limit_name, used_name in _CONTROL_GROUPS.items():
        limit, used = (_read(groups / name).strip() for name in (limit_name, used_name))
        if limit.isdigit() and used.isdigit():  # neither "max" nor missing
            statistics = (groups / limit_name).with_name("memory.stat")
            free = min(free, int(limit) - int(used) + (_entry(statistics, "inactive_file") or 0))
    return max(0, free)


def _entry(path: Path, name: str) -> int | None:
    """The number behind ``name`` in a file of names and numbers; None if there is none."""
    rows = (line.split() for line in _read(path).splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), None)


def _read(path: Path) -> str:
    """The text of a file, nothing if it cannot be read: not Linux, or no control groups."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


_ONCE = once_differentiable(lambda *_: None).__code__  # of any function so wrapped
_TELLS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")  # torch from 2.14 on
_HOOKED = "layers that compute anew what they have saved are measured otherwise (batchlr)"


class ComputedAnew(Exception):
    """A layer holds recipes in place of what its backward pass needs, as checkpointing does."""


@contextmanager
def holding_all() -> Iterator[None]:
    """Raises `ComputedAnew` where a graph recorded inside would not hold what it has saved."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKED):
            yield
    except RuntimeError as error:
        if _HOOKED in str(error):
            raise ComputedAnew from error
        raise


def computes_anew(roots: Sequence[Tensor]) -> bool:
    """Whether a layer does so in the graph behind ``roots``, recorded `offloaded`.

    Before torch 2.14 nothing tells, and the answer is yes.
    """
    if not _TELLS:
        return True
    hooks = (saved.unpack_hook for node in _nodes(roots) for saved in _holders(node))
    return any(h is not None and getattr(h, "__module__", None) != __name__ for h in hooks)


def graph_bytes(
    roots: Sequence[Tensor], owned: Iterable[Tensor] = (), *, computed_anew: bool = False
) -> int:
    """Bytes that the graph behind ``roots`` holds, each storage once.

    Args:
        roots: what the graph hangs on; they count.
        owned: their storages are there anyway and do not count.
        computed_anew: whether layers compute anew what they have saved. Before torch 2.14 they
            count as if they held it.
    """
    sizes = {t.untyped_storage().data_ptr(): 0 for t in owned}
    for tensor in roots:
        _count(tensor, sizes)
    if computed_anew and not _TELLS:
        nodes = (node for node in _nodes(roots) if not hasattr(node, "variable"))  # weights
        outputs = (output for node in nodes for output in node._input_metadata)
        held: int = sum(math.prod(o.shape) * o.dtype.itemsize for o in outputs)
        return sum(sizes.values()) + held
    for node in _nodes(roots):
        for tensor in _saved(node):
            _count(tensor, sizes)
    return sum(sizes.values())


def check_differentiable(roots: Sequence[Tensor]) -> None:
    """Raise ValueError if a backward pass through the graph behind ``roots`` has no derivative.

    Torch itself says so only to who differentiates by the cotangent, or calls ``backward``.
    """
    functions = (getattr(node, "_forward_cls", None) for node in _nodes(roots))
    if any(getattr(f.backward, "__code__", None) is _ONCE for f in functions if f is not None):
        msg = (
            "a layer can be differentiated only once (an autograd.Function marked with "
            "@once_differentiable), so that the loss has no Hessian: write its backward in "
            "operations that autograd knows, or take matrix='ggn'"
        )
        raise ValueError(msg)


def _nodes(roots: Sequence[Tensor]) -> Iterator[Any]:
    queue: list[Any] = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                queue.append(parent)


def _count(tensor: Tensor, sizes: dict[int, int]) -> None:
    storage = tensor.untyped_storage()
    sizes.setdefault(storage.data_ptr(), storage.nbytes())


def _saved(node: Any) -> Iterator[Tensor]:
    """What ``node`` holds; before torch 2.14 asked for, so that nothing may be computed anew."""
    if _TELLS:
        found = [saved.data for saved in _holders(node) if saved.unpack_hook is None]
    else:
        found = [tensor for name in _names(node.__class__)[1] for tensor in _each(node, name)]
    return (tensor for tensor in found if tensor is not None)


def _holders(node: Any) -> Iterator[Any]:
    """Torch's holders of what ``node`` has saved."""
    holders = (saved for name in _names(node.__class__)[0] for saved in _each(node, name))
    return (saved for saved in holders if saved is not None)


def _each(node: Any, name: str) -> Sequence[Any]:
    entry = getattr(node, name)
    return entry if isinstance(entry, (tuple, list)) else (entry,)


@cache
def _names(kind: Hashable) -> tuple[list[str], list[str]]:
    """Attributes that are holders of what was saved, and those that are the tensors themselves."""
    names = dir(kind)
    holders = [name for name in names if name.startswith("_raw_saved_")]
    tensors = [name.removeprefix("_raw") for name in holders]
    return holders, [name if name in names else name.removeprefix("_") for name in tensors]
