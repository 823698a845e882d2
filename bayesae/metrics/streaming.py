"""`CalibrationSums`: likelihood, ranked probability and calibration of Normal predictives, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.errors import DataError, NonFiniteError
from bayesae.metrics._checks import Numbers, tensor_of
from bayesae.metrics._sums import PixelSums
from bayesae.metrics.intervals import (
    LEVELS,
    DeviationBins,
    IntervalCoverage,
    bins_of,
    checked_edges,
    checked_levels,
    deviation_bins,
    share_inside,
    widths,
)
from bayesae.metrics.pit import CONTINUOUS, Atoms, share_below
from bayesae.metrics.predictions import gaussian_crps, gaussian_nll

__all__ = ["Calibration", "CalibrationSums"]


class Calibration(NamedTuple):
    r"""What `CalibrationSums` came to; shapes are those pooled, and (..., \*data) by pixel.

    Args:
        n_values: Seen, ().
        nll: Mean of `gaussian_nll`, nats, ().
        crps: Mean of `gaussian_crps`, units of x, ().
        intervals: As of `interval_coverage`.
        histogram: Share of the probability integral transform in each of the bins [k, k + 1] / n, (n,); all are 1 / n
            for a calibrated predictive.
        deviations: As of `ence`.
    """

    n_values: Tensor
    nll: Tensor
    crps: Tensor
    intervals: IntervalCoverage
    histogram: Tensor
    deviations: DeviationBins


@dataclass(frozen=True, eq=False)
class CalibrationSums(PixelSums):
    r"""Sums over rows, pixel by pixel, from which calibration follows; no row is kept.

    ::

        sums = CalibrationSums.of((1, 28, 28), edges=deviation_edges(first.total))
        for x in batches:
            moments = predictive.moments(x)
            sums = sums.update(moments.mean, moments.total, x)
        sums.result().intervals.coverage

    Args:
        sums: (R, \*data), float64: a row for each statistic.
        levels: Of the central intervals, (L,).
        edges: Between bins of predicted deviation, rising, units of x, (E - 1,).
        n_bins: Of the histogram of the probability integral transform.
        atoms: How data came from the Normal law.

    Exact when: always: results are those of `gaussian_nll`, `gaussian_crps`, `interval_coverage`,
        `quantile_calibration` and `ence` with the same levels and edges on all rows at once, to rounding.
    Cost: R = 4 + 2 L + n_bins + 3 E passes over each batch, on its device, which nothing waits for before `result`;
        memory of a few batches, and of R numbers a pixel.
    """

    levels: tuple[float, ...]
    edges: tuple[float, ...]
    n_bins: int
    atoms: Atoms

    @classmethod
    def of(
        cls,
        data_shape: Sequence[int],
        *,
        levels: Sequence[float] = LEVELS,
        edges: Sequence[float] = (),
        n_bins: int = 20,
        atoms: Atoms = CONTINUOUS,
        device: torch.device | str = "cpu",
    ) -> CalibrationSums:
        r"""Sums of no rows.

        Args:
            data_shape: Of one row, (\*data).
            levels: Of the central intervals, each in (0, 1).
            edges: Between bins of predicted deviation; `deviation_edges` of a first batch are a good choice. By
                default there is one bin.
            n_bins: Of the histogram of the probability integral transform.
            atoms: How data came from the Normal law: clipped or rounded.
            device: Where rows will be; those of other devices are moved there.

        Returns:
            The sums, all 0.

        Raises:
            DataError: If a level is not in (0, 1), edges do not rise, or ``n_bins`` is below 1.
        """
        check_counts(n_bins=n_bins)
        levels, edges = checked_levels(levels), checked_edges(edges)
        n_statistics = 4 + 2 * len(levels) + n_bins + 3 * (len(edges) + 1)
        sums = torch.zeros(n_statistics, *data_shape, dtype=torch.float64, device=device)
        return cls(sums, levels, edges, n_bins, atoms)

    def update(self, mean: Numbers, var: Numbers | float, x: Numbers, mask: Numbers | None = None) -> CalibrationSums:
        r"""The sums with the rows of one batch added; nothing waits for the device.

        Args:
            mean: Predictive means, (B, \*data), units of x.
            var: Predictive variances, (B, \*data) or (), positive; what is not finite is found by `result`.
            x: What came, (B, \*data).
            mask: True where x was observed, (B, \*data); other entries, in which all three may be NaN, do not count.

        Returns:
            New sums.

        Raises:
            ShapeError: If shapes are not (B, \*data), or the mask is not bool.
        """
        mean, var = tensor_of(mean), tensor_of(var)
        mean, var, x = self._rows(mean, var if var.dim() else var.expand_as(mean), x)
        mask = None if mask is None else self._mask(mask, x)
        if mask is not None:  # elsewhere may be NaN, or no variance: observed entries of imputations
            mean, x, var = (torch.where(mask, part, other) for part, other in ((mean, 0.0), (x, 0.0), (var, 1.0)))
        is_observed = torch.ones_like(x) if mask is None else mask.double()
        added = torch.stack([(values * is_observed).sum(0) for values in self._statistics(mean, var, x)])
        return replace(self, sums=self.sums + added)

    def _statistics(self, mean: Tensor, var: Tensor, x: Tensor) -> Iterator[Tensor]:
        below, upto = self.atoms.levels_of(mean, var, x)
        one, before = torch.ones_like(x), torch.zeros_like(x)
        yield from (one, self.atoms.is_outside(x), gaussian_nll(mean, var, x), gaussian_crps(mean, var, x))
        yield from (share_inside(below, upto, level) for level in self.levels)
        yield from (widths(mean, var, level, self.atoms) for level in self.levels)
        for k in range(1, self.n_bins + 1):
            after = share_below(below, upto, k / self.n_bins)
            yield after - before
            before = after
        squares = (x - mean) ** 2
        for inside in bins_of(var, self.edges):
            yield from (part * inside for part in (one, var, squares))

    def result(self, *, is_pooled: bool = True) -> Calibration:
        r"""Means of what was summed.

        Args:
            is_pooled: Over all pixels; False gives every pixel its own.

        Returns:
            `Calibration`, float64; NaN for a pixel that was never observed.

        Raises:
            DataError: If there were no values, or values outside the atoms' range.
            NonFiniteError: If a likelihood was not finite: a variance was 0, or something NaN.
        """
        sums = self._pooled(is_pooled)
        n_levels = len(self.levels)
        count, outside, *_ = sums
        self._check_count(count)
        if bool(outside.sum() > 0):
            got = f"{int(outside.sum())} outside of it"
            raise DataError(f"data in the range of {self.atoms}", got, "Give the data's own range.")
        if not bool(torch.isfinite(sums).all()):
            raise NonFiniteError("finite sums", "NaN or infinite ones", "Is a variance 0, or a mean NaN?")
        sizes = [1, 1, n_levels, n_levels, self.n_bins]
        means = (sums[2 : 2 + sum(sizes)] / count).split(sizes)
        nll, crps, coverage, width, histogram = means
        bins = sums[2 + sum(sizes) :].unflatten(0, (-1, 3)).unbind(1)
        intervals = IntervalCoverage(sums.new_tensor(self.levels), coverage, width)
        return Calibration(count, nll[0], crps[0], intervals, histogram, deviation_bins(*bins))
