"""Isotonic recalibration: levels of the predictive mapped to the shares that held-out rows show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bayesae.calibration.base import (
    ONE_DEVIATION,
    Recalibrated,
    at_deviations,
    check_level,
    errors_of,
    rescaled,
)
from bayesae.data import check_rises
from bayesae.draws import Moments
from bayesae.errors import DataError, ShapeError

__all__ = ["Isotonic", "IsotonicQuantiles"]


@dataclass(frozen=True, eq=False)
class IsotonicQuantiles(Recalibrated):
    """Quantiles of the standardised errors of calibration rows, in place of the Normal law's.

    Args:
        errors: Standardised errors, sorted, (n,), float64.

    Exact when: errors divided by predicted deviations have one law, whatever its shape.

    Raises:
        DataError: If the errors are not sorted, or there are none.
        ShapeError: If they have several axes.
    """

    errors: Tensor

    def __post_init__(self) -> None:
        check_rises(errors=self.errors)
        if self.errors.dim() != 1:
            raise ShapeError("errors (n,)", f"{tuple(self.errors.shape)}", "Take them as Isotonic().fit gives them.")

    def __call__(self, moments: Moments) -> Moments:
        """The moments, their deviation half the width of the recalibrated 68.27 % interval."""
        factor = (0.5 * (self._at((1 + ONE_DEVIATION) / 2) - self._at((1 - ONE_DEVIATION) / 2))) ** 2
        return rescaled(moments, noise=factor, code=factor, weights=factor)

    def quantile(self, moments: Moments, level: float) -> Tensor:
        """Mean plus the recalibrated number of deviations, interpolated between the order statistics k / (n + 1)."""
        return at_deviations(moments, self._at(level))

    def _at(self, level: float) -> Tensor:
        check_level(level)
        n = len(self.errors)
        place = level * (n + 1) - 1
        if not -1e-9 <= place <= n - 1 + 1e-9:
            wanted = math.ceil(1 / min(level, 1 - level) - 1e-9) - 1
            raise DataError(f"{wanted} calibration values for the quantile {level:g}", f"{n}", "Hold out more rows.")
        below = min(max(math.floor(place), 0), n - 1)
        above = min(below + 1, n - 1)
        return self.errors[below].lerp(self.errors[above], place - below)


@dataclass(frozen=True)
class Isotonic:
    r"""Isotonic regression of observed shares on predicted levels.

    .. math:: R(p) = \frac1n \sum_{i, d} [F_{id}(x_{id}) \le p], \qquad
              q_p = F^{-1}(R^{-1}(p)) = \mu + \sigma\, \hat Q_u(p)

    F is the Normal predictive's distribution function. Observed shares rise with the level, so that their isotonic
    regression is themselves; R after F is the empirical law of the standardised errors u, whose quantiles
    :math:`\hat Q_u` are kept (a level of 1 - 1e-17 would be 1). Of rows with missing entries the sums are over what was
    observed.

    Exact when: standardised errors have one law, of any shape: quantiles and intervals then have their level as
        calibration rows are added, also where errors are skew.
    Biased when: that law changes from pixel to pixel or with the size of the deviation: levels hold on average over
        pixels only; and errors of one image are dependent: n pixels count for less than n.
    Cost: one sort of the values, which are kept.

    Raises:
        DataError: From the result, if a level is finer than n values can tell.

    References:
        | Accurate Uncertainties for Deep Learning Using Calibrated Regression (Kuleshov, Fenner, Ermon, 2018).
          Departure: order statistics stand at k / (n + 1), not k / n.
    """

    def fit(
        self, moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None
    ) -> IsotonicQuantiles:
        """The law of the standardised errors of these rows; arguments and errors as of `Recalibration.fit`."""
        error, var, is_observed = errors_of(moments, x, mask)
        return IsotonicQuantiles((error / var.sqrt())[is_observed].sort().values)
