"""Where random-matrix theory puts the outliers of a noisy curvature matrix.

A batch Hessian is the empirical Hessian plus the noise of sampling. An isolated eigenvalue of the
empirical matrix, a *spike*, shows up in the noisy matrix as an *outlier* further out, provided it
exceeds a *threshold*; a weaker spike drowns, and the extremal eigenvalue is the *edge* of the
noise bulk (Baik, Ben Arous & Péché 2005). Two noise laws are offered:

==========================  =================================================================
`SpikedWigner`              symmetric noise of either sign: the Hessian
`SpikedMarchenkoPastur`     positive semi-definite noise: the generalised Gauss-Newton matrix
==========================  =================================================================

`subordinated_outlier` refines the first for a matrix with a bulk of its own. All are limits for
many parameters ``P``; spikes, outliers, edges and noise share the unit of curvature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from batchlr.argument_ranges import require_finite, require_non_negative

_BISECTIONS = 60  # halvings: more than the bits of a double


@dataclass(frozen=True)
class SpikedWigner:
    """Spikes in symmetric noise with a semicircle bulk (Granziol, Zohren & Roberts 2022).

    The noise is ``sqrt(P / b) sigma`` times a Gaussian orthogonal matrix of unit scale, with
    ``sigma^2`` the per-sample variance of an entry and ``1/b = 1/B - 1/N`` for batch size ``B``
    out of ``N`` samples. The spiked matrix is of low rank. Without noise every spike is its own
    outlier and the bulk is a point mass at zero.

    Attributes:
        noise_std: ``sqrt(P sigma^2 / b)``, root mean square of the noise eigenvalues and half the
            bulk edge.

    Raises:
        ValueError: ``noise_std`` is negative or not finite.

    >>> law = SpikedWigner(noise_std=1.0)
    >>> law.outlier(2.0), law.spike(2.5), law.overlap(2.0)
    (2.5, 2.0, 0.75)
    >>> law.outlier(-0.5)  # too weak to leave the bulk
    -2.0
    """

    noise_std: float

    def __post_init__(self) -> None:
        require_non_negative(noise_std=self.noise_std)

    @property
    def edges(self) -> tuple[float, float]:
        """Ends (low, high) of the semicircle."""
        return -2.0 * self.noise_std, 2.0 * self.noise_std

    @property
    def threshold(self) -> float:
        """Magnitude a spike must exceed to leave the bulk."""
        return self.noise_std

    def outlier(self, spike: float) -> float:
        """Eigenvalue of the noisy matrix: ``spike + noise_std^2 / spike``.

        At or below the threshold it is the bulk edge on the spike's side (zero counts as
        positive). Benaych-Georges & Nadakuditi 2011.

        Raises:
            ValueError: ``spike`` is not finite.
        """
        require_finite(spike=spike)
        size = max(abs(spike), self.threshold)
        shift = self.noise_std * (self.noise_std / size) if size > 0.0 else 0.0
        return math.copysign(max(size + shift, self.edges[1]), spike)

    def spike(self, outlier: float) -> float:
        """Spike that appears as ``outlier``; the inverse of `outlier` above the threshold.

        Raises:
            ValueError: ``outlier`` is not finite or lies inside the bulk.
        """
        require_finite(outlier=outlier)
        size, edge = abs(outlier), self.edges[1]
        if size < edge:
            message = (
                f"outlier must lie on or outside the bulk edges {self.edges}, got {outlier}: "
                "inside them every spike below the threshold looks the same"
            )
            raise ValueError(message)
        root = math.sqrt(size - edge) * math.sqrt(size + edge)
        return math.copysign((size + root) / 2.0, outlier)

    def overlap(self, spike: float) -> float:
        """Squared overlap of the spike's and the outlier's unit eigenvectors, in [0, 1].

        ``1 - (noise_std / spike)^2`` above the threshold, 0 at or below it (Benaych-Georges &
        Nadakuditi 2011).

        Raises:
            ValueError: ``spike`` is not finite.
        """
        require_finite(spike=spike)
        if abs(spike) <= self.threshold:
            return 0.0
        return 1.0 - (self.noise_std / spike) ** 2

    def density(self, x: float) -> float:
        """Semicircle density of the bulk at ``x``; integrates to 1, variance ``noise_std^2``.

        Raises:
            ValueError: ``noise_std`` is 0, when the bulk is a point mass and has no density.
        """
        if self.noise_std == 0.0:
            message = "density needs noise_std > 0, got 0.0: the bulk is a point mass at 0"
            raise ValueError(message)
        scaled = x / self.edges[1]
        return math.sqrt(max(1.0 - scaled * scaled, 0.0)) / (math.pi * self.noise_std)


@dataclass(frozen=True)
class SpikedMarchenkoPastur:
    """Spikes in positive semi-definite noise with a Marchenko-Pastur bulk.

    The bulk is that of ``(noise_scale / b) X X^T`` with ``X`` a ``P x b`` matrix of independent
    entries of unit variance. What a spike is depends on the form:

    - ``"multiplicative"``: an eigenvalue of the population covariance, whose other eigenvalues
      all equal ``noise_scale``; the noisy matrix is the covariance of ``b`` samples (Baik &
      Silverstein 2006). Far above the bulk a spike moves by ``ratio noise_scale``, the trace of
      the bulk over ``b``.
    - ``"additive"``: an eigenvalue of a low-rank matrix to which the bulk is added as independent
      noise (Benaych-Georges & Nadakuditi 2011).

    Both obey one law in the spike's distance ``d`` from its anchor, ``noise_scale`` or
    ``ratio * noise_scale``: the outlier is ``(d + noise_scale) (d + ratio noise_scale) / d``, and
    it leaves the bulk when ``d > sqrt(ratio) noise_scale``. Only the upper end is modelled.

    Attributes:
        noise_scale: Mean eigenvalue of the noise.
        ratio: Parameters per sample, ``P / b``; 0 for infinitely many samples.
        form: ``"multiplicative"`` or ``"additive"``.

    Raises:
        ValueError: ``noise_scale`` or ``ratio`` is negative or not finite, or ``form`` is unknown.

    >>> law = SpikedMarchenkoPastur(noise_scale=1.0, ratio=4.0)
    >>> law.edges, law.threshold
    ((1.0, 9.0), 3.0)
    >>> law.outlier(5.0), law.spike(10.0), law.overlap(5.0)
    (10.0, 5.0, 0.375)
    """

    noise_scale: float
    ratio: float
    form: Literal["multiplicative", "additive"] = "multiplicative"

    def __post_init__(self) -> None:
        require_non_negative(noise_scale=self.noise_scale, ratio=self.ratio)
        if self.form not in ("multiplicative", "additive"):
            message = f"form must be 'multiplicative' or 'additive', got {self.form!r}"
            raise ValueError(message)

    @property
    def edges(self) -> tuple[float, float]:
        """Ends (low, high) of the continuous bulk, ``noise_scale (1 -+ sqrt(ratio))^2``."""
        root = math.sqrt(self.ratio)
        return self.noise_scale * (1.0 - root) ** 2, self.noise_scale * (1.0 + root) ** 2

    @property
    def threshold(self) -> float:
        """Spike that must be exceeded to leave the bulk at its upper edge."""
        return self._anchor + self._reach

    def outlier(self, spike: float) -> float:
        """Eigenvalue of the noisy matrix; the upper bulk edge at or below the threshold.

        Raises:
            ValueError: ``spike`` is negative or not finite.
        """
        require_non_negative(spike=spike)
        edge = self.edges[1]
        if spike <= self.threshold:
            return edge
        distance = spike - self._anchor
        noise = self.noise_scale * (1.0 + self.ratio)
        return max(distance + noise + self._reach * (self._reach / distance), edge)

    def spike(self, outlier: float) -> float:
        """Spike that appears as ``outlier``; the inverse of `outlier` above the threshold.

        Raises:
            ValueError: ``outlier`` is not finite or lies below the upper bulk edge.
        """
        require_finite(outlier=outlier)
        low, high = self.edges
        if outlier < high:
            message = (
                f"outlier must be at least the upper bulk edge {high}, got {outlier}: "
                "below it every spike under the threshold looks the same"
            )
            raise ValueError(message)
        centred = outlier - (low + high) / 2.0
        return self._anchor + (centred + math.sqrt(outlier - low) * math.sqrt(outlier - high)) / 2.0

    def overlap(self, spike: float) -> float:
        """Squared overlap of the spike's and the outlier's unit eigenvectors, in [0, 1].

        With ``d`` the spike's distance from its anchor, ``1 - ratio (noise_scale / d)^2``, in the
        multiplicative form divided by ``1 + ratio noise_scale / d`` (Paul 2007; Benaych-Georges &
        Nadakuditi 2011); 0 at or below the threshold.

        Raises:
            ValueError: ``spike`` is negative or not finite.
        """
        require_non_negative(spike=spike)
        if spike <= self.threshold:
            return 0.0
        weakness = self._reach / (spike - self._anchor)  # 1 at the threshold
        kept = 1.0 - weakness**2
        return kept if self.form == "additive" else kept / (1.0 + math.sqrt(self.ratio) * weakness)

    def density(self, x: float) -> float:
        """Marchenko-Pastur density of the continuous bulk at ``x``, as a share of all ``P``.

        It integrates to ``min(1, 1/ratio)``: for ``ratio > 1`` the other ``1 - 1/ratio`` of the
        eigenvalues are exactly zero, as the noise has rank ``b < P``. Mean ``noise_scale`` and
        mean square ``noise_scale^2 (1 + ratio)`` are carried by the continuous part alone.

        Raises:
            ValueError: ``noise_scale`` or ``ratio`` is 0, when the bulk is a point mass.
        """
        low, high = self.edges
        if low == high:
            message = (
                "density needs noise_scale > 0 and ratio > 0, "
                f"got {self.noise_scale} and {self.ratio}: the bulk is a point mass at {low}"
            )
            raise ValueError(message)
        if not low < x < high:
            return 0.0
        height = math.sqrt(x - low) * math.sqrt(high - x)
        return height / (2.0 * math.pi * self.ratio * self.noise_scale * x)

    @property
    def _anchor(self) -> float:
        """Spike at which the outlier formula diverges."""
        return self.noise_scale * (self.ratio if self.form == "additive" else 1.0)

    @property
    def _reach(self) -> float:
        """Distance from the anchor within which spikes drown."""
        return math.sqrt(self.ratio) * self.noise_scale


def subordinated_outlier(
    spike: float, nodes: Sequence[float], weights: Sequence[float], noise_variance: float
) -> float:
    """Outlier of a spike above or below a bulk, in Wigner noise.

    ``spike + noise_variance G(spike)`` with ``G(x) = sum_k weights_k / (x - nodes_k)``, the bulk's
    Stieltjes transform; a spike too weak to leave the noisy bulk gives the bulk's edge on its side
    (free convolution with a semicircle: Biane 1997; Capitaine, Donati-Martin, Féral & Février
    2011). A bulk at 0 recovers `SpikedWigner`.

    Args:
        spike: Isolated eigenvalue of the noise-free matrix.
        nodes: Eigenvalues or Ritz values of the bulk, *without the spike itself* or any beyond it.
        weights: Share of the spectrum at each node, summing to 1 or, once the spikes are left
            out, slightly less.
        noise_variance: Mean squared eigenvalue of the noise, ``P sigma^2 / b``.

    Raises:
        ValueError: The spike is not strictly outside the nodes, the weights are no shares of a
            spectrum, or a value is not finite.

    >>> subordinated_outlier(4.0, nodes=[0.0, 2.0], weights=[0.5, 0.5], noise_variance=1.0)
    4.375
    """
    require_finite(spike=spike)
    require_non_negative(noise_variance=noise_variance)
    bulk = _bulk(nodes, weights)
    low, high = min(bulk)[0], max(bulk)[0]
    if low <= spike <= high:
        message = (
            f"spike must lie outside the bulk's nodes [{low}, {high}], got {spike}: "
            "leave out the nodes of the spike itself and of any eigenvalue beyond it"
        )
        raise ValueError(message)
    side, end = (1.0, high) if spike > high else (-1.0, low)
    gaps = [(abs(end - node), weight) for node, weight in bulk]
    distance = max(abs(spike - end), _critical_distance(gaps, noise_variance))
    shift = sum(noise_variance * weight / (distance + gap) for gap, weight in gaps)
    return end + side * (distance + shift)


def _critical_distance(gaps: list[tuple[float, float]], noise_variance: float) -> float:
    """Distance from the bulk's end where ``noise_variance sum_k w_k / (distance + gap_k)^2 = 1``.

    There the outlier map is smallest, so that its value is the edge of the noisy bulk.
    """
    noise_std = math.sqrt(noise_variance)
    lower = noise_std * math.sqrt(min(gaps)[1])
    upper = noise_std * math.sqrt(sum(weight for _, weight in gaps))
    if lower == upper:  # no noise, or one node: nothing to search
        return upper
    for _ in range(_BISECTIONS):
        middle = (lower + upper) / 2.0
        pull = sum(weight * (noise_std / (middle + gap)) ** 2 for gap, weight in gaps)
        lower, upper = (middle, upper) if pull > 1.0 else (lower, middle)
    return upper


def _bulk(nodes: Sequence[float], weights: Sequence[float]) -> list[tuple[float, float]]:
    """Validated (node, weight) pairs of positive weight."""
    if len(nodes) != len(weights):
        message = f"nodes and weights must pair up, got {len(nodes)} and {len(weights)} of them"
        raise ValueError(message)
    for node, weight in zip(nodes, weights, strict=True):
        require_finite(node=node)
        require_non_negative(weight=weight)
    total = sum(weights)
    if not 0.0 < total <= 1.0 + 1e-3:  # room for single-precision Gauss weights
        message = f"weights must sum to at most 1 and more than 0, got a sum of {total}"
        raise ValueError(message)
    return [(node, weight) for node, weight in zip(nodes, weights, strict=True) if weight > 0.0]
