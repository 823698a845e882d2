"""Coverage and width of central intervals, and predicted deviations held against errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.errors import DataError
from bayesae.functional import check_finite
from bayesae.metrics._checks import Numbers, check_rows, tensor_of
from bayesae.metrics.pit import CONTINUOUS, Atoms, average, checked, share_below

__all__ = ["DeviationBins", "IntervalCoverage", "deviation_edges", "ence", "interval_coverage"]

LEVELS = (0.5, 0.8, 0.9, 0.95)


class IntervalCoverage(NamedTuple):
    r"""How often central intervals hold the data, and how wide they are.

    Args:
        levels: Nominal levels, (L,).
        coverage: Share of values inside (PICP), (L,), or (L, \*data) by pixel.
        width: Mean width (MPIW), units of x, of the same shape.
    """

    levels: Tensor
    coverage: Tensor
    width: Tensor


def interval_coverage(
    mean: Numbers,
    var: Numbers | float,
    x: Numbers,
    *,
    levels: Sequence[float] = LEVELS,
    atoms: Atoms = CONTINUOUS,
    is_pooled: bool = True,
) -> IntervalCoverage:
    r"""Share of values in the central intervals of Normal predictives, and the intervals' mean width.

    .. math:: PICP_\ell = \tfrac1n \sum_i \Pr\big(\tfrac{1-\ell}{2} < u_i \le \tfrac{1+\ell}{2}\big), \qquad
              MPIW_\ell = \tfrac1n \sum_i (q_{i,(1+\ell)/2} - q_{i,(1-\ell)/2})

    u is the probability integral transform. Without atoms a value is inside or not,
    :math:`|x - \mu| \le z_\ell \sigma`. With them a value on the edge counts by the share of its mass that the level
    asks for.

    Args:
        mean: Predictive means, (B, \*data), units of x.
        var: Predictive variances, units of x squared, of the same shape or ().
        x: What came, of the same shape.
        levels: Of the intervals, each in (0, 1).
        atoms: How data came from the Normal law: clipped or rounded. Quantiles are clipped with it.
        is_pooled: One number a level; False gives one for every pixel, over rows.

    Returns:
        `IntervalCoverage`, float64.

    Exact when: x is drawn from the predictive, clipped and rounded as ``atoms`` says: coverage has the level as mean.
    Biased when: x has atoms that are not named: a value that is always hit is inside at every level.
    Cost: one pass over the values for each level.

    Raises:
        ShapeError: If shapes differ.
        DataError: If a level is not in (0, 1), there are no values, or values outside the atoms' range.
        NonFiniteError: If a standardised error or a variance is not finite.
    """
    levels = checked_levels(levels)
    mean, var, x = checked(mean, var, x, atoms)
    below, upto = atoms.levels_of(mean, var, x)
    inside = [average(share_inside(below, upto, level), is_pooled) for level in levels]
    width = [average(widths(mean, var, level, atoms), is_pooled) for level in levels]
    return IntervalCoverage(x.new_tensor(levels), torch.stack(inside), torch.stack(width))


def checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The levels as numbers; raises unless there are some and every one is a share."""
    found = tuple(map(float, levels))
    if not found or not all(0 < level < 1 for level in found):
        raise DataError("levels of intervals in (0, 1)", f"{found}", "0.95 is 95 %.")
    return found


def share_inside(below: Tensor, upto: Tensor, level: float) -> Tensor:
    """Share of each value's mass in the central interval of a level."""
    return share_below(below, upto, (1 + level) / 2) - share_below(below, upto, (1 - level) / 2)


def widths(mean: Tensor, var: Tensor, level: float, atoms: Atoms) -> Tensor:
    """Width of the central interval, clipped with the law; units of x."""
    half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64))) * var.sqrt()
    low, high = mean - half, mean + half
    if atoms.low is not None or atoms.high is not None:
        low, high = low.clamp(atoms.low, atoms.high), high.clamp(atoms.low, atoms.high)
    return high - low


class DeviationBins(NamedTuple):
    r"""Values in bins of their predicted deviation.

    Args:
        deviation: Root of the mean predicted variance of each bin, units of x, (E,) or (E, \*data); NaN in empty ones.
        error: Root of the mean squared error of each bin, likewise.
        n_values: In each bin.
        ence: Mean over bins with values of \|deviation - error\| / deviation, () or (\*data).
    """

    deviation: Tensor
    error: Tensor
    n_values: Tensor
    ence: Tensor


def deviation_edges(var: Numbers, n_bins: int = 10) -> tuple[float, ...]:
    """Edges between bins of predicted deviation that hold as many values each.

    Args:
        var: Predictive variances, units of x squared.
        n_bins: E; fewer edges come where many variances are equal.

    Returns:
        At most E - 1 rising deviations, units of x. Deviations up to an edge lie below it.

    Exact when: always, as quantiles of these variances; bins of other data hold other counts.

    Raises:
        DataError: If there are no variances, or ``n_bins`` is below 1.
        NonFiniteError: If a variance is negative or not finite.
    """
    check_counts(n_bins=n_bins)
    deviations = tensor_of(var).detach().double().flatten().sqrt().sort().values
    if len(deviations) == 0:
        raise DataError("at least one variance", "none", "Give those of a first batch.")
    check_finite({"deviations": deviations}, "roots of variances", "Is a variance NaN or below 0?")
    places = [math.ceil(k * len(deviations) / n_bins) - 1 for k in range(1, n_bins)]
    edges = deviations[[place for place in places if place >= 0]]
    return tuple(edges[edges < deviations[-1]].unique().tolist())


def ence(
    mean: Numbers,
    var: Numbers | float,
    x: Numbers,
    *,
    edges: Sequence[float] | None = None,
    is_pooled: bool = True,
) -> DeviationBins:
    r"""Expected normalised calibration error: predicted deviation against error, bin by bin.

    .. math:: ENCE = \frac1E \sum_e \frac{|\sqrt{\overline{\sigma^2}_e} - RMSE_e|}{\sqrt{\overline{\sigma^2}_e}}

    Args:
        mean: Predictive means, (B, \*data), units of x.
        var: Predictive variances, units of x squared, of the same shape or ().
        x: What came, of the same shape.
        edges: Between the bins, rising, units of x; those of `deviation_edges` (ten bins) if None.
        is_pooled: Bins over all values; False fills them for every pixel.

    Returns:
        `DeviationBins`, float64.

    Exact when: every variance is the error's own: it goes to 0 as values are added.
    Biased when: bins hold few values: the error's own spread, about sqrt(1 / (pi n)) for n Normal errors, comes on
        top; and a bin may be right on average only.
    Cost: one pass over the values for each bin.

    Raises:
        ShapeError: If shapes differ.
        DataError: If there are no values, or edges do not rise.
        NonFiniteError: If a standardised error or a variance is not finite.

    References:
        | Evaluating and Calibrating Uncertainty Prediction in Regression Tasks (Levi, Gispan, Giladi, Fetaya, 2022).
          Departure: the edges may be given; bins without a value are left out of the mean.
    """
    mean, var, x = checked(mean, var, x, CONTINUOUS)
    edges = checked_edges(deviation_edges(var) if edges is None else edges)
    parts = torch.stack([torch.ones_like(x), var, (x - mean) ** 2])
    if is_pooled:
        parts, var = parts.reshape(3, -1), var.flatten()
    check_rows(x, is_pooled)
    sums = torch.stack([(parts * inside).sum(1) for inside in bins_of(var, edges)])
    return deviation_bins(*sums.unbind(1))


def checked_edges(edges: Sequence[float]) -> tuple[float, ...]:
    """The edges as numbers; raises unless they rise."""
    found = tuple(map(float, edges))
    if any(not first < second for first, second in itertools.pairwise((-math.inf, *found))):
        raise DataError("edges that rise", f"{found}", "Take those of deviation_edges(var).")
    return found


def bins_of(var: Tensor, edges: Sequence[float]) -> list[Tensor]:
    """True where a value is in each of the len(edges) + 1 bins of predicted deviation."""
    deviation = var.sqrt()
    upto = [deviation <= edge for edge in edges] + [torch.ones_like(deviation, dtype=torch.bool)]
    return [upto[0], *(after & ~before for before, after in itertools.pairwise(upto))]


def deviation_bins(count: Tensor, variances: Tensor, squares: Tensor) -> DeviationBins:
    """The bins from sums of ones, variances and squared errors, (E, ...) each."""
    deviation, error = (variances / count).sqrt(), (squares / count).sqrt()
    return DeviationBins(deviation, error, count, ((deviation - error).abs() / deviation).nanmean(0))
