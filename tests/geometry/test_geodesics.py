"""Geodesics against closed forms and against SciPy's boundary value solver."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from bayesae.geometry.solver import Solver
from bayesae.geometry.tridiagonal import BlockTridiagonal
from tests.geometry.surfaces import (
    HYPERBOLIC,
    RADII,
    SPHERE,
    TORUS,
    boxed,
    codes,
    hyperbolic_distance,
    linear,
    sphere,
    sphere_distance,
)


def test_block_systems_are_dense_ones():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    dense = root @ root.mT + 8 * torch.eye(8)
    mask = torch.block_diag(*[torch.ones(2, 2)] * 4)
    mask[:-2, 2:] += torch.block_diag(*[torch.ones(2, 2)] * 3)
    mask[2:, :-2] += torch.block_diag(*[torch.ones(2, 2)] * 3)
    dense = dense * mask.double() + 8 * torch.eye(8)
    dense[1] -= 60 * torch.eye(8)
    blocks = dense.reshape(2, 4, 2, 4, 2).transpose(2, 3)
    diagonal = torch.stack([blocks[:, i, i] for i in range(4)], 1)
    matrices = BlockTridiagonal(diagonal, torch.stack([blocks[:, i, i + 1] for i in range(3)], 1))
    right = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    solution, is_definite = matrices.solve(right)
    assert is_definite.tolist() == [True, False] and (solution[1] == 0).all()
    assert_close(solution[0].flatten(), torch.linalg.solve(dense[0], right[0].flatten()))


def test_a_matrix_that_fails_in_one_block_is_not_definite():
    """Nor does it spoil the others."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(1, 4, 2, generator=generator, dtype=torch.float64).expand(5, -1, -1)
    diagonal = (4 * torch.eye(2).double()).expand(5, 4, 2, 2).clone()
    for number in range(4):
        diagonal[number, number, 0, 0] = -1
    upper = 0.5 * torch.randn(1, 3, 2, 2, generator=generator, dtype=torch.float64).expand(5, -1, -1, -1)
    solution, is_definite = BlockTridiagonal(diagonal, upper).solve(right)
    assert is_definite.tolist() == [False, False, False, False, True]
    alone = BlockTridiagonal(diagonal[4:], upper[4:]).solve(right[4:])[0]
    assert_close(solution, torch.cat([torch.zeros(4, 4, 2).double(), alone]))


def test_sums_and_multiples_of_block_matrices():
    generator = torch.Generator().manual_seed(0)
    one, other = (
        BlockTridiagonal(
            torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64),
            torch.randn(2, 2, 2, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(2)
    )
    total, factors = one + other.scaled(torch.tensor([2.0, -1.0]).double()), (2.0, -1.0)
    for number, factor in enumerate(factors):
        assert_close(total.diagonal[number], one.diagonal[number] + factor * other.diagonal[number])
        assert_close(total.upper[number], one.upper[number] + factor * other.upper[number])


def test_a_quadratic_energy_takes_one_step_whose_gain_is_foretold():
    metric, straight = geometry.Pullback(linear()[1]), geometry.straight_lines(codes(3), codes(3, seed=1), 6)
    bent = straight.clone()
    bent[:, 1:-1] += codes(15, seed=2).reshape(3, 5, 2)
    squared, least = (metric.segments(points).sum(1) for points in (bent, straight))
    for wants_all in (False, True):
        none, chosen = torch.zeros_like(squared), torch.full((3,), wants_all)
        steps, gain, residual = Solver(metric, 0.0, 1).steps(bent, squared, none, chosen)[:3]
        assert_close(bent[:, 1:-1] + steps, straight[:, 1:-1], rtol=0, atol=1e-8)
        assert_close(gain, squared - least, rtol=1e-8, atol=0)
        assert_close(residual, gain / squared if wants_all else torch.full_like(squared, math.inf))
    # with a damping of 1 half the way
    assert_close(Solver(metric, 0.0, 1).steps(bent, squared, none + 1, chosen)[0], steps / 2)


def test_a_linear_decoder_has_straight_geodesics():
    weights, decoder = linear()
    starts, ends = codes(6), codes(6, seed=1)
    found = geometry.geodesics(geometry.Pullback(decoder), starts, ends)
    expected = torch.einsum("sdz,pz->psd", weights, ends - starts).square().sum((1, 2)).div(3).sqrt()
    assert_close(found.length, expected, rtol=1e-6, atol=0)
    assert_close(found.points, geometry.straight_lines(starts, ends, 32), rtol=0, atol=1e-6)
    assert found.has_converged.all()


@pytest.mark.parametrize("metric", [SPHERE, geometry.MetricFunction(SPHERE.__call__)], ids=["chords", "metric"])
def test_great_circles(metric):
    starts, ends = codes(12), codes(12, seed=1)
    found = geometry.geodesics(metric, starts, ends)
    assert found.has_converged.all() and not found.is_straight.any()
    assert_close(found.length, sphere_distance(starts, ends), rtol=1e-3, atol=0)
    assert (found.energy >= found.length**2).all()
    # every point lies in the plane of both ends
    normal = torch.linalg.cross(sphere(starts)[0], sphere(ends)[0])
    normal = normal / normal.norm(dim=1, keepdim=True)
    points = sphere(found.points.flatten(0, 1))[0].unflatten(0, (12, 33))
    assert torch.einsum("pi,pni->pn", normal, points).abs().max() < 1e-3


def test_hyperbolic_lines():
    starts, ends = codes(12), codes(12, seed=1)
    found = geometry.geodesics(HYPERBOLIC, starts, ends)
    assert found.has_converged.all()
    assert_close(found.length, hyperbolic_distance(starts, ends), rtol=1e-3, atol=0)


def test_circles_of_the_torus():
    wide, narrow = RADII
    starts = torch.tensor([[0.3, 1.0], [0.0, 0.0]], dtype=torch.float64)
    ends = torch.tensor([[2.0, 1.0], [0.0, 0.8]], dtype=torch.float64)
    found = geometry.geodesics(TORUS, starts, ends)
    expected = torch.tensor([1.7 * narrow, 0.8 * (wide + narrow)], dtype=torch.float64)
    assert_close(found.length, expected, rtol=1e-3, atol=0)


def test_a_start_elsewhere_finds_another_minimum():
    """A hill between the ends, which lie a little above its middle: the way above is shorter than that below."""
    starts, ends = torch.tensor([[-2.0, 0.05]]).double(), torch.tensor([[2.0, 0.05]]).double()
    middle = torch.tensor([[0.0, -1.0]]).double()
    above = geometry.geodesics(hill(0.0), starts, ends)
    below = geometry.geodesics(hill(0.0), starts, ends, initial=torch.stack([starts, middle, ends], 1))
    assert above.has_converged.all() and below.has_converged.all()
    assert above.points[0, 16, 1] > 0.5 and below.points[0, 16, 1] < -0.5
    assert above.length < below.length < below.straight_length


def hill(place):
    """A metric that is dear around (0, place)."""
    centre = torch.tensor([0.0, place])
    return geometry.MetricFunction(
        lambda z: (1 + 9 * torch.exp(-2 * (z - centre.to(z)).square().sum(1)))[:, None, None] * torch.eye(2).to(z)
    )


def test_a_saddle_is_not_certified():
    """Straight over a hill by its top: no force to either side, but either side is lower."""
    starts, ends = torch.tensor([[-2.0, 0.0]]).double(), torch.tensor([[2.0, 0.0]]).double()
    with pytest.warns(RuntimeWarning, match="1 of 1 geodesics have not converged"):
        found = geometry.geodesics(hill(0.0), starts, ends, n_segments=16, max_iterations=20)
    assert (found.points[..., 1] == 0).all() and found.residual == math.inf


def test_a_straight_line_is_kept_where_what_is_found_is_longer():
    """There is a minimum above a hill, but the straight line below it is shorter. That is no minimum, and says so."""
    starts, ends = torch.tensor([[-2.0, 0.0]]).double(), torch.tensor([[2.0, 0.0]]).double()
    initial = torch.stack([starts, torch.tensor([[0.0, 2.5]]).double(), ends], 1)
    with pytest.warns(RuntimeWarning, match="1 of 1 geodesics have not converged"):
        found = geometry.geodesics(hill(1.0), starts, ends, initial=initial, n_segments=16)
    straight = geometry.straight_lines(starts, ends, 16)
    assert found.is_straight.all() and torch.equal(found.points, straight)
    assert_close(found.energy, geometry.chord_energy(hill(1.0), straight))
    assert found.length == found.straight_length and 1e-6 < found.residual < 1
    assert geometry.geodesics(hill(1.0), starts, ends, n_segments=16).has_converged.all()


def test_equal_energy_from_every_start():
    starts, ends = codes(4), codes(4, seed=1)
    bent = geometry.straight_lines(starts, ends, 6)
    bent += 0.2 * codes(28, low=(-1, -1), high=(1, 1)).reshape(4, 7, 2)  # the ends are put back
    one, other = (geometry.geodesics(SPHERE, starts, ends, initial=initial) for initial in (None, bent))
    assert_close(one.energy, other.energy, rtol=1e-5, atol=0)
    assert torch.equal(other.points[:, 0], starts) and torch.equal(other.points[:, -1], ends)


def test_independent_draws_keep_away_from_disagreement():
    """Decoders differ near the origin: this curve goes around, that of the expected metric goes through."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 1, 3, generator=generator, dtype=torch.float64)

    def decoder(z):
        inside = torch.exp(-4 * z.square().sum(1))[None, :, None]
        return torch.cat([z, 0 * z[:, :1]], 1)[None] + 0.3 * inside * noise

    starts, ends = torch.tensor([[-1.0, 0.05]]).double(), torch.tensor([[1.0, 0.05]]).double()
    around = geometry.geodesics(geometry.IndependentDraws(decoder), starts, ends, n_segments=16)
    through = geometry.geodesics(geometry.Pullback(decoder), starts, ends, n_segments=16)
    assert around.points[0, :, 1].max() > 0.4 > through.points[0, :, 1].max()
    assert around.has_converged.all() and (around.length <= around.straight_length).all()


def test_float32_and_few_pairs_alone_give_the_same():
    starts, ends = codes(5), codes(5, seed=1)
    whole = geometry.geodesics(SPHERE, starts, ends)
    alone = geometry.geodesics(SPHERE, starts[2:3], ends[2:3])
    assert_close(alone.points[0], whole.points[2])
    small = geometry.geodesics(SPHERE, starts.float(), ends.float())
    assert small.has_converged.all() and small.points.dtype == torch.float32
    assert_close(small.length, whole.length, rtol=1e-4, atol=0)


def test_nothing_of_the_caller_changes():
    state, starts, ends = torch.get_rng_state(), codes(3), codes(3, seed=1)
    before = starts.clone(), ends.clone()
    geometry.geodesics(SPHERE, starts.requires_grad_(), ends)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before[0], starts) and torch.equal(before[1], ends) and starts.grad is None


def test_residuals_are_those_of_the_points():
    """Also where the steps run out, on the last level or one before."""
    starts, ends = codes(4), codes(4, seed=1)
    for max_iterations in (1, 2, 3, 100):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = geometry.geodesics(SPHERE, starts, ends, n_segments=8, max_iterations=max_iterations)
        assert_close(found.residual, Solver(SPHERE, 0.0, 1).residual(found.points)[0])
        squared = SPHERE.segments(found.points)
        assert_close(found.energy, 8 * squared.sum(1))
        assert_close(found.length, squared.sqrt().sum(1))


def test_a_residual_is_the_share_that_a_newton_step_gains():
    """Near the minimum, where the energy is its expansion, that is how far the energy lies above the minimum's."""
    starts, ends = codes(4), codes(4, seed=1)
    least = geometry.geodesics(SPHERE, starts, ends, n_segments=8, tolerance=1e-14)
    nearby = least.points.clone()
    nearby[:, 1:-1] += 1e-3 * (codes(28, seed=2) - 1.5).reshape(4, 7, 2)
    share = 1 - least.energy / geometry.chord_energy(SPHERE, nearby)
    assert_close(Solver(SPHERE, 0.0, 1).residual(nearby)[0], share, rtol=2e-2, atol=0)


@pytest.mark.parametrize("n_latents", [1, 3])
def test_other_dimensions(n_latents):
    starts, ends = boxed(6, n_latents), boxed(6, n_latents, seed=1)
    found = geometry.geodesics(HYPERBOLIC, starts, ends)
    assert found.has_converged.all()
    assert_close(found.length, hyperbolic_distance(starts, ends), rtol=1e-3, atol=0)


@pytest.mark.parametrize("metric", [HYPERBOLIC, geometry.Pullback(lambda z: torch.cat([z.exp(), z.sin()], 1)[None])])
def test_straight_lines_at_another_speed(metric):
    """In one dimension every way is the straight line: what is found are equal steps, no longer and no shorter."""
    starts, ends = boxed(4, 1), boxed(4, 1, seed=1)
    found = geometry.geodesics(metric, starts, ends, tolerance=1e-9)
    assert found.has_converged.all() and not found.is_straight.any()
    assert (found.length <= found.straight_length * (1 + 1e-3)).all()  # measured with as few chords
    assert (found.energy < found.length**2 * (1 + 1e-3)).all()
    steps = metric.segments(found.points).sqrt()
    assert (steps.amax(1) < 1.001 * steps.amin(1)).all()  # an energy to 1e-9 has steps to its root
    assert_close(found.length, found.straight_length, rtol=2e-3, atol=0)


@pytest.mark.slow
def test_lengths_are_those_of_a_boundary_value_solver():
    """A small trained decoder; SciPy solves the geodesic equation by collocation."""
    from scipy.integrate import solve_bvp

    train = bae.datasets.load("digits").double()
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(64, [32], 2), bae.nets.mlp(2, [32], 64)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian()).double()
    bae.fit_model(model, train, epochs=20, learning_rate=5e-3, batch_size=64, seed=0)
    metric = geometry.Pullback(lambda z: decoder(z)[None])
    with torch.no_grad():
        z = model.encoder(train.flatten(1)[:12]).reshape(12, 2)
    found = geometry.geodesics(metric, z[:6], z[6:])
    assert found.has_converged.all()

    def equation(times, state):
        position, velocity = torch.as_tensor(state.T).chunk(2, 1)
        symbols = geometry.christoffel(metric, position).detach()
        return torch.cat([velocity, -torch.einsum("bkij,bi,bj->bk", symbols, velocity, velocity)], 1).numpy().T

    for number in range(6):
        a, b = z[number].numpy(), z[6 + number].numpy()
        times = np.linspace(0, 1, 33)
        curve = geometry.CubicSpline(found.points[number : number + 1])
        guess = torch.cat([found.points[number], curve(torch.as_tensor(times), derivative=1)[0]], 1).numpy().T
        solved = solve_bvp(equation, lambda p, q, a=a, b=b: np.concatenate([p[:2] - a, q[:2] - b]), times, guess)
        assert solved.success
        path = torch.as_tensor(solved.sol(np.linspace(0, 1, 400))[:2].T)[None]
        assert float(found.length[number]) == pytest.approx(float(geometry.chord_length(metric, path)), rel=0.01)


def test_bad_pairs():
    z = codes(3)
    with pytest.raises(bae.errors.DataError, match="1 equal pairs, the first at row 1"):
        geometry.geodesics(SPHERE, z, torch.stack([z[1], z[1], z[0]]))
    with pytest.raises(bae.errors.NonFiniteError, match="finite ends"):
        geometry.geodesics(SPHERE, z, z / 0 * 0)
    with pytest.raises(bae.errors.ShapeError, match="of one shape and dtype"):
        geometry.geodesics(SPHERE, z, z[:2])
    with pytest.raises(bae.errors.ShapeError, match=r"starts \(B, Z\)"):
        geometry.geodesics(SPHERE, z[0], z[0])
    with pytest.raises(bae.errors.ShapeError, match=r"initial curves \(3, m \+ 1, 2\)"):
        geometry.geodesics(SPHERE, z, z.flip(0) + 1, initial=z)
    with pytest.raises(bae.errors.NonFiniteError, match="finite initial curves"):
        geometry.geodesics(SPHERE, z, z.flip(0) + 1, initial=torch.full((3, 4, 2), math.nan))
    with pytest.raises(bae.errors.DataError, match="n_segments >= 2"):
        geometry.geodesics(SPHERE, z, z.flip(0) + 1, n_segments=1)


def test_what_is_no_metric():
    with pytest.raises(
        bae.errors.UnsupportedError, match="a metric of bayesae.geometry; got a function. Put a decoder"
    ):
        geometry.geodesics(sphere, codes(2), codes(2, seed=1))


def test_decoders_that_are_not_finite():
    with pytest.raises(bae.errors.NonFiniteError, match="finite squared lengths of segments of straight lines"):
        geometry.geodesics(geometry.Pullback(lambda z: sphere(z).log()), codes(2), codes(2, seed=1) + 2)


def test_a_solver_that_does_not_converge_says_so():
    with pytest.warns(RuntimeWarning, match="3 of 3 geodesics have not converged"):
        found = geometry.geodesics(SPHERE, codes(3), codes(3, seed=1), max_iterations=1, tolerance=1e-14)
    assert not found.has_converged.any() and (found.residual > 1e-14).all()
    # one with 8 segments, one with 32, and one with 16 where the first left something to gain
    assert (found.n_iterations >= 2).all() and (found.n_iterations <= 3).all()
    assert (found.length <= found.straight_length).all()


def test_of_independent_draws_a_curve_of_less_energy_that_is_longer_is_not_kept():
    """The draws agree at 0, 1/2 and 1: equal steps have less energy, and more length, as their node is uncertain."""

    def decoder(z):
        spread = 0.23 * torch.sin(2 * math.pi * z)
        return torch.stack([torch.cat([z**2, sign * spread], 1) for sign in (1, -1)])

    starts, ends = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    metric = geometry.IndependentDraws(decoder)
    with pytest.warns(RuntimeWarning, match="1 of 1 geodesics have not converged"):
        found = geometry.geodesics(metric, starts, ends, n_segments=2)
    assert found.is_straight.all() and found.points[0, 1, 0] == 0.5
    assert_close(found.length, torch.ones(1).double())
    nearer = torch.tensor([[[0.0], [0.61], [1.0]]]).double()
    assert geometry.chord_energy(metric, nearer) < found.energy
    assert geometry.chord_length(metric, nearer) > found.length
