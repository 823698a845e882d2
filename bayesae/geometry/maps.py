"""Exponential map, logarithm and parallel transport, by the geodesic equation."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.geometry.curves import Curve
from bayesae.geometry.derivatives import checked_points
from bayesae.geometry.geodesics import Geodesics, checked_pairs, solved, warn_of_failures
from bayesae.geometry.graph import CodeGraph
from bayesae.geometry.local import symbols_or_nan
from bayesae.geometry.metrics import Metric, check_metric
from bayesae.geometry.ode import integrate

__all__ = ["exponential", "logarithm", "parallel_transport"]

_NEWTON_STEPS = 20
_IN_VAIN = 4  # of them that hit no nearer, before shooting is given up
_ASTRAY = "Split long curves, or allow segments (n_segments=) until the curves converge."


def exponential(
    metric: Metric, points: Tensor, velocities: Tensor, *, tolerance: float = 1e-8, max_steps: int = 2000
) -> tuple[Tensor, Tensor]:
    r"""Where geodesics from points with given velocities are after unit time.

    .. math:: \ddot c^k = -\sum_{ij} \Gamma^k_{ij}(c)\, \dot c^i \dot c^j, \qquad c(0) = z, \quad \dot c(0) = v

    Args:
        metric: G, differentiable in torch.
        points: z, (B, Z); gradients do not pass.
        velocities: v, (B, Z); a zero velocity stays where it is.
        tolerance: Local error of a step; never below ten roundings of the dtype (1e-6 in float32).
        max_steps: Steps before giving up.

    Returns:
        End points c(1) and velocities there, both (B, Z). To follow a curve, scale the velocities.

    Exact when: never; the error is some ten times ``tolerance``. Straight lines (a constant metric) are exact.
    Biased when: a velocity is long and the space is negatively curved: errors grow exponentially with length.
    Cost: seven times 1 + Z evaluations of the metric a step, some tens of steps.

    Raises:
        ShapeError: If points and velocities differ in shape.
        NonFiniteError: If a code or a velocity is not finite, or the metric along the curve is not, or is singular.
        UnsupportedError: If unit time is not reached in ``max_steps``, or torch cannot differentiate the metric.
    """
    check_metric(metric)
    points, velocities = checked_points("points", points), checked_points("velocities", velocities)
    _check_alike("velocities", velocities, points)

    def rate(times: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        position, velocity = state.chunk(2, -1)
        symbols = symbols_or_nan(metric, position)
        return torch.cat([velocity, -torch.einsum("bkij,bi,bj->bk", symbols, velocity, velocity)], -1)

    state = integrate(rate, torch.cat([points, velocities], -1), tolerance=tolerance, max_steps=max_steps)
    end, velocity = state.chunk(2, -1)
    return end, velocity


def logarithm(
    metric: Metric,
    starts: Tensor,
    ends: Tensor,
    *,
    curves: Geodesics | None = None,
    n_segments: int = 32,
    graph: CodeGraph | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    max_steps: int = 200,
) -> Tensor:
    r"""Velocities with which geodesics leave the starts to be at the ends after unit time.

    The velocity of the curve of least energy is refined by shooting: Newton steps on c(1) - end, with differences of
    `exponential` as derivatives.

    Args:
        metric: G, differentiable in torch.
        starts: (P, Z); gradients do not pass.
        ends: (P, Z).
        curves: Geodesics between them if they are known already, instead of the next three.
        n_segments: Of `geodesics`, and so are the next two.
        graph: For a second start.
        max_iterations: Of the curves' solver.
        tolerance: Largest miss of an end, a share of the distance in codes; shooting is a hundred times finer. Never
            below a thousand roundings of the dtype (1e-4 in float32).
        max_steps: Of each `exponential`; some tens are usual, and what needs many more is shot astray.

    Returns:
        (P, Z): of length :math:`\sqrt{v^\top G v}` equal to the distance.

    Exact when: as its shooting is: `exponential` of the result is the end, to ``tolerance``.
    Biased when: several geodesics join the points (beyond the cut locus): it is that of ``curves``.
    Cost: `geodesics`, then 1 + Z calls of `exponential` a Newton step, two to four steps; no more than 20, and no more
        than four in a row that hit no nearer.

    Raises:
        ShapeError: If the pairs do not fit each other.
        DataError: If two ends are equal, or ``curves`` do not join the pairs.
        NonFiniteError: If a code is not finite, or the metric along a curve is not, or is singular.
        UnsupportedError: If the curves are too coarse to have a slope, shooting does not come within the tolerance, or
            ``metric`` is none.
    """
    check_metric(metric)
    start, end = checked_pairs(starts, ends)
    found = curves
    if found is None:
        found = solved(metric, start, end, n_segments=n_segments, graph=graph, max_iterations=max_iterations)
    if bool(found.is_coarse.any()):
        got = f"{int(found.is_coarse.sum())} of {len(start)} whose segments jump"
        raise UnsupportedError("curves with a slope to shoot from", got, _ASTRAY)
    if curves is None:
        warn_of_failures(found, stacklevel=3)
    if not (torch.equal(found.points[:, 0], start) and torch.equal(found.points[:, -1], end)):
        raise DataError("curves that join the pairs", "curves with other ends", "Give geodesics(metric, starts, ends).")
    velocity = found.spline()(torch.zeros(1).to(start), derivative=1)[:, 0]
    scale, size = (end - start).norm(dim=1), start.shape[1]
    tolerance = max(tolerance, 1000 * torch.finfo(start.dtype).eps)
    axes = torch.eye(size).to(start)
    best, answer = torch.full_like(scale, torch.inf), velocity.clone()
    active, in_vain = torch.arange(len(start), device=start.device), torch.zeros_like(scale)
    for _ in range(_NEWTON_STEPS):
        origins, nudge = start[active], tolerance**0.5 * scale[active, None, None]
        shots = torch.cat([velocity[:, None], velocity[:, None] + nudge * axes], 1).flatten(0, 1)
        origins = origins[:, None].expand(-1, 1 + size, -1).flatten(0, 1)
        try:
            landed = exponential(metric, origins, shots, tolerance=tolerance / 100, max_steps=max_steps)[0]
        except UnsupportedError as error:
            raise UnsupportedError("shooting that hits the ends", error.got, _ASTRAY) from error
        landed = landed.unflatten(0, (-1, 1 + size))
        miss = (landed[:, 0] - end[active]).norm(dim=1) / scale[active]
        is_better = miss < best[active]
        answer[active[is_better]], best[active[is_better]] = velocity[is_better], miss[is_better]
        in_vain[active] = torch.where(is_better, 0.0, in_vain[active] + 1)
        slopes = ((landed[:, 1:] - landed[:, :1]) / nudge).mT
        velocity = velocity + (torch.linalg.pinv(slopes) @ (end[active] - landed[:, 0])[..., None])[..., 0]
        is_far = miss > tolerance
        active, velocity = active[is_far], velocity[is_far]
        if not len(active):
            return answer
        if bool((in_vain[active] >= _IN_VAIN).any()):
            break
    got = f"{len(active)} of {len(best)} ends missed by up to {float(best[active].max()):.2g} of the distance"
    raise UnsupportedError("shooting that hits the ends", got, f"Raise the tolerance. {_ASTRAY}")


def parallel_transport(
    metric: Metric, curve: Curve, vectors: Tensor, *, tolerance: float = 1e-8, max_steps: int = 2000
) -> Tensor:
    r"""Vectors carried along curves without turning.

    .. math:: \dot v^k = -\sum_{ij} \Gamma^k_{ij}(c)\, \dot c^i v^j

    Args:
        metric: G, differentiable in torch.
        curve: P curves with a slope, such as ``geodesics(...).spline()``.
        vectors: At the starts, (P, Z); gradients do not pass.
        tolerance: Local error of a step; never below ten roundings of the dtype (1e-6 in float32).
        max_steps: Steps before giving up.

    Returns:
        At the ends, (P, Z). Inner products :math:`v^\top G w` are those at the starts, whatever the curve.

    Exact when: never; the error is some ten times ``tolerance``. A constant metric leaves vectors as they are.
    Biased when: a spline is read as the geodesic: vectors then turn by the spline's error.
    Cost: seven times 1 + Z evaluations of the metric a step, some tens of steps.

    Raises:
        ShapeError: If there are not as many vectors as curves.
        NonFiniteError: If a vector or the metric along the curve is not finite, or the metric singular.
        UnsupportedError: If the end is not reached in ``max_steps``, or torch cannot differentiate the metric.
    """
    check_metric(metric)
    vectors = checked_points("vectors", vectors)
    _check_alike("vectors", vectors, curve(torch.zeros(1).to(vectors))[:, 0])

    def rate(times: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        # curves evaluate all P at common times: each row picks its own
        chosen = torch.arange(len(rows), device=rows.device)
        position = curve(times)[rows, chosen].detach()
        slope = curve(times, derivative=1)[rows, chosen].detach()
        return -torch.einsum("bkij,bi,bj->bk", symbols_or_nan(metric, position), slope, state)

    return integrate(rate, vectors, tolerance=tolerance, max_steps=max_steps)


def _check_alike(name: str, given: Tensor, points: Tensor) -> None:
    if given.shape != points.shape or given.dtype != points.dtype:
        got = f"{tuple(given.shape)} of {given.dtype}"
        raise ShapeError(f"{name} {tuple(points.shape)} of {points.dtype}", got, "Give one for every row.")
