"""The law of lengths over weight draws, in closed form for linear decoders and draw by draw for others."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from tests.geometry.surfaces import codes, linear, network


@pytest.mark.parametrize("curves", ["own", "expected"])
def test_linear_decoders_have_their_own_lengths(curves):
    weights, decoder = linear()
    starts, ends = codes(4), codes(4, seed=1)
    found = geometry.distance_draws(decoder, starts, ends, curves=curves, n_segments=8)
    expected = torch.einsum("sdz,pz->spd", weights, ends - starts).norm(dim=-1)
    assert_close(found.lengths, expected, rtol=1e-6, atol=0)
    assert_close(found.mean(), expected.mean(0))
    assert_close(found.variation(), expected.std(0) / expected.mean(0))
    low, high = found.interval(0.5)  # of three draws the first and the last: a fourth is between them half the time
    assert_close(low, expected.amin(0))
    assert_close(high, expected.amax(0))


def test_own_geodesics_are_those_of_every_decoder_alone():
    decoder, starts, ends = network(n_draws=2), codes(2), codes(2, seed=1)
    own = geometry.distance_draws(decoder, starts, ends)
    for number in range(2):
        alone = geometry.geodesics(geometry.Pullback(lambda z, s=number: decoder(z)[s : s + 1]), starts, ends)
        assert_close(own.lengths[number], alone.length)
    shared = geometry.distance_draws(decoder, starts, ends, curves="expected")
    assert (own.lengths <= shared.lengths * (1 + 1e-6)).all()


def test_a_band_of_linear_decoders_has_no_width():
    starts, ends = codes(3), codes(3, seed=1)
    band = geometry.geodesic_band(linear()[1], starts, ends, n_segments=8)
    low, high = band.interval(0.5)
    assert_close(low, high, rtol=0, atol=1e-8)
    assert_close(low, band.expected.points, rtol=0, atol=1e-8)


def test_a_band_holds_the_draws():
    starts, ends = codes(1), codes(1, seed=1)
    band = geometry.geodesic_band(network(n_draws=4), starts, ends, n_segments=8)
    low, high = band.interval(0.5)
    assert band.points.shape == (4, 1, 9, 2) and band.distances.lengths.shape == (4, 1)
    assert (low[0, 1:-1] < high[0, 1:-1]).all() and torch.equal(low[0, 0], starts[0])
    # places 1.25 and 3.75 of four
    ordered = band.points.sort(0).values
    assert_close(low, 0.75 * ordered[0] + 0.25 * ordered[1])
    assert_close(high, 0.75 * ordered[3] + 0.25 * ordered[2])


@pytest.mark.parametrize(("n_draws", "level"), [(19, 0.9), (16, 0.8), (9, 0.8), (3, 0.5)])
def test_intervals_cover_a_further_draw_as_often_as_they_say(n_draws, level):
    """Of exchangeable draws; 16 have places 1.7 and 15.3, and of uniform ones what lies between two is exact too."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(n_draws, 40_000, generator=generator, dtype=torch.float64)
    further = torch.rand(40_000, generator=generator, dtype=torch.float64)
    low, high = geometry.DistanceDraws(lengths, torch.ones_like(lengths).bool()).interval(level)
    share = float(((low <= further) & (further <= high)).double().mean())
    assert abs(share - level) < 4 * (level * (1 - level) / 40_000) ** 0.5
    assert_close((high - low).mean(), torch.tensor(level).double(), rtol=1e-2, atol=0)


def test_few_draws_have_no_wide_interval():
    for n_draws, fix in ((1, "more draws."), (5, "at most 0.666."), (16, "at most 0.882."), (18, "at most 0.894.")):
        found = geometry.DistanceDraws(torch.rand(n_draws, 2).double(), torch.ones(n_draws, 2).bool())
        with pytest.raises(bae.errors.DataError, match=f"19 weight draws or more .* of 0.9; got {n_draws}.*{fix}"):
            found.interval(0.9)
        if n_draws > 1:
            found.interval(float(fix[8:-1]))


@pytest.mark.parametrize("name", ["own", "expected", "band"])
def test_options_of_the_solver_and_warnings_of_the_caller(name):
    decoder, starts, ends = network(n_draws=2), codes(2), codes(2, seed=1)
    graph = geometry.neighbour_graph(geometry.Pullback(decoder), codes(20, seed=2))

    def ask(**options):
        if name == "band":
            return geometry.geodesic_band(decoder, starts, ends, n_segments=8, **options).distances
        return geometry.distance_draws(decoder, starts, ends, curves=name, n_segments=8, **options)

    with pytest.warns(RuntimeWarning, match="have not converged.*more iterations") as caught:
        hasty = ask(max_iterations=1, tolerance=1e-14)
    assert {one.filename for one in caught} == {__file__}
    assert not hasty.has_converged.any()
    assert_close(ask(graph=graph).lengths, ask().lengths, rtol=1e-3, atol=0)
    apart = geometry.CodeGraph(graph.nodes[:2], torch.zeros(0, 2).long(), torch.zeros(0).double())
    with pytest.raises(bae.errors.DataError, match="a path between every pair"):
        geometry.distance_draws(decoder, graph.nodes[:1], graph.nodes[1:2], curves="own", graph=apart)


def test_a_solver_that_does_not_converge_says_so():
    wild = network(n_draws=2, spread=2.0)
    with pytest.warns(RuntimeWarning, match="of 2 geodesics of single draws have not converged"):
        found = geometry.distance_draws(wild, codes(1) * 3, -codes(1, seed=1) * 3, n_segments=2)
    assert not found.has_converged.all()


def test_a_draw_is_solved_under_its_own_decoder_alone():
    decoder, starts, ends = network(n_draws=3), codes(2), codes(2, seed=1)
    asked = []

    def member(number):
        def one(z):
            asked.append(number)
            return decoder(z)[number]

        return one

    draws = geometry.DecoderDraws([member(number) for number in range(3)])
    found = geometry.distance_draws(draws, starts, ends, n_segments=8)
    assert asked == sorted(asked) and set(asked) == {0, 1, 2}
    assert_close(found.lengths, geometry.distance_draws(decoder, starts, ends, n_segments=8).lengths)
    band = geometry.geodesic_band(draws, starts, ends, n_segments=8)
    assert_close(band.points, geometry.geodesic_band(decoder, starts, ends, n_segments=8).points)
    assert_close(band.distances.lengths, found.lengths)


@pytest.mark.parametrize("curves", ["own", "expected"])
def test_curves_start_where_they_are_told(curves):
    """A hill between the ends: a start below it ends there, under every draw."""

    def decoder(z):
        hill = 2 * torch.exp(-2 * z.square().sum(1, keepdim=True))
        return torch.stack([torch.cat([z, size * hill], 1) for size in (1.0, 1.1)])

    starts, ends = torch.tensor([[-2.0, 0.05]]).double(), torch.tensor([[2.0, 0.05]]).double()
    initial = torch.stack([starts, torch.tensor([[0.0, -1.0]]).double(), ends], 1)
    found, other = (
        geometry.distance_draws(decoder, starts, ends, curves=curves, initial=one)
        for one in (initial, -initial.flip(1))
    )
    assert found.has_converged.all() and other.has_converged.all()
    assert (found.lengths > 1.001 * other.lengths).all()
    band = geometry.geodesic_band(decoder, starts, ends, initial=initial)
    assert (band.points[:, 0, 16, 1] < -0.3).all() and band.expected.points[0, 16, 1] < -0.3


def test_what_is_refused():
    found = geometry.distance_draws(linear()[1], codes(1), codes(1, seed=1), n_segments=4)
    with pytest.raises(bae.errors.DataError, match="a level between 0 and 1"):
        found.interval(1.0)
    with pytest.raises(bae.errors.DataError, match="curves of 'own' or 'expected'"):
        geometry.distance_draws(linear()[1], codes(1), codes(1, seed=1), curves="Own")
    alone = geometry.distance_draws(linear(n_draws=1)[1], codes(1), codes(1, seed=1), n_segments=4)
    with pytest.raises(bae.errors.DataError, match="two weight draws or more"):
        alone.variation()
    with pytest.raises(bae.errors.DataError, match="two different codes"):
        geometry.geodesic_band(linear()[1], codes(1), codes(1))
