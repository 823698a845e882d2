"""Geometry of a code space of two dimensions: the volume element, curves on it, and what they decode to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import NonFiniteError, ShapeError

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["code_curves", "curve_band", "film_strip", "volume_background"]

_CODES_AT_ONCE = 512  # a metric decodes each Z + 1 times under every draw


def volume_background(
    axes: Axes,
    log_volume: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    *,
    n: int = 60,
    label: str | None = "log volume element",
    cmap: str = "viridis",
) -> Axes:
    """Fill a rectangle of codes with the logarithm of the volume element: high where steps of the code are long.

    Args:
        axes: Where to draw; put codes and curves on top.
        log_volume: Codes (B, 2) to (B,), such as ``lambda z: geometry.log_volume_element(metric, z)``.
        low: Lower left corner, (2,); gives the dtype of the codes.
        high: Upper right corner, (2,).
        n: Cells along each side.
        label: Written beside a colour bar; None draws no bar.
        cmap: Colour map.

    Returns:
        The axes.

    Raises:
        ShapeError: If a corner has not two coordinates.
        NonFiniteError: If a value is not finite.
    """
    if low.shape != (2,) or high.shape != (2,):
        raise ShapeError("corners (2,)", f"{tuple(low.shape)} and {tuple(high.shape)}", "Codes have two dimensions.")
    shares = (torch.arange(n).to(low) + 0.5) / n  # the middles of cells
    across, up = (low[i] + shares * (high[i] - low[i]) for i in (0, 1))
    codes = torch.cartesian_prod(up, across).flip(1)
    with torch.no_grad():
        values = torch.cat([log_volume(part) for part in codes.split(_CODES_AT_ONCE)]).reshape(n, n)
    if not bool(torch.isfinite(values).all()):
        n_bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError("finite volume elements", f"{n_bad} of {n * n} that are not", "Draw a smaller rectangle.")
    box = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    shown = axes.imshow(values.cpu().double().numpy(), origin="lower", extent=box, cmap=cmap, aspect="auto")
    axes.set(xlabel="code dimension 0", ylabel="code dimension 1")
    figure = axes.get_figure()
    if label is not None and figure is not None:
        figure.colorbar(shown, ax=axes, label=label)
    return axes


def code_curves(axes: Axes, curves: Mapping[str, Tensor], *, colours: Mapping[str, str] | None = None) -> Axes:
    """Draw curves of a code space, those of one name in one colour; their ends are marked.

    Args:
        axes: Where to draw.
        curves: Points (P, n + 1, 2) by name, such as geodesics and straight lines.
        colours: By name; those of the axes' cycle if None.

    Returns:
        The axes.

    Raises:
        ShapeError: If curves are not (P, n + 1, 2).
    """
    for number, (name, points) in enumerate(curves.items()):
        shown = _points(name, points)
        colour = f"C{number}" if colours is None else colours[name]
        for row, one in enumerate(shown):
            axes.plot(one[:, 0], one[:, 1], color=colour, linewidth=1.4, label=None if row else name)
        ends = shown[:, [0, -1]].reshape(-1, 2)
        axes.scatter(ends[:, 0], ends[:, 1], s=14, color="white", edgecolors="black", linewidths=0.6, zorder=3)
    axes.legend(fontsize="small")  # framed: it stands on the background
    return axes


def curve_band(axes: Axes, points: Tensor, *, colour: str = "white", label: str | None = None) -> Axes:
    """Draw every weight draw's curve between the same codes, thinly: how far a geodesic is known.

    Args:
        axes: Where to draw.
        points: (S, P, n + 1, 2), such as ``geodesic_band(...).points``.
        colour: Of all curves.
        label: In the legend of the axes.

    Returns:
        The axes.

    Raises:
        ShapeError: If curves are not (S, P, n + 1, 2).
    """
    if points.dim() != 4:
        fix = "Give those of all draws, such as geodesic_band(...).points."
        raise ShapeError("curves (S, P, n + 1, 2)", f"{tuple(points.shape)}", fix)
    shown = _points("draws", points.flatten(0, 1))
    for row, one in enumerate(shown):
        axes.plot(one[:, 0], one[:, 1], color=colour, linewidth=0.5, alpha=0.5, label=None if row else label)
    return axes


def film_strip(axes: Axes, frames: Mapping[str, Tensor], *, cmap: str = "gray", high: float | None = None) -> Axes:
    """Draw what curves decode to, one row of images a curve, in order of time.

    Args:
        axes: Where to draw.
        frames: Images (T, height, width) or (T, 1, height, width) by the curve's name, all of one shape.
        cmap: Colour map.
        high: Upper end of the scale; the largest value if None. The lower end is 0.

    Returns:
        The axes.

    Raises:
        ShapeError: If the rows differ in shape.
    """
    shapes = {tuple(rows.shape) for rows in frames.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) < 3:
        raise ShapeError("frames (T, height, width) of one shape", f"{sorted(shapes)}", "Decode as many times of each.")
    strips = []
    for rows in frames.values():
        pictures = rows.detach().cpu().double().reshape(len(rows), *rows.shape[-2:])
        padded = torch.nn.functional.pad(pictures, (0, 1, 0, 1), value=torch.nan)
        strips.append(padded.permute(1, 0, 2).flatten(1)[:, :-1])
    height = strips[0].shape[0]
    mosaic = np.ma.masked_invalid(torch.cat(strips)[:-1].numpy())
    axes.imshow(mosaic, cmap=cmap, vmin=0, vmax=high, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * height - 1 for row in range(len(frames))], list(frames))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes


def _points(name: str, points: Tensor) -> np.ndarray:
    if points.dim() != 3 or points.shape[-1] != 2:
        fix = "Choose two dimensions of the code."
        raise ShapeError(f"curves (P, n + 1, 2) of {name}", f"{tuple(points.shape)}", fix)
    return points.detach().cpu().double().numpy()
