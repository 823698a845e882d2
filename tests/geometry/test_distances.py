"""Graphs, distance matrices, neighbours, medoids and means against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from tests.geometry.surfaces import (
    HYPERBOLIC,
    SPHERE_METRIC,
    boxed,
    codes,
    hyperbolic_distance,
    linear,
    sphere,
    sphere_distance,
)


def exactly(z):
    return (z[:, None] - z).norm(dim=-1)


def all_pairs(distance, z):
    n = len(z)
    return distance(z.repeat_interleave(n, 0), z.repeat(n, 1)).reshape(n, n)


def test_a_grid_is_within_its_directions_of_a_plane():
    z = codes(12)
    found = geometry.grid_graph(geometry.Euclidean(), z, n_cells=60)
    apart = torch.cdist(z, z)
    paths, _ = found.distances(torch.arange(12))
    off = ~torch.eye(12, dtype=torch.bool)
    assert (paths[:, :12][off] >= apart[off] * (1 - 1e-12)).all()
    # up to 1.4 % for directions, and two crooked steps at the ends
    assert (paths[:, :12] <= 1.014 * apart + 0.5 * 2.4 / 60).all()
    # a code meets the 16 nodes around it
    cell = float((found.nodes[13] - found.nodes[12]).abs().max())
    for number in range(12):
        around = found.nodes[found.edges[found.edges[:, 0] == number, 1]]
        assert len(around) == 16 and ((around - z[number]).abs() < 2.001 * cell).all()


def test_distances_of_a_curved_space():
    z = codes(10, low=(0.5, 1.0))
    found = geometry.distance_matrix(HYPERBOLIC, geometry.grid_graph(HYPERBOLIC, z, n_cells=50), 10, n_checked=20)
    exact = all_pairs(hyperbolic_distance, z)
    off = ~torch.eye(10, dtype=torch.bool)
    assert ((found.matrix - exact)[off] / exact[off]).abs().median() < 0.02
    assert torch.equal(found.matrix, found.matrix.T) and (found.matrix.diagonal() == 0).all()
    assert found.has_converged.all()
    checked = exact[found.pairs[:, 0], found.pairs[:, 1]]
    assert_close(found.solved, checked, rtol=1e-3, atol=0)
    assert_close(found.relative_errors, found.matrix[found.pairs[:, 0], found.pairs[:, 1]] / found.solved - 1)


def test_a_graph_of_neighbours_is_one_piece_and_never_too_short():
    z = torch.cat([codes(15), codes(15, seed=1) + 8])  # two clouds
    graph = geometry.neighbour_graph(geometry.Euclidean(), z, n_neighbours=3)
    paths, before = graph.distances(torch.arange(30))
    assert torch.isfinite(paths).all() and (paths >= exactly(z) * (1 - 1e-12)).all()
    way = graph.path(before[0], 20)
    assert torch.equal(way[0], z[0]) and torch.equal(way[-1], z[20])
    assert_close((way[1:] - way[:-1]).norm(dim=1).sum(), paths[0, 20])


def test_equal_codes_are_joined():
    z = codes(3).repeat(4, 1)
    for graph in (
        geometry.neighbour_graph(geometry.Euclidean(), z, n_neighbours=3),
        geometry.grid_graph(geometry.Euclidean(), z, n_cells=30, margin=0.0),
    ):
        found = geometry.distance_matrix(geometry.Euclidean(), graph, 12, n_checked=0).matrix
        assert (found - exactly(z)).abs().max() < 0.2


def ring(z):
    """A metric that is dear away from the unit circle."""
    return (1 + 30 * (z.norm(dim=1) - 1) ** 2)[:, None, None] * torch.eye(2).to(z)


def test_a_start_on_the_graph_finds_the_shorter_way():
    metric = geometry.MetricFunction(ring)
    angles = torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64)[:-1]
    z = torch.stack([angles.cos(), angles.sin()], 1)
    graph = geometry.neighbour_graph(metric, z, n_neighbours=2)
    starts, ends = torch.tensor([[1.0, 0.02]]).double(), torch.tensor([[-1.0, 0.02]]).double()
    initial = geometry.graph_starts(graph, starts, ends)
    assert initial.shape == (1, 33, 2) and torch.equal(initial[:, 0], starts) and torch.equal(initial[:, -1], ends)
    steps = (initial[0, 1:] - initial[0, :-1]).norm(dim=1)
    assert steps[2:].max() < 1.05 * steps[2:].min()  # the first one turns around at the nearest node
    found = geometry.geodesics(metric, starts, ends, initial=initial)
    assert found.has_converged.all() and found.length < 1.01 * math.pi < found.straight_length


def barred(z):
    """The ring with a bar across its top."""
    apart = (z - torch.tensor([0.0, 1.0]).to(z)).square().sum(1)
    return (1 + 40 * (-10 * apart).exp())[:, None, None] * ring(z)


def test_of_a_straight_start_and_one_along_a_graph_the_better_is_kept_pair_by_pair():
    metric = geometry.MetricFunction(barred)
    angles = torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64)[:-1]
    z = torch.stack([angles.cos(), angles.sin()], 1)
    starts, ends = torch.tensor([[0.95, 0.3], [1.0, 0.0]]).double(), torch.tensor([[-0.95, 0.3], [0.8, -0.6]]).double()
    graph = geometry.neighbour_graph(metric, z, n_neighbours=2)
    initial = geometry.graph_starts(graph, starts, ends)
    straight, both = (geometry.geodesics(metric, starts, ends, graph=one) for one in (None, graph))
    along = geometry.geodesics(metric, starts, ends, initial=initial)
    assert straight.has_converged.all() and both.has_converged.all()
    assert both.energy[0] < 0.6 * straight.energy[0]  # under the ring, not through it
    assert_close(both.energy, torch.minimum(straight.energy, along.energy))
    assert_close(both.n_iterations, straight.n_iterations + along.n_iterations)
    assert both.points[0, 16, 1] < -0.9 and straight.points[0, 16, 1] > 0.2
    for name in ("length", "residual", "coarseness", "is_straight"):
        assert_close(getattr(both, name)[0], getattr(along, name)[0], rtol=1e-6, atol=1e-12)
    # pairs that are solved with others stop a little earlier or later
    other = geometry.geodesics(metric, starts.flip(0), ends.flip(0), initial=straight.points.flip(0), graph=graph)
    assert_close(other.energy.flip(0), both.energy, rtol=1e-5, atol=0)
    apart = geometry.CodeGraph(z[[0, 20]], torch.zeros(0, 2).long(), torch.zeros(0).double())
    with pytest.raises(bae.errors.DataError, match="none for pair 0"):
        geometry.geodesics(metric, starts[:1], ends[:1], graph=apart)


def test_neighbours_are_sorted():
    z = codes(9)
    matrix = torch.cdist(z, z)
    found = geometry.geodesic_neighbours(matrix, 3)
    for row, mine in enumerate(found.tolist()):
        others = sorted((float(matrix[row, j]), j) for j in range(9) if j != row)
        assert mine == [j for _, j in others[:3]]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_medoids_are_the_best_of_all_subsets(k):
    z = torch.cat([codes(4), codes(4, seed=1) + 4, codes(3, seed=2) - 4])
    matrix = torch.cdist(z, z)
    found = geometry.k_medoids(matrix, k)
    brute = min(float(matrix[list(some)].amin(0).sum()) for some in itertools.combinations(range(11), k))
    assert found.cost == pytest.approx(brute)
    assert torch.equal(found.labels, matrix[found.indices].argmin(0))
    assert float(matrix[found.indices].amin(0).sum()) == pytest.approx(found.cost)


def test_the_mean_of_a_constant_metric_is_arithmetic():
    z = codes(5)
    assert_close(geometry.frechet_mean(geometry.Pullback(linear()[1]), z), z.mean(0))


def test_the_mean_on_the_sphere_has_no_mean_logarithm():
    """Three points around a centre, an angle of 0.6 away, a third of a turn apart: the centre is their mean."""
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3]).double()
    east, north = torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    centre = torch.tensor([1.0, 0.0, 0.0]).double()
    points = math.cos(0.6) * centre + math.sin(0.6) * (angles.cos()[:, None] * east + angles.sin()[:, None] * north)
    z = torch.stack([points[:, 2].acos(), torch.atan2(points[:, 1], points[:, 0])], 1)
    found = geometry.frechet_mean(SPHERE_METRIC, z, start=z[0], tolerance=1e-4)
    assert_close(found, torch.tensor([math.pi / 2, 0.0]).double(), rtol=0, atol=2e-4)
    assert_close(sphere_distance(found.expand(3, 2), z), torch.full((3,), 0.6).double(), rtol=0, atol=3e-4)
    assert sphere(found[None])[0, 0, 0] == pytest.approx(1, abs=1e-6)


def test_a_grid_over_a_thin_range():
    """One code dimension has nearly collapsed: a cell or two lie across it."""
    for thin in (0.002, 0.02, 0.04):
        z = codes(8, low=(0.0, 0.0), high=(2.0, thin))
        for some in (z, z.flip(1)):
            graph = geometry.grid_graph(geometry.Euclidean(), some, n_cells=50, margin=0.0)
            found = geometry.distance_matrix(geometry.Euclidean(), graph, 8, n_checked=0).matrix
            assert (found >= exactly(some) * (1 - 1e-12)).all()
            assert (found <= 1.014 * exactly(some) + 0.12).all()


def test_a_metric_that_is_not_finite_is_no_graph():
    z = codes(4)
    broken = geometry.MetricFunction(lambda c: (c[:, :1, None] - 1).log() * torch.eye(2).to(c))
    with pytest.raises(bae.errors.NonFiniteError, match="at nodes of the grid"):
        geometry.grid_graph(broken, z, n_cells=5)
    with pytest.raises(bae.errors.NonFiniteError, match="of segments"):
        geometry.neighbour_graph(broken, z)


def test_distances_in_three_dimensions():
    """Along the neighbours of many codes; no grid is needed."""
    z = boxed(150, 3)
    graph = geometry.neighbour_graph(HYPERBOLIC, z, n_neighbours=25)
    found = geometry.distance_matrix(HYPERBOLIC, graph, 150, n_checked=10)
    exact = all_pairs(hyperbolic_distance, z)
    off = ~torch.eye(150, dtype=torch.bool)
    assert (found.matrix[off] >= exact[off] * 0.999).all()  # a line's chords are short by their order
    assert (found.matrix / exact)[off].median() < 1.05
    checked = exact[found.pairs[:, 0], found.pairs[:, 1]]
    assert_close(found.solved, checked, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_in_any_dimension_and_dtype(dtype):
    """Of two codes it is the middle of their geodesic, which in hyperbolic space is as far from both."""
    z = boxed(2, 3).to(dtype)
    found = geometry.frechet_mean(HYPERBOLIC, z).double()[None]
    whole = hyperbolic_distance(z[:1].double(), z[1:].double())
    for one in z.double():
        assert_close(hyperbolic_distance(one[None], found), whole / 2, rtol=1e-3, atol=0)


def test_matrices_of_other_things_are_refused():
    z = codes(4)
    for function in (lambda d: geometry.k_medoids(d, 2), lambda d: geometry.geodesic_neighbours(d, 2)):
        with pytest.raises(bae.errors.DataError, match="distances of at least 0; got 12 of 16 below 0"):
            function(-exactly(z))
        with pytest.raises(bae.errors.DataError, match="symmetric distances; got some that differ by up to"):
            function(exactly(z).triu())
        function(torch.cdist(z.float() + 50, z.float() + 50))  # symmetric but for rounding


def test_metrics_of_graphs():
    z, draws = codes(6), geometry.IndependentDraws(linear()[1])
    graph = geometry.neighbour_graph(draws.as_metric(), z)
    for function in (
        lambda: geometry.neighbour_graph(draws, z),
        lambda: geometry.grid_graph(draws, z),
        lambda: geometry.distance_matrix(draws, graph, 6),
        lambda: geometry.frechet_mean(draws, z),
    ):
        with pytest.raises(bae.errors.UnsupportedError, match="a metric; got IndependentDraws.* Use its as_metric"):
            function()
    with pytest.raises(bae.errors.ShapeError, match=r"as many dimensions; got nodes \(6, 2\) and codes \(2, 3\)"):
        geometry.geodesics(HYPERBOLIC, boxed(2, 3), boxed(2, 3, seed=1), graph=graph)
    half = geometry.MetricFunction(lambda c: torch.diag(torch.tensor([1.0, -0.5])).to(c).expand(len(c), 2, 2))
    line = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.3]]).double()
    with pytest.raises(bae.errors.DataError, match="a positive definite metric"):
        geometry.neighbour_graph(half, line)
    skew = geometry.MetricFunction(lambda c: torch.tensor([[1.0, 0.5], [0.0, 1.0]]).to(c).expand(len(c), 2, 2))
    with pytest.raises(bae.errors.DataError, match="a symmetric metric; got .* at nodes of the grid"):
        geometry.grid_graph(skew, z, n_cells=5)


def test_the_check_takes_the_solver_s_options():
    z = codes(6)
    graph = geometry.neighbour_graph(SPHERE_METRIC, z)
    hasty = geometry.distance_matrix(SPHERE_METRIC, graph, 6, n_checked=5, max_iterations=1, tolerance=1e-14)
    assert not hasty.has_converged.any()
    assert geometry.distance_matrix(SPHERE_METRIC, graph, 6, n_checked=5).has_converged.all()


def test_weights_of_a_mean():
    """A weight of two is the code twice; of two codes in hyperbolic space the mean cuts the line by their weights."""
    z, weights = codes(4), torch.tensor([2.0, 1.0, 1.0, 0.0])
    found = geometry.frechet_mean(geometry.Euclidean(), z, weights=weights)
    assert_close(found, (2 * z[0] + z[1] + z[2]) / 4)
    two = boxed(2, 3)
    mean = geometry.frechet_mean(HYPERBOLIC, two, weights=torch.tensor([3.0, 1.0]))[None]
    whole = hyperbolic_distance(two[:1], two[1:])
    assert_close(hyperbolic_distance(two[:1], mean), whole / 4, rtol=1e-3, atol=0)
    with pytest.raises(bae.errors.ShapeError, match=r"weights \(4,\)"):
        geometry.frechet_mean(HYPERBOLIC, z, weights=weights[:2])
    for wrong in (-weights, 0 * weights, weights * math.nan):
        with pytest.raises(bae.errors.DataError, match="finite weights of at least 0"):
            geometry.frechet_mean(HYPERBOLIC, z, weights=wrong)
    with pytest.raises(bae.errors.NonFiniteError, match="finite start"):
        geometry.frechet_mean(HYPERBOLIC, z, start=z[0] * math.nan)


def test_what_is_refused():
    z = codes(4)
    with pytest.raises(bae.errors.ShapeError, match=r"codes \(N, 2\)"):
        geometry.grid_graph(geometry.Euclidean(), z[:, :1])
    with pytest.raises(bae.errors.DataError, match="codes that differ in both dimensions"):
        geometry.grid_graph(geometry.Euclidean(), z[:1])
    with pytest.raises(bae.errors.DataError, match="two codes and one neighbour"):
        geometry.neighbour_graph(geometry.Euclidean(), z[:1])
    graph = geometry.neighbour_graph(geometry.Euclidean(), z)
    with pytest.raises(bae.errors.DataError, match="two codes or more, all of them nodes"):
        geometry.distance_matrix(geometry.Euclidean(), graph, 5)
    apart = geometry.CodeGraph(z, torch.tensor([[0, 1], [2, 3]]), torch.ones(2).double())
    with pytest.raises(bae.errors.DataError, match="none for 4 pairs"):
        geometry.distance_matrix(geometry.Euclidean(), apart, 4)
    with pytest.raises(bae.errors.DataError, match="none for pair 0"):
        geometry.graph_starts(apart, z[:1], z[3:])
    with pytest.raises(bae.errors.ShapeError, match=r"distances \(N, N\)"):
        geometry.geodesic_neighbours(z, 1)
    with pytest.raises(bae.errors.DataError, match="k from 1 to 3"):
        geometry.geodesic_neighbours(torch.cdist(z, z), 4)
    with pytest.raises(bae.errors.DataError, match="k from 1 to 4"):
        geometry.k_medoids(torch.cdist(z, z), 5)
    with pytest.raises(bae.errors.NonFiniteError, match="finite distances"):
        geometry.k_medoids(torch.full((3, 3), math.nan), 1)
    with pytest.raises(bae.errors.ShapeError, match=r"a start \(2,\)"):
        geometry.frechet_mean(HYPERBOLIC, z, start=z)
    with pytest.raises(bae.errors.DataError, match="steps that come to rest"):
        geometry.frechet_mean(HYPERBOLIC, z, max_iterations=1, tolerance=1e-12)
