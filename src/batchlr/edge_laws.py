"""What each theory makes of one measurement: the largest eigenvalue of a batch, law by law."""

import math
from dataclasses import dataclass

from batchlr.curvature_report import CurvatureReport
from batchlr.measured import Measured
from batchlr.random_matrix import SpikedMarchenkoPastur, SpikedWigner, subordinated_outlier


@dataclass(frozen=True)
class EdgeLaw:
    """One law's largest eigenvalue of a batch matrix."""

    largest: Measured  # unit: curvature
    overlap: float  # squared, of the batch's top eigenvector with v1; NaN where a law has none
    assumes: str


def edge_laws(report: CurvatureReport, batch_size: float) -> dict[str, EdgeLaw]:
    """Every law's prediction from the same report, the default one first.

    ======================  ====================================================================
    law                     largest eigenvalue of a batch of effective size ``b``
    ======================  ====================================================================
    ``"resampled"``         `CurvatureReport.largest_at`: resampled batches on the measured axes
    ``"second-order"``      ``lambda_1 + kappa / b``
    ``"wigner"``            the theorem of Granziol, Zohren & Roberts (2022), noise from a random
                            direction as in their estimator
    ``"wigner-top"``        the same with ``c1``, the noise along the top eigenvector
    ``"subordinated"``      the theorem for a matrix with a bulk of its own
    ``"trace"``             ``lambda_1 + (tr H - lambda_1) / b``: exact to second order for least
                            squares with Gaussian features
    ``"marchenko-pastur"``  spiked covariance: positive semi-definite noise of the same trace
    ``"additive"``          the same noise, added to the matrix
    ``"two-point"``         a line in ``1/b`` through ``lambda_1`` and the mean of small batches
    ======================  ====================================================================

    Laws whose ingredients were not measured are left out. Costs no product.

    Raises:
        ValueError: the largest eigenvalue is not positive, or ``batch_size`` is out of range.
    """
    inverse = report.inverse_effective_batch_size(batch_size)
    largest, noise = report.largest, report.noise
    if largest <= 0:
        msg = f"laws of an outlier need a positive largest eigenvalue, got {largest}"
        raise ValueError(msg)
    laws = {
        "resampled": EdgeLaw(
            report.largest_at(batch_size), math.nan, "batches differ as those measured do"
        ),
        "second-order": EdgeLaw(
            _shifted(largest, report.kappa * inverse, _relative(noise.orthogonal)),
            max(0.0, 1 - noise.orthogonal * inverse / largest**2),
            "noise small against the gaps of the spectrum",
        ),
        "wigner-top": _wigner(
            largest, noise.orthogonal, inverse, "homogeneous noise of the top direction's size"
        ),
    }
    return (
        laws
        | _with_random_noise(report, inverse)
        | _with_trace(report, inverse)
        | _with_small_batches(report, inverse)
    )


def _with_random_noise(report: CurvatureReport, inverse: float) -> dict[str, EdgeLaw]:
    """Laws of the noise along a random direction."""
    largest, random = report.largest, report.noise.random_direction
    if not math.isfinite(random):
        return {}
    laws = {"wigner": _wigner(largest, random, inverse, "homogeneous noise, a matrix of low rank")}
    pairs = zip(report.ritz_values[1:], report.ritz_weights[1:], strict=False)
    bulk = [(value, weight) for value, weight in pairs if value < largest]
    total = sum(weight for _, weight in bulk)
    if total > 0:
        outlier = subordinated_outlier(
            largest,
            [value for value, _ in bulk],
            [weight / total for _, weight in bulk],
            random * inverse,
        )
        laws["subordinated"] = EdgeLaw(
            _shifted(largest, outlier - largest, _relative(random)),
            math.nan,
            "homogeneous noise, any spectrum",
        )
    return laws


def _with_trace(report: CurvatureReport, inverse: float) -> dict[str, EdgeLaw]:
    """Laws of what the trace leaves beside the largest eigenvalue."""
    largest = report.largest
    rest = Measured(report.trace - largest, report.trace.stderr)
    if not (math.isfinite(rest) and rest > 0):
        return {}
    laws = {
        "trace": EdgeLaw(
            _shifted(largest, rest * inverse, _relative(rest)),
            math.nan,
            "rank-one samples with Gaussian features",
        )
    }
    scale, ratio = rest / report.num_params, report.num_params * inverse
    covariance = SpikedMarchenkoPastur(noise_scale=scale, ratio=ratio)
    addition = SpikedMarchenkoPastur(noise_scale=scale, ratio=ratio, form="additive")
    # Of an added noise the mean belongs to the mean matrix already.
    for name, law, mean in (("marchenko-pastur", covariance, 0.0), ("additive", addition, scale)):
        spike = largest - mean
        laws[name] = EdgeLaw(
            _shifted(largest, law.outlier(spike) - largest, _relative(rest)),
            law.overlap(spike),
            "positive semi-definite noise, alike in all directions",
        )
    return laws


def _with_small_batches(report: CurvatureReport, inverse: float) -> dict[str, EdgeLaw]:
    """The law of the mean largest eigenvalue of small batches."""
    if report.small_batch is None:
        return {}
    largest, (size, mean) = report.largest, report.small_batch
    there = report.inverse_effective_batch_size(size)
    if there <= 0:
        return {}
    shift = max(mean - largest, 0.0) * inverse / there
    error = mean.stderr * inverse / there
    edge = Measured(largest + shift, math.hypot(_finite(largest.stderr), _finite(error)))
    return {"two-point": EdgeLaw(edge, math.nan, "a shift proportional to 1/b")}


def _wigner(largest: Measured, variance: Measured, inverse: float, assumes: str) -> EdgeLaw:
    law = SpikedWigner(noise_std=math.sqrt(variance * inverse))
    shifted = _shifted(largest, law.outlier(largest) - largest, _relative(variance))
    return EdgeLaw(shifted, law.overlap(largest), assumes)


def _shifted(largest: Measured, shift: float, relative: float) -> Measured:
    return Measured(largest + shift, math.hypot(_finite(largest.stderr), shift * relative))


def _relative(value: Measured) -> float:
    return _finite(value.stderr) / value if value > 0 else 0.0


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0
