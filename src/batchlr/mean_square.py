"""Where SGD on a noisy quadratic stops contracting in the mean square, in many directions at once.

`learning_rates.max_sgd_lr` knows one direction; here the noise may carry energy from any direction
to any other. Without noise each direction answers an impulse on its own; what noise feeds back is
the response to it, so that stability is a question of one positive linear map (`loop_gain`).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchlr.argument_ranges import require_fraction, require_non_negative

Array = npt.NDArray[np.float64]

_STEP = 1e-4  # assumed: step of the difference quotients, over the distance to the noiseless limit
_TOLERANCE = 1e-7  # assumed: of a limit, relative; its sampling error is far larger
_ROUGH = 1e-3  # assumed: of a rate that only its scatter is wanted of, likewise
_DENSE = 8  # assumed: directions up to which a map on matrices is solved as a dense one


@dataclass(frozen=True)
class Dynamics:
    """What an optimizer makes of gradients, linear in them (PyTorch's conventions).

    ``v <- momentum v + dampening (g + weight_decay w)`` and ``w <- (1 - lr decoupled_decay) w - lr
    v``, with ``dampening = 1 - momentum`` for an average (Adam) and 1 for SGD. Nesterov's variant
    steps by ``g + momentum v``.

    Raises:
        ValueError: momentum is outside [0, 1), a decay is negative, or an average has Nesterov's
            step.
    """

    momentum: float = 0.0
    nesterov: bool = False
    averaged: bool = False
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0

    def __post_init__(self) -> None:
        require_fraction(momentum=self.momentum)
        require_non_negative(weight_decay=self.weight_decay, decoupled_decay=self.decoupled_decay)
        if self.nesterov and self.averaged:
            msg = "Nesterov's step is defined for SGD's momentum, not for an average"
            raise ValueError(msg)

    def noiseless_limit(self, largest: float) -> float:
        """The rate at which curvature ``largest`` alone stops contracting.

        ``2 (1 + m) / (largest + decay)`` for SGD with momentum; from Jury's criterion for the
        2 x 2 recursion of weight and velocity.
        """
        m = self.momentum
        stiffness = (largest + self.weight_decay) * (1 + 2 * m if self.nesterov else 1)
        if self.averaged:
            stiffness *= 1 - m
        return 2 * (1 + m) / (stiffness + (1 + m) * self.decoupled_decay)

    def flat_response(self, lr: float) -> float:
        """``h g`` as the curvature ``h`` of a direction goes to zero: ``lr / (2 (1 - momentum))``.

        For an average without the ``1 - momentum``, which its impulses carry already.
        """
        return lr / 2 if self.averaged else lr / (2 * (1 - self.momentum))

    def response(self, curvatures: Array, lr: float) -> Array:
        """``g_ij = sum_t c_i(t) c_j(t)`` ``(d, d)``, with ``c_i`` the weight's impulse response.

        ``c_i(t)`` is how far the weight along direction ``i`` stands ``t`` steps after a unit
        impulse in its gradient. For plain SGD ``g_ij = lr / (h_i + h_j - lr h_i h_j)``.
        """
        return self._response(curvatures, curvatures, lr)

    def _response(self, rows: Array, columns: Array, lr: float) -> Array:
        first, second = self._recursion(rows, lr), self._recursion(columns, lr)
        pairs = np.einsum("iab,jcd->ijacbd", first, second).reshape(len(rows), len(columns), 4, 4)
        impulse = self._impulse(lr)
        forcing = np.outer(impulse, impulse).reshape(4, 1)
        moments = np.linalg.solve(
            np.eye(4) - pairs, np.broadcast_to(forcing, (*pairs.shape[:3], 1))
        )
        result: Array = moments[..., 0, 0]
        return result

    def _recursion(self, curvatures: Array, lr: float) -> Array:
        """``(w, v) -> (w, v)`` ``(d, 2, 2)`` along each direction."""
        m = self.momentum
        gain = 1 - m if self.averaged else 1.0
        pull = gain * (curvatures + self.weight_decay)
        kept = 1 - lr * self.decoupled_decay
        matrix = np.empty((len(curvatures), 2, 2))
        matrix[:, 1, 0], matrix[:, 1, 1] = pull, m
        if self.nesterov:
            matrix[:, 0, 0], matrix[:, 0, 1] = kept - lr * (1 + m) * pull, -lr * m * m
        else:
            matrix[:, 0, 0], matrix[:, 0, 1] = kept - lr * pull, -lr * m
        return matrix

    def _impulse(self, lr: float) -> Array:
        gain = 1 - self.momentum if self.averaged else 1.0
        return gain * np.array([-lr * (1 + self.momentum if self.nesterov else 1.0), 1.0])


@dataclass(frozen=True)
class CurvatureSpread:
    """How a symmetric ``(d, d)`` matrix of mean ``diag(curvatures)`` fluctuates from step to step.

    The fluctuations are ``sum_k X -> scale D_k X D_k``, the covariance of ``K`` deviations;
    ``leak`` is the variance that each direction sends out of these ``d``, over its curvature.
    """

    curvatures: Array  # (d,) positive, descending
    deviations: Array  # (K, d, d) symmetric
    scale: float = 1.0
    leak: Array | float = 0.0  # (d,), or the same for all; unit: curvature

    def leaving(self) -> Array:
        """``leak`` of each pair of directions ``(d, d)``, those of a pair taken as coherent."""
        roots = np.sqrt(np.broadcast_to(self.leak, self.curvatures.shape))
        result: Array = np.outer(roots, roots)
        return result

    def feed(self, second_moment: Array) -> Array:
        """``E D X D`` ``(d, d)`` of a symmetric ``X``: what noise makes of the second moment."""
        fed = np.matmul(np.matmul(self.deviations, second_moment), self.deviations).sum(0)
        symmetric: Array = self.scale * (fed + fed.T) / 2
        return symmetric


@dataclass(frozen=True)
class Limit:
    """A largest stable rate and how it depends on what it was computed from."""

    lr: float
    noiseless: float  # the limit without fluctuations, never smaller
    steepness: float  # d ln(gain) / d ln(lr) at the limit; infinite where noise does not limit
    by_deviation: Array  # (K,) what each deviation's own feed contributes to the gain there
    by_curvature: Array  # (d,) d ln(lr) / d curvature
    outside: float = 0.0  # what the leak contributes to the gain there


def loop_gain(dynamics: Dynamics, spread: CurvatureSpread, lr: float) -> float:
    """Growth of the second moment through noise: below 1 it contracts, above 1 it grows.

    A perturbation of second moment ``X`` is fed back as ``g o E[D X D]``, with ``g`` the response
    and ``o`` the entrywise product; to that adds what noise sends out and back, ``X`` by the leak
    and the response of flat directions. The gain is the spectral radius of that map, which keeps
    the cone of positive semi-definite matrices. Where it reaches 1, and there is no leak, the full
    recursion of all second moments of weight and velocity has spectral radius 1 (Mulayoff &
    Michaeli 2024 for plain SGD); the leak is an approximation.
    """
    return _gain(dynamics, spread, lr, None)[0]


def mean_square_limit(dynamics: Dynamics, spread: CurvatureSpread) -> Limit:
    """The rate at which `loop_gain` reaches 1.

    Raises:
        ValueError: there is no positive curvature, or a number is not finite.
    """
    noiseless = _noiseless_limit(dynamics, spread)
    lr, start = _search(dynamics, spread, noiseless, None, _TOLERANCE)
    if start is None:
        return Limit(
            noiseless,
            noiseless,
            math.inf,
            np.zeros(len(spread.deviations)),
            _noiseless_slope(dynamics, spread.curvatures),
        )
    return _sensitivities(dynamics, spread, lr, noiseless, start)


def mean_square_lr(dynamics: Dynamics, spread: CurvatureSpread, *, near: float) -> float:
    """The rate of `mean_square_limit` alone, to a thousandth, at a third of the cost.

    Args:
        dynamics: of the optimizer.
        spread: of the curvature.
        near: a rate from which to start the search.

    Raises:
        ValueError: there is no positive curvature, or a number is not finite.
    """
    return _search(dynamics, spread, _noiseless_limit(dynamics, spread), near, _ROUGH)[0]


def _noiseless_limit(dynamics: Dynamics, spread: CurvatureSpread) -> float:
    curvatures = spread.curvatures
    if len(curvatures) == 0 or not 0 < curvatures.max() < math.inf or curvatures.min() <= 0:
        msg = (
            "curvatures must be positive and finite, got "
            f"{curvatures.tolist()[:5]}: directions that do not curve upwards have no limit"
        )
        raise ValueError(msg)
    leak = np.asarray(spread.leak)
    if not (np.isfinite(spread.deviations).all() and np.isfinite(leak).all() and leak.min() >= 0):
        msg = "the deviations and the leak must be finite, and the leak at least 0"
        raise ValueError(msg)
    return dynamics.noiseless_limit(float(curvatures.max()))


def _search(
    dynamics: Dynamics,
    spread: CurvatureSpread,
    noiseless: float,
    near: float | None,
    tolerance: float,
) -> tuple[float, Array | None]:
    """Where the gain reaches 1, and the second moment there; None where noise does not limit."""
    # 1 / gain is nearly straight in 1 / lr, along one direction exactly (but for decays); so a
    # secant, kept inside the bracket, soon arrives even where the gain is all but a pole.
    low, high = (1 + 1e-9) / noiseless, math.inf
    gain, start = _gain(dynamics, spread, 1 / low, None, tolerance)
    if gain <= 1:
        return noiseless, None
    here, value, guess = low, 1 / gain - 1, 2 * low
    if near is not None and 1 / near > low:
        guess = 1 / near
    for _ in range(100):
        gain, start = _gain(dynamics, spread, 1 / guess, start, tolerance)
        level = 1 / gain - 1
        slope = (level - value) / (guess - here)
        here, value = guess, level
        low, high = (here, high) if level < 0 else (low, here)
        guess = here - value / slope if slope > 0 else high
        if abs(guess - here) < tolerance * here:
            break
        if not low < guess < high:
            guess = 2 * low if math.isinf(high) else (low + high) / 2
    return 1 / max(guess, low), start


def _gain(
    dynamics: Dynamics,
    spread: CurvatureSpread,
    lr: float,
    start: Array | None,
    tolerance: float = _TOLERANCE,
) -> tuple[float, Array]:
    """`loop_gain`, and the second moment ``(d, d)`` that grows by it."""
    response = dynamics.response(spread.curvatures, lr)
    outside = dynamics.flat_response(lr) * spread.leaving()
    size = len(response)

    def fed_back(moment: Array) -> Array:
        result: Array = response * spread.feed(moment) + outside * moment
        return result

    if spread.scale == 0 or not spread.deviations.any():
        top = int(np.diag(outside).argmax())
        return float(outside[top, top]), np.diag(np.eye(size)[top])
    if size <= _DENSE:
        basis = np.eye(size * size).reshape(-1, size, size)
        columns = [fed_back((unit + unit.T) / 2).ravel() for unit in basis]
        values, vectors = np.linalg.eig(np.stack(columns, 1))
        top = int(np.abs(values).argmax())
        return float(abs(values[top])), _moment(vectors[:, top].real, size)
    from scipy.sparse.linalg import LinearOperator, eigs

    def multiply(flat: Array) -> Array:
        moment = flat.reshape(size, size)
        return fed_back((moment + moment.T) / 2).ravel()

    ncv = 16 if tolerance < _ROUGH else 8  # assumed: products before a restart
    guess = np.diag(np.diag(response)) if start is None else start
    operator = LinearOperator((size * size, size * size), matvec=multiply, dtype=np.float64)
    values, vectors = eigs(
        operator, k=1, which="LM", v0=guess.ravel(), ncv=ncv, tol=min(10 * tolerance, 1e-3)
    )
    return float(abs(values[0])), _moment(vectors[:, 0].real, size)


def _moment(flat: Array, size: int) -> Array:
    matrix = flat.reshape(size, size)
    return (matrix + matrix.T) / 2 * (1.0 if np.trace(matrix) >= 0 else -1.0)


def _sensitivities(
    dynamics: Dynamics, spread: CurvatureSpread, lr: float, noiseless: float, start: Array
) -> Limit:
    """First-order perturbation of the gain, which is stationary in ``X``.

    ``(<X, N X> + <X, L o X / g>) / <X, X / g>``, with ``L`` what leaves.
    """
    step = _STEP * (1 - lr / noiseless)
    _, moment = _gain(dynamics, spread, lr, start)
    curvatures = spread.curvatures
    response = dynamics.response(curvatures, lr)
    norm = float((moment**2 / response).sum())
    leaving = dynamics.flat_response(lr) * spread.leaving()
    outside = float((leaving * moment**2 / response).sum()) / norm
    fed = np.matmul(np.matmul(spread.deviations, moment), spread.deviations)
    shares = spread.scale * np.einsum("kij,ij->k", fed, moment) / norm
    inside = float(shares.sum())
    slower = dynamics.response(curvatures, lr * (1 - step))
    by_rate = (response - slower) / step
    weight = moment**2 / response**2 / norm * (inside + outside - leaving)
    steepness = float((weight * by_rate).sum()) + outside
    steps = step * curvatures
    rows = dynamics._response(curvatures - steps, curvatures, lr)
    slopes = (response - rows) / steps[:, None]
    by_curvature = -2 * (weight * slopes).sum(1) / steepness
    return Limit(lr, noiseless, steepness, shares, by_curvature, outside)


def _noiseless_slope(dynamics: Dynamics, curvatures: Array) -> Array:
    slope = np.zeros(len(curvatures))
    top = int(curvatures.argmax())
    here = dynamics.noiseless_limit(float(curvatures[top]))
    there = dynamics.noiseless_limit(float(curvatures[top]) * (1 - _STEP))
    slope[top] = math.log(here / there) / (_STEP * curvatures[top])
    return slope
