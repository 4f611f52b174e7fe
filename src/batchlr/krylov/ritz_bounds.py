"""How far eigenvalues can be from Ritz values: what is certain, and what is likely."""

import torch
from torch import Tensor


def certified_bounds(
    values: Tensor, residuals: Tensor, *, end: str = "largest", rounding: Tensor | float = 0.0
) -> Tensor:
    """For each Ritz value a distance ``(m,)`` within which an eigenvalue lies, whatever the rest.

    Any vector ``u`` has an eigenvalue within ``|A u - theta u| / |u|`` of ``theta`` (Weinstein). A
    Ritz vector is seldom the best such ``u`` in its Krylov space: all residuals there are multiples
    of one vector, so that others' parts cancel some of it (refined Ritz vectors, Jia 1997). The
    least norm over the space is the smallest singular value of ``[diag(theta_j - theta); r']``;
    the first step of its secular equation is never below that, and for the outermost value within
    one percent of it once the bound is below a tenth of the gap to the next:

        ``|r_i| / sqrt(1 + sum_j r_j^2 / (theta_j - theta_i)^2)``

    On networks it is 9 to 40 % below the residual of the largest eigenvalue (measured,
    docs/log.md). Values further out than ``theta_i`` do not help it, lest it be certified by their
    eigenvalues. That no eigenvalue further out has gone unseen is not certified by this or any
    other bound on a Krylov space.

    Args:
        values: ``(m,)`` Ritz values of one Krylov space, ascending.
        residuals: ``(m,)`` norms of their vectors' residuals, parallel to one another.
        end: ``"largest"`` or ``"smallest"``, from which values are counted.
        rounding: what ``values`` are uncertain by anyway.
    """
    distances = values.unsqueeze(0) - values.unsqueeze(1)  # of j from i
    inwards = distances < 0 if end == "largest" else distances > 0
    shares = residuals.square() / distances.square().clamp(min=_tiny(values, rounding))
    helped = torch.where(inwards, shares, torch.zeros_like(shares)).sum(1)
    return residuals / (1 + helped).sqrt()


def likely_errors(values: Tensor, residuals: Tensor) -> Tensor:
    """``residual^2 / gap`` (Kato-Temple) ``(m,)``, or the residual where the gap is no larger.

    The gap is that to the nearest neighbour as far as its residual may reach; it holds if no
    eigenvalue in between has gone unseen.

    Args:
        values: ``(m,)`` Ritz values, ascending.
        residuals: ``(m,)`` of them.
    """
    if values.numel() == 1:
        return residuals
    below = values[1:] - values[:-1] - residuals[:-1]  # of each but the first, downwards
    above = values[1:] - values[:-1] - residuals[1:]  # of each but the last, upwards
    far = values.new_full((1,), torch.inf)
    gaps = torch.minimum(torch.cat([far, below]), torch.cat([above, far]))
    return torch.where(gaps > residuals, residuals.square() / gaps, residuals)


def _tiny(values: Tensor, rounding: Tensor | float) -> Tensor:
    """A squared distance that cannot be told from zero."""
    least = torch.finfo(values.dtype).tiny
    return torch.as_tensor(rounding, dtype=values.dtype, device=values.device).square() + least
