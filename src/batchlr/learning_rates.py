"""The largest stable learning rate, from curvature and its batch noise.

Every ``max_*`` and ``paper_*`` rate here is an *upper limit of stability* on a local quadratic,
not a recommendation: beyond it the iterates grow, well below it training is merely slower.
Curvatures, noise and weight decay share one unit (loss per squared parameter); rates have its
inverse.
"""

import math
from dataclasses import dataclass

from batchlr.argument_ranges import require_fraction, require_non_negative


def max_sgd_lr(
    largest: float,
    noise: float = 0.0,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> float:
    """Mean-square stability limit of SGD with heavy-ball or Nesterov momentum.

    ``2 (1 + m) / (largest + weight_decay + (1 + m) / (1 - m) noise)``, in PyTorch's convention
    ``v <- m v + g``, ``w <- w - lr v``. Without momentum and noise it is the classical
    ``2 / largest``; without momentum it is Granziol, Zohren & Roberts (2022) with
    ``largest + noise`` as the batch's largest eigenvalue.

    Exact where the curvature along the top direction is drawn afresh each step with mean
    ``largest`` and variance ``s^2 = largest * noise``, because there the second moments of weight
    and velocity stop contracting; with both noise and weight decay a little on the safe side.
    In several dimensions it is an estimate. Over 1,800 random least-squares problems it lay 13 %
    below to 1 % above the exact limit (Mulayoff & Michaeli 2024) from batch size 8 on; at 1 to 4
    it was up to 50 % too high in a few, mostly where the second eigenvalue is close to the first.

    Nesterov's step ``v <- m v + g``, ``w <- w - lr (g + m v)`` with PyTorch's one gradient a step
    has, under the same assumption and exactly with weight decay too, the positive root of
    ``m (1 + 2m) q a lr^2 + ((1 - m - 4m^2) a^2 + (1 + m) s^2) lr = 2 (1 - m^2) a``, where
    ``a = largest + weight_decay`` and ``q = a^2 + s^2`` (this library's derivation). Without noise
    it is ``2 (1 + m) / ((1 + 2m) a)``, a third of the heavy ball's for ``m`` near 1; where noise
    dominates, the same ``2 (1 - m) a / s^2``.

    Args:
        largest: Largest eigenvalue of the empirical matrix, free of batch noise.
        noise: ``s^2 / largest = (r1 + c1) / (b largest)``: ``r1`` and ``c1`` are the per-sample
            variances of the curvature product with the top eigenvector, along and orthogonal to
            it, and ``1/b = 1/B - 1/N``. With ``r1`` alone it is only a necessary bound.
        momentum: In [0, 1).
        weight_decay: Coupled L2 strength; it shifts the curvature, not the noise.
        nesterov: Whether the momentum is Nesterov's, as by ``torch.optim.SGD(nesterov=True)``.

    Raises:
        ValueError: ``largest`` is not positive, or another argument is out of range.

    >>> max_sgd_lr(4.0)
    0.5
    >>> max_sgd_lr(4.0, noise=4.0)
    0.25
    >>> max_sgd_lr(1.0, noise=1.0, momentum=0.5)
    0.75
    >>> max_sgd_lr(4.0, momentum=0.5, nesterov=True)
    0.375
    """
    _require_curvature(largest=largest)
    require_non_negative(noise=noise, weight_decay=weight_decay)
    require_fraction(momentum=momentum)
    if nesterov:
        return _max_nesterov_lr(largest + weight_decay, largest * noise, momentum)
    amplified_noise = (1.0 + momentum) / (1.0 - momentum) * noise
    return 2.0 * (1.0 + momentum) / (largest + weight_decay + amplified_noise)


def max_adam_lr(
    largest: float, noise: float = 0.0, *, beta1: float = 0.9, weight_decay: float = 0.0
) -> float:
    """Mean-square stability limit of Adam, whose momentum is an average.

    `max_sgd_lr` on the *preconditioned* matrix ``D^-1/2 H D^-1/2`` (``D`` the diagonal Adam
    divides by), over ``1 - beta1`` as ``m <- beta1 m + (1 - beta1) g`` shrinks each gradient.
    The preconditioner counts as frozen. Without noise and at ``beta1 = 0.9`` it is
    ``38 / largest`` (Cohen et al. 2022).

    AdamW's decay ``w <- (1 - lr weight_decay) w`` passes by preconditioner and average: without
    momentum it adds ``weight_decay`` to the preconditioned curvature; with it, ``(1 + beta1) /
    (1 - beta1)`` times as much, so that without noise the limit is ``2 / ((1 - beta1) / (1 + beta1)
    largest + weight_decay)``. With noise it is the root of a quadratic, exact like `max_sgd_lr`
    (this library's derivation). Adam's coupled decay is part of the gradient, hence of the
    preconditioner, and has no place here.

    This is the limit of a run under way. At step ``t`` Adam divides by ``1 - beta1^t`` as well: the
    effective rate is ``lr / (1 - beta1^t)``, ten times the nominal one at the first step with
    ``beta1 = 0.9``, on an average of but ``t`` gradients. The limit is not about those steps.

    Args:
        largest: Largest eigenvalue of the preconditioned matrix.
        noise: As in `max_sgd_lr`, of the preconditioned matrix.
        beta1: Decay rate of the gradient average, in [0, 1).
        weight_decay: AdamW's, decoupled; unit: of the preconditioned curvature.

    Raises:
        ValueError: ``largest`` is not positive, or another argument is out of range.

    >>> round(max_adam_lr(1.0), 9)
    38.0
    >>> max_adam_lr(3.0, beta1=0.0, weight_decay=1.0)
    0.5
    """
    require_fraction(beta1=beta1)
    require_non_negative(weight_decay=weight_decay)
    undecayed = max_sgd_lr(largest, noise, momentum=beta1) / (1.0 - beta1)
    if weight_decay == 0.0:
        return undecayed
    # In units of `largest`: s^2 and the decay, and the determinant a x^2 + b x - c over x.
    s2, d, m = noise / largest, weight_decay / largest, beta1
    a = m * d * ((1 - m) * (1 - s2) + 2 * d + (1 + m) * d**2)
    b = (1 - m) ** 2 + 2 * d * (1 - 2 * m - m**2) + d**2 * (1 - 3 * m) * (1 + m) + (1 - m**2) * s2
    return _smaller_root(a, b, 2 * (1 + d) * (1 - m**2)) / largest


def _max_nesterov_lr(curvature: float, variance: float, m: float) -> float:
    s2 = variance / curvature**2
    a = m * (1 + 2 * m) * (1 + s2)
    b = 1 - m - 4 * m**2 + (1 + m) * s2
    return _smaller_root(a, b, 2 * (1 - m**2)) / curvature


def _smaller_root(a: float, b: float, c: float) -> float:
    """Least positive root of ``a x^2 + b x - c`` for ``c > 0``; ``b > 0`` where ``a <= 0``.

    The second moments' map keeps the cone of positive matrices, so that its spectral radius is an
    eigenvalue: stability ends at the first root of ``det(map - 1)``, which this is.
    """
    root = math.sqrt(b * b + 4 * a * c)
    return 2 * c / (b + root) if b > 0 else (root - b) / (2 * a)


def paper_sgd_lr(largest: float, *, weight_decay: float = 0.0) -> float:
    """Maximal SGD rate ``2 / (largest + weight_decay)`` of Granziol, Zohren & Roberts (2022).

    Assumes plain gradient descent on the batch's own quadratic, without momentum; batch noise
    enters only through the batch's eigenvalue.

    Args:
        largest: Largest eigenvalue of the *batch* matrix, noise included.
        weight_decay: Coupled L2 strength.

    Raises:
        ValueError: ``largest`` is not positive, or ``weight_decay`` is negative.

    >>> paper_sgd_lr(8.0)
    0.25
    """
    _require_curvature(largest=largest)
    require_non_negative(weight_decay=weight_decay)
    return 2.0 / (largest + weight_decay)


def paper_adam_lr(largest: float, *, damping: float = 0.0) -> float:
    """Maximal rate ``2 (sqrt(largest) + damping) / largest`` for Adam-like preconditioning.

    Assumes that the preconditioner is the square root of the curvature plus ``damping``, the
    route by which Granziol, Zohren & Roberts (2022) arrive at square-root scaling for small
    damping and linear scaling for large.

    Args:
        largest: Largest eigenvalue of the *batch* matrix, not preconditioned.
        damping: Added to the preconditioner, hence in the unit of ``sqrt(largest)``; Adam's
            ``eps``.

    Raises:
        ValueError: ``largest`` is not positive, or ``damping`` is negative.

    >>> paper_adam_lr(4.0)
    1.0
    """
    _require_curvature(largest=largest)
    require_non_negative(damping=damping)
    return 2.0 * (math.sqrt(largest) + damping) / largest


@dataclass(frozen=True)
class StepSize:
    """A learning rate and the momentum that belongs to it."""

    lr: float  # inverse curvature
    momentum: float  # in [0, 1)


def heavy_ball(largest: float, smallest: float) -> StepSize:
    """Fastest-converging heavy-ball pair for curvatures in [smallest, largest] (Polyak 1964).

    ``lr = (2 / (sqrt(largest) + sqrt(smallest)))^2`` and
    ``momentum = ((sqrt(largest) - sqrt(smallest)) / (sqrt(largest) + sqrt(smallest)))^2``: optimal
    on a quadratic without noise, where this rate is within the limit ``2 (1 + momentum) / largest``
    and the error shrinks by ``sqrt(momentum)`` a step.

    Args:
        largest: Largest eigenvalue.
        smallest: Smallest *non-trivial, positive* eigenvalue, in (0, largest]; not that of the
            near-zero bulk.

    Raises:
        ValueError: ``largest`` is not positive, or ``smallest`` is outside (0, largest].

    >>> heavy_ball(largest=9.0, smallest=1.0)
    StepSize(lr=0.25, momentum=0.25)
    """
    _require_curvature(largest=largest)
    if not 0.0 < smallest <= largest:
        message = (
            f"smallest must lie in (0, {largest}], got {smallest}: "
            "take the smallest positive curvature outside the near-zero bulk"
        )
        raise ValueError(message)
    root_sum = math.sqrt(largest) + math.sqrt(smallest)
    root_difference = math.sqrt(largest) - math.sqrt(smallest)
    return StepSize(lr=(2.0 / root_sum) ** 2, momentum=(root_difference / root_sum) ** 2)


def min_damping(lr: float, noise: float) -> float:
    """Least damping ``lr noise / 2`` that keeps a second-order step stable.

    Along a direction whose curvature the preconditioner missed, the update ``lr (C + damping)^-1
    g`` is a gradient step of rate ``lr / damping``, stable up to ``2 / noise``. Proportional to
    ``lr / B``, as in Granziol, Zohren & Roberts (2022); the constant is this derivation's.

    Args:
        lr: Dimensionless rate of the second-order step.
        noise: Curvature that batch noise alone creates: ``kappa / b``, the shift of the largest
            eigenvalue, by which ``damping * B`` is constant; or the Wigner edge ``2 sqrt(P / b)
            sigma``, by which it is ``damping * sqrt(B)``.

    Raises:
        ValueError: An argument is negative or not finite.

    >>> min_damping(lr=0.5, noise=8.0)
    2.0
    """
    require_non_negative(lr=lr, noise=noise)
    return lr / 2.0 * noise


def shrinkage_damping(alpha: float, *, target: float = 1.0) -> float:
    """Damping ``(1 - alpha) / alpha * target`` that shrinking a curvature matrix amounts to.

    ``alpha C + (1 - alpha) target I`` is ``alpha`` times ``C`` plus this damping, so a step through
    its inverse is the damped one at rate ``lr / alpha`` (Granziol et al. 2020, arXiv:2011.08181).

    Args:
        alpha: Weight of the measured matrix against the multiple of the identity, in (0, 1].
        target: ``target I`` is what the matrix is shrunk towards, for instance its mean
            eigenvalue; unit: curvature.

    Raises:
        ValueError: An argument is out of range.

    >>> shrinkage_damping(0.75, target=3.0)
    1.0
    """
    if not 0.0 < alpha <= 1.0:
        message = f"alpha must lie in (0, 1], got {alpha}: 1 keeps the matrix as it is"
        raise ValueError(message)
    require_non_negative(target=target)
    return (1.0 - alpha) / alpha * target


def weight_decay_from_shrinkage(alpha: float, target: float) -> float:
    """Weight decay ``(1 - alpha) / alpha * target`` that a shrunk gradient amounts to.

    ``alpha g + (1 - alpha) target w`` is ``alpha`` times the gradient with this coupled decay. It
    is `shrinkage_damping`: one number damps a second-order step and decays the weights
    (Granziol et al. 2020, arXiv:2011.08181).

    Args:
        alpha: Weight of the measured curvature, in (0, 1].
        target: Curvature it is shrunk towards.

    Raises:
        ValueError: An argument is out of range.

    >>> weight_decay_from_shrinkage(0.5, 2e-3)
    0.002
    """
    return shrinkage_damping(alpha, target=target)


def shrinkage_from_weight_decay(weight_decay: float, target: float) -> float:
    """Shrinkage ``alpha = target / (target + weight_decay)``, in (0, 1], that a decay amounts to.

    The inverse of `weight_decay_from_shrinkage`, and of `shrinkage_damping` for a damping in place
    of the decay.

    Args:
        weight_decay: Coupled L2 strength, or damping; unit: curvature.
        target: Curvature shrunk towards, positive.

    Raises:
        ValueError: An argument is out of range.

    >>> shrinkage_from_weight_decay(1.0, 3.0)
    0.75
    """
    require_non_negative(weight_decay=weight_decay)
    if not 0.0 < target < math.inf:
        message = f"target must be positive and finite, got {target}: it sets the decay's scale"
        raise ValueError(message)
    return target / (target + weight_decay)


def balanced_momentum(largest: float, noise: float, *, limit: float = 0.95) -> float:
    """Momentum at which curvature and batch noise limit SGD's rate alike.

    In the mean-square limit of `max_sgd_lr` the noise counts ``(1 + m) / (1 - m)`` times. More
    momentum always allows a larger effective rate ``lr / (1 - m)``; from where
    ``(1 + m) / (1 - m) = largest / noise`` on, at most twice as large. Derived from that limit,
    without regard to the condition number.

    Args:
        largest: Largest eigenvalue of the empirical matrix.
        noise: As in `max_sgd_lr`.
        limit: Largest momentum returned, in [0, 1); 0.95 is assumed.

    Raises:
        ValueError: ``largest`` is not positive, or another argument is out of range.

    >>> round(balanced_momentum(1.9, 0.1), 9)
    0.9
    >>> balanced_momentum(1.0, 2.0)
    0.0
    """
    _require_curvature(largest=largest)
    require_non_negative(noise=noise)
    require_fraction(limit=limit)
    return max(0.0, min(limit, (largest - noise) / (largest + noise)))


def _require_curvature(*, largest: float) -> None:
    if not 0.0 < largest < math.inf:
        message = (
            f"largest must be positive and finite, got {largest}: there is no stability limit "
            "along non-positive curvature, so keep the present rate or measure again"
        )
        raise ValueError(message)
