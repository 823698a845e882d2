"""Hamiltonian Monte Carlo over codes: the density first, then the dynamics, then the moments."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.codes import HMC, DiagonalLaw
from bayesae.codes.hmc import _slopes, leapfrog
from bayesae.testing import LinearGaussian

codes_hmc = importlib.import_module("bayesae.codes.hmc")
OBSERVED = torch.tensor([True, False, True, True, False, False, True])


@pytest.fixture
def world():
    return LinearGaussian.make(n_data=5, correlation=0.5)


def at_draws(model, shifts=(0.0, 0.4)):
    """Two weight draws, biases of the decoder apart."""
    params = {name: torch.stack([leaf.detach()] * len(shifts)) for name, leaf in model.network.named_parameters()}
    params["decoder.0.bias"] = params["decoder.0.bias"] + torch.tensor(shifts, dtype=torch.float64)[:, None]
    return model.at(params)


def masked(world):
    mask = OBSERVED.expand(len(world.x), -1)
    return bae.Batch(torch.where(mask, world.x, 0), mask, index=torch.arange(len(world.x)))


def posterior(world, x, shift=0.0):
    """Mean and covariance of the code given the observed entries."""
    weight, bias = world.weight[OBSERVED], world.bias[OBSERVED] + shift
    cov = torch.linalg.inv(weight.T @ weight / world.noise_var + torch.eye(world.n_latents).double())
    return (x[:, OBSERVED] - bias) @ weight @ cov / world.noise_var, cov


class TestTheDensity:
    def test_is_the_exact_posterior_up_to_a_constant(self, world):
        model, batch = at_draws(world.model("location")), masked(world)
        position = torch.randn(6, 2, 5, 3).double()
        flat = DiagonalLaw(torch.zeros(2, 5, 3).double(), torch.zeros(2, 5, 3).double())
        value, slope = _slopes(model, batch, flat)(position)
        for s, shift in enumerate((0.0, 0.4)):
            mean, cov = posterior(world, world.x, shift)
            exact = torch.distributions.MultivariateNormal(mean, cov)
            rest = value[:, s] - exact.log_prob(position[:, s])
            assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-11)
            assert_close(slope[:, s], -(position[:, s] - mean) @ torch.linalg.inv(cov), rtol=0, atol=1e-11)

    def test_is_standard_normal_where_the_posterior_whitens(self, world):
        model, batch = at_draws(world.model("location")), masked(world)
        state = HMC().init(model, batch, n_chains=4)
        assert_close(state.slope, -state.position, rtol=0, atol=1e-10)


class TestLeapfrog:
    def test_runs_back_to_its_start(self, world):
        model = bae.Autoencoder(bae.nets.mlp(7, [5], 3), bae.nets.mlp(3, [5], 7), bae.likelihoods.Gaussian(0.5))
        model = at_draws_of(model.double().eval())
        law = DiagonalLaw(torch.zeros(1, 5, 3).double(), torch.zeros(1, 5, 3).double())
        slopes = _slopes(model, masked(world), law)
        start, momentum = torch.randn(2, 1, 5, 3).double(), torch.randn(2, 1, 5, 3).double()
        there = leapfrog(slopes, start, momentum, slopes(start)[1], 0.1, 9)
        back = leapfrog(slopes, there[0], -there[1], there[3], 0.1, 9)
        assert float((there[0] - start).abs().max()) > 0.1
        assert_close(back[0], start, rtol=0, atol=1e-12)
        assert_close(-back[1], momentum, rtol=0, atol=1e-12)

    def test_keeps_the_energy_to_second_order(self, world):
        law = DiagonalLaw(torch.zeros(1, 5, 3).double(), torch.zeros(1, 5, 3).double())
        slopes = _slopes(at_draws(world.model("location"), (0.0,)), masked(world), law)
        start, momentum = torch.randn(1, 1, 5, 3).double(), torch.randn(1, 1, 5, 3).double()
        errors = []
        for n in (40, 80):
            _, moved, value, _ = leapfrog(slopes, start, momentum, slopes(start)[1], 0.4 / n, n)
            gain = value - slopes(start)[0] - 0.5 * (moved**2 - momentum**2).sum(-1)
            errors.append(float(gain.abs().max()))
        assert errors[1] < 0.3 * errors[0]


def at_draws_of(model):
    return model.at({name: leaf.detach()[None] for name, leaf in model.network.named_parameters()})


@pytest.mark.parametrize(
    "whitening",
    [bae.codes.Laplace(), pytest.param(None, marks=pytest.mark.slow)],
    ids=["Laplace", "none"],
)
def test_moments_are_the_exact_ones(world, whitening):
    model, batch = at_draws(world.model("location")), masked(world)
    n_burn_in, n_steps = (50, 100) if whitening else (150, 250)
    hmc = HMC(whitening=whitening)
    chains = hmc.run(model, batch, n_chains=8, n_burn_in=n_burn_in, n_steps=n_steps, seed=0)
    assert chains.latents.shape == (8, n_steps, 2, 5, 3)
    assert bool(((chains.acceptance - 0.8).abs() < 0.2).all()) and not bool(chains.n_divergent.any())
    assert float(bae.metrics.split_rhat(chains.latents).max()) < 1.05
    for s, shift in enumerate((0.0, 0.4)):
        mean, cov = posterior(world, world.x, shift)
        latents = chains.latents[:, :, s]
        centred = latents - mean
        for found in (centred, centred.square() - cov.diagonal(), centred[..., :1] * centred[..., 1:2] - cov[0, 1]):
            error = found.flatten(0, 1).std(0) / bae.metrics.ess(found).sqrt()
            assert float((found.mean((0, 1)) / error).abs().max()) < 4


def test_a_seed_gives_the_same_and_leaves_the_generator(world):
    model, batch, state = at_draws(world.model("location")), masked(world), torch.get_rng_state()
    runs = [HMC().run(model, batch, n_chains=2, n_burn_in=3, n_steps=3, seed=seed).latents for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())


def test_steps_adapt_while_chains_burn_in_only(world):
    model, batch = at_draws(world.model("location")), masked(world)
    hmc = HMC(step_size=1e-3, whitening=None)
    first = hmc.init(model, batch, n_chains=2)
    assert torch.equal(hmc.step(first, model, batch).log_step, first.log_step)
    adapted = hmc.step(first, model, batch, adapts=True)
    assert bool((adapted.log_step > first.log_step).all()) and adapted.n_adapted == 1


class TestSteps:
    def start(self, world, hmc, n_chains=50):
        model, batch = at_draws(world.model("location")), masked(world)
        return hmc.init(model, batch, n_chains=n_chains), model, batch

    def test_chains_start_at_twice_the_whitening_law(self, world):
        state, _, _ = self.start(world, HMC(), 800)
        spread = state.position.flatten(0, 2).std(0)
        assert_close(spread, torch.full((3,), 2.0).double(), rtol=0, atol=4 * 2 / (2 * 8000) ** 0.5)

    def test_density_and_slope_are_those_of_where_a_chain_stands(self, world):
        hmc = HMC(step_size=1.6)
        state, model, batch = self.start(world, hmc)
        after = hmc.step(state, model, batch)
        moved = (after.position != state.position).any(-1)
        assert 0.1 < float(moved.double().mean()) < 0.9
        value, slope = _slopes(model, batch, state.law)(after.position)
        assert_close(after.value, value, rtol=0, atol=1e-11)
        assert_close(after.slope, slope, rtol=0, atol=1e-11)
        assert_close(after.latents, state.law.push(after.position))

    def test_trajectories_have_every_length_and_sizes_within_a_fifth(self, world, monkeypatch):
        seen, hmc = [], HMC(n_leapfrog=3, step_size=0.25)
        state, model, batch = self.start(world, hmc, 30)

        def spy(slopes, position, momentum, slope, size, n_steps):
            seen.append((n_steps, size))
            return leapfrog(slopes, position, momentum, slope, size, n_steps)

        monkeypatch.setattr(codes_hmc, "leapfrog", spy)
        for _ in range(40):
            hmc.step(state, model, batch)
        assert {n for n, _ in seen} == {1, 2, 3}
        shares = torch.stack([size for _, size in seen]) / 0.25
        assert shares.shape == (40, 30, 2, 5, 1)  # of every chain its own
        assert 0.8 <= float(shares.min()) < 0.81 < 1.19 < float(shares.max()) <= 1.2
        assert_close(shares.mean(), torch.tensor(1.0).double(), rtol=0, atol=0.01)

    def test_sizes_adapt_by_dual_averaging_and_their_average_is_kept(self, world):
        """Section 3.2 of the paper: gamma 0.05, t_0 10, kappa 0.75, mu the log of ten times the first size."""
        hmc = HMC(step_size=0.3, target_acceptance=0.7, n_leapfrog=2)
        state, model, batch = self.start(world, hmc, 4)
        short, average = 0.0, math.log(0.3)
        for t in range(1, 6):
            state = hmc.step(state, model, batch, adapts=True)
            short = (1 - 1 / (t + 10)) * short + (0.7 - state.acceptance) / (t + 10)
            step = math.log(3.0) - math.sqrt(t) / 0.05 * short
            average = t**-0.75 * step + (1 - t**-0.75) * average
            assert_close(state.log_step, step)
            assert_close(state.log_average, average)

    def test_a_run_is_its_steps(self, world):
        hmc, model, batch = HMC(n_leapfrog=2), at_draws(world.model("location")), masked(world)
        found = hmc.run(model, batch, n_chains=3, n_burn_in=4, n_steps=5, seed=2)
        with bae.random.scope(2), torch.no_grad():
            state, path, shares = hmc.init(model, batch, n_chains=3), [], []
            for _ in range(4):
                state = hmc.step(state, model, batch, adapts=True)
            state = dataclasses.replace(state, log_step=state.log_average)
            for _ in range(5):
                state = hmc.step(state, model, batch)
                path.append(state.latents)
                shares.append(state.acceptance)
        assert torch.equal(found.latents, torch.stack(path, 1))
        assert_close(found.step_size, state.log_average.exp())
        assert_close(found.acceptance, torch.stack(shares).mean(0))

    def test_trajectories_that_leave_the_numbers_count_as_divergent(self, world):
        model, batch = at_draws(world.model("location")), masked(world)
        chains = HMC(step_size=1e200, whitening=None).run(model, batch, n_chains=2, n_burn_in=0, n_steps=4, seed=0)
        assert bool((chains.n_divergent == 8).all()) and torch.equal(chains.latents[:, 0], chains.latents[:, -1])


def test_divergences_are_counted_and_refused(world):
    model, batch = at_draws(world.model("location")), masked(world)
    hmc = HMC(step_size=1e4, whitening=None)
    chains = hmc.run(model, batch, n_chains=2, n_burn_in=0, n_steps=4, seed=0)
    assert bool((chains.n_divergent == 8).all()) and not bool(chains.acceptance.any())
    assert torch.equal(chains.latents[:, 0], chains.latents[:, -1])


class TestErrors:
    def test_numbers(self, world):
        with pytest.raises(bae.errors.DataError, match="n_leapfrog"):
            HMC(n_leapfrog=0)
        with pytest.raises(bae.errors.DataError, match="target_acceptance"):
            HMC(target_acceptance=1.0)
        with pytest.raises(bae.errors.DataError, match="n_steps"):
            HMC().run(at_draws(world.model("location")), masked(world), n_steps=0)

    def test_a_whitening_without_a_normal(self, world):
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
            HMC(whitening=bae.codes.encode).init(at_draws(world.model("location")), masked(world))

    def test_a_start_that_is_not_finite(self, world):
        model = at_draws(world.model("location"), (0.0, float("nan")))
        with pytest.raises(bae.errors.NonFiniteError, match="where chains start"):
            HMC(whitening=None).init(model, masked(world))
