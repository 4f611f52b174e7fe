"""Reading the noise of a gradient off the backward passes that accumulate it."""

from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import Tensor, nn

from batchlr.gradients.gradient_scatter import GradientScatter, scatter_of_norms
from batchlr.inner_products import norm
from batchlr.sharded_tensors import local_part, norms_of_whole


@final
class GroupGradients:
    """Norms of the gradients of a batch's groups, from what each adds to ``.grad``.

    No backward pass more than training makes: call `add` after the one of each micro-batch, and
    `scatter` after the last, before anything else is done to the gradients (clipping, unscaling
    that is not the same for all). Whether losses are divided by the number of micro-batches or not
    does not matter to any test of batch sizes, which knows ratios only.

    It holds a copy of the gradients from `add` to `scatter`, and reads them twice a group. What was
    added is of one step: every step with an `add` ends in `scatter` or `forget`, or the next one's
    groups are compared with gradients that are no longer there.

    Args:
        parameters: those trained.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> groups = GroupGradients(layer.parameters())
    >>> for x in (1.0, 3.0):
    ...     (layer(torch.tensor([[x]])) / 2).sum().backward()  # gradients 1 and 3, halved
    ...     groups.add()
    >>> scatter = groups.scatter(2)
    >>> scatter.square_norm, scatter.trace
    (4.0, 2.0)
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._seen: dict[int, Tensor] = {}  # by place in the list
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        """Take note of one group, whose gradients were just added to zeroed ones or to others'.

        A step that calls it calls `scatter`, or `forget` where its noise is not asked for.
        """
        found = {n: p.grad for n, p in enumerate(self._parameters) if p.grad is not None}
        parts = {number: _part(gradient) for number, gradient in found.items()}
        # In place, so that there is one copy of the gradients and no second.
        changes = [
            self._seen[number].sub_(part) if number in self._seen else part
            for number, part in parts.items()
        ]
        self._squares.append(_square(changes, list(found.values())))
        for number, part in parts.items():
            if number in self._seen:
                self._seen[number].copy_(part)
            else:
                self._seen[number] = part.clone()

    def forget(self) -> None:
        """Drop the groups added so far: of a step whose `scatter` is not wanted, or was skipped."""
        self._seen, self._squares = {}, []

    @torch.no_grad()
    def scatter(
        self,
        batch_size: int,
        *,
        dataset_size: int | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> GradientScatter:
        """The batch's, and forget its groups; one synchronisation with the device.

        Args:
            batch_size: samples of all groups together, which are of equal size.
            dataset_size: what they were drawn from without replacement.
            total: adds a tensor over all processes, where each has groups of its own: call `add`
                while gradients are still local, and `scatter` when ``.grad`` is their average.
                None for one process, or sharded gradients, of which every group is all processes'.

        Raises:
            ValueError: there are fewer than two groups, or no gradient.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients or not self._squares:
            msg = "there are no gradients: call add() after each micro-batch's backward pass"
            raise ValueError(msg)
        square_norm = _square([_part(gradient) for gradient in gradients], gradients)
        here = len(self._squares)
        # A group's own gradient is `here` times what it added to the mean.
        sums = torch.stack(
            [torch.stack(self._squares).sum() * here**2, torch.full_like(square_norm, here)]
        )
        if total is not None:
            sums = total(sums)
        squares, count, norm = torch.cat([sums, square_norm.reshape(1)]).tolist()
        self.forget()
        return scatter_of_norms(
            squares,
            norm,
            num_groups=round(count),
            batch_size=batch_size,
            dataset_size=dataset_size,
        )


def _part(gradient: Tensor) -> Tensor:
    """What this process has of ``gradient``; of a sparse one all entries."""
    part = local_part(gradient)
    return part.to_dense() if part.is_sparse else part


def _square(parts: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Squared norm ``()`` of all together, in float64; ``parts`` are this process's."""
    norms = [norm(part) for part in parts]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    whole = norms_of_whole(norms, gradients)
    return torch.stack([own.to(whole[0].device) for own in whole]).square().sum()
