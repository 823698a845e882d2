"""Every code posterior: conformance, exactness where its row says so, and under every kind of weight posterior."""

from __future__ import annotations

import pytest
import torch

import bayesae as bae
from bayesae.families import DiagonalNormal, Particles
from bayesae.functional import n_draws
from bayesae.testing import check_code_posterior
from tests.cases import CODE_CASES


@pytest.fixture
def x():
    return torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def n_latent_draws_of(case):
    return 1 if case.name.startswith("encode") else 3


@pytest.mark.parametrize("case", CODE_CASES, ids=str)
class TestCodePosterior:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_conforms(self, case, dtype, x):
        model = case.model(dtype=dtype)
        codes = case.build(2)
        bae.codes.modules_of(codes).to(dtype)
        check_code_posterior(codes, model, x.to(dtype), n_latent_draws=n_latent_draws_of(case))


@pytest.mark.parametrize("case", [case for case in CODE_CASES if case.exact is not None], ids=str)
def test_is_exact_when_its_row_says_so(case):
    world = case.exact()
    model, codes = world.model(case.exact_family), case.build(world.n_latents)
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    with bae.random.scope(0), torch.no_grad():
        draws = codes(model.at(params), world.batch, n_latent_draws=4)
    torch.testing.assert_close(draws.log_ratio, world.log_evidence().expand_as(draws.log_ratio), rtol=0, atol=1e-9)


def weight_posteriors(model):
    mean = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
    size = sum(leaf.numel() for leaf in mean.values())
    generator = torch.Generator().manual_seed(3)
    shifts = {k: 0.1 * torch.randn(4, *v.shape, generator=generator, dtype=v.dtype) for k, v in mean.items()}
    subset = bae.Subset.of(model.network)
    var = torch.full((size,), 0.01, dtype=torch.float64)
    return {
        "particles": (Particles({k: v + shifts[k] for k, v in mean.items()}), None),
        "sampled Normal": (DiagonalNormal(mean, var, subset), False),
        "linearised Normal": (DiagonalNormal(mean, var, subset), True),
    }


@pytest.mark.parametrize("weights", ["particles", "sampled Normal", "linearised Normal"])
@pytest.mark.parametrize("case", CODE_CASES, ids=str)
class TestComposition:
    """p(x | D) with codes and weights integrated out, any of the one under any of the other."""

    def test_the_law_of_total_variance_holds(self, case, weights, x):
        model, k = case.model(), n_latent_draws_of(case)
        posterior, is_linearised = weight_posteriors(model)[weights]
        predictive = bae.Predictive(model, posterior, codes=case.build(2), linearised=is_linearised)
        settings = {"n_weight_draws": 4, "n_latent_draws": k, "seed": 0}
        moments = predictive.moments(x, **settings)
        draws = predictive(x, **settings, keep_outputs=True)
        means = model.likelihood.mean(draws.outputs).flatten(0, 1)
        noise = model.likelihood.variance(draws.outputs).flatten(0, 1)
        torch.testing.assert_close(moments.mean, means.mean(0))
        torch.testing.assert_close(moments.total, means.var(0, correction=0) + noise.mean(0))
        by_weights = model.likelihood.mean(draws.outputs)
        torch.testing.assert_close(moments.code, by_weights.var(0, correction=0).mean(0))
        torch.testing.assert_close(moments.weights, by_weights.mean(0).var(0, correction=0))
        assert bool((moments.weights > 0).all())
        assert bool((moments.code > 0).all()) == (k > 1)

    def test_chunks_change_nothing_beyond_rounding(self, case, weights, x):
        model, k = case.model(), n_latent_draws_of(case)
        posterior, is_linearised = weight_posteriors(model)[weights]
        predictive = bae.Predictive(model, posterior, codes=case.build(2), linearised=is_linearised)
        one, other = (
            predictive(x, n_weight_draws=4, n_latent_draws=k, seed=0, chunk_size=size) for size in (None, 2 * k)
        )
        for name in ("latents", "log_likelihood", "log_prior"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)
        assert n_draws(posterior.sample(2)) == 2 and one.log_density().shape == (4, 5)
