"""What is held against curves of a solver: their segments halved, the straight line, and changes of the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.errors import UnsupportedError
from bayesae.geometry.curves import CubicSpline, end_slopes, middles
from bayesae.geometry.metrics import Metric, SegmentEnergy

__all__ = ["check_derivatives", "growth", "inner_length", "is_kept", "root_sum"]

_UNLIKE = 1.25  # between a length by derivatives and one by chords: above it they are held against each other finely
_GROSS = 0.1  # share of the outputs' changes that derivatives may miss
_FINER = (4, 16, 64)  # parts of a segment
_SLACK, _MOST_SLACK = 0.1, 0.01  # share of what chords miss within which lengths are alike, and the most of a length


def root_sum(squared: Tensor) -> Tensor:
    """Lengths of curves.

    Args:
        squared: Of their segments, (P, n).

    Returns:
        (P,).
    """
    return squared.clamp(min=0).sqrt().sum(1)


def growth(metric: Metric, points: Tensor, chords: Tensor, *, of_spline: bool = False) -> Tensor:
    """Share by which lengths grow when every segment is halved.

    Args:
        metric: G.
        points: (P, n + 1, Z).
        chords: Lengths by their segments, (P,).
        of_spline: Whether on the spline through the points, or on the straight lines between them.

    Returns:
        (P,); infinite where the metric is not finite between points, which says nothing of the curve.
    """
    between = middles(points)
    if of_spline:
        n = points.shape[1] - 1
        times = (torch.arange(n, dtype=points.dtype, device=points.device) + 0.5) / n
        between = CubicSpline(points, end_slopes(points))(times)
    halved = torch.cat([torch.stack([points[:, :-1], between], 2).flatten(1, 2), points[:, -1:]], 1)
    finer = root_sum(metric.segments(halved))
    return (finer / chords.clamp(min=1e-300) - 1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def is_kept(
    metric: SegmentEnergy, squared: Tensor, grown: Tensor, straight: Tensor, straight_squared: Tensor
) -> Tensor:
    """Whether curves have less energy than straight lines and are no longer, by a measure finer than their segments.

    Lengths are those of segments and of half segments, extrapolated. A metric finds two of them alike within a tenth of
    what chords miss, and within 1 % at most: equal steps on the straight line itself are measured longer than others by
    their order. Of an energy that is no metric, lengths are those of its segments.

    Args:
        metric: What measures segments.
        squared: Of the curves' segments, (P, n).
        grown: Their `growth` on straight lines, (P,).
        straight: (P, n + 1, Z).
        straight_squared: (P, n).

    Returns:
        (P,).
    """
    found = squared.sum(1) < straight_squared.sum(1)
    length, straight_length = root_sum(squared), root_sum(straight_squared)
    if not isinstance(metric, Metric):
        return found & (length <= straight_length)
    # a straight line's chords miss some of it too, so that what is shorter than them is shorter
    chosen = (found & (length * (1 + 4 / 3 * grown) > straight_length)).nonzero()[:, 0]
    if len(chosen):
        miss, other = 4 / 3 * grown[chosen], 4 / 3 * growth(metric, straight[chosen], straight_length[chosen])
        slack = 1e-9 + (_SLACK * (miss.abs() + other.abs())).clamp(max=_MOST_SLACK)
        found[chosen] = length[chosen] * (1 + miss) <= straight_length[chosen] * (1 + other) * (1 + slack)
    return found


def inner_length(squared: Tensor, n_segments: int) -> Tensor:
    """Lengths without half a segment at either end, to compare with a `reach`.

    Args:
        squared: Of segments at equal times, (P, n).
        n_segments: Of the curves that the reach is of.

    Returns:
        (P,).
    """
    n = squared.shape[1]
    starts = torch.arange(n, dtype=squared.dtype, device=squared.device)
    low, high = n / (2 * n_segments), n - n / (2 * n_segments)
    shares = ((starts + 1).clamp(max=high) - starts.clamp(min=low)).clamp(min=0)
    return squared.clamp(min=0).sqrt() @ shares


def check_derivatives(metric: SegmentEnergy, points: Tensor, reached: Tensor, changed: Tensor, where: str) -> None:
    """Whether outputs change along curves as their derivatives say.

    Curves whose length by derivatives at nodes is that by chords are believed. Of others each segment is parted until
    what the derivatives miss is small, as it will be under kinks and fine structure; where a decoder is partly detached
    or made of steps it stays.

    Args:
        metric: What measures segments.
        points: (P, n + 1, Z).
        reached: Their `reach`, (P,).
        changed: Their `inner_length` by chords, (P,).
        where: What they are, for a message.

    Raises:
        UnsupportedError: If derivatives miss more than a tenth of the changes and finer parts do not mend it.
    """
    ratio = (reached + 1e-300) / (changed + 1e-300)
    unlike = (torch.maximum(ratio, 1 / ratio) > _UNLIKE).nonzero()[:, 0]
    if not len(unlike) or metric.gaps(points[:1, :2]) is None:
        return
    for row in unlike[torch.maximum(ratio, 1 / ratio)[unlike].argsort(descending=True)].tolist():
        missed: list[float] = []
        for parts in _FINER:
            found = metric.gaps(_parted(points[row], parts))
            assert found is not None
            gap, change = (float(each.sum()) for each in found)
            missed.append(gap / change if change > 0 else 0.0)
            if not missed[-1] > _GROSS:
                break
        else:
            if missed[-1] > missed[-2] / 2:
                got = f"derivatives that miss {100 * missed[-1]:.0f} % of the changes along {where} of pair {row}"
                fix = "Is part of the decoder detached from its argument, rounded, or piecewise constant?"
                raise UnsupportedError("outputs that are differentiable in the code", got, fix)


def _parted(points: Tensor, parts: int) -> Tensor:
    """A curve (n + 1, Z) with every segment cut into equal parts, (1, n * parts + 1, Z)."""
    shares = torch.arange(parts, dtype=points.dtype, device=points.device)[:, None] / parts
    inner = points[:-1, None] + shares * (points[1:] - points[:-1])[:, None]
    return torch.cat([inner.flatten(0, 1), points[-1:]])[None]
