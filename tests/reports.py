"""Projected curvature with chosen values and per-sample variances, for reports made by hand."""

import numpy as np

from batchlr.measured import Measured
from batchlr.measurement.projected_curvature import ProjectedCurvature

NO_LEAK = Measured(0.0, 0.0)


def projected_curvature(
    values,
    variances,
    *,
    num_batches=8,
    batch_size=100,
    leak_largest=NO_LEAK,
    leak_smallest=NO_LEAK,
    leaks=None,
    seed=0,
):
    """Batches whose entries ``(i, j)`` have exactly the per-sample ``variances`` given.

    Entries are uncorrelated with each other; the batches' deviations are Gaussian, made orthogonal.
    """
    rng = np.random.default_rng(seed)
    centred = np.c_[np.ones(num_batches), rng.normal(size=(num_batches, len(variances)))]
    contrasts = np.linalg.qr(centred).Q[:, 1:]  # (K, entries) orthonormal, columns of mean 0
    matrices = np.tile(np.diag(np.array(values, dtype=float)), (num_batches, 1, 1))
    for contrast, ((i, j), variance) in zip(contrasts.T, variances.items(), strict=True):
        moves = np.sqrt(variance * (num_batches - 1) / batch_size) * contrast
        matrices[:, i, j] += moves
        if i != j:
            matrices[:, j, i] += moves
    return ProjectedCurvature(
        values=np.array(values, dtype=float),
        matrices=matrices,
        samples=(batch_size,) * num_batches,
        leak_largest=leak_largest,
        leak_smallest=leak_smallest,
        leaks=leaks,
    )
