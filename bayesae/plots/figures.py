"""Rows of images, score histograms and reliability diagrams on axes that the caller makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["images", "reliability", "score_histograms"]


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
