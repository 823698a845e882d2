"""Curves in a code space, many at once: points joined by straight lines or by a cubic spline; energy and length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError
from bayesae.geometry.metrics import Metric, SegmentEnergy, check_energy, check_matrices, check_metric

__all__ = [
    "CubicSpline",
    "Curve",
    "Polyline",
    "check_curves",
    "checked_squares",
    "chord_energy",
    "chord_length",
    "end_slopes",
    "energy",
    "length",
    "middles",
    "straight_lines",
]


class Curve(Protocol):
    """P curves over times 0 to 1."""

    def __call__(self, times: Tensor, *, derivative: int = 0) -> Tensor:
        """Values at times (T,), or their derivatives in time, (P, T, Z)."""
        ...


_ROUNDING = 1e-5  # share of the largest squared length by which one may be below 0


def check_curves(points: Tensor) -> None:
    """Whether there is an axis of curves, one of points and one of code dimensions.

    Args:
        points: (P, n + 1, Z), n >= 1.

    Raises:
        ShapeError: If not.
    """
    if points.dim() != 3 or points.shape[1] < 2 or 0 in points.shape or not points.is_floating_point():
        got = f"{tuple(points.shape)} of {points.dtype}"
        raise ShapeError("points (P, n + 1, Z) of floating numbers, n >= 1", got, "Give the points of each curve.")


def checked_squares(squared: Tensor, where: str) -> Tensor:
    """Squared lengths that may be rooted: what rounding put below 0 is 0.

    Args:
        squared: Of any shape.
        where: What they belong to, for a message.

    Returns:
        The same numbers.

    Raises:
        NonFiniteError: If one is not finite.
        DataError: If one is below 0 by more than rounding.
    """
    if not bool(torch.isfinite(squared).all()):
        got = f"{int((~torch.isfinite(squared)).sum())} of {squared.numel()} that are not"
        fix = "Does the decoder overflow, or is the metric undefined there?"
        raise NonFiniteError(f"finite squared lengths {where}", got, fix)
    is_below = squared < -_ROUNDING * squared.abs().amax()
    if bool(is_below.any()):
        got = f"{int(is_below.sum())} squared lengths below 0 of {squared.numel()} {where}"
        raise DataError("a positive definite metric", got, "Is it symmetric, and defined at these codes?")
    return squared.clamp(min=0)


def straight_lines(starts: Tensor, ends: Tensor, n_segments: int) -> Tensor:
    """Points at equal steps from start to end.

    Args:
        starts: (P, Z).
        ends: (P, Z).
        n_segments: Steps n.

    Returns:
        (P, n + 1, Z).
    """
    times = torch.linspace(0, 1, n_segments + 1, dtype=starts.dtype, device=starts.device)[:, None]
    points = starts[:, None] + times * (ends - starts)[:, None]
    return torch.cat([points[:, :-1], ends[:, None]], 1)


def end_slopes(points: Tensor) -> Tensor:
    """Derivatives in time at both ends of curves through equally spaced points, by one-sided differences.

    Args:
        points: (P, n + 1, Z).

    Returns:
        (P, 2, Z), off by order 1 / n^4 for a smooth curve with n >= 4 (fewer points give a lower order).
    """
    n = points.shape[1] - 1
    order = min(n, 4)
    # weights of a derivative at 0 that is exact for polynomials of this order
    powers = torch.arange(order + 1, dtype=torch.float64)
    target = (powers == 1).double()
    weights = torch.linalg.solve(powers[None] ** powers[:, None], target).to(points)
    first = torch.einsum("k,pkz->pz", weights, points[:, : order + 1])
    last = -torch.einsum("k,pkz->pz", weights, points.flip(1)[:, : order + 1])
    return n * torch.stack([first, last], 1)


@dataclass(frozen=True)
class Polyline:
    """Points at equal times joined by straight lines.

    Args:
        points: (P, n + 1, Z).

    Exact when: always; it has no second derivative, and its first one jumps at the points.
    Raises: ShapeError if the points are not (P, n + 1, Z).
    """

    points: Tensor

    def __post_init__(self) -> None:
        check_curves(self.points)

    def __call__(self, times: Tensor, *, derivative: int = 0) -> Tensor:
        """Values (derivative 0) or slopes (1) at times (T,) in [0, 1], (P, T, Z).

        Args:
            times: (T,).
            derivative: 0 or 1.

        Returns:
            The values.

        Raises:
            ShapeError: If another derivative is asked for.
        """
        if derivative not in (0, 1):
            raise ShapeError("derivative 0 or 1 of a polyline", f"{derivative}", "Use a CubicSpline.")
        cell, inside = _cells(times, self.points)
        steps = self.points[:, 1:] - self.points[:, :-1]
        if derivative == 1:
            return (self.points.shape[1] - 1) * steps[:, cell]
        return self.points[:, cell] + inside[:, None] * steps[:, cell]


@dataclass(frozen=True)
class CubicSpline:
    r"""Cubic splines through points at equal times: value, slope and second derivative are continuous.

    The slopes m_i at the points solve m_{i-1} + 4 m_i + m_{i+1} = 3 n (c_{i+1} - c_{i-1}).

    Args:
        points: (P, n + 1, Z).
        slopes: Derivatives at both ends, (P, 2, Z); the spline is then clamped. None for a natural one, whose second
            derivative is 0 at both ends.

    Exact when: the curve is a cubic and the slopes are its own; straight lines either way.
    Biased when: natural ends are put on a curve that bends there: off by order 1 / n^2 near the ends (else 1 / n^4).
    Cost: one solve of (n + 1) unknowns for all curves.
    Raises: ShapeError if the points are not (P, n + 1, Z), or the slopes do not fit them.
    """

    points: Tensor
    slopes: Tensor | None = None

    def __post_init__(self) -> None:
        check_curves(self.points)
        n_curves, _, n_latents = self.points.shape
        if self.slopes is not None and self.slopes.shape != (n_curves, 2, n_latents):
            fix = "Give one at each end of every curve, such as end_slopes."
            raise ShapeError(f"slopes ({n_curves}, 2, {n_latents})", f"{tuple(self.slopes.shape)}", fix)
        object.__setattr__(self, "_all_slopes", self._solved())

    def _solved(self) -> Tensor:
        n, points = self.points.shape[1] - 1, self.points.double()
        matrix = 4 * torch.eye(n + 1, dtype=torch.float64)
        matrix += torch.diag(torch.ones(n, dtype=torch.float64), 1) + torch.diag(torch.ones(n, dtype=torch.float64), -1)
        right = torch.zeros_like(points)
        right[:, 1:-1] = 3 * n * (points[:, 2:] - points[:, :-2])
        if self.slopes is None:
            matrix[0, 0] = matrix[-1, -1] = 2
            right[:, 0] = 3 * n * (points[:, 1] - points[:, 0])
            right[:, -1] = 3 * n * (points[:, -1] - points[:, -2])
        else:
            matrix[0] = matrix[-1] = 0
            matrix[0, 0] = matrix[-1, -1] = 1
            right[:, [0, -1]] = self.slopes.double()
        return torch.linalg.solve(matrix.to(points.device), right).to(self.points)

    def __call__(self, times: Tensor, *, derivative: int = 0) -> Tensor:
        """Values (derivative 0) or derivatives in time (1, 2) at times (T,) in [0, 1], (P, T, Z).

        Args:
            times: (T,).
            derivative: 0, 1 or 2.

        Returns:
            The values.

        Raises:
            ShapeError: If another derivative is asked for.
        """
        if derivative not in (0, 1, 2):
            raise ShapeError("derivative 0, 1 or 2 of a cubic spline", f"{derivative}", "The third one jumps.")
        n = self.points.shape[1] - 1
        cell, inside = _cells(times, self.points)
        u, slopes = inside[:, None], self._node_slopes() / n
        a, b = self.points[:, cell], self.points[:, cell + 1]
        p, q = slopes[:, cell], slopes[:, cell + 1]
        if derivative == 0:
            h = (1 + 2 * u) * (1 - u) ** 2
            return h * a + (1 - h) * b + u * (1 - u) ** 2 * p - u**2 * (1 - u) * q
        if derivative == 1:
            return n * (6 * u * (1 - u) * (b - a) + (1 - u) * (1 - 3 * u) * p + u * (3 * u - 2) * q)
        return n**2 * (6 * (1 - 2 * u) * (b - a) + (6 * u - 4) * p + (6 * u - 2) * q)

    def _node_slopes(self) -> Tensor:
        return self.__dict__["_all_slopes"]


def _cells(times: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Which step of the curve each time is in, and how far in it, 0 to 1."""
    n = points.shape[1] - 1
    scaled = times.to(points).clamp(0, 1) * n
    cell = scaled.floor().long().clamp(max=n - 1)
    return cell, scaled - cell


def chord_energy(metric: SegmentEnergy, points: Tensor) -> Tensor:
    r"""Energy of curves from the lengths of their segments: :math:`n \sum_i d^2(c_i, c_{i+1})`.

    Args:
        metric: What measures segments.
        points: (P, n + 1, Z) at equal times; gradients do not pass.

    Returns:
        (P,), float64: squared length a unit of time, at least `chord_length` squared.

    Exact when: the metric is constant along the curve (of a `Pullback`: the outputs are linear).
    Biased when: there are few segments: off by a share of order 1 / n^2.
    Cost: one decoding of the points for a `Pullback`.

    Raises:
        ShapeError: If the points are not (P, n + 1, Z).
        NonFiniteError: If a length is not finite.
        DataError: If the metric is not symmetric and positive definite.
        UnsupportedError: If ``metric`` is none.
    """
    squared = _squared_segments(metric, points)
    return squared.shape[1] * squared.sum(1)


def chord_length(metric: SegmentEnergy, points: Tensor) -> Tensor:
    r"""Length of curves from the lengths of their segments: :math:`\sum_i d(c_i, c_{i+1})`.

    Args:
        metric: What measures segments.
        points: (P, n + 1, Z); gradients do not pass.

    Returns:
        (P,), float64, in units of the outputs.

    Exact when: the metric is constant along the curve (of a `Pullback`: the outputs are linear).
    Biased when: there are few segments: off by a share of order 1 / n^2.
    Cost: one decoding of the points for a `Pullback`.

    Raises:
        ShapeError: If the points are not (P, n + 1, Z).
        NonFiniteError: If a length is not finite.
        DataError: If the metric is not symmetric and positive definite.
        UnsupportedError: If ``metric`` is none.
    """
    return _squared_segments(metric, points).sqrt().sum(1)


def _squared_segments(metric: SegmentEnergy, points: Tensor) -> Tensor:
    check_energy(metric)
    check_curves(points)
    squared = checked_squares(metric.segments(points), "of segments")
    metric.as_metric().check_positive(middles(points).flatten(0, 1).detach(), "in the middle of segments")
    return squared


def middles(points: Tensor) -> Tensor:
    """Of curves' segments.

    Args:
        points: (P, n + 1, Z).

    Returns:
        (P, n, Z).
    """
    return (points[:, 1:] + points[:, :-1]) / 2


def energy(metric: Metric, curve: Curve, *, n_nodes: int = 64) -> Tensor:
    r"""Energy of curves from the metric: :math:`\int_0^1 \dot c^\top G(c)\, \dot c\, dt`.

    Args:
        metric: G.
        curve: P curves; gradients do not pass.
        n_nodes: Gauss-Legendre nodes.

    Returns:
        (P,), float64.

    Exact when: the integrand is a polynomial of degree up to ``2 n_nodes - 1``.
    Biased when: the metric or the curve's slope jumps between nodes (kinks of a decoder, points of a `Polyline`): off
        by a share of order 1 / ``n_nodes``.
    Cost: the metric at every node of every curve.

    Raises:
        NonFiniteError: If a speed is not finite.
        DataError: If the metric is not symmetric and positive definite.
        UnsupportedError: If ``metric`` is none.
    """
    speed, weights = _speeds(metric, curve, n_nodes)
    return speed @ weights


def length(metric: Metric, curve: Curve, *, n_nodes: int = 64) -> Tensor:
    r"""Length of curves from the metric: :math:`\int_0^1 \sqrt{\dot c^\top G(c)\, \dot c}\, dt`.

    Args:
        metric: G.
        curve: P curves; gradients do not pass.
        n_nodes: Gauss-Legendre nodes.

    Returns:
        (P,), float64, in units of the outputs.

    Exact when: the speed is a polynomial of degree up to ``2 n_nodes - 1``.
    Biased when: the metric or the curve's slope jumps between nodes (kinks of a decoder, points of a `Polyline`): off
        by a share of order 1 / ``n_nodes``.
    Cost: the metric at every node of every curve.

    Raises:
        NonFiniteError: If a speed is not finite.
        DataError: If the metric is not symmetric and positive definite.
        UnsupportedError: If ``metric`` is none.
    """
    speed, weights = _speeds(metric, curve, n_nodes)
    return speed.sqrt() @ weights


def _speeds(metric: Metric, curve: Curve, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Squared speeds (P, T) at Gauss-Legendre nodes, and the weights (T,)."""
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(n_nodes))
    check_metric(metric)
    times = (nodes + 1) / 2
    with torch.no_grad():
        values, slopes = curve(times), curve(times, derivative=1).double()
        matrices = metric(values.flatten(0, 1)).double().unflatten(0, values.shape[:2])
    speed = torch.einsum("pti,ptij,ptj->pt", slopes, matrices, slopes)
    speed = checked_squares(speed, "a unit of time")
    check_matrices(matrices.flatten(0, 1), "along a curve")
    return speed, (weights / 2).to(slopes)
