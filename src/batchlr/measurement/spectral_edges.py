"""The ends of a spectrum with their noise, from a search or by following them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchlr.curvature_noise import DirectionalNoise, directional_noise
from batchlr.inner_products import norm
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.krylov.lanczos_process import Subspace
from batchlr.lanczos import top_eigenpairs
from batchlr.measured import Measured
from batchlr.measurement.memory_plan import UNLIMITED, MemoryShare
from batchlr.measurement.outlying_directions import WidenedSubspace, widened
from batchlr.measurement.projected_curvature import ProjectedCurvature
from batchlr.operators.base import BatchedOperator
from batchlr.tracker import CurvatureTracker

_TINY = 1e-300  # no curvature at all


@dataclass(frozen=True)
class SpectralEdges:
    """What one search says of a matrix, corrected for the samples being a subsample."""

    largest: Measured
    smallest: Measured  # NaN if the search was for the largest only
    noise: DirectionalNoise  # along the top vector
    projected: ProjectedCurvature
    axes: KrylovBasis  # m Ritz vectors; the first is the top eigenvector
    weights: Tensor  # (m,) their squared overlaps with the start
    converged: bool


@dataclass(frozen=True)
class EdgeSearch:
    """A Lanczos search for both ends of a spectrum.

    Args:
        num_eigenpairs: at each end.
        tol: relative residual at which to stop.
        max_products: at most.
        generator: for the start.
        memory: what the search may take.
    """

    num_eigenpairs: int
    tol: float
    max_products: int
    generator: torch.Generator
    memory: MemoryShare = UNLIMITED

    def run(
        self,
        matrix: BatchedOperator,
        sampling: float,
        *,
        gradients: Iterable[Tensor] | None,
        largest_only: bool,
        start: Tensor | None = None,
    ) -> SpectralEdges:
        """Both ends of ``matrix``, or only the largest with its noise.

        Args:
            matrix: of two or more batches.
            sampling: ``1/n - 1/N``, what the batches' samples have of one sample's variance.
            gradients: ``(P,)`` of each batch, in the coordinates of ``matrix``: then the space has
                `outlying_directions` too. For matrices without negative curvature: where a
                sample's has both signs, its directions never come to rest.
            largest_only: stop once the largest is settled; it saves a product for noise, too.
            start: ``(P,)`` where the search begins, unless it is zero. By default a random
                direction: then ``weights`` say how dense the spectrum is.
        """
        size = matrix.shape[0]
        k = max(1, min(self.num_eigenpairs, size // 2))
        both = size > 1
        if start is not None and not 0 < float(norm(start)) < math.inf:
            start = None
        pairs = top_eigenpairs(
            matrix,
            k,
            which="both" if both else "largest",
            settle="largest" if largest_only else None,
            tol=self.tol,
            criterion="residual",  # the noise is measured along the vectors
            max_steps=min(size, max(self.max_products, 2 * k)),
            basis=self.memory.basis,
            basis_budget=self.memory.basis_bytes,
            with_vectors=False,  # they are among the axes
            with_subspace=True,
            start=start,
            generator=self.generator,
        )
        space, wide = pairs.subspace, None
        assert space is not None
        if gradients is not None:
            wide = widened(space, matrix, gradients)
            space = wide.subspace
        noise = self._noise(matrix, space.basis, 0)
        below = None
        if both and not largest_only:
            below = self._noise(matrix, space.basis, space.basis.count - 1)
        projected = _projected(space, matrix, noise, below, wide)
        smallest = _moved(pairs.values[-1], pairs.bounds[-1], space.values[-1])
        if below is not None:
            kappa = projected.second_order("smallest")
            smallest = _of_the_whole(smallest, kappa, below, sampling)
        largest = _moved(pairs.values[0], pairs.bounds[0], space.values[0])
        return SpectralEdges(
            largest=_of_the_whole(largest, projected.second_order(), noise, sampling),
            smallest=smallest,
            noise=noise,
            projected=projected,
            axes=space.basis,
            weights=space.weights,
            converged=pairs.converged,
        )

    def _noise(self, matrix: BatchedOperator, axes: KrylovBasis, index: int) -> DirectionalNoise:
        """Along one axis, and across the others."""

        def others(vector: Tensor) -> Tensor:
            found = axes.project(vector)
            return torch.cat([found[:index], found[index + 1 :]])

        vector, hold = axes.vector(index), self.memory.holds(len(matrix.samples))
        return directional_noise(matrix, vector, others=others, hold=hold)


def followed_edges(
    tracker: CurvatureTracker, matrix: BatchedOperator, gradient: Tensor, sampling: float
) -> SpectralEdges:
    """The largest eigenvalue of ``matrix`` where ``tracker`` finds it from the last one.

    Args:
        tracker: of the largest end, with noise.
        matrix: of two or more batches.
        gradient: ``(P,)`` in the coordinates of ``matrix``.
        sampling: see `EdgeSearch.run`.
    """
    found = tracker.update(matrix, gradient=gradient)
    space, noise = found.subspace, found.noise
    assert space is not None
    assert noise is not None
    projected = _projected(space, matrix, noise, None)
    largest = _of_the_whole(found.largest.measured, projected.second_order(), noise, sampling)
    return SpectralEdges(
        largest=largest,
        smallest=Measured(math.nan),
        noise=noise,
        projected=projected,
        axes=space.basis,
        weights=space.weights,
        converged=found.converged,
    )


def _projected(
    space: Subspace,
    matrix: BatchedOperator,
    above: DirectionalNoise,
    below: DirectionalNoise | None,
    wide: WidenedSubspace | None = None,
) -> ProjectedCurvature:
    values = space.values.cpu().numpy()
    leaks = None
    if wide is not None:
        before = wide.before.cpu().numpy()  # at most the largest eigenvalue
        leaks = wide.leaks.cpu().numpy() + above.outside * before / max(values[0], _TINY)
        leaks[0] = above.outside  # measured, and all there is
    return ProjectedCurvature(
        values=values,
        matrices=space.matrices.cpu().numpy(),
        samples=matrix.weights,
        leak_largest=above.outside,
        leak_smallest=Measured(math.nan) if below is None else below.outside,
        leaks=leaks,
    )


def _moved(value: Tensor, bound: Tensor, now: Tensor) -> Measured:
    """An eigenvalue as the space widened has it; by how much it moved is an error, too."""
    return Measured(float(now), max(float(bound), abs(float(now - value))))


def _of_the_whole(
    edge: Measured, kappa: float, noise: DirectionalNoise, sampling: float
) -> Measured:
    """``edge`` without what the samples at hand, a batch of the whole, add to it.

    Its error is that of the search and the sampling error along the edge's own vector.
    """
    limit = 0.5 * abs(edge)  # assumed: beyond it the second order says nothing
    shift = max(-limit, min(kappa * sampling, limit))
    error = math.hypot(edge.stderr, math.sqrt(noise.parallel * sampling))
    return Measured(edge - shift, error)
