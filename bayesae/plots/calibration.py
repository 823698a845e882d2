"""Calibration of intervals: observed against nominal coverage, and coverage by predicted deviation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["coverage", "coverage_by_deviation"]


def coverage(axes: Axes, curves: Mapping[str, tuple[Tensor, Tensor]]) -> Axes:
    """Draw the share of data inside central intervals against their level; the diagonal is perfect.

    Args:
        axes: Where to draw.
        curves: (levels, coverage), (L,) each, by the predictive's name; as `metrics.interval_coverage` has them.

    Returns:
        The axes. Above the diagonal intervals are too wide, below it too narrow.
    """
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (levels, inside) in curves.items():
        axes.plot(levels.cpu(), inside.cpu(), marker=".", label=name)
    axes.set(xlabel="level of the interval", ylabel="share of pixels inside", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize="small")
    return axes


def coverage_by_deviation(axes: Axes, curves: Mapping[str, Tensor], *, level: float) -> Axes:
    """Draw the share of data inside intervals of one level from values of small to values of large predicted deviation.

    Args:
        axes: Where to draw.
        curves: Coverage in bins of the predicted deviation that hold as many values each, rising, (E,), by the
            predictive's name; E may differ. A single bin, where all deviations are equal, is a dot in the middle.
        level: Of the intervals: a line across, where all points are if deviations are right everywhere.

    Returns:
        The axes.
    """
    axes.axhline(level, color="0.7", linewidth=1)
    lowest = min(float(inside.min()) for inside in curves.values())
    for name, inside in curves.items():
        axes.plot([(k + 0.5) / len(inside) for k in range(len(inside))], inside.cpu(), marker=".", label=name)
    xlabel, ylabel = "rank of the predicted deviation", f"share of pixels inside the {100 * level:g} % interval"
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(min(0.5, lowest - 0.05), 1.02))
    axes.legend(frameon=False, fontsize="small")
    return axes
