"""Renyi and chi-square bounds where their expectations are known: one Normal against another."""

from __future__ import annotations

import math

import pytest
import torch

import bayesae as bae
from bayesae.objectives import CUBO, Renyi, iwae, sampled_elbo
from bayesae.testing import LinearGaussian


def log_moment(n, scale, var=1.0):
    """Log E_q[(p / q)^n] of q = N(0, scale^2) against p = N(0, var)."""
    return -n / 2 * math.log(var) + (n - 1) * math.log(scale) - 0.5 * math.log(n / var - (n - 1) / scale**2)


def normal_draws(scale, n, seed=0):
    z = scale * torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)[..., 0]
    log_q = torch.distributions.Normal(0.0, scale).log_prob(z)[..., 0]
    return bae.Draws(z, torch.zeros_like(log_q), log_prior, log_q, bae.likelihoods.Gaussian(1.0))


def error_of_log_mean(log_values):
    """Standard error of the logarithm of a mean of exponentials, (K, ...) to (...)."""
    ess = torch.exp(2 * log_values.logsumexp(0) - (2 * log_values).logsumexp(0))
    return (1 / ess - 1 / len(log_values)).sqrt()


@pytest.mark.parametrize(("n", "known"), [(2.0, 0.0912), (0.5, -0.0170), (-1.0, 0.323)])
def test_published_moments_of_two_normals(n, known):
    assert log_moment(n, 1.3) == pytest.approx(known, abs=5e-4)
    draws = normal_draws(1.3, 100_000)
    bound = CUBO(n) if n > 1 else Renyi(1 - n)
    error = float(error_of_log_mean(n * draws.log_ratio))
    assert error < 0.05  # the variance is infinite for n = -1
    assert abs(n * float(bound(draws)) - log_moment(n, 1.3)) < 3 * error


def moments_of(world, widening, n):
    """Log E_q[(p(z | x) / q)^n] for q of the posterior's mean and ``widening`` times the mean-field variances."""
    q = torch.diag(world.precision.diagonal() / widening)
    log_dets = n * torch.logdet(world.precision) + (1 - n) * torch.logdet(q)
    return 0.5 * float(log_dets - torch.logdet(n * world.precision + (1 - n) * q))


class TestSandwich:
    @pytest.fixture(scope="class")
    @staticmethod
    def world():
        return LinearGaussian.make(n_data=6, correlation=0.5, noise_var=1.0)

    @pytest.fixture(scope="class")
    @staticmethod
    def draws(world):
        model = world.model("diagonal")
        with torch.no_grad():
            model.encoder[0].bias[1::2] += 0.5 * math.log(2.5)  # wide enough for a chi-square divergence
        params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
        with bae.random.scope(0), torch.no_grad():
            return bae.codes.amortised(model.at(params), world.batch, n_latent_draws=40_000)

    @pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.3, 0.7])
    def test_estimates_meet_the_closed_form(self, world, draws, alpha):
        order = 1 - alpha
        expected = world.log_evidence() + moments_of(world, 2.5, order) / order
        error = error_of_log_mean(order * draws.log_ratio)[0] / abs(order)
        assert bool((error < 0.02).all())
        assert bool(((Renyi(alpha)(draws)[0] - expected).abs() < 4 * error).all())

    def test_lower_bounds_evidence_upper_bound(self, world, draws):
        lower = [sampled_elbo(draws), Renyi(0.7)(draws), Renyi(0.3)(draws), iwae(draws)]
        values = torch.stack([*lower, CUBO(1.5)(draws), CUBO(2.0)(draws)])[:, 0]
        assert bool((values.diff(dim=0) > 0).all())
        evidence = world.log_evidence()
        assert bool((values[2] < evidence).all()) and bool((values[4] > evidence).all())
        error = error_of_log_mean(draws.log_ratio)[0]
        assert bool(((values[3] - evidence).abs() < 4 * error).all())


class TestTooNarrow:
    """Var q <= 1/2 against var p = 1: the chi-square divergence is infinite, and every estimate of it is finite."""

    def test_cubo_warns_and_more_draws_do_not_help(self):
        for n in (1_000, 100_000):
            draws = normal_draws(0.6, n)
            # Pareto shape of w^n: n (1 - s^2 / v); Hill's estimate of it is low by 1 / log(K) or so
            assert float(CUBO(2.0).tail_shape(draws)) == pytest.approx(2 * (1 - 0.36), rel=0.25)
            with pytest.warns(UserWarning, match=r"CUBO\(2\) is too low in 1 of 1 rows, or infinite"):
                CUBO(2.0)(draws)

    def test_cubo_of_few_draws_warns(self):
        for n in (1, 8):
            with pytest.warns(UserWarning, match=f"effective draws of {n} and"):
                CUBO(2.0)(normal_draws(1.3, n))

    def test_cubo_of_a_wide_q_says_nothing(self):
        draws = normal_draws(1.3, 1_000)
        assert float(CUBO(2.0).ess(draws)) > 500
        assert float(CUBO(2.0).tail_shape(draws)) < 0.1
        CUBO(2.0)(draws)


def test_an_upper_bound_is_not_climbed():
    model = bae.Autoencoder(bae.nets.mlp(64, [8], (2, 2)), bae.nets.mlp(2, [8], 64), bae.likelihoods.Gaussian(0.3))
    with pytest.raises(bae.errors.UnsupportedError, match="a lower bound to climb; got CUBO"):
        bae.fit_model(
            model, torch.rand(50, 64), objective=CUBO(), codes=bae.codes.amortised, n_latent_draws=20, epochs=1
        )
