"""Following the edges of the spectrum along training, at one to three products an update."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from batchlr.argument_ranges import require_count, require_inner_fraction
from batchlr.curvature_noise import DirectionalNoise, directional_noise, noise_of_products
from batchlr.gradients.gradient_noise import mean_gradient
from batchlr.krylov.edge_trail import EdgeLook, EdgeTrail, End
from batchlr.krylov.edge_trail import TrackedEdge as TrackedEdge
from batchlr.krylov.lanczos_process import Subspace
from batchlr.krylov.rayleigh_ritz import RitzSpace
from batchlr.lanczos import default_generator, gaussian
from batchlr.operators import LinearOperator
from batchlr.operators.base import BatchedOperator
from batchlr.operators.curvature_matrix import CurvatureMatrix

Ends = Literal["largest", "both"]

_CAPACITY = 12  # assumed: vectors of a longer run before it restarts from half of them
_RESTART_STEPS = 5  # assumed: products from a random vector on before a space is believed again


@dataclass(frozen=True)
class TrackedCurvature:
    """What one update of a `CurvatureTracker` found; curvature in units of the operator."""

    largest: TrackedEdge
    smallest: TrackedEdge | None  # None unless both ends are tracked
    num_products: int
    converged: bool  # every tracked end's error is within the tolerance
    fell_back: bool  # it took more products than a warm update may, as the first always does
    # with noise: each batch's own matrix on the space searched
    subspace: Subspace | None = field(default=None, repr=False)
    noise: DirectionalNoise | None = None  # with noise: along the top vector


@final
class CurvatureTracker:
    """Largest (and smallest) eigenvalue of a matrix that changes slowly, as in training.

    Every update is a Rayleigh-Ritz search on the operator of the day, from the last eigenvector, or
    from that and the gradient where the gradient has been telling more, as where much happens
    between updates: products go to that vector, then to residuals, until the error estimate is
    within ``tol``. Most updates take one to three products. One that is not done after
    ``max_products`` goes on (the longer run, `TrackedCurvature.fell_back`) up to ``max_run``, in
    bounded memory and without losing a product. An eigenvalue that overtakes the tracked one is
    found through a second vector that is kept, mixed with the gradient, and looked at with one
    product every ``explore_every``-th update, or every other while the two are close.

    The residual is certified, the error is an estimate: its gap is to the second eigenvalue as far
    as it has been seen, and it knows nothing of an eigenvalue that has just overtaken.

    Memory: ``2 min(m, 12) P`` numbers within an update of ``m`` products, two vectors an end
    between updates; with noise ``2 K max_products P`` more for ``K`` batches.

    Args:
        ends: ``"largest"``, or ``"both"`` (products and limits then count for two).
        tol: error at which an update stops, relative to the largest eigenvalue; of the smallest,
            to the largest magnitude seen. At the default mean true errors came out
            at 0.3 % to 1.9 %, single ones at up to 3.5 % (docs/benchmarks.md).
        max_products: of a usual update, per end (assumed).
        max_run: of the first update and of longer runs, per end (assumed).
        explore_every: updates between two looks for an eigenvalue that has overtaken (measured at
            updates of every step, docs/log.md); 1 where much happens between updates.
        with_noise: also return how batches differ (`TrackedCurvature.subspace`, ``noise``). It
            needs operators of two or more batches and takes no product, or one after a longer run.
        generator: for the first start where there is no gradient; without one the seed is 0.

    Raises:
        ValueError: an argument is illegal.
    """

    def __init__(
        self,
        *,
        ends: Ends = "largest",
        tol: float = 0.05,
        max_products: int = 3,
        max_run: int = 30,
        explore_every: int = 8,
        with_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if ends not in ("largest", "both"):
            msg = f"ends must be 'largest' or 'both', got {ends!r}"
            raise ValueError(msg)
        require_inner_fraction(tol=tol)
        if not 1 <= max_products <= max_run:
            msg = (
                f"max_products must lie between 1 and max_run, got {max_products} and a "
                f"max_run of {max_run}"
            )
            raise ValueError(msg)
        require_count(explore_every=explore_every)
        self.ends: Ends = ends
        self.tol = tol
        self.max_products = max_products
        self.max_run = max_run
        self.explore_every = explore_every
        self.with_noise = with_noise
        self.num_products = 0
        self.num_updates = 0
        self._generator = default_generator(generator)
        followed: tuple[End, ...] = ("largest", "smallest") if ends == "both" else ("largest",)
        self._trails = {end: EdgeTrail(end) for end in followed}

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """Eigenvectors ``(P,)`` of the tracked ends; empty before the first update."""
        return tuple(t.vector for t in self._trails.values() if t.vector is not None)

    def update(
        self, operator: LinearOperator, *, gradient: Tensor | None = None
    ) -> TrackedCurvature:
        """Find the edges of ``operator``, starting from those of the last update.

        Args:
            operator: the matrix as it is now: new weights, new batches, a new preconditioner. Of
                the size of the last one.
            gradient: ``(P,)`` in the operator's coordinates (``scale * g`` for a preconditioned
                matrix); it leans towards the top of the spectrum. By default that of the operator's
                own batches, where it has them (`CurvatureMatrix`: free).

        Raises:
            ValueError: the operator's size has changed, or ``gradient`` does not fit.
            TypeError: noise is wanted from an operator without batches.
            ArithmeticError: a product is not finite; the tracker is left as it was, its products
                counted.
        """
        self._check(operator)
        for trail in self._trails.values():
            trail.move(operator.device, operator.dtype)
        gradient = self._usable(gradient, operator)
        warm = self.max_products * len(self._trails)
        space = RitzSpace(
            operator,
            min(_CAPACITY, self.max_run * len(self._trails)),
            by_batch=self.with_noise,
            keep_products=2 * warm if self.with_noise else 0,
        )
        try:
            looks = self._search(space, gradient)
        except ArithmeticError:
            self.num_products += space.num_products
            raise
        edges = {end: look.edge(space) for end, look in looks.items()}
        products, subspace, noise = space.num_products, None, None
        if self.with_noise:
            subspace = space.subspace()
            noise, spent = _noise(space, subspace)
            products += spent
        for end, edge in edges.items():
            self._trails[end].learn(space, edge.vector, gradient)
        self.num_updates += 1
        self.num_products += products
        worst = max(look.relative for look in looks.values())
        return TrackedCurvature(
            largest=edges["largest"],
            smallest=edges.get("smallest"),
            num_products=products,
            converged=worst <= self.tol or space.size == operator.shape[0],
            fell_back=space.num_products > warm,
            subspace=subspace,
            noise=noise,
        )

    def _search(self, space: RitzSpace, gradient: Tensor | None) -> dict[End, EdgeLook]:
        """Let vectors join ``space`` until the error of every end is small, or products run out.

        First those that earlier searches have left: the last eigenvectors, and where an eigenvalue
        may have overtaken. Then, one by one, the residual of the end whose error is the largest.
        """
        self._begin(space, gradient)
        to_explore = [trail for trail in self._trails.values() if self._explores(trail)]
        # Without an eigenvector from before a space that is closed says nothing of the rest: then a
        # random vector joins, once, and what follows from it is waited for.
        closed_is_suspect, trusted_from = not self.vectors, 0
        limit, size = self.max_run * len(self._trails), space.operator.shape[0]
        room = {end: _new_vector(space.operator) for end in self._trails}
        while space.num_products < limit and space.size < size:
            if to_explore:
                direction = to_explore.pop().exploration(gradient)
            else:
                looks = self._look(space, room)
                worst = max(looks.values(), key=lambda look: look.relative)
                direction = worst.remainder
                if worst.relative <= self.tol and space.num_products >= trusted_from:
                    if not (worst.closed and closed_is_suspect):
                        return looks
                    closed_is_suspect, trusted_from = False, space.num_products + _RESTART_STEPS
                    direction = None
            if not self._join(space, direction):
                break
        return self._look(space, room)

    def _begin(self, space: RitzSpace, gradient: Tensor | None) -> None:
        """The first vectors: the last eigenvectors, else the gradient, else a random one."""
        for trail in self._trails.values():
            start = trail.start(gradient)
            if start is not None:
                space.extend(start, end=self.ends)
        if space.size == 0 and (gradient is None or not space.extend(gradient)):
            space.extend(gaussian(space.operator, self._generator))

    def _join(self, space: RitzSpace, direction: Tensor | None) -> bool:
        """Let ``direction`` join, or a random vector where there is none or nothing new in it."""
        if direction is None:
            direction = gaussian(space.operator, self._generator)
        if space.extend(direction, end=self.ends):
            return True
        return space.extend(gaussian(space.operator, self._generator), end=self.ends)

    def _look(self, space: RitzSpace, room: dict[End, Tensor]) -> dict[End, EdgeLook]:
        """Every end as ``space`` knows it; ``room`` holds the last look, which is overwritten."""
        values, coefficients = space.ritz()
        return {
            end: trail.look(space, values, coefficients, out=room[end])
            for end, trail in self._trails.items()
        }

    def _explores(self, trail: EdgeTrail) -> bool:
        return trail.explores(self.num_updates, every=self.explore_every)

    def _usable(self, gradient: Tensor | None, operator: LinearOperator) -> Tensor | None:
        """The gradient, that of the operator's batches if none is given; None if of no use."""
        if gradient is not None:
            operator.check(gradient)
        trails = self._trails.values()
        if self.vectors and not any(self._explores(t) or t.gradient_share > 0 for t in trails):
            return None
        if gradient is None and isinstance(operator, CurvatureMatrix):
            gradient = mean_gradient(operator)
        if gradient is None:
            return None
        norm = float(gradient.norm())
        return gradient if math.isfinite(norm) and norm > 0 else None

    def _check(self, operator: LinearOperator) -> None:
        for vector in self.vectors:
            if vector.shape != operator.shape[:1]:
                msg = (
                    f"the tracker follows a ({vector.numel()}, {vector.numel()}) matrix, got one "
                    f"of shape {operator.shape}; use a new tracker"
                )
                raise ValueError(msg)
        if self.with_noise and not (
            isinstance(operator, BatchedOperator) and sum(w > 0 for w in operator.weights) > 1
        ):
            msg = (
                f"with_noise needs an operator of two or more batches, got "
                f"{type(operator).__name__}; give it more, or leave with_noise out"
            )
            raise TypeError(msg)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; with it a resumed tracker goes on bit-identically."""
        return {
            "num_products": self.num_products,
            "num_updates": self.num_updates,
            "trails": {end: trail.state_dict() for end, trail in self._trails.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved.

        Raises:
            ValueError: it is of a tracker of other ends.
        """
        trails = state_dict["trails"]
        if set(trails) != set(self._trails):
            msg = f"the state is of ends {sorted(trails)}, the tracker's are {sorted(self._trails)}"
            raise ValueError(msg)
        self.num_products = state_dict["num_products"]
        self.num_updates = state_dict["num_updates"]
        self._trails = {end: EdgeTrail.of_state(end, trails[end]) for end in self._trails}
        self._generator.set_state(state_dict["generator"].cpu())


def _new_vector(operator: LinearOperator) -> Tensor:
    """Room for a vector ``(P,)``: new pages of memory cost more than a pass over old ones."""
    return torch.empty(operator.shape[0], dtype=operator.dtype, device=operator.device)


def _noise(space: RitzSpace, subspace: Subspace) -> tuple[DirectionalNoise, int]:
    """Noise along the top vector and the products it took: none, or one after a longer run."""
    operator = space.operator
    assert isinstance(operator, BatchedOperator)
    vector, others = subspace.basis.vector(0), subspace.axes[:, 1:]
    vector = vector / vector.norm()
    _, coefficients = space.ritz()
    products = space.batch_products(coefficients[:, 0])
    if products is None:
        return directional_noise(operator, vector, others=others), 1
    return noise_of_products(products, operator.weights, vector, others=others), 0
