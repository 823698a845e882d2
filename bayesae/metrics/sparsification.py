"""Sparsification: how fast the error falls when the pixels that are thought uncertain are taken away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.errors import DataError
from bayesae.metrics.pit import CONTINUOUS, checked

__all__ = ["Sparsification", "sparsification"]


class Sparsification(NamedTuple):
    """Error of the values that are left, as a share of the error of all.

    Args:
        removed: Share taken away, (M,), from 0 upwards.
        error: Root of the mean squared error of the rest, the most uncertain taken first, (M,); 1 at the left end.
        oracle: Likewise, the largest errors taken first.
        ause: Area between the two.
    """

    removed: Tensor
    error: Tensor
    oracle: Tensor
    ause: float


def sparsification(mean: Tensor, var: Tensor, x: Tensor, *, n_shares: int = 100) -> Sparsification:
    r"""Sparsification curve, and the area between it and the best that an order could do (AUSE).

    .. math:: c(r) = \sqrt{\overline{(x - \mu)^2} \text{ of the } n - \lfloor r n \rfloor \text{ least uncertain}}
              \Big/ RMSE, \qquad AUSE = \int_0^1 c(r) - c_{oracle}(r)\, dr

    Only the order of the variances counts, not their size. Equal ones are taken away in random order, which is averaged
    over: a variance that is the same everywhere has c = 1.

    Args:
        mean: Predictive means, units of x.
        var: Predictive variances, units of x squared.
        x: What came.
        n_shares: Shares 0, 1/n, .., (n-1)/n that are taken away.

    Returns:
        `Sparsification`, float64; the integral is by trapezoids over those shares.

    Exact when: always, as a statistic at those shares; 0 if variances rank values as their squared errors do.
    Biased when: AUSE is read as calibration, or compared between predictives whose errors differ: each has its oracle.
    Cost: two sorts.

    Raises:
        DataError: If there are fewer than two shares, fewer values than shares, or no error at all.
        NonFiniteError: If a standardised error is not finite.

    References:
        | Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow (Ilg, Cicek, Galesso, Klein, Makansi,
          Hutter, Brox, 2018)
    """
    if n_shares < 2:
        raise DataError("at least two shares", f"n_shares={n_shares}", "100 are a curve.")
    mean, var, x = (part.flatten() for part in checked(mean, var, x, CONTINUOUS))
    squares = (x - mean) ** 2
    total = squares.mean()
    if len(x) < n_shares or not total > 0:
        got = f"{len(x)} values with a mean squared error of {float(total):g}"
        raise DataError(f"{n_shares} values or more and an error to explain", got, "Give more rows or fewer shares.")
    _, group, size = torch.unique(var, return_inverse=True, return_counts=True)
    # every value of a tie has the tie's mean: the expectation over orders within it
    tied = torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add_(0, group, squares) / size
    kept = len(x) - torch.arange(n_shares, device=x.device) * len(x) // n_shares

    def curve(ordered: Tensor) -> Tensor:
        return (ordered.cumsum(0)[kept - 1] / kept / total).sqrt()

    error, oracle = curve(tied.repeat_interleave(size)), curve(squares.sort().values)
    removed = torch.arange(n_shares, dtype=x.dtype, device=x.device) / n_shares
    return Sparsification(removed, error, oracle, float(torch.trapezoid(error - oracle, removed)))
