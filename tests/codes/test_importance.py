"""Codes chosen by their importance weights."""

from __future__ import annotations

import math

import pytest
import torch

import bayesae as bae
from bayesae.codes import Amortised, Importance, amortised
from bayesae.codes.base import noise
from bayesae.testing import LinearGaussian

K, N = 5, 4


@pytest.fixture
def world():
    return LinearGaussian.make(n_data=6, correlation=0.3)


def params_of(model, scales=(1.0, 1.1)):
    return {k: torch.stack([s * leaf.detach() for s in scales]) for k, leaf in model.network.named_parameters()}


def draws_of(model, codes, batch, n, seed=0):
    with bae.random.scope(seed), torch.no_grad():
        return codes(model.at(params_of(model)), batch, n_latent_draws=n)


def test_equals_a_loop_over_codes(world):
    model = world.model("diagonal")
    given = draws_of(model, amortised, world.batch, K * N)
    with bae.random.scope(0), bae.random.scope(bae.random.derived_seed(1)):
        level = torch.special.ndtr(noise(model.at(params_of(model)), world.batch, K, 1, given.latents[0]))
    draws = draws_of(model, Importance(amortised, N), world.batch, K)
    assert draws.latents.shape == (K, 2, 6, 3) and draws.outputs.shape == (K, 2, 6, 7) and draws.kl is None
    for k in range(K):
        for s in range(2):
            for b in range(6):
                weights = [math.exp(given.log_ratio[k * N + i, s, b]) for i in range(N)]
                i = next(i for i in range(N) if level[k, 0, b, 0] <= sum(weights[: i + 1]) / sum(weights))
                assert torch.equal(draws.latents[k, s, b], given.latents[k * N + i, s, b])
                assert torch.equal(draws.outputs[k, s, b], given.outputs[k * N + i, s, b])
                assert float(draws.log_likelihood[k, s, b]) == float(given.log_likelihood[k * N + i, s, b])
                assert float(draws.log_ratio[k, s, b]) == pytest.approx(math.log(sum(weights) / N), abs=1e-10)


def test_bounds_are_those_of_more_codes(world):
    model = world.model("diagonal")
    inner = draws_of(model, amortised, world.batch, K * N)
    draws = draws_of(model, Importance(amortised, N), world.batch, K)
    torch.testing.assert_close(draws.log_evidence(), inner.log_evidence(), rtol=0, atol=1e-10)
    torch.testing.assert_close(bae.objectives.iwae(draws), inner.log_evidence(), rtol=0, atol=1e-10)
    parts = inner.log_ratio.unflatten(0, (K, N)).logsumexp(1) - math.log(N)
    torch.testing.assert_close(bae.objectives.elbo(draws), parts.mean(0), rtol=0, atol=1e-10)


def test_the_exact_posterior_stays_exact(world):
    with bae.random.scope(0), torch.no_grad():
        draws = Importance(Amortised("full"), N)(world.model("full").live(), world.batch, n_latent_draws=3000)
    torch.testing.assert_close(draws.log_ratio, world.log_evidence().expand_as(draws.log_ratio), rtol=0, atol=1e-10)
    error = draws.latents.std(0) / 3000**0.5
    assert bool(((draws.latents.mean(0)[0] - world.posterior_mean()).abs() < 4 * error[0]).all())


@pytest.mark.parametrize("codes", [amortised, Importance(amortised, 3)], ids=["plain", "nested"])
def test_the_choice_does_not_depend_on_what_was_drawn(world, codes):
    """Given the codes, the mean of the chosen one is their weighted mean: not so if both came of the same noise."""
    n = 5000
    batch = bae.Batch(world.x[:1].expand(n, -1), index=torch.arange(n))
    model = world.model("diagonal")
    inner, chosen = draws_of(model, codes, batch, N), draws_of(model, Importance(codes, N), batch, 1).latents[0]
    shares = inner.log_ratio.softmax(0)[..., None]
    for moment in (1, 2):
        shift = chosen**moment - (shares * inner.latents**moment).sum(0)
        assert float((shift.mean(1) / (shift.std(1) / n**0.5)).abs().max()) < 4


def test_more_codes_bring_the_law_to_the_posterior(world):
    model = world.model("diagonal")
    with torch.no_grad():  # the prior's scale, and a shift
        model.encoder[0].bias.copy_(torch.tensor([0.3, 0, 0.3, 0, 0.3, 0]))
    shifts = []
    with bae.random.scope(1), torch.no_grad():
        for n in (1, 30):
            draws = Importance(amortised, n)(model.live(), world.batch, n_latent_draws=2000)
            shifts.append(float((draws.latents.mean(0)[0] - world.posterior_mean()).abs().mean()))
    assert shifts[1] < 0.5 * shifts[0]


def test_gradients_are_those_of_the_importance_weighted_bound(world):
    model = world.model("diagonal").train()
    values = []
    for codes, n in ((amortised, N), (Importance(amortised, N), 1)):
        torch.manual_seed(3)
        bound = bae.objectives.iwae(codes(model.live(), world.batch, n_latent_draws=n))
        values.append(torch.autograd.grad(bound.sum(), list(model.parameters())))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("is_linearised", [False, True])
def test_chunks_do_not_matter(world, is_linearised):
    model = world.model("diagonal")
    subset = bae.Subset.of(model.network)
    mean = bae.functional.parameters_of(model.network)
    var = torch.full((subset.ravel(mean).shape[-1],), 1e-6, dtype=torch.float64)
    weights = bae.families.DiagonalNormal(mean, var, subset, is_linearised=is_linearised)
    predictive = bae.Predictive(model, weights, Importance(amortised, N))
    sizes = {"n_latent_draws": K, "n_weight_draws": 3, "seed": 2}
    one, other = (predictive(world.x, chunk_size=size, **sizes) for size in (None, 11))
    torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.log_q, other.log_q, rtol=0, atol=1e-10)


def test_trains_a_model(world):
    encoder, decoder = bae.nets.mlp(7, [8], (2, 2)), bae.nets.mlp(2, [8], 7)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(1.0)).double()
    options = {"codes": Importance(amortised, 3), "objective": bae.objectives.elbo, "seed": 0, "progress": False}
    history = bae.fit_model(model, world.x, epochs=30, **options)
    assert history.train[-1] > history.train[0]


class TestErrors:
    def test_counts(self):
        with pytest.raises(bae.errors.DataError, match="n of at least 1"):
            Importance(amortised, 0)

    def test_a_code_without_density(self, world):
        with pytest.raises(bae.errors.UnsupportedError, match="n_latent_draws=1 from a deterministic"):
            draws_of(world.model("location"), Importance(bae.codes.encode, 2), world.batch, 1)
