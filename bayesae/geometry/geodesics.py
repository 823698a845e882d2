"""Shortest curves between many pairs of codes at once, by a safeguarded Newton method with a certificate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError, UnsupportedError
from bayesae.geometry.certificate import check_derivatives, growth, inner_length, is_kept, root_sum
from bayesae.geometry.curves import CubicSpline, checked_squares, end_slopes, middles, straight_lines
from bayesae.geometry.derivatives import checked_points
from bayesae.geometry.graph import CodeGraph, graph_starts
from bayesae.geometry.metrics import SegmentEnergy, check_energy
from bayesae.geometry.solver import Solver, reach

__all__ = ["Geodesics", "checked_pairs", "geodesics", "solved", "warn_of_failures"]

_COARSEST = 8  # segments of the first level: far from the answer, nodes are cheap
_COARSE_TOLERANCE = 1e-3  # of the levels before the last
_COARSE = 0.1  # growth of a length under halved segments above which points are no curve


@dataclass(frozen=True)
class Geodesics:
    """P curves and how far their solver came.

    Args:
        points: (P, n + 1, Z) at equal times 0 to 1; the ends are those that were asked for.
        energy: Of the points' chords, (P,), squared units of the outputs.
        length: Of the points' chords, (P,), units of the outputs.
        straight_length: Of the straight line with as many segments, (P,): never less than ``length`` by more than
            chords miss, as the straight line at another speed may be.
        residual: Share of the energy that a full Newton step is predicted to gain, (P,); infinite where the Hessian
            is not positive definite.
        coarseness: Share by which the length (of ``metric.as_metric()``) grows when every segment is halved, on the
            straight line between its ends or on `spline`, the larger of both, (P,). Three quarters of what the chords
            miss where that is little; less of it where segments jump between codes that decode alike, which makes it
            large. Infinite where the metric is not finite between points.
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

    @property
    def is_coarse(self) -> Tensor:
        """Whether ``coarseness`` is above 0.1: points are then no curve, and lengths and slopes say nothing, (P,)."""
        return self.coarseness > _COARSE

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
        The curves. Where the result would have more energy or length than the straight line, lengths taken finer than
        by its segments (to 1 % where these are coarse), the straight line is kept and marked.

    Exact when: the outputs are linear in the code: straight lines, of length ``|W (b - a)|``.
    Biased when: there are few segments (see `chord_length`), or several local minima: a start elsewhere may find a
        shorter curve.
    Cost: some 5 to 10 expansions of the metric at the points, most of them with 8 segments; with a graph twice that,
        and a shortest-path search a pair.

    Raises:
        ShapeError: If the pairs do not fit each other, or ``initial`` does not fit them.
        DataError: If two ends are equal, no path of the graph joins a pair, or the metric is not symmetric and positive
            definite.
        NonFiniteError: If a code or an energy is not finite.
        UnsupportedError: If ``metric`` measures nothing, outputs do not change along a straight line, or have no
            derivative there or along a result, in whole or in part.
    """
    found = solved(
        metric, starts, ends, n_segments=n_segments, initial=initial, graph=graph, tolerance=tolerance,
        max_iterations=max_iterations,
    )  # fmt: skip
    warn_of_failures(found, stacklevel=3)
    return found


def warn_of_failures(found: Geodesics, *, stacklevel: int) -> None:
    """Say how many curves have not converged, and what may help.

    Args:
        found: Curves.
        stacklevel: As of ``warnings.warn``, from here.
    """
    n_failed, n_coarse = (int(part.sum()) for part in (~found.has_converged, found.is_coarse))
    if n_failed:
        text = f"{n_failed} of {len(found.points)} geodesics have not converged"
        if n_coarse:
            text = f"{text} ({n_coarse} with segments that jump: allow more segments)"
        fix = "See .residual and .coarseness; allow more iterations or segments, or start along a graph too."
        warnings.warn(f"{text}. {fix}", RuntimeWarning, stacklevel=stacklevel)


def solved(
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
    """`geodesics` without a warning, for callers that word their own.

    Args:
        metric: As there, and so are all others.
        starts: (P, Z).
        ends: (P, Z).
        n_segments: n.
        initial: (P, m + 1, Z).
        graph: For a second start.
        tolerance: Of residuals.
        max_iterations: On each level.

    Returns:
        The curves.

    Raises:
        DataError: As there, and so do others.
    """
    check_energy(metric)
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
    return reduce(_better, found)


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
    reached = torch.zeros_like(straight_squared[:, 0])
    residual = torch.full_like(straight_squared[:, 0], torch.inf)
    for n in _levels(n_segments):
        solver = Solver(metric, tolerance if n == n_segments else max(tolerance, _COARSE_TOLERANCE), max_iterations)
        points, residual, spent, reached = solver(_resampled(points, n), residual < torch.inf)
        n_iterations += spent
    squared, own = metric.segments(points), metric.as_metric()
    chords = squared if own is metric else own.segments(points)
    grown = growth(own, points, root_sum(chords))
    is_straight = ~is_kept(metric, squared, grown, straight, straight_squared)
    if is_straight.any():
        points = torch.where(is_straight[:, None, None], straight, points)
        squared = torch.where(is_straight[:, None], straight_squared, squared)
        residual[is_straight], reached[is_straight] = Solver(metric, tolerance, 1).residual(points[is_straight])
        chords = squared if own is metric else own.segments(points)
        grown[is_straight] = growth(own, points[is_straight], root_sum(chords[is_straight]))
    check_derivatives(metric, points, reached, inner_length(chords, n_segments), "the curve")
    own.check_positive(middles(points).flatten(0, 1), "in the middle of curves' segments")
    coarseness = torch.maximum(grown, growth(own, points, root_sum(chords), of_spline=True))
    return Geodesics(
        points, n_segments * squared.sum(1), root_sum(squared), root_sum(straight_squared), residual, coarseness,
        n_iterations, (residual <= tolerance) & (coarseness <= _COARSE), is_straight,
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


def _checked_squared(metric: SegmentEnergy, straight: Tensor) -> Tensor:
    """Squared lengths of straight lines' segments, (P, n)."""
    segments, own = checked_squares(metric.segments(straight), "of segments of straight lines"), metric.as_metric()
    own.check_positive(middles(straight).flatten(0, 1), "in the middle of straight lines' segments")
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
    changed = inner_length(segments if own is metric else own.segments(straight), few.shape[1] - 1)
    check_derivatives(metric, straight, reach(few, first.stiffness), changed, "the straight line")
    return segments


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
