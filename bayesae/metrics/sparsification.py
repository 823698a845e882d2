"""Sparsification: how fast the error falls when the pixels that are thought uncertain are taken away."""

from __future__ import annotations

from typing import Generic, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.errors import DataError
from bayesae.metrics._checks import Numbers, check_rows
from bayesae.metrics.pit import CONTINUOUS, checked

__all__ = ["Sparsification", "sparsification"]

Area = TypeVar("Area", float, Tensor)


class Sparsification(NamedTuple, Generic[Area]):
    r"""Error of the values that are left, as a share of the error of all.

    Args:
        removed: Share taken away, (M,), from 0 upwards.
        error: Root of the mean squared error of the rest, the most uncertain taken first, (M,), or (M, \*data) by
            pixel; 1 at the left end.
        oracle: Likewise, the largest errors taken first.
        ause: Area between the two: a number, or (\*data) by pixel.
    """

    removed: Tensor
    error: Tensor
    oracle: Tensor
    ause: Area


@overload
def sparsification(
    mean: Numbers, var: Numbers | float, x: Numbers, *, n_shares: int = ..., is_pooled: Literal[True] = ...
) -> Sparsification[float]: ...
@overload
def sparsification(
    mean: Numbers, var: Numbers | float, x: Numbers, *, n_shares: int = ..., is_pooled: Literal[False]
) -> Sparsification[Tensor]: ...
def sparsification(
    mean: Numbers, var: Numbers | float, x: Numbers, *, n_shares: int = 100, is_pooled: bool = True
) -> Sparsification[float] | Sparsification[Tensor]:
    r"""Sparsification curve, and the area between it and the best that an order could do (AUSE).

    .. math:: c(r) = \sqrt{\overline{(x - \mu)^2} \text{ of the } n - \lfloor r n \rfloor \text{ least uncertain}}
              \Big/ RMSE, \qquad AUSE = \int_0^1 c(r) - c_{oracle}(r)\, dr

    Only the order of the variances counts, not their size. Equal ones are taken away in random order, which is averaged
    over: a variance that is the same everywhere has c = 1.

    It needs all rows at once: an order of values is no sum, so that there is nothing to add up batch by batch. Moments
    of many rows come in chunks from ``predictive.moments(x, chunk_size=...)``; of more than memory holds, give a random
    part of the rows, which estimates the same curve.

    Args:
        mean: Predictive means, (B, \*data), or of any shape if pooled; units of x.
        var: Predictive variances, units of x squared, of the same shape or ().
        x: What came, of the same shape.
        n_shares: Shares 0, 1/n, .., (n-1)/n that are taken away.
        is_pooled: One curve of all values; False gives every pixel its own, over rows.

    Returns:
        `Sparsification`, float64; the integral is by trapezoids over those shares. NaN for a single pixel without any
        error.

    Exact when: always, as a statistic at those shares; 0 if variances rank values as their squared errors do.
    Biased when: AUSE is read as calibration, or compared between predictives whose errors differ: each has its oracle.
        So has each pixel: the mean over pixels is not the pooled area.
    Cost: two sorts.

    Raises:
        ShapeError: If shapes differ.
        DataError: If there are fewer than two shares, fewer values than shares (rows, by pixel), or no error at all.
        NonFiniteError: If a standardised error or a variance is not finite.

    References:
        | Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow (Ilg, Cicek, Galesso, Klein, Makansi,
          Hutter, Brox, 2018)
    """
    check_counts(n_shares=n_shares)
    if n_shares < 2:
        raise DataError("at least two shares", f"n_shares={n_shares}", "100 are a curve.")
    mean, var, x = checked(mean, var, x, CONTINUOUS)
    check_rows(x, is_pooled)
    data = torch.Size() if is_pooled else x.shape[1:]
    squares, var = ((x - mean) ** 2).reshape(-1, data.numel()), var.reshape(-1, data.numel())
    n, total = len(squares), squares.mean(0)
    if n < n_shares or not bool((total > 0).any()):
        got = f"{n} values with a mean squared error of {float(total.mean()):g}"
        raise DataError(f"{n_shares} values or more and an error to explain", got, "Give more rows or fewer shares.")
    kept = n - torch.arange(n_shares, device=x.device) * n // n_shares

    def curve(ordered: Tensor) -> Tensor:
        return (ordered.cumsum(0)[kept - 1] / kept[:, None] / total).sqrt()

    error, oracle = curve(_by_uncertainty(var, squares)), curve(squares.sort(0).values)
    removed = torch.arange(n_shares, dtype=x.dtype, device=x.device) / n_shares
    area = torch.trapezoid(error - oracle, removed, dim=0)
    if is_pooled:
        return Sparsification(removed, error[:, 0], oracle[:, 0], float(area))
    shape = (n_shares, *data)
    return Sparsification(removed, error.reshape(shape), oracle.reshape(shape), area.reshape(data))


def _by_uncertainty(var: Tensor, squares: Tensor) -> Tensor:
    """Squared errors (n, P) in the order of variances, column by column; each is its tie's mean, over all orders."""
    ordered, order = var.sort(0)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] > ordered[:-1]
    tie = is_first.cumsum(0) - 1
    parts = squares.gather(0, order), torch.ones_like(squares)
    sums, size = (torch.zeros_like(part).scatter_add(0, tie, part) for part in parts)
    return (sums / size).gather(0, tie)
