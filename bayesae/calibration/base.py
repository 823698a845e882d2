"""What recalibrations share: their two protocols, and what rows and moments must be like."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayesae.draws import Moments, fitted_mask, fitted_rows
from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.likelihoods import Bernoulli, ContinuousBernoulli, Mixed
from bayesae.types import Likelihood

__all__ = ["Recalibrated", "Recalibration"]

ONE_DEVIATION = math.erf(1 / math.sqrt(2))
"""Level of the central interval of one standard deviation of a Normal law, 68.27 %."""


class Recalibrated(ABC):
    """What a recalibration leaves: moments to recalibrated moments, quantiles and intervals.

    No exact case: each subclass says what it holds for. Missing entries of new rows need no mask: a number's moments
    are recalibrated by themselves.
    """

    @abstractmethod
    def __call__(self, moments: Moments) -> Moments:
        r"""The moments with a recalibrated variance, its three parts rescaled; the mean stays.

        Args:
            moments: Of the predictive that was fitted, at any rows.

        Returns:
            Moments whose ``total`` is the recalibrated variance: the square of half the width of the 68.27 % interval.

        Raises:
            ShapeError: If rows are of another shape than those that it was fitted on, and it knows single pixels.
        """

    @abstractmethod
    def quantile(self, moments: Moments, level: float) -> Tensor:
        r"""Recalibrated quantile of every number.

        Args:
            moments: Of the predictive that was fitted, at any rows.
            level: In (0, 1).

        Returns:
            (B, \*data), units of x.

        Raises:
            DataError: If the level is not in (0, 1), or finer than the calibration rows can tell.
            ShapeError: As for a call.
        """

    def interval(self, moments: Moments, level: float) -> tuple[Tensor, Tensor]:
        r"""Recalibrated central interval of every number.

        Args:
            moments: Of the predictive that was fitted, at any rows.
            level: Share of data that is to lie inside, in (0, 1).

        Returns:
            Lower and upper ends, (B, \*data) each, units of x.

        Raises:
            DataError: If the level is not in (0, 1), or finer than the calibration rows can tell.
            ShapeError: As for a call.
        """
        check_level(level)
        return self.quantile(moments, (1 - level) / 2), self.quantile(moments, (1 + level) / 2)


@runtime_checkable
class Recalibration(Protocol):
    """How moments are to be recalibrated: settings, and a fit."""

    def fit(self, moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Recalibrated:
        r"""Fit on rows that trained nothing and test nothing, and the predictive's moments there.

        One call has all rows: quantiles, and the search for a temperature, are no sums over batches.
        ``predictive.moments(x, chunk_size=...)`` makes moments of any number of rows chunk by chunk, from a loader too,
        and keeps five numbers a pixel.

        Args:
            moments: Of the predictive at x.
            x: Rows that trained nothing, (N, \*data).
            mask: True where x was observed, (N, \*data); other entries, which may be NaN, decide nothing. None if
                everything was.

        Returns:
            What recalibrates moments of any rows.

        Raises:
            DataError: If nothing was observed, or a variance is not positive.
            NonFiniteError: If an observed error or its variance is not finite.
            ShapeError: If x or the mask do not fit the moments.
            UnsupportedError: If the likelihood's mean settles its law (binary and nominal data);
                `IsotonicProbabilities` is for binary pixels.
        """
        ...


class Errors(NamedTuple):
    r"""Errors of the mean and predictive variances of calibration rows, (N, \*data) each.

    Args:
        error: x - mean, float64; 0 where nothing was observed.
        var: The total variance, float64; 1 where nothing was observed.
        is_observed: Which numbers decide.
    """

    error: Tensor
    var: Tensor
    is_observed: Tensor


def check_level(level: float) -> None:
    """Raise unless a level is a share."""
    if not 0 < level < 1:
        raise DataError("a level in (0, 1)", f"{level}", "0.95 is 95 %.")


def errors_of(moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None) -> Errors:
    r"""Errors of the mean and predictive variances; arguments and what it raises are those of `Recalibration.fit`."""
    if _is_settled_by_mean(moments.likelihood):
        raise UnsupportedError(
            "numbers with a variance of their own",
            f"{type(moments.likelihood).__name__}, whose law the mean settles",
            "Bernoulli pixels are for IsotonicProbabilities; metrics.ece and brier_score measure probabilities.",
        )
    rows, is_observed = observed_rows(moments, x, mask)
    error, var = (part.detach().double() for part in (rows - moments.mean, moments.total))
    error, var = torch.where(is_observed, error, 0.0), torch.where(is_observed, var, 1.0)
    check_finite({"x - mean": error, "variance": var}, "errors and variances", "Give a mask of what is missing.")
    n_zero = int((var <= 0).sum())
    if n_zero:
        got = f"{n_zero} of {var.numel()} that are not"
        raise DataError("positive predictive variances", got, "Give the likelihood noise, or leave those pixels out.")
    return Errors(error, var, is_observed)


def observed_rows(moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None) -> tuple[Tensor, Tensor]:
    r"""Calibration rows as the moments know them, and which numbers were observed: some, (N, \*data) each."""
    rows = fitted_rows(x, moments.mean.shape, moments.mean)
    is_observed = torch.ones_like(rows, dtype=torch.bool)
    if mask is not None:
        is_observed = fitted_mask(mask, moments.mean.shape).to(rows.device)
    if not bool(is_observed.any()):
        got = "none" if rows.numel() == 0 else "rows of which nothing was observed"
        raise DataError("at least one calibration row", got, "Hold rows out of the training data.")
    return rows, is_observed


def _is_settled_by_mean(likelihood: Likelihood) -> bool:
    if isinstance(likelihood, Mixed):
        return any(_is_settled_by_mean(head) for head in likelihood.heads)
    return likelihood.is_nominal or isinstance(likelihood, (Bernoulli, ContinuousBernoulli))


def rescaled(moments: Moments, *, noise: Tensor, code: Tensor, weights: Tensor) -> Moments:
    r"""Moments with each part of the variance times a factor.

    Args:
        moments: Of any rows.
        noise: Factor of the noise, () or (\*data).
        code: Factor of the code's part.
        weights: Factor of the weights' part.

    Returns:
        New moments of the same mean.

    Raises:
        ShapeError: If a factor is for pixels that the moments do not have.
    """
    factors = {"noise": noise, "code": code, "weights": weights}
    for factor in factors.values():
        check_pixels(moments, factor)
    return replace(
        moments, **{name: getattr(moments, name) * factor.to(moments.mean) for name, factor in factors.items()}
    )


def check_pixels(moments: Moments, values: Tensor) -> None:
    r"""Raise unless values () or (\*data) fit the moments' rows."""
    if values.dim() and values.shape != moments.mean.shape[1:]:
        expected, got = f"rows of shape {tuple(values.shape)}", f"{tuple(moments.mean.shape[1:])}"
        raise ShapeError(expected, got, "Give moments of the pixels that it was fitted on.")


def at_deviations(moments: Moments, deviations: Tensor) -> Tensor:
    r"""Mean plus a number of predictive deviations, () or (\*data); (B, \*data), units of x."""
    check_pixels(moments, deviations)
    return moments.mean + deviations.to(moments.mean) * moments.total.sqrt()


def normal_quantile(level: float) -> Tensor:
    """Quantile of the standard Normal law, ()."""
    check_level(level)
    return torch.special.ndtri(torch.tensor(float(level), dtype=torch.float64))
