"""What geodesics promise of themselves: no jumps, no detours, derivatives that are those of the outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from bayesae.geometry.certificate import growth
from bayesae.geometry.solver import Solver
from tests.geometry.surfaces import codes, network, sphere


@pytest.mark.filterwarnings("ignore:.*geodesics have not converged")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_misled", [False, True])
def test_never_longer_than_the_straight_line(seed, is_misled, monkeypatch):
    """By chords far finer than the solver's; even a solver that gives zigzags as minima keeps to it."""

    def zigzag(self, points, is_near):
        none = torch.zeros(len(points), dtype=torch.float64)
        bent = points.clone()
        bent[:, 1:-1:2] += 1.0
        return bent, none, none.long(), none + geometry.chord_length(energy.as_metric(), bent)

    if is_misled:
        monkeypatch.setattr(Solver, "__call__", zigzag)
    decoder = network(n_outputs=4, seed=seed)
    starts, ends = codes(8, low=(-3, -3), high=(3, 3)), codes(8, seed=1, low=(-3, -3), high=(3, 3))
    for energy in (geometry.Pullback(decoder), geometry.IndependentDraws(decoder)):
        found = geometry.geodesics(energy, starts, ends, n_segments=16)
        straight = geometry.straight_lines(starts, ends, 16)
        if isinstance(energy, geometry.Pullback):
            fine, least = (geometry.chord_length(energy, finely(points)) for points in (found.points, straight))
        else:  # of the same number of segments only
            fine, least = found.length, found.straight_length
        assert (fine <= least * (1 + 1e-3)).all()
        assert_close(found.length, geometry.chord_length(energy, found.points))
        assert (found.energy >= found.length**2 * (1 - 1e-9)).all()
        assert found.is_straight.any() == is_misled


def finely(points):
    return geometry.Polyline(points)(torch.linspace(0, 1, 16 * 40 + 1, dtype=torch.float64))


def test_a_curve_whose_spline_swings_out_has_not_converged():
    """Two nodes far apart that decode nearly alike: chords and the lines between them look fine."""

    def decoder(z):  # a valley of length 1 that is cheap to jump over, and dear to run through
        return torch.cat([z[:, :1], 0.1 * torch.sin(2 * math.pi * z[:, 1:])], 1)[None]

    metric = geometry.Pullback(decoder)
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    points = torch.stack([times, (times > 0.5).double()], 1)[None]
    chords = geometry.chord_length(metric, points)
    assert growth(metric, points, chords)[0] < 0.1 < growth(metric, points, chords, of_spline=True)[0]


@pytest.mark.parametrize(("decoder", "message"), [
    (lambda z: torch.ones(1, len(z), 3).to(z), "do not change at all"),
    (lambda z: sphere(z.detach()), "change but have derivative 0"),
    (lambda z: sphere(torch.round(4 * z)), "change but have derivative 0"),
], ids=["constant", "detached", "steps"])  # fmt: skip
def test_decoders_without_a_derivative(decoder, message):
    with pytest.raises(bae.errors.UnsupportedError, match=message):
        geometry.geodesics(geometry.Pullback(decoder), codes(2), codes(2, seed=1))


def bump(z, height=3.0, place=0.0, width=0.5):
    return height * torch.exp(-((z - torch.tensor([0.0, place]).to(z)).square().sum(1, keepdim=True)) / width)


@pytest.mark.parametrize("energy", [geometry.Pullback, geometry.IndependentDraws])
@pytest.mark.parametrize("part", [
    lambda z: bump(z.detach()), lambda z: (4 * bump(z)).round() / 4,
], ids=["detached", "steps"])  # fmt: skip
def test_decoders_that_are_differentiable_in_part_only(energy, part):
    """Over a hill of height 3 the straight line of length 4 is about 7.9 long; a derivative of z alone says 4."""
    starts, ends = torch.tensor([[-2.0, 0.05]]).double(), torch.tensor([[2.0, 0.05]]).double()
    message = "derivatives that miss .* of the changes along the straight line of pair 0"
    if energy is geometry.Pullback:
        assert geometry.geodesics(energy(lambda z: torch.cat([z, bump(z)], 1)[None]), starts, ends).has_converged.all()
    with pytest.raises(bae.errors.UnsupportedError, match=message):
        geometry.geodesics(energy(lambda z: torch.cat([z, part(z)], 1)[None]), starts, ends)


def test_a_result_may_meet_what_the_straight_line_does_not():
    def decoder(z):
        return torch.cat([z, bump(z), bump(z.detach(), height=1.5, place=1.0, width=0.3)], 1)[None]

    starts, ends = torch.tensor([[-2.0, 0.05]]).double(), torch.tensor([[2.0, 0.05]]).double()
    above = torch.stack([starts, torch.tensor([[0.0, 1.0]]).double(), ends], 1)
    with pytest.raises(bae.errors.UnsupportedError, match="along the curve of pair 0"):
        geometry.geodesics(geometry.Pullback(decoder), starts, ends, initial=above, n_segments=16, max_iterations=1)


@pytest.mark.filterwarnings("ignore:.*geodesics have not converged")
@pytest.mark.parametrize("decoder", [
    lambda z: torch.cat([z, 3 * z.abs(), 2 * (z.sum(1, keepdim=True) + 0.3).relu()], 1)[None],
    lambda z: torch.cat([z, torch.sin(40 * z) / 10], 1)[None],
    lambda z: torch.cat([z, bump(z)], 1).float()[None],
], ids=["kinks", "fine structure", "single precision"])  # fmt: skip
@pytest.mark.parametrize("n_segments", [2, 8])
def test_kinks_and_fine_structure_are_differentiable_enough(decoder, n_segments):
    starts, ends = torch.tensor([[-2.0, 0.05], [-1.0, -1.0]]).double(), torch.tensor([[2.0, 0.1], [1.0, 0.7]]).double()
    found = geometry.geodesics(geometry.Pullback(decoder), starts, ends, n_segments=n_segments)
    assert torch.isfinite(found.length).all()


def test_metrics_that_are_not_positive():
    saddle = geometry.MetricFunction(lambda z: torch.diag(torch.tensor([1.0, -1.0])).to(z).expand(len(z), 2, 2))
    with pytest.raises(bae.errors.DataError, match="a positive definite metric"):
        geometry.geodesics(saddle, codes(4), codes(4, seed=1))
    # positive along the straight line, and by the eigenvalue across it not
    half = geometry.MetricFunction(lambda z: torch.diag(torch.tensor([1.0, -0.5])).to(z).expand(len(z), 2, 2))
    starts, ends = torch.tensor([[-2.0, 0.0]]).double(), torch.tensor([[2.0, 1.0]]).double()
    with pytest.raises(bae.errors.DataError, match="32 of 32 with an eigenvalue below 0, in the middle of straight"):
        geometry.geodesics(half, starts, ends)
    skew = geometry.MetricFunction(lambda z: torch.tensor([[1.0, 0.5], [0.0, 1.0]]).to(z).expand(len(z), 2, 2))
    with pytest.raises(bae.errors.DataError, match="a symmetric metric; got 32 of 32 that are not"):
        geometry.geodesics(skew, starts, ends)


def test_a_curve_that_leaves_where_the_metric_is_positive():
    """The straight line is dear, and beside it the metric is indefinite and cheap."""

    def function(z):
        near = torch.exp(-4 * z[:, 1].square())[:, None, None]
        return torch.eye(2).to(z) * (0.2 + near) - torch.diag(torch.tensor([0.0, 0.5])).to(z) * (1 - near)

    starts, ends = torch.tensor([[-2.0, 0.05]]).double(), torch.tensor([[2.0, 0.05]]).double()
    with pytest.raises(bae.errors.DataError, match="with an eigenvalue below 0, in the middle of curves' segments"):
        geometry.geodesics(geometry.MetricFunction(function), starts, ends)


def test_curves_that_jump_are_found_out():
    """A decoder of period 1: one segment may span it, and its chord is short. No curve is."""

    def decoder(z):
        angle = 2 * math.pi * z
        return torch.cat([angle.cos(), angle.sin()], 1)[None]

    starts, ends = torch.zeros(1, 1).double(), torch.full((1, 1), 0.95).double()
    jump = torch.tensor([0.0, -0.01, 0.96, 0.95]).double()[None, :, None]
    with pytest.warns(RuntimeWarning, match="1 of 1 geodesics have not converged"):
        found = geometry.geodesics(geometry.Pullback(decoder), starts, ends, initial=jump, n_segments=3)
    assert found.length < 1 < found.straight_length and found.coarseness > 0.1 and found.residual <= 1e-6


def test_points_that_jump_between_codes_that_decode_alike_have_not_converged():
    """Two chords around a circle of radius 0.3, each a whole turn: stationary, and no curve."""

    def helix(z):
        angle = 2 * math.pi * z[:, :1]
        return torch.cat([0.3 * angle.cos(), 0.3 * angle.sin(), z[:, 1:]], 1)[None]

    starts, ends = torch.zeros(1, 2).double(), torch.tensor([[2.0, 1.0]]).double()
    with pytest.warns(RuntimeWarning, match="1 of 1 geodesics have not converged"):
        found = geometry.geodesics(geometry.Pullback(helix), starts, ends, n_segments=2)
    assert found.residual.max() < 1e-6 and not found.has_converged.any()
    assert_close(found.coarseness, torch.tensor([4 * math.hypot(0.6, 0.25) - 1]).double())
