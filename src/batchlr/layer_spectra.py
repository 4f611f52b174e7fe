"""The spectrum of every layer's own block, from one set of recorded graphs."""

import torch

from batchlr.argument_ranges import require_count
from batchlr.lanczos import Eigenpairs, Which, top_eigenpairs
from batchlr.operators.curvature_matrix import CurvatureMatrix
from batchlr.operators.restricted import layer_blocks
from batchlr.slq import SpectralMeasure, stochastic_lanczos_quadrature


def layer_eigenpairs(
    operator: CurvatureMatrix,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    max_steps: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Eigenpairs]:
    """`top_eigenpairs` of each layer's diagonal block, by the name of the layer.

    The blocks share the graphs of ``operator``. A product of a block costs at most one of the whole
    matrix; an eigenvalue of a block lies within the spectrum of the whole (Cauchy interlacing).
    Layers too small for ``k`` pairs give all they have.

    Raises:
        ValueError: an argument is illegal.
        ArithmeticError: a product is not finite.
    """
    ends = 2 if which == "both" else 1
    found = {}
    for layer, block in layer_blocks(operator).items():
        size = block.shape[0]
        fitting = "largest" if size < ends else which
        count = min(k, size // ends) if size >= ends else 1
        found[layer] = top_eigenpairs(
            block, count, which=fitting, tol=tol, max_steps=max_steps, generator=generator
        )
    return found


def layer_measures(
    operator: CurvatureMatrix,
    *,
    num_steps: int,
    num_probes: int,
    generator: torch.Generator | None = None,
) -> dict[str, SpectralMeasure]:
    """`stochastic_lanczos_quadrature` of each layer's diagonal block, by the name of the layer.

    At most ``num_probes * num_steps`` products of each block, on shared graphs; layers with fewer
    parameters than ``num_steps`` take as many steps as they have.

    Raises:
        ValueError: ``num_steps`` or ``num_probes`` < 1.
        ArithmeticError: a product is not finite.
    """
    require_count(num_steps=num_steps)
    return {
        layer: stochastic_lanczos_quadrature(
            block,
            num_steps=min(num_steps, block.shape[0]),
            num_probes=num_probes,
            generator=generator,
        )
        for layer, block in layer_blocks(operator).items()
    }
