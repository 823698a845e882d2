"""Variance scaling: the predictive variance times one factor, or times one for every pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesae.calibration.base import Recalibrated, at_deviations, errors_of, normal_quantile, rescaled
from bayesae.data import check_choice
from bayesae.draws import Moments
from bayesae.errors import DataError

__all__ = ["Rescaled", "VarianceScaling"]

By = Literal["all", "pixel"]


@dataclass(frozen=True, eq=False)
class Rescaled(Recalibrated):
    r"""Parts of the variance times factors; quantiles are those of the Normal law.

    Args:
        noise: Factor of the noise, () or (\*data), float64; 0 takes that part out.
        code: Factor of the code's part.
        weights: Factor of the weights' part.

    Exact when: data are Normal around the mean with the variance that comes out.

    Raises:
        DataError: If a factor is negative or not finite.
    """

    noise: Tensor
    code: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for name in ("noise", "code", "weights"):
            factor = getattr(self, name)
            if not bool(((factor >= 0) & factor.isfinite()).all()):
                raise DataError(f"{name} factors of 0 or more", "negative, infinite or NaN", "1 changes nothing.")

    def __call__(self, moments: Moments) -> Moments:
        """The moments, rescaled."""
        return rescaled(moments, noise=self.noise, code=self.code, weights=self.weights)

    def quantile(self, moments: Moments, level: float) -> Tensor:
        """Quantile of the Normal law of the rescaled moments."""
        return at_deviations(self(moments), normal_quantile(level))


@dataclass(frozen=True)
class VarianceScaling:
    r"""The predictive variance times the mean squared standardised error of held-out rows.

    .. math:: c = \frac1{N D} \sum_{i, d} u_{id}^2, \qquad u = (x - \mu) / \sigma, \qquad
              c_d = \frac{\nu c + \sum_i u_{id}^2}{\nu + N} \text{ by pixel}

    c maximises the likelihood of N(mean, c var); with :math:`\nu = 0` each :math:`c_d` does for its pixel. Of rows with
    missing entries sums and counts are those of what was observed: a pixel that never was has the shared factor.

    Args:
        by: "all" pixels share a factor, or every "pixel" has its own.
        n_prior: Rows :math:`\nu` that the shared factor counts for, by pixel: shrinkage towards it.

    Exact when: data are Normal around the mean, with variances that are right up to the factor.
    Biased when: errors have heavier tails than a Normal law: c is then decided by a few, and intervals of moderate
        levels come out too wide.
    Cost: one pass over the values.

    Raises:
        DataError: If ``n_prior`` is negative or not finite; from a fit if all errors that decide a factor are 0, or
            none does.
        UnsupportedError: If ``by`` is another word.

    References:
        | Evaluating and Calibrating Uncertainty Prediction in Regression Tasks (Levi, Gispan, Giladi, Fetaya, 2022).
          Departure: a factor by pixel, shrunk to the shared one.
    """

    by: By = "all"
    n_prior: float = 10.0

    def __post_init__(self) -> None:
        check_choice("by", self.by, get_args(By))
        if not 0 <= self.n_prior < float("inf"):
            raise DataError("n_prior of 0 or more", f"{self.n_prior}", "It counts rows.")

    def fit(self, moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Rescaled:
        """One factor for all three parts; arguments and errors as of `Recalibration.fit`."""
        error, var, is_observed = errors_of(moments, x, mask)
        squares = error**2 / var
        factor = squares.sum() / is_observed.sum()
        if not bool(factor > 0):
            raise DataError("errors that are not all 0", "no other", "Are these rows the predictive's own means?")
        if self.by == "pixel":
            factor = (self.n_prior * factor + squares.sum(0)) / (self.n_prior + is_observed.sum(0, dtype=torch.float64))
        if not bool((factor > 0).all()):
            got = f"{int((~(factor > 0)).sum())} pixels without any"
            raise DataError("errors that are not all 0", got, "Leave those pixels out, or give n_prior > 0.")
        return Rescaled(factor, factor, factor)
