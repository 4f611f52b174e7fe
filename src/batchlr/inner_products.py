"""Inner products of long vectors, to more digits than their own type sums up."""

import torch
from torch import Tensor

PART = 1 << 16
"""Numbers summed in the vectors' own type at a time. A single float32 sum of 10^7 numbers loses
what is added late: 2e-4 of a squared norm, 3e-5 of an inner product (measured, docs/log.md)."""


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product ``()`` in float64, of parts summed in the vectors' own type.

    Where their products may be beyond its range (entries near 1e-17 or 1e17 in float32) they are
    multiplied in float64; long vectors on an accelerator are not, which would have to be waited
    for.
    """
    if left.dtype == torch.float64:
        return torch.dot(left, right)
    if left.numel() <= PART:
        return torch.dot(left.double(), right.double())
    if left.device.type == "cpu":
        parts = zip(torch.split(left, PART), torch.split(right, PART), strict=True)
        total = torch.stack([torch.dot(a, b) for a, b in parts]).sum(dtype=torch.float64)
        if _in_range(float(total), left.dtype):
            return total
        parts = zip(torch.split(left, PART), torch.split(right, PART), strict=True)
        return torch.stack([torch.dot(a.double(), b.double()) for a, b in parts]).sum()
    whole = left.numel() // PART * PART  # one kernel for all parts
    rest = torch.dot(left[whole:].double(), right[whole:].double())
    sums = torch.linalg.vecdot(left[:whole].view(-1, PART), right[:whole].view(-1, PART))
    return rest.add_(sums.sum(dtype=torch.float64))


def _in_range(total: float, dtype: torch.dtype) -> bool:
    """Whether no product that counts in a sum of ``dtype`` can have over- or underflowed."""
    info = torch.finfo(dtype)
    return PART * info.tiny / info.eps < abs(total) < info.max


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm ``()`` in float64, of any shape and as good as `dot`; halves are widened."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32))
    return dot(flat, flat).sqrt()


def dots(rows: Tensor, vectors: Tensor) -> Tensor:
    """``rows @ vectors`` in float64: ``(m, P)`` with ``(P,)`` or ``(P, b)``.

    On the CPU in parts; the kernels of accelerators sum in parts by themselves (assumed).
    """
    size = vectors.shape[0]
    if size <= PART or rows.dtype == torch.float64 or rows.device.type != "cpu":
        return (rows @ vectors).double()
    total = torch.zeros(len(rows), *vectors.shape[1:], dtype=torch.float64, device=rows.device)
    for first in range(0, size, PART):
        part = slice(first, first + PART)
        total += rows[:, part] @ vectors[part]
    return total
