"""Traces of what monitors say along a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from bayesae.errors import ShapeError

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["stream_trace"]


def stream_trace(
    axes: Axes,
    values: Mapping[str, Tensor],
    *,
    limit: float,
    label: str,
    change: int | None = None,
    every: int = 1,
) -> Axes:
    """Draw one line a monitor, and where its alarms begin.

    Args:
        axes: Where to draw; its scale stays as it is.
        values: By the monitor's name, such as log statistics (n,) after each row or p-values after each window.
        limit: The value at which alarms begin, drawn as a dashed line.
        label: What the values are, with their unit.
        change: Number of the last row before a known change, drawn as a dotted line; None if there is none.
        every: Rows between two values: the size of a window.

    Returns:
        The axes.

    Raises:
        ShapeError: If values are not (n,).
    """
    for name, line in values.items():
        if line.dim() != 1:
            raise ShapeError("values (n,)", f"{tuple(line.shape)} of {name}", "Draw one stream a line.")
        rows = [every * (place + 1) for place in range(len(line))]
        marker = "." if every > 1 else None
        axes.plot(rows, line.detach().cpu().double().numpy(), label=name, linewidth=1.0, marker=marker)
    axes.axhline(limit, color="black", linestyle="--", linewidth=0.8, label="alarm")
    if change is not None:
        axes.axvline(change, color="grey", linestyle=":", linewidth=1.2, label="change")
    axes.set(xlabel="row of the stream", ylabel=label)
    axes.legend(frameon=False, fontsize="small")
    return axes
