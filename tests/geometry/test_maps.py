"""Exponential map, logarithm and transport on surfaces where they are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from bayesae.geometry import maps
from tests.geometry.surfaces import (
    HYPERBOLIC,
    SPHERE,
    SPHERE_METRIC,
    TORUS_METRIC,
    boxed,
    codes,
    hyperbolic_distance,
    linear,
    network,
    sphere,
    sphere_distance,
)


def squared(metric, z, v):
    return torch.einsum("bi,bij,bj->b", v, metric(z), v)


def test_a_linear_decoder_goes_straight():
    metric, z, v = geometry.Pullback(linear()[1]), codes(3), codes(3, seed=1)
    end, velocity = geometry.exponential(metric, z, v)
    assert_close(end, z + v)
    assert_close(velocity, v)
    assert_close(geometry.logarithm(metric, z, z + v), v)
    assert_close(geometry.parallel_transport(metric, geometry.Polyline(torch.stack([z, z + v], 1)), v), v)


def test_the_exponential_follows_great_circles():
    z, v = codes(5), codes(5, seed=1, low=(-1, -1), high=(1, 1))
    length = squared(SPHERE, z, v).sqrt()[:, None]
    tangent = torch.func.jvp(lambda c: sphere(c)[0], (z,), (v,))[1] / length
    end, velocity = geometry.exponential(SPHERE, z, v, tolerance=1e-7)
    assert_close(sphere(end)[0], length.cos() * sphere(z)[0] + length.sin() * tangent, rtol=0, atol=1e-6)
    assert_close(squared(SPHERE, end, velocity), length[:, 0] ** 2, rtol=1e-6, atol=0)


def test_the_exponential_of_nothing_stays():
    z = codes(2)
    assert torch.equal(geometry.exponential(HYPERBOLIC, z, torch.zeros_like(z))[0], z)


@pytest.mark.parametrize(
    ("metric", "distance"), [(SPHERE_METRIC, sphere_distance), (HYPERBOLIC, hyperbolic_distance), (TORUS_METRIC, None)]
)
def test_the_exponential_undoes_the_logarithm(metric, distance):
    starts, ends = codes(3), codes(3, seed=1)
    velocity = geometry.logarithm(metric, starts, ends)
    assert_close(geometry.exponential(metric, starts, velocity)[0], ends, rtol=0, atol=1e-5)
    if distance is not None:
        assert_close(squared(metric, starts, velocity).sqrt(), distance(starts, ends), rtol=1e-5, atol=0)


def test_a_logarithm_of_known_curves_solves_no_geodesic():
    starts, ends = codes(2), codes(2, seed=1)
    curves = geometry.geodesics(HYPERBOLIC, starts, ends)
    assert_close(
        geometry.logarithm(HYPERBOLIC, starts, ends, curves=curves), geometry.logarithm(HYPERBOLIC, starts, ends)
    )


@pytest.mark.parametrize("metric", [SPHERE_METRIC, HYPERBOLIC])
def test_transport_keeps_inner_products(metric):
    curve = geometry.CubicSpline(codes(12).reshape(3, 4, 2))  # no geodesic: transport keeps them along any curve
    one, other = codes(3, seed=2), codes(3, seed=3)
    moved = [geometry.parallel_transport(metric, curve, v, tolerance=1e-7) for v in (one, other)]
    start, end = metric(curve.points[:, 0]), metric(curve.points[:, -1])
    for a, b in ((0, 0), (0, 1), (1, 1)):
        before = torch.einsum("bi,bij,bj->b", (one, other)[a], start, (one, other)[b])
        assert_close(torch.einsum("bi,bij,bj->b", moved[a], end, moved[b]), before, rtol=1e-5, atol=1e-5)


def test_transport_around_a_circle_of_latitude_turns_by_the_enclosed_area():
    polar, n = 0.8, 64
    azimuth = torch.linspace(0, 2 * math.pi, n + 1, dtype=torch.float64)
    circle = geometry.Polyline(torch.stack([torch.full_like(azimuth, polar), azimuth], -1)[None])
    moved = geometry.parallel_transport(SPHERE_METRIC, circle, torch.tensor([[1.0, 0.0]]).double())[0]
    angle = 2 * math.pi * math.cos(polar)
    expected = torch.tensor([math.cos(angle), -math.sin(angle) / math.sin(polar)], dtype=torch.float64)
    assert_close(moved, expected, rtol=0, atol=1e-6)


def ladder(metric, curve, vector, n):
    """Schild's ladder of n rungs."""
    points, carried = curve(torch.linspace(0, 1, n + 1, dtype=torch.float64))[0], vector / n
    for here, there in zip(points[:-1, None], points[1:, None], strict=True):
        tip = geometry.exponential(metric, here, carried)[0]
        middle = geometry.exponential(metric, tip, geometry.logarithm(metric, tip, there) / 2)[0]
        corner = geometry.exponential(metric, here, 2 * geometry.logarithm(metric, here, middle))[0]
        carried = geometry.logarithm(metric, there, corner)
    return n * carried


@pytest.mark.slow
def test_transport_is_the_limit_of_a_ladder():
    curve = geometry.CubicSpline(torch.tensor([[[0.5, 1.0], [1.0, 1.5], [1.8, 1.4]]]).double())
    vector = torch.tensor([[0.3, -0.2]]).double()
    four, eight = (ladder(HYPERBOLIC, curve, vector, n) for n in (4, 8))
    found = geometry.parallel_transport(HYPERBOLIC, curve, vector)
    assert (eight - found).abs().max() < 0.6 * (four - found).abs().max()
    assert_close(2 * eight - four, found, rtol=0, atol=1e-3)  # its error is of order 1 / n


@pytest.mark.slow
def test_geodesics_of_a_network_are_shot():
    metric, starts, ends = geometry.Pullback(network()), codes(2), codes(2, seed=1)
    curves = geometry.geodesics(metric, starts, ends, n_segments=64)
    velocity = geometry.logarithm(metric, starts, ends, curves=curves)
    assert_close(squared(metric, starts, velocity).sqrt(), curves.length, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n_latents", [1, 3])
def test_other_dimensions(n_latents):
    starts, ends = boxed(2, n_latents), boxed(2, n_latents, seed=1)
    velocity = geometry.logarithm(HYPERBOLIC, starts, ends)
    assert_close(squared(HYPERBOLIC, starts, velocity).sqrt(), hyperbolic_distance(starts, ends), rtol=1e-5, atol=0)
    assert_close(geometry.exponential(HYPERBOLIC, starts, velocity)[0], ends, rtol=0, atol=1e-5)
    curve = geometry.geodesics(HYPERBOLIC, starts, ends).spline()
    # the velocity is carried along its own geodesic
    arrived = geometry.exponential(HYPERBOLIC, starts, velocity)[1]
    carried = geometry.parallel_transport(HYPERBOLIC, curve, velocity, tolerance=1e-5)
    assert_close(carried, arrived, rtol=1e-3, atol=1e-3)


def test_float32_needs_no_other_options():
    starts, ends = codes(3).float(), codes(3, seed=1).float()
    velocity = geometry.logarithm(HYPERBOLIC, starts, ends)
    assert velocity.dtype == torch.float32
    assert_close(squared(HYPERBOLIC, starts, velocity).sqrt(), hyperbolic_distance(starts, ends), rtol=1e-3, atol=0)
    assert_close(geometry.exponential(HYPERBOLIC, starts, velocity)[0], ends, rtol=0, atol=1e-3)
    moved = geometry.parallel_transport(HYPERBOLIC, geometry.Polyline(torch.stack([starts, ends], 1)), velocity)
    assert_close(squared(HYPERBOLIC, ends, moved), squared(HYPERBOLIC, starts, velocity), rtol=1e-4, atol=0)


def test_a_trial_that_leaves_the_metric_is_shortened():
    """With one dimension and g = exp(20 x) a curve is at log(1 + 10 v t) / 10; there is no metric from 0.7."""
    metric = geometry.MetricFunction(lambda z: (torch.exp(20 * z) * torch.where(z < 0.7, 1.0, math.nan))[..., None])
    start, velocity = torch.zeros(1, 1).double(), torch.full((1, 1), 20.0).double()
    end, speed = geometry.exponential(metric, start, velocity, tolerance=1e-7)
    assert_close(end, torch.full((1, 1), math.log(201) / 10).double(), rtol=0, atol=1e-5)
    assert_close(speed, torch.full((1, 1), 20 / 201).double(), rtol=0, atol=1e-5)


def test_no_graph_is_kept():
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    metric = geometry.Pullback(geometry.DecoderDraws([decoder]))
    z, v = codes(2).requires_grad_(), 0.1 * codes(2, seed=1)
    end, velocity = geometry.exponential(metric, z, v)
    curve = geometry.Polyline(torch.stack([z, z + v], 1))
    moved = geometry.parallel_transport(metric, curve, v)
    for found in (end, velocity, moved, geometry.logarithm(metric, z, z + v)):
        assert not found.requires_grad


def test_shooting_ends():
    """Curves that jump have no slope to shoot from; shots that need many steps, or miss four times, are given up."""
    starts, ends = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[2.0, 1.0]]).double()

    def helix(z):
        angle = 2 * math.pi * z[:, :1]
        return torch.cat([0.3 * angle.cos(), 0.3 * angle.sin(), z[:, 1:]], 1)[None]

    with pytest.raises(bae.errors.UnsupportedError, match="a slope to shoot from; got 1 of 1 whose segments jump"):
        geometry.logarithm(geometry.Pullback(helix), starts, ends, n_segments=2)
    z, v = codes(2), codes(2, seed=1)
    with pytest.raises(bae.errors.UnsupportedError, match="shooting that hits the ends; got .* after 3 steps"):
        geometry.logarithm(HYPERBOLIC, z, v, max_steps=3)
    calls, true = [], maps.exponential

    def astray(*args, **named):
        calls.append(1)
        end, velocity = true(*args, **named)
        return end + len(calls), velocity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "exponential", astray)
        with pytest.raises(bae.errors.UnsupportedError, match="2 of 2 ends missed by up to"):
            geometry.logarithm(geometry.Euclidean(), z, v)
    assert len(calls) <= 20


def test_a_logarithm_takes_the_solver_s_options():
    z, v = codes(2), codes(2, seed=1)
    with pytest.warns(RuntimeWarning, match="geodesics have not converged") as caught:
        found = geometry.logarithm(HYPERBOLIC, z, v, n_segments=4, max_iterations=1)
    assert [one.filename for one in caught] == [__file__]
    assert_close(found, geometry.logarithm(HYPERBOLIC, z, v, n_segments=16), rtol=1e-4, atol=0)
    graph = geometry.neighbour_graph(HYPERBOLIC, codes(20, seed=2))
    assert_close(found, geometry.logarithm(HYPERBOLIC, z, v, graph=graph), rtol=1e-4, atol=0)


def test_what_is_refused():
    z, v = codes(2), codes(2, seed=1)
    with pytest.raises(bae.errors.ShapeError, match=r"velocities \(2, 2\)"):
        geometry.exponential(SPHERE, z, v[:1])
    with pytest.raises(bae.errors.NonFiniteError, match="finite velocities"):
        geometry.exponential(SPHERE, z, v * math.nan)
    with pytest.raises(bae.errors.UnsupportedError, match="curves that reach time 1"):
        geometry.exponential(SPHERE, z, v, max_steps=2)
    flat = geometry.MetricFunction(lambda c: torch.diag(torch.tensor([1.0, 0.0])).to(c).expand(len(c), 2, 2))
    with pytest.raises(bae.errors.NonFiniteError, match="finite and positive definite along the curve"):
        geometry.exponential(flat, z, v)
    with pytest.raises(bae.errors.DataError, match="curves that join the pairs"):
        geometry.logarithm(SPHERE, z, v, curves=geometry.geodesics(SPHERE, v, z))
    with pytest.raises(bae.errors.DataError, match="two different codes"):
        geometry.logarithm(SPHERE, z, z)
    hole = geometry.MetricFunction(lambda c: torch.eye(2).to(c) * torch.where(c[:, :1, None] < 1, 1.0, math.nan))
    with pytest.raises(bae.errors.NonFiniteError, match="2 of 2 curves .* to time 0.111"):
        geometry.exponential(hole, 0 * z, 0 * v + torch.tensor([9.0, 0.0]).double())
    with pytest.raises(bae.errors.ShapeError, match="vectors"):
        geometry.parallel_transport(SPHERE, geometry.Polyline(codes(8).reshape(2, 4, 2)), v[:1])


def test_a_tolerance_below_rounding_is_that_of_rounding():
    z, v = codes(3).float(), codes(3, seed=1, low=(-1, -1), high=(1, 1)).float()
    end, _ = geometry.exponential(SPHERE_METRIC, z, v, tolerance=1e-12, max_steps=100)
    exact, _ = geometry.exponential(SPHERE_METRIC, z.double(), v.double())
    assert_close(end.double(), exact, rtol=0, atol=1e-4)
