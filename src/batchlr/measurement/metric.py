"""Symmetric matrices where length is measured by a metric of its own, as Adam's ``D`` is one."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


_ROUNDING = 1e-6  # assumed: of single precision, relative to the largest eigenvalue


def lifted(metrics: Array) -> Array:
    """``metrics`` ``(..., m, m)``, eigenvalues that are but rounding raised to it.

    Where no gradient stands out of its noise ``D`` of all the data is ``eps``, a hundred-millionth
    of that of a batch; what remains of it in single precision may be negative, and lengths are not.
    """
    values, axes = np.linalg.eigh(metrics)
    least = _ROUNDING * values[..., -1:]
    if (values >= least).all():
        return metrics
    result: Array = (axes * np.maximum(values, least)[..., None, :]) @ axes.swapaxes(-1, -2)
    return result


def diagonalise(matrix: Array, metric: Array) -> tuple[Array, Array]:
    """Descending eigenvalues of ``matrix`` in ``metric``, and axes ``A' metric A = 1``."""
    factors, rotation = np.linalg.eigh(metric)
    whitened = rotation / np.sqrt(factors)
    found, turned = np.linalg.eigh(whitened.T @ matrix @ whitened)
    return found[::-1].copy(), whitened @ turned[:, ::-1]


def selection_bias(values: Array, metrics: Sequence[Array]) -> float:
    """By how much a top eigenvalue is too large because its metric was estimated.

    The top direction is the one where the metric came out too small by chance. Two estimates from
    halves of the data show how much: the eigenvalue found with one, judged by the other. What the
    halves have in excess, the whole has half of, in the logarithm.

    Args:
        values: ``(m,)`` of the matrix, diagonal on the axes, the largest positive.
        metrics: two ``(m, m)``, or none if nothing is known.

    Returns:
        The factor, at least 1.
    """
    if len(metrics) != 2 or not values.max() > 0:
        return 1.0
    logs = []
    for here, there in (metrics, metrics[::-1]):
        if np.linalg.eigvalsh(here)[0] <= 0:
            return 1.0
        found, axes = diagonalise(np.diag(values), here)
        axis = axes[:, 0]
        judged = float(axis @ (values * axis)) / float(axis @ there @ axis)
        logs.append(math.log(found[0] / judged))
    return math.exp(max(0.0, sum(logs) / 2) / 2)
