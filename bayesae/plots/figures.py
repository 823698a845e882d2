"""Rows of images, heat maps, histograms, reliability and latent spaces, on axes that the caller makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import ShapeError

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["heat_map", "images", "latent_grid", "latent_scatter", "reliability", "score_histograms"]


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


def latent_scatter(
    axes: Axes,
    locations: Tensor,
    labels: Tensor | Sequence[object] | None = None,
    *,
    covariances: Tensor | None = None,
    n_deviations: float = 1.0,
    dimensions: tuple[int, int] = (0, 1),
) -> Axes:
    """Draw the posterior means of rows in two dimensions of the code, coloured by label.

    Args:
        axes: Where to draw; units of both axes are made equal.
        locations: (N, Z), as ``codes.law_of(...).loc`` has them for one weight draw.
        labels: (N,), each value a colour and a line of the legend; None draws all alike.
        covariances: (N, Z, Z): an ellipse around every mean. None draws none.
        n_deviations: Half axes of the ellipses, in standard deviations.
        dimensions: Which two of the Z, counted from 0.

    Returns:
        The axes.

    Raises:
        ShapeError: If locations are no matrix with those two columns, or labels or covariances do not fit them.
    """
    points, chosen = locations.detach().cpu().double(), list(dimensions)
    if points.dim() != 2 or not all(0 <= j < points.shape[1] for j in chosen):
        raise ShapeError(f"locations (N, Z) with dimensions {dimensions}", f"{tuple(points.shape)}", "One row a mean.")
    names = (
        np.zeros(len(points)) if labels is None else np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    )
    if names.shape != (len(points),):
        raise ShapeError(f"{len(points)} labels, one for each location", f"{names.shape}", "Flatten them.")
    kinds = np.unique(names)
    colours = _distinct_colours(len(kinds)) if labels is not None else ["black"]
    for kind, colour in zip(kinds, colours, strict=True):
        own = torch.as_tensor(names == kind)
        shown = points[own][:, chosen]
        axes.scatter(shown[:, 0].numpy(), shown[:, 1].numpy(), s=9, color=colour, linewidths=0, label=str(kind))
        if covariances is not None:
            _ellipses(axes, shown, _of_dimensions(covariances, points, own, chosen), n_deviations, colour)
    axes.set(xlabel=f"code dimension {chosen[0]}", ylabel=f"code dimension {chosen[1]}")
    axes.set_aspect("equal", adjustable="datalim")
    if labels is not None:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
    return axes


def _distinct_colours(n: int) -> list[object]:
    from matplotlib import colormaps

    if n <= 10:
        return [colormaps["tab10"](i) for i in range(n)]
    return [colormaps["turbo"](i / (n - 1)) for i in range(n)]


def _of_dimensions(covariances: Tensor, points: Tensor, own: Tensor, chosen: list[int]) -> Tensor:
    if covariances.shape != (*points.shape, points.shape[1]):
        expected = f"covariances {(*points.shape, points.shape[1])}"
        raise ShapeError(expected, f"{tuple(covariances.shape)}", "One matrix for each location.")
    return covariances.detach().cpu().double()[own][:, chosen][:, :, chosen]


def _ellipses(axes: Axes, centres: Tensor, covariances: Tensor, n_deviations: float, colour: object) -> None:
    from matplotlib.collections import EllipseCollection

    values, vectors = torch.linalg.eigh(covariances)  # the longer axis comes second
    lengths = 2 * n_deviations * values.clamp(min=0).sqrt()
    angles = torch.rad2deg(torch.atan2(vectors[:, 1, 1], vectors[:, 0, 1]))
    drawn = EllipseCollection(
        lengths[:, 1].numpy(), lengths[:, 0].numpy(), angles.numpy(), units="xy", offsets=centres.numpy(),
        offset_transform=axes.transData, facecolors="none", edgecolors=colour, linewidths=0.5, alpha=0.5, zorder=0.5,
    )  # fmt: skip
    axes.add_collection(drawn)
    reach = n_deviations * covariances.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    axes.update_datalim(torch.cat([centres - reach, centres + reach]).numpy())
    axes.autoscale_view()


def latent_grid(
    axes: Axes,
    decode: Callable[[Tensor], Tensor],
    *,
    n: int = 15,
    shape: tuple[int, int] | None = None,
    cmap: str = "gray",
    high: float | None = None,
    like: Tensor | None = None,
) -> Axes:
    r"""Draw the images that a code of two makes, at quantiles of its standard Normal prior.

    .. math:: z_{ij} = (\Phi^{-1}(\tfrac{i + 1/2}{n}), \Phi^{-1}(\tfrac{j + 1/2}{n})): \quad
              \text{each image stands for the same share of the prior}

    Args:
        axes: Where to draw: the first code dimension grows to the right, the second upwards.
        decode: Codes (n^2, 2) to images (n^2, \*image), or (S, n^2, \*image), averaged over S as those of
            ``Predictive.decoder()`` are.
        n: Images a side.
        shape: (height, width) of flat images; the last two axes of what ``decode`` gives if None.
        cmap: Colour map.
        high: Upper end of the scale; the largest value if None. The lower end is 0.
        like: Gives dtype and device of the codes; float32 on the CPU if None.

    Returns:
        The axes.

    Raises:
        ShapeError: If ``decode`` does not give one image of that shape for every code.
    """
    like = torch.empty(0) if like is None else like
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    first, second = torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy")
    codes = torch.stack([first, second], -1).reshape(-1, 2)
    with torch.no_grad():
        decoded = decode(codes.to(like)).cpu().double()
    height, width = decoded.shape[-2:] if shape is None else shape
    if decoded.shape[:1] != (n * n,):
        decoded = decoded.mean(0)
    if decoded.shape[:1] != (n * n,) or decoded[0].numel() != height * width:
        expected = f"{n * n} images of {height} x {width} pixels"
        raise ShapeError(expected, f"{tuple(decoded.shape)}", "Give shape=(height, width), and one channel.")
    tiles = torch.full((n, height + 1, n, width + 1), torch.nan, dtype=decoded.dtype)  # a gap after every image
    tiles[:, :-1, :, :-1] = decoded.reshape(n, n, height, width).transpose(1, 2)
    mosaic = tiles.reshape(n * (height + 1), n * (width + 1))[:-1, :-1]
    axes.imshow(np.ma.masked_invalid(mosaic.numpy()), cmap=cmap, vmin=0, vmax=high, interpolation="nearest")
    shown = range(0, n, math.ceil(n / 8))
    texts = [f"{quantiles[i]:.1f}" for i in shown]
    axes.set_xticks([i * (width + 1) + (width - 1) / 2 for i in shown], texts)
    axes.set_yticks([(n - 1 - i) * (height + 1) + (height - 1) / 2 for i in shown], texts)
    axes.set(xlabel="code dimension 0", ylabel="code dimension 1")
    return axes
