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


def coverage_by_deviation(axes: Axes, curves: Mapping[str, tuple[Tensor, Tensor]], *, level: float) -> Axes:
    """Draw the share of data inside intervals of one level for values of small and of large predicted deviation.

    Args:
        axes: Where to draw.
        curves: Mean predicted deviation of each bin, units of x, and coverage in it, (E,) each, by the predictive's
            name.
        level: Of the intervals: a line across, where all points are if deviations are right everywhere.

    Returns:
        The axes.
    """
    axes.axhline(level, color="0.7", linewidth=1)
    lowest = min(float(inside.min()) for _, inside in curves.values())
    for name, (deviations, inside) in curves.items():
        axes.plot(deviations.cpu(), inside.cpu(), marker=".", label=name)
    ylabel = f"share of pixels inside the {100 * level:g} % interval"
    axes.set(xlabel="predicted deviation", ylabel=ylabel, ylim=(min(0.5, lowest - 0.05), 1.02))
    axes.legend(frameon=False, fontsize="small")
    return axes
