"""Shortest curves between many pairs of codes at once, by a safeguarded Newton method with a certificate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError, UnsupportedError
from bayesae.geometry.curves import CubicSpline, checked_squares, end_slopes, straight_lines
from bayesae.geometry.derivatives import checked_points
from bayesae.geometry.graph import CodeGraph, graph_starts
from bayesae.geometry.metrics import Metric, SegmentEnergy
from bayesae.geometry.tridiagonal import BlockTridiagonal

__all__ = ["Geodesics", "checked_pairs", "geodesics"]

_COARSEST = 8  # segments of the first level: far from the answer, nodes are cheap
_GAUSS_NEWTON_UNTIL = 0.03  # predicted share of the energy below which the full Hessian is worth its price
_HIGHEST_DAMPING = 1e8
_COARSE_TOLERANCE = 1e-3  # of the levels before the last
_COARSE = 0.1  # growth of a length under halved segments above which points are no curve


@dataclass(frozen=True)
class Geodesics:
    """P curves and how far their solver came.

    Args:
        points: (P, n + 1, Z) at equal times 0 to 1; the ends are those that were asked for.
        energy: Of the points' chords, (P,), squared units of the outputs.
        length: Of the points' chords, (P,), units of the outputs; ``straight_length`` where that is less, which can be
            where the curve is the straight line at another speed: both then miss as little as chords do.
        straight_length: Of the straight line with as many segments, (P,): never less than ``length``.
        residual: Share of the energy that a full Newton step is predicted to gain, (P,); infinite where the Hessian
            is not positive definite.
        coarseness: Share by which the length (of ``metric.as_metric()``) grows when every segment is halved, (P,):
            about three quarters of what the chords miss. Large where a segment jumps between codes that decode alike,
            infinite where the metric is not finite between points.
        n_iterations: Steps that were tried, over all levels and starts, (P,).
        has_converged: Whether ``residual`` is at most the tolerance, at a positive definite Hessian (the points are
            then a local minimum to second order), and ``coarseness`` at most 0.1, (P,).
        is_straight: Whether the straight line was kept because the solver found nothing shorter, (P,).
    """

    points: Tensor
    energy: Tensor
    length: Tensor
    straight_length: Tensor
    residual: Tensor
    coarseness: Tensor
    n_iterations: Tensor
    has_converged: Tensor
    is_straight: Tensor

    def spline(self) -> CubicSpline:
        """The cubic splines through the points, with one-sided differences as slopes at the ends."""
        return CubicSpline(self.points, end_slopes(self.points))


def geodesics(
    metric: SegmentEnergy,
    starts: Tensor,
    ends: Tensor,
    *,
    n_segments: int = 32,
    initial: Tensor | None = None,
    graph: CodeGraph | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> Geodesics:
    r"""Curves of least energy between pairs of codes, all pairs at once.

    .. math:: \min_{c_1 \dots c_{n-1}} n \sum_{i=0}^{n-1} d^2(c_i, c_{i+1})

    A minimum has equal steps, so that it is shortest too. Energies are expanded to second order in all interior
    points; the Hessian is block-tridiagonal, (Z, Z) for each point, and is factorised for all pairs together. Its
    positive part (Gauss-Newton) serves far from the minimum, all of it near by, and both are damped where a step
    would not lower the energy. Curves start with 8 segments and are refined by a spline.

    Args:
        metric: What measures segments: a metric, or `IndependentDraws`.
        starts: Codes (P, Z); gradients do not pass.
        ends: Codes (P, Z).
        n_segments: n, at least 2.
        initial: Curves to start from, (P, m + 1, Z); straight lines if None.
        graph: Whose shortest paths are a second start, such as `neighbour_graph` of encoded data; of both results the
            one of less energy is kept for each pair. It finds the way around a region without data, which a straight
            start runs through. None: one start only.
        tolerance: Largest ``residual`` of a curve that counts as converged.
        max_iterations: Steps that are tried on each level.

    Returns:
        The curves. Where the result would be longer than the straight line, the straight line is kept and marked.

    Exact when: the outputs are linear in the code: straight lines, of length ``|W (b - a)|``.
    Biased when: there are few segments (see `chord_length`), or several local minima: a start elsewhere may find a
        shorter curve.
    Cost: some 5 to 10 expansions of the metric at the points, most of them with 8 segments; with a graph twice that,
        and a shortest-path search a pair.

    Raises:
        ShapeError: If the pairs do not fit each other, or ``initial`` does not fit them.
        DataError: If two ends are equal, no path of the graph joins a pair, or the metric is not positive definite.
        NonFiniteError: If a code or an energy is not finite.
        UnsupportedError: If outputs do not change along a straight line, or have no derivative.
    """
    starts, ends = checked_pairs(starts, ends)
    if n_segments < 2 or max_iterations < 1:
        got = f"n_segments={n_segments}, max_iterations={max_iterations}"
        raise DataError("n_segments >= 2 and max_iterations >= 1", got, "32 and 100 will do.")
    straight = straight_lines(starts, ends, n_segments)
    straight_squared = _checked_squared(metric, straight)
    firsts = [straight if initial is None else _checked_initial(initial, starts, ends)]
    if graph is not None:
        firsts.append(graph_starts(graph, starts, ends, n_segments=n_segments))
    found = (_solved(metric, first, straight, straight_squared, tolerance, max_iterations) for first in firsts)
    result = reduce(_better, found)
    n_failed = int((~result.has_converged).sum())
    if n_failed:
        fix = "See .residual and .coarseness; allow more iterations or segments, or start along a graph too."
        message = f"{n_failed} of {len(starts)} geodesics have not converged. {fix}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return result


def _solved(
    metric: SegmentEnergy,
    points: Tensor,
    straight: Tensor,
    straight_squared: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Geodesics:
    """From one start (P, m + 1, Z); straight lines (P, n + 1, Z) and their squared segments (P, n)."""
    n_segments = straight_squared.shape[1]
    n_iterations = torch.zeros(len(points), dtype=torch.long, device=points.device)
    residual = torch.full_like(straight_squared[:, 0], torch.inf)
    for n in _levels(n_segments):
        solver = _Solver(metric, tolerance if n == n_segments else max(tolerance, _COARSE_TOLERANCE), max_iterations)
        points, residual, spent = solver(_resampled(points, n), residual < torch.inf)
        n_iterations += spent
    squared = metric.segments(points)
    is_straight = ~_is_shorter(metric, points, squared, straight, straight_squared)
    if is_straight.any():
        points = torch.where(is_straight[:, None, None], straight, points)
        squared = torch.where(is_straight[:, None], straight_squared, squared)
        residual[is_straight] = _Solver(metric, tolerance, 1).residual(points[is_straight])
    coarseness = _coarseness(metric.as_metric(), points)
    straight_length = _length(straight_squared)
    return Geodesics(
        points, n_segments * squared.sum(1), torch.minimum(_length(squared), straight_length), straight_length,
        residual, coarseness, n_iterations, (residual <= tolerance) & (coarseness <= _COARSE), is_straight,
    )  # fmt: skip


def _better(one: Geodesics, other: Geodesics) -> Geodesics:
    """Of each pair the curve of less energy; the steps of both."""
    is_other, named = other.energy < one.energy, {}
    for name in (field.name for field in fields(Geodesics)):
        mine, its = getattr(one, name), getattr(other, name)
        named[name] = torch.where(is_other.reshape(-1, *[1] * (mine.dim() - 1)), its, mine)
    return Geodesics(**(named | {"n_iterations": one.n_iterations + other.n_iterations}))


def checked_pairs(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """End points as the solver takes them.

    Args:
        starts: (P, Z).
        ends: (P, Z).

    Returns:
        Both, of one shape and dtype.

    Raises:
        ShapeError: If they differ in shape.
        DataError: If a pair has one point twice.
    """
    starts, ends = checked_points("starts", starts), checked_points("ends", ends)
    if starts.shape != ends.shape or starts.dtype != ends.dtype:
        got = f"{tuple(starts.shape)} of {starts.dtype} and {tuple(ends.shape)} of {ends.dtype}"
        raise ShapeError("starts and ends of one shape and dtype", got, "Pair them: expand the one that is alone.")
    equal = (starts == ends).all(1)
    if equal.any():
        first = int(equal.nonzero()[0])
        got = f"{int(equal.sum())} equal pairs, the first at row {first}"
        raise DataError("two different codes in every pair", got, "Leave them out: their distance is 0.")
    return starts, ends


def _length(squared: Tensor) -> Tensor:
    return squared.clamp(min=0).sqrt().sum(1)


def _checked_squared(metric: SegmentEnergy, straight: Tensor) -> Tensor:
    """Squared lengths of straight lines' segments, (P, n)."""
    segments = checked_squares(metric.segments(straight), "of segments of straight lines")
    energy = segments.sum(1)
    few = _resampled(straight, min(_COARSEST, segments.shape[1]))
    first = metric.expansion(few, has_curvature=False)
    stiffness = first.stiffness.diagonal.diagonal(dim1=-2, dim2=-1).sum(-1)
    is_flat = ~(stiffness > 0).any(1)
    if is_flat.any():
        moves = bool((energy[is_flat] > 0).any())
        got = "outputs that change but have derivative 0" if moves else "outputs that do not change at all"
        got = f"{got}, along {int(is_flat.sum())} of {len(energy)} straight lines"
        fix = "Is the decoder detached from its argument, piecewise constant, or collapsed?"
        raise UnsupportedError("outputs that are differentiable in the code", got, fix)
    return segments


def _is_shorter(
    metric: SegmentEnergy, points: Tensor, squared: Tensor, straight: Tensor, straight_squared: Tensor
) -> Tensor:
    """Whether curves have less energy than straight lines, and no more length than chords can tell."""
    # the straight line at its right speed, in equal steps, is measured longer than at another by order 1 / n^2: lengths
    # are compared as they are for segments of no size
    found = squared.sum(1) < straight_squared.sum(1)
    length, straight_length = _length(squared), _length(straight_squared)
    doubtful = (found & (length > straight_length)).nonzero()[:, 0]
    found[doubtful] = False
    if len(doubtful) and metric.as_metric() is metric:
        misses = [4 / 3 * _coarseness(metric.as_metric(), part[doubtful]) for part in (points, straight)]
        slack = 1 + 0.1 * (misses[0].abs() + misses[1].abs()) + 1e-9
        found[doubtful] = length[doubtful] * (1 + misses[0]) <= straight_length[doubtful] * (1 + misses[1]) * slack
    return found


def _coarseness(metric: Metric, points: Tensor) -> Tensor:
    middles = (points[:, 1:] + points[:, :-1]) / 2
    halved = torch.cat([torch.stack([points[:, :-1], middles], 2).flatten(1, 2), points[:, -1:]], 1)
    finer, coarse = (_length(metric.segments(part)) for part in (halved, points))
    # a metric that is undefined between points says nothing of the curve
    return (finer / coarse.clamp(min=1e-300) - 1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _checked_initial(initial: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    is_fitting = initial.dim() == 3 and initial.shape[1] >= 2 and initial[:, 0].shape == starts.shape
    if not is_fitting:
        raise ShapeError(
            f"initial curves ({len(starts)}, m + 1, {starts.shape[1]})", f"{tuple(initial.shape)}", "One for each pair."
        )
    initial = initial.detach().to(starts)
    if not bool(torch.isfinite(initial).all()):
        raise NonFiniteError("finite initial curves", "NaN or infinite values", "Leave initial out.")
    return torch.cat([starts[:, None], initial[:, 1:-1], ends[:, None]], 1)


def _levels(n_segments: int) -> list[int]:
    """Numbers of segments from few to all."""
    levels = [n_segments]
    while levels[0] >= 2 * _COARSEST:
        levels.insert(0, levels[0] // 2)
    return levels


def _resampled(points: Tensor, n_segments: int) -> Tensor:
    if points.shape[1] == n_segments + 1:
        return points
    times = torch.linspace(0, 1, n_segments + 1, dtype=points.dtype, device=points.device)
    inner = CubicSpline(points)(times[1:-1])
    return torch.cat([points[:, :1], inner, points[:, -1:]], 1)


@dataclass(frozen=True)
class _Solver:
    """Levenberg-Marquardt steps on one level, each pair with a damping of its own."""

    metric: SegmentEnergy
    tolerance: float
    max_iterations: int

    def __call__(self, points: Tensor, is_near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (P, n + 1, Z), and whether the whole Hessian pays at once, to better ones, residuals, steps tried."""
        points = points.clone()
        squared = self.metric.segments(points).sum(1)
        damping = torch.zeros_like(squared)
        residual = torch.full_like(squared, torch.inf)
        spent = torch.zeros(len(points), dtype=torch.long, device=points.device)
        wants_all = is_near.clone()
        active = torch.arange(len(points), device=points.device)
        for _ in range(self.max_iterations):
            steps, gain, found = self._steps(points[active], squared[active], damping[active], wants_all[active])
            residual[active] = found
            is_done = found <= self.tolerance
            if is_done.all():
                break
            active, steps, gain = active[~is_done], steps[~is_done], gain[~is_done]
            spent[active] += 1
            trial = points[active].clone()
            trial[:, 1:-1] += steps.to(points.dtype)
            segments = self.metric.segments(trial)
            now = segments.sum(1)
            ratio = (squared[active] - now) / gain
            # a segment below 0 is one where the metric is not positive definite
            is_better = torch.isfinite(now) & (segments >= 0).all(1) & (gain > 0) & (ratio > 1e-4)
            taken = active[is_better]
            points[taken], squared[taken] = trial[is_better], now[is_better]
            wants_all[active] |= gain <= _GAUSS_NEWTON_UNTIL * squared[active]
            lower = torch.where(ratio > 0.5, damping[active] / 8, damping[active])
            lower = torch.where(lower < 1e-3, 0.0, lower)
            damping[active] = torch.where(is_better, lower, (4 * damping[active]).clamp(min=0.03))
            active = active[damping[active] < _HIGHEST_DAMPING]
            if not len(active):
                break
        else:  # out of steps: the residuals are those of the points before the last one
            residual[active] = self.residual(points[active])
        return points, residual, spent

    def residual(self, points: Tensor) -> Tensor:
        """Of curves as they are, (P,)."""
        squared = self.metric.segments(points).sum(1)
        none = torch.zeros_like(squared)
        return self._steps(points, squared, none, torch.ones_like(squared, dtype=torch.bool))[2]

    def _steps(
        self, points: Tensor, squared: Tensor, damping: Tensor, wants_all: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Damped steps, the decrease that each predicts, and residuals, infinite without the whole Hessian."""
        gradient = torch.empty_like(points[:, 1:-1], dtype=torch.float64)
        steps, gain, residual = (
            torch.zeros_like(gradient),
            torch.zeros_like(squared),
            torch.full_like(squared, torch.inf),
        )
        for has_all in (False, True):
            chosen = (wants_all == has_all).nonzero()[:, 0]
            if not len(chosen):
                continue
            found = self.metric.expansion(points[chosen], has_curvature=has_all)
            held = _regular(found.stiffness)
            hessian = held if found.curvature is None else held + found.curvature
            step, is_definite = (hessian + held.scaled(damping[chosen])).solve(-found.gradient)
            predicted = -(found.gradient * step).sum((1, 2)) / 2
            if has_all:
                full, is_full = hessian.solve(-found.gradient)
                decrement = -(found.gradient * full).sum((1, 2)) / 2
                share = decrement / squared[chosen]
                residual[chosen] = torch.where(is_full & (share >= 0), share, torch.inf)
            steps[chosen], gain[chosen] = step, torch.where(is_definite, predicted, 0.0)
        return steps, gain, residual


def _regular(stiffness: BlockTridiagonal) -> BlockTridiagonal:
    """With a diagonal raised by its rounding: a node where the decoder is flat would make it singular."""
    size = stiffness.diagonal.shape[-1]
    trace = stiffness.diagonal.diagonal(dim1=-2, dim2=-1).mean((1, 2))
    ridge = 1e-10 * trace[:, None, None, None] * torch.eye(size).to(stiffness.diagonal)
    return BlockTridiagonal(stiffness.diagonal + ridge, stiffness.upper)
