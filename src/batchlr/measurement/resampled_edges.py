"""How far batch noise moves an end of the spectrum, by resampling the batches measured."""

import math
from typing import Literal, final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
End = Literal["largest", "smallest"]

_LEAST = 1e-10  # assumed: 1/b of the largest data set; an edge next to zero asks for less
_SMALL = 1e-4  # assumed: a variance this small beside the edge's square moves it by second order
_DRAWS = 400  # assumed: resampled batches; their mean is then good to a twentieth of their spread


@final
class ResampledEdges:
    """Extreme eigenvalues of batches of any size, made from the deviations of those measured.

    A batch of ``b`` samples is drawn as the sum of as many deviations, with replacement, as give
    it ``b`` samples, scaled to the variance of that size and added to the mean. The draws are the
    same for every size, so that distances vary smoothly with it.

    Args:
        values: ``(m,)`` descending, the mean matrix, which is diagonal.
        deviations: ``(K, m, m)`` of the batches, see `ProjectedCurvature.deviations`.
        samples: of a measured batch, on average.
    """

    def __init__(self, values: Array, deviations: Array, samples: float) -> None:
        self._values = values
        self._deviations = deviations
        self._samples = samples
        self._tables: dict[str, tuple[Array, Array, Array]] = {}

    def mean_shift(self, inverse: float, end: End) -> tuple[float, float]:
        """Mean distance outwards and its error at ``inverse`` = 1/b, from a table.

        So it is smooth and grows with the noise.
        """
        noise, shifts, errors = self._table(end)
        if inverse <= noise[0]:  # where the second order is exact
            return float(shifts[0] * inverse / noise[0]), float(errors[0] * inverse / noise[0])
        at = math.log(inverse)
        shift = np.exp(np.interp(at, np.log(noise), np.log(np.maximum(shifts, 1e-300))))
        return float(shift), float(np.interp(at, np.log(noise), errors))

    def shift_quantile(self, inverse: float, end: End, quantile: float) -> tuple[float, float]:
        """A quantile of the distance over batches, which may have either sign, and its error."""
        moved, _ = self._moved(inverse, end)
        error = float(moved.std()) / math.sqrt(min(len(moved), len(self._deviations)))
        return float(np.quantile(moved, quantile)), error

    def _table(self, end: End) -> tuple[Array, Array, Array]:
        """``1/b`` ascending to 1 by factors of some two, mean distances there, their errors."""
        if end not in self._tables:
            index = 0 if end == "largest" else -1
            edge = abs(float(self._values[index]))
            reach = float((self._deviations[:, index] ** 2).sum())
            small = min(1.0, max(_SMALL * edge**2 / reach, _LEAST)) if reach > 0 else 1.0
            noise = np.exp(np.linspace(math.log(small), 0.0, 2 + int(-math.log2(small))))
            rows = [self._moved(inverse, end) for inverse in noise]
            # The first order has mean 0: without it there is less chance in the mean.
            means = np.array([float((moved - first).mean()) for moved, first in rows])
            errors = [float((moved - first).std()) / math.sqrt(_DRAWS) for moved, first in rows]
            shifts = np.maximum.accumulate(np.maximum(means, 0.0))
            self._tables[end] = (noise, shifts, np.array(errors))
        return self._tables[end]

    def _moved(self, inverse: float, end: End) -> tuple[Array, Array]:
        """Distances ``(draws,)`` of resampled edges, and their first order, whose mean is 0."""
        index, sign = (0, 1.0) if end == "largest" else (-1, -1.0)
        drawn = self._resample(inverse)
        edges = np.linalg.eigvalsh(np.diag(self._values) + drawn)[:, -1 if index == 0 else 0]
        return sign * (edges - self._values[index]), sign * drawn[:, index, index]

    def _resample(self, inverse: float) -> Array:
        """Fluctuations ``(draws, m, m)`` of batches with ``b = 1 / inverse`` samples."""
        count = len(self._deviations)
        terms = max(1, round(1 / (inverse * self._samples)))
        generator = np.random.default_rng(0)
        weights = generator.multinomial(terms, np.full(count, 1 / count), size=_DRAWS)
        scale = math.sqrt(inverse * count / terms)  # a draw's terms have their sum's covariance
        drawn = np.tensordot(weights.astype(np.float64), self._deviations, (1, 0))
        result: Array = scale * (drawn - drawn.mean(0))
        return result
