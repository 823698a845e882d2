"""Splines against SciPy, lengths against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline as TheirSpline
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from bayesae.geometry.curves import checked_squares, end_slopes
from tests.geometry.surfaces import HYPERBOLIC, SPHERE, codes, linear

TIMES = torch.linspace(0, 1, 41, dtype=torch.float64)


def wave(times):
    return torch.stack([torch.sin(3 * times), times**2], -1)


@pytest.mark.parametrize("is_clamped", [False, True])
@pytest.mark.parametrize("derivative", [0, 1, 2])
def test_splines_are_those_of_scipy(is_clamped, derivative):
    points = codes(14).reshape(2, 7, 2)
    slopes = codes(4, seed=1).reshape(2, 2, 2) if is_clamped else None
    spline = geometry.CubicSpline(points, slopes)
    for number, one in enumerate(points):
        ends = "natural" if slopes is None else ((1, slopes[number, 0].numpy()), (1, slopes[number, 1].numpy()))
        theirs = TheirSpline(np.linspace(0, 1, 7), one.numpy(), bc_type=ends)
        expected = torch.as_tensor(theirs(TIMES.numpy(), derivative))
        assert_close(spline(TIMES, derivative=derivative)[number], expected, rtol=1e-9, atol=1e-9)


def test_second_derivatives_do_not_jump():
    spline = geometry.CubicSpline(codes(14).reshape(2, 7, 2))
    knots = torch.arange(1, 6, dtype=torch.float64) / 6
    before, after = (spline(knots + step, derivative=2) for step in (-1e-9, 1e-9))
    assert (before - after).abs().max() < 1e-5


def test_splines_of_smooth_curves_converge_at_order_four():
    errors = []
    for n in (16, 32):
        points = wave(torch.linspace(0, 1, n + 1, dtype=torch.float64))[None]
        errors.append(float((geometry.CubicSpline(points, end_slopes(points))(TIMES)[0] - wave(TIMES)).abs().max()))
    assert errors[1] < errors[0] / 12
    few = end_slopes(wave(torch.linspace(0, 1, 3, dtype=torch.float64))[None, :, 1:])
    assert_close(few, torch.tensor([[[0.0], [2.0]]], dtype=torch.float64))  # exact for t^2 with three points


def test_slopes_at_the_ends_are_exact_for_polynomials_as_far_as_the_points_tell():
    for order, n in ((2, 2), (3, 3), (4, 4), (4, 9)):
        times = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        slopes = end_slopes((1 + times[:, None]).pow(order)[None])
        assert_close(slopes, torch.tensor([[[order], [order * 2 ** (order - 1)]]]).double(), rtol=1e-12, atol=0)


def test_only_rounding_may_be_below_zero():
    squared = torch.tensor([1.0, -1e-6]).double()
    assert checked_squares(squared, "here").tolist() == [1.0, 0.0]
    with pytest.raises(bae.errors.DataError, match="1 squared lengths below 0 of 2 here"):
        checked_squares(torch.tensor([1.0, -1e-4]).double(), "here")


def test_lengths_of_known_curves():
    angle = 2.0
    points = torch.stack([torch.full((65,), math.pi / 2), torch.linspace(0, angle, 65)], -1).double()[None]
    spline = geometry.CubicSpline(points)
    assert_close(geometry.length(SPHERE, spline), torch.tensor([angle], dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(geometry.energy(SPHERE, spline), torch.tensor([angle**2], dtype=torch.float64), rtol=1e-6, atol=0)
    chords = 64 * 2 * math.sin(angle / 128)
    assert_close(geometry.chord_length(SPHERE, points), torch.tensor([chords], dtype=torch.float64), rtol=1e-6, atol=0)
    upright = torch.tensor([[[0.0, 1.0], [0.0, math.e]]], dtype=torch.float64)
    found = geometry.length(HYPERBOLIC, geometry.Polyline(upright))
    assert_close(found, torch.ones(1, dtype=torch.float64))


def test_energy_is_at_least_length_squared():
    points = codes(40).reshape(5, 8, 2)
    for metric in (SPHERE, HYPERBOLIC, geometry.Euclidean()):
        assert (geometry.chord_energy(metric, points) >= geometry.chord_length(metric, points) ** 2).all()
        spline = geometry.CubicSpline(points)
        assert (geometry.energy(metric, spline) >= geometry.length(metric, spline) ** 2).all()
    even = geometry.straight_lines(points[:, 0], points[:, 1], 9)
    plane = geometry.Euclidean()
    assert_close(geometry.chord_energy(plane, even), geometry.chord_length(plane, even) ** 2)


def test_chords_and_metric_agree_on_a_linear_decoder():
    metric, points = geometry.Pullback(linear()[1]), codes(10).reshape(2, 5, 2)
    whole = geometry.length(metric, geometry.Polyline(points), n_nodes=400)  # a jump of the speed at every point
    assert_close(geometry.chord_length(metric, points), whole, rtol=1e-2, atol=0)
    line = geometry.straight_lines(points[:, 0], points[:, 1], 3)
    assert_close(geometry.chord_length(metric, line), geometry.length(metric, geometry.Polyline(line)))


def test_gradients_do_not_pass_by_half():
    """The metric is held fixed in an energy; so is everything else."""
    points = codes(8).reshape(2, 4, 2).requires_grad_()
    for found in (
        geometry.energy(SPHERE, geometry.CubicSpline(points)),
        geometry.length(SPHERE, geometry.Polyline(points)),
        geometry.chord_energy(HYPERBOLIC, points),
        geometry.chord_length(SPHERE, points),
    ):
        assert not found.requires_grad


def test_nothing_is_measured_in_silence():
    points = codes(8).reshape(2, 4, 2)
    broken = geometry.Pullback(lambda z: SPHERE.decoder(z).sqrt())
    tilted = geometry.MetricFunction(lambda z: torch.diag(torch.tensor([1.0, -1.0])).to(z).expand(len(z), 2, 2))
    for measure in (geometry.chord_energy, geometry.chord_length):
        with pytest.raises(bae.errors.NonFiniteError, match="finite squared lengths of segments"):
            measure(broken, 2 * points)
        with pytest.raises(bae.errors.DataError, match="a positive definite metric"):
            measure(tilted, points)
        with pytest.raises(bae.errors.ShapeError, match=r"points \(P, n \+ 1, Z\)"):
            measure(SPHERE, points[0])
    for measure in (geometry.energy, geometry.length):
        with pytest.raises(bae.errors.NonFiniteError, match="a unit of time"):
            measure(broken, geometry.Polyline(2 * points))
        with pytest.raises(bae.errors.DataError, match="a positive definite metric"):
            measure(tilted, geometry.Polyline(points))


def test_matrices_are_looked_at_and_not_only_lengths():
    """Along the first axis nothing is amiss."""
    line = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    for matrix, message in (([[1.0, 0.0], [0.0, -0.5]], "positive definite"), ([[1.0, 5.0], [0.0, 1.0]], "symmetric")):
        metric = geometry.MetricFunction(lambda z, m=matrix: torch.tensor(m).to(z).expand(len(z), 2, 2))
        for measure in (geometry.chord_energy, geometry.chord_length):
            with pytest.raises(bae.errors.DataError, match=f"a {message} metric"):
                measure(metric, line)
        for measure in (geometry.energy, geometry.length):
            with pytest.raises(bae.errors.DataError, match=f"a {message} metric"):
                measure(metric, geometry.Polyline(line))
    none = geometry.MetricFunction(lambda z: torch.zeros(len(z), 2, 2).to(z))  # flat: no length, no error
    assert geometry.chord_length(none, line) == 0


def test_lengths_of_what_is_no_metric():
    line = geometry.straight_lines(codes(2), codes(2, seed=1), 3)
    draws = geometry.IndependentDraws(linear()[1])
    assert (geometry.chord_length(draws, line) > 0).all()  # of a number of segments
    for measure in (geometry.energy, geometry.length):
        with pytest.raises(bae.errors.UnsupportedError, match="got IndependentDraws.* Use its as_metric"):
            measure(draws, geometry.Polyline(line))
        with pytest.raises(bae.errors.UnsupportedError, match="got a function"):
            measure(linear()[1], geometry.Polyline(line))


def test_what_rounding_puts_below_zero_is_zero():
    rounded = geometry.MetricFunction(lambda z: torch.diag(torch.tensor([1.0, -1e-12])).to(z).expand(len(z), 2, 2))
    square = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    assert_close(geometry.chord_length(rounded, square), torch.ones(1, dtype=torch.float64))


def test_what_is_refused():
    points = codes(4).reshape(1, 4, 2)
    with pytest.raises(bae.errors.ShapeError, match="derivative 0 or 1"):
        geometry.Polyline(points)(TIMES, derivative=2)
    with pytest.raises(bae.errors.ShapeError, match="derivative 0, 1 or 2"):
        geometry.CubicSpline(points)(TIMES, derivative=3)
    for curve in (geometry.CubicSpline, geometry.Polyline):
        for wrong in (points[0], points[:, :1], points.long()):
            with pytest.raises(bae.errors.ShapeError, match=r"points \(P, n \+ 1, Z\)"):
                curve(wrong)
    with pytest.raises(bae.errors.ShapeError, match=r"slopes \(1, 2, 2\)"):
        geometry.CubicSpline(points, points[0, :2])
