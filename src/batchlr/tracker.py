"""Following the edges of the spectrum along training, at one to three products an update."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from batchlr.curvature_noise import DirectionalNoise, directional_noise, noise_of_products
from batchlr.gradients.gradient_noise import mean_gradient
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.krylov.lanczos_process import Subspace
from batchlr.krylov.rayleigh_ritz import RitzSpace
from batchlr.lanczos import default_generator, gaussian
from batchlr.measured import Measured
from batchlr.operators import LinearOperator
from batchlr.operators.base import BatchedOperator
from batchlr.operators.curvature_matrix import CurvatureMatrix

Ends = Literal["largest", "both"]

_CAPACITY = 12  # assumed: vectors of a longer run before it restarts from half of them
_EXPLORE_NEAR = 2  # assumed: `explore_every` at most, where the second is within `_NEAR`
_NEAR = 0.75  # assumed
_GRADIENT_SHARE = 0.2  # assumed: of the gradient's direction in such a look
_DOUBT = (4.0, 1.4)  # measured (docs/log.md): of a gap remembered, of one seen
_CLOSED = 1e-5  # assumed: a residual this small beside the spectrum is rounding
_RESTART_STEPS = 5  # assumed: products from a random vector on before a space is believed again
_FLUSHED = 1e-30  # assumed: entries of a unit vector that may be zero as well
_SURE = 1e-3  # assumed: 1 - c^2 of the best estimate of a direction
_LEAST = 1e-3  # assumed: weight of one that told nothing, lest the other's share be infinite
_FORGET = 0.97  # measured (docs/log.md): of the second eigenvalue seen, at each update


@dataclass(frozen=True)
class TrackedEdge:
    """One end of the spectrum at one update."""

    value: float  # Rayleigh quotient of `vector`: never beyond the true edge
    residual: float  # |A v - value v|: certified, some eigenvalue lies within it of the value
    error: float  # an estimate of the order of residual^2 / gap, at most the residual
    # (P,) of unit norm; the tracker's own until its next update: do not change it
    vector: Tensor = field(repr=False)

    @property
    def measured(self) -> Measured:
        """The value with its estimated error."""
        return Measured(self.value, self.error)


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


@dataclass
class _Trail:
    """What is remembered of one end between updates."""

    vector: Tensor | None = None  # (P,) the edge's eigenvector
    explorer: Tensor | None = None  # (P,) where the next eigenvalue is sought
    ratio: float | None = None  # of the second value to the edge
    far: float = 0.0  # the other end of the spectrum, or zero if that is beyond
    kept: float | None = None  # cosine of the vectors found by two updates in turn
    lean: float | None = None  # of the gradient and what was found

    @property
    def gradient_share(self) -> float:
        """How much of the gradient a start has beside the last vector, both of unit norm.

        Estimates of one direction whose errors are independent go together best with weights
        ``c / (1 - c^2)``, where ``c`` are their cosines with it. A gradient that told less than the
        last vector is left out (measured, docs/log.md).
        """
        if self.kept is None or self.lean is None or self.lean < self.kept:
            return 0.0
        return _weight(self.lean) / max(_weight(self.kept), _LEAST)

    def learn(self, found: Tensor, slope: Tensor | None) -> None:
        """Take ``found`` as the edge's vector, and note what would have told it beforehand."""
        if self.vector is not None:
            self.kept = _averaged(self.kept, _cosine(self.vector, found))
        if slope is not None:
            self.lean = _averaged(self.lean, _cosine(slope, found))
        self.vector = found

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """A trail read from a checkpoint may lie elsewhere than the model."""
        if self.vector is not None:
            self.vector = self.vector.to(device, dtype)
        if self.explorer is not None:
            self.explorer = self.explorer.to(device, dtype)


@dataclass(frozen=True)
class _Look:
    """What the space says of one end."""

    value: float
    residual: float
    error: float
    column: Tensor  # (m,) coefficients of its vector


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
            to the largest magnitude seen. Mean true errors came out at 0.3 % to 2.5 %
            (`benchmarks/tracking.py`), single ones higher.
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
        tol: float = 0.03,
        max_products: int = 3,
        max_run: int = 30,
        explore_every: int = 8,
        with_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if ends not in ("largest", "both"):
            msg = f"ends must be 'largest' or 'both', got {ends!r}"
            raise ValueError(msg)
        if not 0 < tol < 1:
            msg = f"tol must lie in (0, 1), got {tol}"
            raise ValueError(msg)
        if not 1 <= max_products <= max_run:
            msg = (
                f"max_products must lie between 1 and max_run, got {max_products} and a "
                f"max_run of {max_run}"
            )
            raise ValueError(msg)
        if explore_every < 1:
            msg = f"explore_every must be at least 1, got {explore_every}"
            raise ValueError(msg)
        self.ends: Ends = ends
        self.tol = tol
        self.max_products = max_products
        self.max_run = max_run
        self.explore_every = explore_every
        self.with_noise = with_noise
        self.num_products = 0
        self.num_updates = 0
        self._generator = default_generator(generator)
        self._trails = {"largest": _Trail()}
        if ends == "both":
            self._trails["smallest"] = _Trail()

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
        slope = self._slope(operator, gradient)
        space = RitzSpace(
            operator,
            min(_CAPACITY, self.max_run * len(self._trails)),
            by_batch=self.with_noise,
            keep_products=2 * self.max_products * len(self._trails) if self.with_noise else 0,
        )
        try:
            edges = self._search(space, operator, slope)
        except ArithmeticError:
            self.num_products += space.num_products
            raise
        values, coefficients = space.ritz()
        warm = self.max_products * len(self._trails)
        fell_back = space.num_products > warm
        products = space.num_products
        subspace = noise = None
        if self.with_noise:
            subspace = _subspace(space, values, coefficients)
            noise, spent = _noise(space, operator, subspace)
            products += spent
        for end, edge in edges.items():
            self._trails[end].learn(edge.vector, slope)
            self._remember(space, end, edge, values, coefficients)
        self.num_updates += 1
        self.num_products += products
        errors = [_relative(end, edge, values) for end, edge in edges.items()]
        return TrackedCurvature(
            largest=edges["largest"],
            smallest=edges.get("smallest"),
            num_products=products,
            converged=max(errors) <= self.tol or space.size == operator.shape[0],
            fell_back=fell_back,
            subspace=subspace,
            noise=noise,
        )

    def _search(
        self, space: RitzSpace, operator: LinearOperator, slope: Tensor | None
    ) -> dict[str, TrackedEdge]:
        """Let vectors join the space until the ends are settled."""
        limit = self.max_run * len(self._trails)
        for trail in self._trails.values():
            if trail.vector is not None and space.num_products < limit:
                space.extend(_start(trail.vector, slope, trail.gradient_share), end=self.ends)
        if space.size == 0 and (slope is None or not space.extend(slope)):
            space.extend(gaussian(operator, self._generator))
        pending = [end for end in self._trails if self._due(end)]
        unproven = not self.vectors  # a first space that closes says nothing of what lies outside
        trusted_from = 0
        room = {end: _new_vector(operator) for end in self._trails}  # residuals, then results
        while space.num_products < limit and space.size < operator.shape[0]:
            values, coefficients = space.ritz()
            if pending:
                direction = self._exploration(pending.pop(), operator, slope)
            else:
                looks = self._looks(space, values, coefficients, room)
                errors = {end: _relative(end, look, values) for end, look in looks.items()}
                worst = max(errors, key=lambda end: errors[end])
                direction = room[worst]
                if errors[worst] <= self.tol and space.num_products >= trusted_from:
                    closed = looks[worst].residual <= _CLOSED * float(values.abs().max())
                    if not (unproven and closed):
                        return {end: _edge(space, look, room[end]) for end, look in looks.items()}
                    unproven, trusted_from = False, space.num_products + _RESTART_STEPS
                    direction = gaussian(operator, self._generator)
            joined = space.extend(direction, end=self.ends)
            if not joined and not space.extend(gaussian(operator, self._generator), end=self.ends):
                break
        looks = self._looks(space, *space.ritz(), room)
        return {end: _edge(space, look, room[end]) for end, look in looks.items()}

    def _due(self, end: str) -> bool:
        """Whether this update looks for an overtaking eigenvalue."""
        trail = self._trails[end]
        if trail.vector is None:
            return False
        near = trail.ratio is not None and trail.ratio > _NEAR
        every = min(self.explore_every, _EXPLORE_NEAR) if near else self.explore_every
        return self.num_updates % every == 0

    def _asks(self, end: str) -> bool:
        """Whether this update has a use for the gradient."""
        return self._due(end) or self._trails[end].gradient_share > 0

    def _exploration(self, end: str, operator: LinearOperator, slope: Tensor | None) -> Tensor:
        """Where an overtaking eigenvalue is looked for."""
        explorer = self._trails[end].explorer
        if slope is None:
            return gaussian(operator, self._generator) if explorer is None else explorer
        if explorer is None:
            return slope
        return torch.add(explorer, slope, alpha=_GRADIENT_SHARE / float(slope.norm()))

    def _looks(
        self, space: RitzSpace, values: Tensor, coefficients: Tensor, room: dict[str, Tensor]
    ) -> dict[str, _Look]:
        """Each end as the space knows it; its residual ``(P,)`` is left in ``room``."""
        floor = torch.finfo(space.operator.dtype).eps * float(values.abs().max())
        looks = {}
        for end in self._trails:
            value, column = float(values[_index(end)]), coefficients[:, _index(end)]
            remainder = space.residual(value, column, out=room[end])
            residual = max(float(remainder.norm()), floor)
            looks[end] = _Look(value, residual, self._error(end, values, residual), column)
        return looks

    def _error(self, end: str, values: Tensor, residual: float) -> float:
        """``residual^2 / gap`` with a doubt of the gap, or the residual."""
        trail, value = self._trails[end], float(values[_index(end)])
        if trail.vector is None:  # a gap seen from a random start means nothing
            return residual
        # Networks have their bulk at zero, so zero is a neighbour, whatever the space has seen.
        neighbours = [0.0] if trail.ratio is None else [0.0, trail.ratio * value]
        if len(values) > 1:
            neighbours.append(float(values[1 if end == "largest" else -2]))
        gap = min(abs(value - neighbour) for neighbour in neighbours)
        doubt = _DOUBT[0] if len(values) == 1 else _DOUBT[1]
        return residual if gap <= doubt * residual else doubt * residual**2 / gap

    def _remember(
        self,
        space: RitzSpace,
        end: str,
        edge: TrackedEdge,
        values: Tensor,
        coefficients: Tensor,
    ) -> None:
        trail = self._trails[end]
        far = float(values[-1 if end == "largest" else 0])
        trail.far = (
            min(far, _FORGET * trail.far) if end == "largest" else max(far, _FORGET * trail.far)
        )
        if len(values) < 2:
            return
        second = 1 if end == "largest" else -2
        column = coefficients[:, second]
        # One step of power iteration, shifted so that the far end of the spectrum dies out.
        step = space.residual(trail.far, column, out=trail.explorer)
        norm = float(step.norm())
        trail.explorer = _flushed(step.div_(norm) if norm > 0 else space.vector(column))
        if edge.value == 0:
            return
        found = float(values[second]) / edge.value
        trail.ratio = found if trail.ratio is None else max(found, _FORGET * trail.ratio)

    def _slope(self, operator: LinearOperator, gradient: Tensor | None) -> Tensor | None:
        """The gradient, or None if there is none or it has no direction."""
        if gradient is not None:
            operator.check(gradient)
        if self.vectors and not any(self._asks(end) for end in self._trails):
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
            isinstance(operator, BatchedOperator) and len(operator.samples) > 1
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
            "trails": {
                end: {
                    "vector": None if trail.vector is None else trail.vector.clone(),
                    "explorer": None if trail.explorer is None else trail.explorer.clone(),
                    "ratio": trail.ratio,
                    "far": trail.far,
                    "kept": trail.kept,
                    "lean": trail.lean,
                }
                for end, trail in self._trails.items()
            },
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
        self._trails = {end: _Trail(**trails[end]) for end in self._trails}
        for trail in self._trails.values():
            if trail.explorer is not None:
                trail.explorer = trail.explorer.clone()  # which the next update overwrites
        self._generator.set_state(state_dict["generator"].cpu())


def _relative(end: str, edge: _Look | TrackedEdge, values: Tensor) -> float:
    """Error of an edge, relative to what the search is for.

    That of the largest is relative to itself, for negative curvature may be many times stronger. A
    largest that is negative is not believed: networks have their bulk at zero.
    """
    scale = max(edge.value, 0.0) if end == "largest" else float(values.abs().max())
    if scale == 0:
        return math.inf if edge.error > 0 else 0.0
    return edge.error / scale


def _start(vector: Tensor, slope: Tensor | None, share: float) -> Tensor:
    """Where a search begins: ``vector`` and ``share`` of the gradient's direction."""
    if slope is None or share == 0:
        return vector
    share = math.copysign(share, float(torch.dot(vector, slope)))
    return torch.add(vector, slope, alpha=share / float(slope.norm()))


def _cosine(left: Tensor, unit: Tensor) -> float:
    """Magnitude of the cosine between a vector and one of unit norm."""
    return min(1.0, abs(float(torch.dot(left, unit) / left.norm())))


def _averaged(before: float | None, new: float) -> float:
    """Half of what was, half of what is (assumed)."""
    return new if before is None else (before + new) / 2


def _weight(cosine: float) -> float:
    """Of an estimate of a direction; see `_Trail.gradient_share`."""
    return cosine / max(1 - cosine**2, _SURE)


def _new_vector(operator: LinearOperator) -> Tensor:
    """Room for a vector ``(P,)``: new pages of memory cost more than a pass over old ones."""
    return torch.empty(operator.shape[0], dtype=operator.dtype, device=operator.device)


def _edge(space: RitzSpace, look: _Look, out: Tensor) -> TrackedEdge:
    """The end that was looked at, its vector in ``out``."""
    vector = space.vector(look.column, out=out)
    vector = _flushed(vector.div_(vector.norm()))
    return TrackedEdge(look.value, look.residual, look.error, vector)


def _flushed(vector: Tensor) -> Tensor:
    """The vector less its tiniest entries, in place.

    What a matrix maps to zero, such as the weights of dead units, shrinks by a factor at each
    update. Some hundred updates later it consists of subnormal numbers, with which a CPU multiplies
    four times as slowly (measured, docs/log.md).
    """
    return torch.hardshrink(vector, _FLUSHED, out=vector)


def _index(end: str) -> int:
    return 0 if end == "largest" else -1


def _subspace(space: RitzSpace, values: Tensor, coefficients: Tensor) -> Subspace:
    return Subspace(
        values=values,
        weights=space.overlaps(coefficients),
        matrices=space.matrices(coefficients),
        basis=KrylovBasis.of(space.rows(coefficients)),
    )


def _noise(
    space: RitzSpace, operator: LinearOperator, subspace: Subspace
) -> tuple[DirectionalNoise, int]:
    """Noise along the top vector and the products it took: none, or one after a longer run."""
    assert isinstance(operator, BatchedOperator)
    vector, others = subspace.basis.vector(0), subspace.axes[:, 1:]
    vector = vector / vector.norm()
    _, coefficients = space.ritz()
    products = space.batch_products(coefficients[:, 0])
    if products is None:
        return directional_noise(operator, vector, others=others), 1
    return noise_of_products(products, operator.weights, vector, others=others), 0
