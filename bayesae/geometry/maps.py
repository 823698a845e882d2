"""Exponential map, logarithm and parallel transport, by the geodesic equation."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.errors import ShapeError, UnsupportedError
from bayesae.geometry.curves import Curve
from bayesae.geometry.derivatives import checked_points
from bayesae.geometry.geodesics import Geodesics, geodesics
from bayesae.geometry.local import christoffel
from bayesae.geometry.metrics import Metric
from bayesae.geometry.ode import integrate

__all__ = ["exponential", "logarithm", "parallel_transport"]

_NEWTON_STEPS = 20


def exponential(
    metric: Metric, points: Tensor, velocities: Tensor, *, tolerance: float = 1e-8, max_steps: int = 2000
) -> tuple[Tensor, Tensor]:
    r"""Where geodesics from points with given velocities are after unit time.

    .. math:: \ddot c^k = -\sum_{ij} \Gamma^k_{ij}(c)\, \dot c^i \dot c^j, \qquad c(0) = z, \quad \dot c(0) = v

    Args:
        metric: G, differentiable in torch.
        points: z, (B, Z).
        velocities: v, (B, Z); a zero velocity stays where it is.
        tolerance: Local error of a step; float32 metrics need 1e-5 or more.
        max_steps: Steps before giving up.

    Returns:
        End points c(1) and velocities there, both (B, Z). To follow a curve, scale the velocities.

    Exact when: never; the error is some ten times ``tolerance``. Straight lines (a constant metric) are exact.
    Biased when: a velocity is long and the space is negatively curved: errors grow exponentially with length.
    Cost: seven times 1 + Z evaluations of the metric a step, some tens of steps.

    Raises:
        ShapeError: If points and velocities differ in shape.
        NonFiniteError: If a code, a velocity or the metric along the curve is not finite, or the metric singular.
        UnsupportedError: If unit time is not reached in ``max_steps``.
    """
    points, velocities = checked_points("points", points), checked_points("velocities", velocities)
    _check_alike("velocities", velocities, points)

    def rate(times: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        position, velocity = state.chunk(2, -1)
        symbols = christoffel(metric, position).detach()
        return torch.cat([velocity, -torch.einsum("bkij,bi,bj->bk", symbols, velocity, velocity)], -1)

    state = integrate(rate, torch.cat([points, velocities], -1), tolerance=tolerance, max_steps=max_steps)
    end, velocity = state.chunk(2, -1)
    return end, velocity


def logarithm(
    metric: Metric, starts: Tensor, ends: Tensor, *, curves: Geodesics | None = None, tolerance: float = 1e-6
) -> Tensor:
    r"""Velocities with which geodesics leave the starts to be at the ends after unit time.

    The velocity of the curve of least energy is refined by shooting: Newton steps on c(1) - end, with differences of
    `exponential` as derivatives.

    Args:
        metric: G, differentiable in torch.
        starts: (P, Z).
        ends: (P, Z).
        curves: Geodesics between them if they are known already.
        tolerance: Largest miss of an end, a share of the distance in codes; shooting is a hundred times finer.

    Returns:
        (P, Z): of length :math:`\sqrt{v^\top G v}` equal to the distance.

    Exact when: as its shooting is: `exponential` of the result is the end, to ``tolerance``.
    Biased when: several geodesics join the points (beyond the cut locus): it is that of ``curves``.
    Cost: `geodesics`, then 1 + Z calls of `exponential` a Newton step, two to four steps.

    Raises:
        UnsupportedError: If shooting does not come within the tolerance.
    """
    found = geodesics(metric, starts, ends) if curves is None else curves
    start, end = found.points[:, 0], found.points[:, -1]
    velocity = found.spline()(torch.zeros(1).to(start), derivative=1)[:, 0]
    scale = (end - start).norm(dim=1)
    n, size = start.shape
    nudge = max(tolerance, torch.finfo(start.dtype).eps) ** 0.5 * scale[:, None, None] * torch.eye(size).to(start)
    fine = max(tolerance / 100, 10 * torch.finfo(start.dtype).eps)
    best = torch.full_like(scale, torch.inf)
    answer = velocity
    for _ in range(_NEWTON_STEPS):
        shots = torch.cat([velocity[:, None], velocity[:, None] + nudge], 1).flatten(0, 1)
        origins = start[:, None].expand(-1, 1 + size, -1).flatten(0, 1)
        landed = exponential(metric, origins, shots, tolerance=fine)[0].reshape(n, 1 + size, size)
        miss = (landed[:, 0] - end).norm(dim=1) / scale
        answer = torch.where((miss < best)[:, None], velocity, answer)
        best = torch.minimum(best, miss)
        if bool((best <= tolerance).all()):
            return answer
        slopes = ((landed[:, 1:] - landed[:, :1]) / nudge.diagonal(dim1=-2, dim2=-1)[:, :, None]).mT
        velocity = velocity + (torch.linalg.pinv(slopes) @ (end - landed[:, 0])[..., None])[..., 0]
    got = f"{int((best > tolerance).sum())} of {n} ends missed by up to {float(best.max()):.2g} of the distance"
    raise UnsupportedError("shooting that hits the ends", got, "Raise the tolerance, or split long curves.")


def parallel_transport(
    metric: Metric, curve: Curve, vectors: Tensor, *, tolerance: float = 1e-8, max_steps: int = 2000
) -> Tensor:
    r"""Vectors carried along curves without turning.

    .. math:: \dot v^k = -\sum_{ij} \Gamma^k_{ij}(c)\, \dot c^i v^j

    Args:
        metric: G, differentiable in torch.
        curve: P curves with a slope, such as ``geodesics(...).spline()``.
        vectors: At the starts, (P, Z).
        tolerance: Local error of a step; float32 metrics need 1e-5 or more.
        max_steps: Steps before giving up.

    Returns:
        At the ends, (P, Z). Inner products :math:`v^\top G w` are those at the starts, whatever the curve.

    Exact when: never; the error is some ten times ``tolerance``. A constant metric leaves vectors as they are.
    Biased when: a spline is read as the geodesic: vectors then turn by the spline's error.
    Cost: seven times 1 + Z evaluations of the metric a step, some tens of steps.

    Raises:
        ShapeError: If there are not as many vectors as curves.
        NonFiniteError: If the metric along the curve is not finite, or singular.
        UnsupportedError: If the end is not reached in ``max_steps``.
    """
    vectors = checked_points("vectors", vectors)
    _check_alike("vectors", vectors, curve(torch.zeros(1).to(vectors))[:, 0])

    def rate(times: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        # curves evaluate all P at common times: each row picks its own
        chosen = torch.arange(len(rows), device=rows.device)
        position = curve(times)[rows, chosen]
        slope = curve(times, derivative=1)[rows, chosen]
        symbols = christoffel(metric, position).detach()
        return -torch.einsum("bkij,bi,bj->bk", symbols, slope, state)

    return integrate(rate, vectors, tolerance=tolerance, max_steps=max_steps)


def _check_alike(name: str, given: Tensor, points: Tensor) -> None:
    if given.shape != points.shape or given.dtype != points.dtype:
        got = f"{tuple(given.shape)} of {given.dtype}"
        raise ShapeError(f"{name} {tuple(points.shape)} of {points.dtype}", got, "Give one for every row.")
