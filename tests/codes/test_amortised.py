"""Normal code posteriors on probabilistic PCA, where everything is known."""

from __future__ import annotations

import math

import pytest
import torch

import bayesae as bae
from bayesae.testing import LinearGaussian


@pytest.fixture
def world():
    return LinearGaussian.make(correlation=0.8)


def params_of(model):
    return {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}


def draws_of(model, codes, batch, n, seed=0):
    with bae.random.scope(seed), torch.no_grad():
        return codes(model.at(params_of(model)), batch, n_latent_draws=n)


class TestExactPosterior:
    def test_every_log_ratio_is_the_log_evidence(self, world):
        draws = draws_of(world.model("full"), bae.codes.Amortised("full"), world.batch, 5)
        expected = world.log_evidence().expand(5, 1, -1)
        torch.testing.assert_close(draws.log_ratio, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(bae.objectives.iwae(draws), expected[0], rtol=0, atol=1e-9)

    def test_the_closed_form_kl_gives_the_elbo(self, world):
        model = world.model("full")
        law = bae.codes.Amortised("full").law(model.at(params_of(model)), world.batch)
        mean, cov = law.loc[0], law.covariance()[0]
        torch.testing.assert_close(mean, world.posterior_mean(), rtol=0, atol=1e-12)
        torch.testing.assert_close(cov, world.covariance.expand_as(cov), rtol=0, atol=1e-12)
        residual = world.x - mean @ world.weight.mT - world.bias
        trace = torch.trace(world.weight @ world.covariance @ world.weight.mT)
        expected = -0.5 * ((residual**2).sum(1) + trace) / world.noise_var
        n = len(world.bias)
        expected = expected - 0.5 * n * math.log(2 * math.pi * world.noise_var) - law.kl()[0].sum(-1)
        torch.testing.assert_close(expected, world.log_evidence(), rtol=0, atol=1e-9)


def test_the_best_diagonal_normal_leaves_the_mean_field_gap(world):
    draws = draws_of(world.model("diagonal"), bae.codes.amortised, world.batch, 4000)
    gap = world.log_evidence() - draws.log_ratio.mean(0)[0]
    error = draws.log_ratio.std(0)[0] / 4000**0.5
    assert world.mean_field_gap > 0.3
    assert bool(((gap - world.mean_field_gap).abs() < 4.5 * error).all())


def test_the_plain_code_of_a_variational_encoder_is_its_location(world):
    model = world.model("diagonal")
    draws = draws_of(model, bae.codes.encode, world.batch, 1)
    torch.testing.assert_close(draws.latents[0, 0], world.posterior_mean())
    torch.testing.assert_close(model(world.x), draws.outputs[0, 0])
    torch.testing.assert_close(model.network(world.x), draws.outputs[0, 0])


def test_path_gradients_leave_the_density_of_fixed_parameters(world):
    """The score part of an ELBO's gradient, absent from "path", has mean 0 and is not 0."""
    model = world.model("diagonal").train()
    gradients = {}
    for gradient in ("total", "path"):
        torch.manual_seed(3)
        draws = bae.codes.Amortised(gradient=gradient)(model.live(), world.batch, n_latent_draws=2)
        assert draws.is_path_gradient == (gradient == "path")
        (gradients[gradient],) = torch.autograd.grad(draws.log_ratio.mean(0).sum(), model.encoder[0].bias)
    assert not torch.allclose(gradients["total"], gradients["path"])


class TestErrors:
    def test_unknown_choices(self):
        with pytest.raises(bae.errors.UnsupportedError, match="family, one of"):
            bae.codes.Amortised("round")
        with pytest.raises(bae.errors.UnsupportedError, match="gradient, one of"):
            bae.codes.Amortised(gradient="none")

    def test_an_encoder_without_scales(self, model, rows):
        with pytest.raises(bae.errors.ShapeError, match="2 numbers for each of 2 code dimensions"):
            draws_of(model, bae.codes.amortised, bae.Batch(rows), 1)
