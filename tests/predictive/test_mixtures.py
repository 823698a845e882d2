"""Predictives of mixtures: every component around its own mean, and the law of total variance over them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.draws import concatenate_weight_draws
from bayesae.errors import ParameterError, UnsupportedError
from bayesae.families import DiagonalNormal, Mixture, Particles
from bayesae.functional import parameters_of
from tests import twins
from tests.conftest import small_model

PARTS = ("mean", "noise", "code", "weights")


def normal(model, seed, var=0.01, is_linearised=True):
    generator = torch.Generator().manual_seed(seed)
    mean = {
        name: leaf + 0.2 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for name, leaf in parameters_of(model.network).items()
    }
    subset = bae.Subset.of(model.network)
    var = var * torch.rand(len(subset), dtype=torch.float64, generator=generator)
    return DiagonalNormal(mean, var, subset, is_linearised=is_linearised)


def mixture(model, n=3, **kwargs):
    return Mixture([normal(model, seed, **kwargs) for seed in range(n)])


def at(model, params):
    """The plain network at other weights."""
    return torch.func.functional_call(model.network, params, (ROWS,))


ROWS = torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_moments_are_those_of_dense_jacobians_around_each_mean(model):
    weights = mixture(model)
    moments = bae.Predictive(model, weights).moments(ROWS)
    assert moments.is_exact
    means, variances = [], []
    for one in weights.components:
        twin = small_model()
        twin.load_state_dict(one.mean, strict=False)
        jacobian = twins.dense_jacobian(twin.network, ROWS)
        means.append(at(model, one.mean))
        variances.append((jacobian**2 @ one.var).reshape(means[-1].shape))
    mean = sum(means) / 3
    between = sum((one - mean) ** 2 for one in means) / 3
    assert_close(moments.mean, mean, rtol=1e-10, atol=1e-12)
    assert_close(moments.weights, sum(variances) / 3 + between, rtol=1e-10, atol=1e-12)
    assert_close(moments.noise, torch.full_like(mean, 0.09), rtol=1e-12, atol=0)
    assert float(between.min()) > 0 and float(moments.code.abs().max()) == 0
    wrong = bae.Predictive(model, replace(weights.components[0], mean=weights.mean)).moments(ROWS)
    assert float((wrong.mean - mean).abs().max()) > 1e-3  # around the average weights is something else


@pytest.mark.parametrize("likelihood", [lambda: bae.likelihoods.Gaussian(0.3), bae.likelihoods.Bernoulli])
def test_closed_form_is_the_limit_of_draws(likelihood):
    model, n = small_model(likelihood()), 6000
    predictive = bae.Predictive(model, mixture(model))
    exact = predictive.moments(ROWS)
    draws = predictive(ROWS, n_weight_draws=n, seed=0, keep_outputs=True)
    values = model.likelihood.mean(draws.outputs[0])
    assert float(((values.mean(0) - exact.mean) / values.std(0) * math.sqrt(n)).abs().max()) < 4
    squares = (values - exact.mean) ** 2
    assert float(((squares.mean(0) - exact.weights) / squares.std(0) * math.sqrt(n)).abs().max()) < 4
    streamed = predictive.moments(ROWS, n_weight_draws=n, seed=0)
    assert not streamed.is_exact
    assert_close(streamed.mean, values.mean(0), rtol=1e-8, atol=1e-10)
    assert_close(streamed.weights, values.var(0, correction=0), rtol=1e-8, atol=1e-12)
    assert_close(streamed.noise, exact.noise, rtol=0.05, atol=0)


@pytest.mark.parametrize("is_linearised", [True, False])
def test_draws_are_the_components_own(model, is_linearised):
    weights = mixture(model, is_linearised=is_linearised)
    predictive = bae.Predictive(model, weights)
    assert predictive.is_linearised == is_linearised
    draws = predictive(ROWS, n_weight_draws=6, seed=0, keep_outputs=True)
    codes = predictive.over_chunks(lambda params, batch, draw: (draw(1).latents[0],), ROWS, n_weight_draws=6, seed=0)[0]
    decoded = predictive.decoder(6, seed=0)(codes[0])
    with bae.random.scope(0):
        for place, one in enumerate(weights.components):
            own, part = bae.Predictive(model, one), slice(2 * place, 2 * place + 2)
            params = one.sample(2)
            expected = own._evaluate(params, bae.Batch(ROWS), 1)
            assert_close(draws.outputs[:, part], expected.outputs, rtol=1e-12, atol=1e-14)
            assert_close(draws.log_likelihood[:, part], expected.log_likelihood, rtol=1e-12, atol=1e-14)
            assert_close(codes[part], expected.latents[0], rtol=1e-12, atol=1e-14)
            assert_close(decoded[part], own._decode(params, codes[0], None), rtol=1e-12, atol=1e-14)
    small = predictive(ROWS, n_weight_draws=6, seed=0, keep_outputs=True, chunk_size=4)
    assert_close(small.outputs, draws.outputs, rtol=1e-10, atol=1e-12)
    assert torch.equal(predictive(ROWS, seed=3).log_likelihood, predictive(ROWS, seed=3).log_likelihood)


def test_draws_come_evenly_by_default(model):
    assert bae.Predictive(model, mixture(model))(ROWS, seed=0).log_likelihood.shape == (1, 33, 9)
    particles = Mixture([Particles(normal(model, seed).sample(2)) for seed in range(3)])
    predictive = bae.Predictive(model, particles)
    draws = predictive(ROWS, keep_outputs=True)
    assert draws.outputs.shape[1] == 6
    flat = Particles({name: torch.cat([one.atoms[name] for one in particles.components]) for name in particles.mean})
    expected, moments = bae.Predictive(model, flat).moments(ROWS), predictive.moments(ROWS)
    assert moments.is_exact
    for name in PARTS:
        assert_close(getattr(moments, name), getattr(expected, name), rtol=1e-10, atol=1e-12)


def with_noise(model, *scales):
    """Components that learned noise of these scales."""
    parts = []
    for seed, scale in enumerate(scales):
        noise = bae.likelihoods.Gaussian()
        noise.set_noise_var(scale**2)
        parts.append(replace(normal(model, seed), noise=noise.state_dict()))
    return parts


def test_every_component_has_the_noise_that_it_learned():
    model = small_model(bae.likelihoods.Gaussian())
    parts = with_noise(model, 0.1, 0.4)
    predictive = bae.Predictive(model, Mixture(parts))
    for moments in (predictive.moments(ROWS), predictive.moments(ROWS, n_weight_draws=4, seed=0)):
        assert_close(moments.noise, torch.full_like(ROWS, (0.01 + 0.16) / 2), rtol=1e-12, atol=0)
        assert bool(moments.log_prob(ROWS).isfinite().all())
    # the one likelihood of the moments reads mean and variance alone, so that it does not matter whose it is
    turned = bae.Predictive(model, Mixture(parts[::-1])).moments(ROWS)
    assert_close(turned.log_prob(ROWS), predictive.moments(ROWS).log_prob(ROWS), rtol=1e-12, atol=0)
    assert not model.likelihood.is_estimated
    draws = predictive(ROWS, n_weight_draws=4, seed=0)
    with bae.random.scope(0):
        for place, one in enumerate(parts):
            expected = bae.Predictive(model, one)._evaluate(one.sample(2), bae.Batch(ROWS), 1)
            assert_close(
                draws.log_likelihood[:, 2 * place : 2 * place + 2], expected.log_likelihood, rtol=1e-12, atol=0
            )


def test_outputs_of_several_noises_are_not_kept_under_one():
    """The draws' likelihood scores all of their outputs again, to what each component said of them."""
    model = small_model(bae.likelihoods.Gaussian())
    several = bae.Predictive(model, Mixture(with_noise(model, 0.1, 0.4, 0.4)))
    with pytest.raises(UnsupportedError, match="one likelihood.*in 2 of 3 pieces.*components one by one"):
        several(ROWS, n_weight_draws=6, seed=0, keep_outputs=True)
    with pytest.raises(UnsupportedError, match="one likelihood"):
        several.reduce(bae.ood.all_scores, ROWS, n_weight_draws=6, seed=0)
    assert several(ROWS, n_weight_draws=6, seed=0).outputs is None
    one = bae.Predictive(model, several.weights.components[1])
    for predictive, n in ((bae.Predictive(model, Mixture(with_noise(model, 0.4, 0.4))), 6), (several, 1), (one, 6)):
        draws = predictive(ROWS, n_weight_draws=n, seed=0, keep_outputs=True)
        assert_close(draws.likelihood.log_prob(draws.outputs, ROWS), draws.log_likelihood, rtol=1e-12, atol=0)
        found = bae.ood.contribution_draws(draws, ROWS)
        assert_close(found.mean.sum(1), -draws.log_likelihood.mean((0, 1)), rtol=1e-12, atol=0)


def test_draws_of_other_kinds_of_likelihood_are_not_joined(model):
    draws = bae.Predictive(model, normal(model, 0))(ROWS, n_weight_draws=2, seed=0, keep_outputs=True)
    for other in (bae.likelihoods.Bernoulli(), bae.likelihoods.Gaussian(0.4), object()):
        unlike = replace(draws, likelihood=other)
        with pytest.raises(UnsupportedError, match="in 1 of 2 pieces"):
            concatenate_weight_draws([draws, unlike])
        joined = concatenate_weight_draws([draws.without_outputs(), unlike.without_outputs()])
        assert joined.log_likelihood.shape == (1, 4, 9)


def test_a_mixture_of_mixtures_and_of_unlike_families(model):
    inner = mixture(model, 2)
    nested = bae.Predictive(model, Mixture([inner, inner])).moments(ROWS)
    for name in PARTS:
        assert_close(
            getattr(nested, name), getattr(bae.Predictive(model, inner).moments(ROWS), name), rtol=1e-12, atol=1e-14
        )
    unlike = Mixture([normal(model, 0), Particles(normal(model, 1).sample(2))])
    assert not bae.Predictive(model, unlike).is_linearised
    assert bae.Predictive(model, unlike).moments(ROWS, n_weight_draws=4, seed=0).mean.shape == ROWS.shape
    with pytest.raises(UnsupportedError, match="continuous posterior to linearise"):
        bae.Predictive(model, unlike, linearised=True)
    other = small_model(hidden=(6,))
    with pytest.raises(ParameterError):
        bae.Predictive(model, mixture(other))


def test_categories_draw(model):
    head = bae.likelihoods.Categorical(3)
    decoder = torch.nn.Sequential(bae.nets.mlp(2, [5], 21), torch.nn.Unflatten(1, (7, 3)))
    model = bae.Autoencoder(bae.nets.mlp(7, [5], 2), decoder, head).double().eval()
    x = (ROWS * 2.99).floor()
    moments = bae.Predictive(model, mixture(model)).moments(x, seed=0)
    assert not moments.is_exact and moments.mean.shape == (9, 7, 3)


def test_a_mixture_of_laplace_approximations_end_to_end(model):
    method = bae.weights.MixtureOf(bae.weights.Ensemble(3, epochs=2), bae.weights.Laplace("kronecker"))
    weights = bae.fit_weights(method, model, ROWS, seed=0)
    moments = bae.Predictive(model, weights).moments(ROWS)
    each = [bae.Predictive(model, one).moments(ROWS) for one in weights.components]
    assert moments.is_exact
    within = sum(one.weights for one in each) / 3
    assert bool((moments.weights > within).all())
    assert_close(moments.mean, sum(one.mean for one in each) / 3, rtol=1e-12, atol=1e-14)
