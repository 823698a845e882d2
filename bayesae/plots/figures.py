"""Rows of images, heat maps, score histograms and reliability diagrams on axes that the caller makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import ShapeError

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["heat_map", "images", "reliability", "score_histograms"]


def images(axes: Axes, rows: Tensor, *, title: str, cmap: str = "gray", high: float | None = None) -> Axes:
    """Draw images side by side in one strip with its own scale.

    Args:
        axes: Where to draw.
        rows: (N, 1, height, width) or (N, height, width).
        title: Written at the left.
        cmap: Colour map.
        high: Upper end of the scale; the largest value if None. The lower end is 0.

    Returns:
        The axes.
    """
    pictures = rows.reshape(len(rows), *rows.shape[-2:]).cpu()
    gap = torch.full((len(pictures), pictures.shape[1], 1), torch.nan)
    strip = torch.cat([pictures, gap], -1).permute(1, 0, 2).flatten(1)[:, :-1]
    axes.imshow(np.ma.masked_invalid(strip.numpy()), cmap=cmap, vmin=0, vmax=high, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(title, rotation=0, ha="right", va="center")
    return axes


def heat_map(
    axes: Axes,
    image: Tensor,
    values: Tensor,
    *,
    label: str | None = None,
    low: float = 0.0,
    high: float | None = None,
    outline: Tensor | None = None,
    cmap: str = "autumn_r",
) -> Axes:
    """Draw an image in grey under a value for every pixel, such as its contribution to a score.

    Values of ``low`` and less are transparent and let the image through, ``high`` and more nearly opaque: colour and
    opacity both say how strange a pixel is.

    Args:
        axes: Where to draw.
        image: (height, width) or (channels, height, width), of which the mean is drawn; 0 is black and 1 white.
        values: (height, width) or (channels, height, width), of which the sum is drawn.
        label: What the values are, with their unit: written beside a colour bar. None draws no bar, where panels
            of one scale stand side by side.
        low: Lower end of the scale, units of ``values``.
        high: Upper end; the largest value if None.
        outline: True where a line should go around, shape as ``image``: a mask of a known defect, say.
        cmap: Colour map.

    Returns:
        The axes.

    Raises:
        ShapeError: If the pictures differ in height or width.
    """
    below, above = image.reshape(-1, *image.shape[-2:]).mean(0), values.reshape(-1, *values.shape[-2:]).sum(0)
    if below.shape != above.shape:
        raise ShapeError(f"values of shape {tuple(below.shape)}", f"{tuple(above.shape)}", "One for every pixel.")
    below, above = (part.detach().cpu().double().numpy() for part in (below, above))
    top = float(above.max()) if high is None else high
    opacity = 0.85 * np.clip((above - low) / max(top - low, np.finfo(float).tiny), 0, 1)
    axes.imshow(below, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    heat = axes.imshow(above, cmap=cmap, vmin=low, vmax=top, alpha=opacity, interpolation="nearest")
    if outline is not None:
        inside = outline.reshape(-1, *outline.shape[-2:]).any(0).cpu().numpy()
        for first, second in _edges(inside):
            axes.plot(*zip(first, second, strict=True), color="cyan", linewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    figure = axes.get_figure()
    if label is not None and figure is not None:
        figure.colorbar(heat, ax=axes, label=label, extend="both")
    return axes


def _edges(inside: np.ndarray) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Sides (x, y) to (x, y) of the pixels where a mask and its outside meet."""
    padded = np.pad(inside, 1).astype(np.int8)
    across, down = np.diff(padded, axis=1)[1:-1], np.diff(padded, axis=0)[:, 1:-1]
    upright = [((x - 0.5, y - 0.5), (x - 0.5, y + 0.5)) for y, x in zip(*np.nonzero(across), strict=True)]
    return upright + [((x - 0.5, y - 0.5), (x + 0.5, y - 0.5)) for y, x in zip(*np.nonzero(down), strict=True)]


def score_histograms(axes: Axes, scores: Mapping[str, Tensor], *, xlabel: str) -> Axes:
    """Overlay histograms of a score for several sets of rows on common bins; the last bin holds the top 1 % too.

    Args:
        axes: Where to draw.
        scores: Scores (N,) by the set's name; the first set is drawn filled.
        xlabel: What the score is, with its unit.

    Returns:
        The axes.
    """
    pooled = torch.cat([values.flatten() for values in scores.values()]).cpu().double().numpy()
    bins = np.linspace(float(pooled.min()), float(np.quantile(pooled, 0.99)), 41)
    for number, (name, values) in enumerate(scores.items()):
        shown = np.clip(values.cpu().double().numpy(), bins[0], bins[-1])
        edges = bins.tolist()
        if number == 0:
            axes.hist(shown, edges, density=True, label=name, histtype="stepfilled", alpha=0.35, color="black")
        else:
            axes.hist(shown, edges, density=True, label=name, histtype="step", linewidth=1.5)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize="small")
    return axes


def reliability(axes: Axes, curves: Mapping[str, tuple[Tensor, Tensor]]) -> Axes:
    """Draw observed against nominal levels; the diagonal is perfect.

    Args:
        axes: Where to draw.
        curves: (levels, observed) by the predictive's name.

    Returns:
        The axes.
    """
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (levels, observed) in curves.items():
        axes.plot(levels.cpu(), observed.cpu(), marker=".", label=name)
    axes.set(xlabel="nominal level", ylabel="share of pixels below the quantile", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize="small")
    return axes
