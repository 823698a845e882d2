"""What parameters follow: one gradient by hand, estimators of one gradient against one another."""

from __future__ import annotations

import math

import pytest
import torch

import bayesae as bae
from bayesae.codes.base import draws_of, noise
from bayesae.evaluation import gradient_snr
from bayesae.objectives import CIWAE, PIWAE, DReG, dreg, elbo, iwae, reweighted_wake_sleep
from bayesae.testing import LinearGaussian
from bayesae.training.options import Stepper

PATH = bae.codes.Amortised(gradient="path")
N_REPEATS = 20_000


def encoder_gradient(model, batch, objective, codes, n, seed=0):
    torch.manual_seed(seed)
    draws = codes(model.train().live(), batch, n_latent_draws=n)
    values = objective(draws)
    value = values if isinstance(values, torch.Tensor) else values["encoder"]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.mean(), list(model.encoder.parameters()))])


class TestStickingTheLanding:
    """Path gradients have no noise where q is the posterior."""

    @pytest.fixture
    def world(self):
        return LinearGaussian.make(n_data=5, correlation=0.8)

    @pytest.mark.parametrize("objective", [elbo, dreg, DReG(0.4), reweighted_wake_sleep])
    def test_the_exact_posterior_stays(self, world, objective):
        codes = bae.codes.Amortised("full", gradient="path")
        gradient = encoder_gradient(world.model("full"), world.batch, objective, codes, 4)
        assert float(gradient.abs().max()) < 1e-10
        total = encoder_gradient(world.model("full"), world.batch, elbo, bae.codes.Amortised("full"), 4)
        assert float(total.abs().max()) > 0.01

    def test_it_is_dreg_of_one_draw_and_of_a_whole_elbo(self, world):
        one, other = (encoder_gradient(world.model("diagonal"), world.batch, f, PATH, 1) for f in (elbo, dreg))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        one, other = (encoder_gradient(world.model("diagonal"), world.batch, f, PATH, 6) for f in (elbo, DReG(1.0)))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def wake_phase(model, batch, *, n_latent_draws):
    """Draws whose codes are constants, and whose log q is not: what the wake phase is written down for."""
    law = bae.codes.amortised.law(model, batch)
    latents = law.push(noise(model, batch, n_latent_draws, law.loc.shape[-1], law.loc)).detach()
    return draws_of(model, batch, latents, law.log_prob(latents))


def wake(draws):
    share = torch.softmax(draws.log_ratio.detach(), 0)
    return {"decoder": iwae(draws), "encoder": (share * draws.log_q).sum(0)}


class TestExpectations:
    """Of gradients of the encoder, over many repeats, in standard errors of their difference."""

    @pytest.fixture(scope="class")
    @staticmethod
    def model_and_rows():
        world = LinearGaussian.make(n_data=3, n_outputs=4, n_latents=2, correlation=0.6, noise_var=0.5)
        model = world.model("diagonal")
        with torch.no_grad():
            model.encoder[0].bias[0] += 0.4  # off the optimum, where means are not zero
        return model, world.x

    def z_scores(self, given, one, other):
        results = []
        for seed, (objective, codes) in enumerate((one, other)):
            options = {"codes": codes, "n_latent_draws": 5, "n_repeats": N_REPEATS, "seed": seed}
            results.append(gradient_snr(*given, objective, **options))
        first, second = results
        names = [name for name in first.mean if name.startswith("encoder.")]
        scores = [(first.mean[n] - second.mean[n]) / ((first.var[n] + second.var[n]) / N_REPEATS).sqrt() for n in names]
        return torch.cat([score.flatten() for score in scores]).abs(), results

    @pytest.mark.parametrize(("beta", "bound"), [(0.0, iwae), (0.3, CIWAE(0.3))])
    def test_dreg_has_the_mean_of_the_bounds_own_gradient(self, model_and_rows, beta, bound):
        scores, (own, doubly) = self.z_scores(model_and_rows, (bound, bae.codes.amortised), (DReG(beta), PATH))
        assert float(scores.max()) < 4
        assert float(doubly.pooled()["encoder"]) > 1.3 * float(own.pooled()["encoder"])
        decoders = [result.mean["decoder.0.weight"] for result in (own, doubly)]
        torch.testing.assert_close(*decoders, rtol=0.05, atol=0.05)

    def test_path_gradients_of_iwae_have_another_mean(self, model_and_rows):
        scores, _ = self.z_scores(model_and_rows, (iwae, bae.codes.amortised), (iwae, PATH))
        assert float(scores.max()) > 10

    def test_the_wake_phase_has_the_mean_of_its_score_form(self, model_and_rows):
        scores, (score, doubly) = self.z_scores(model_and_rows, (wake, wake_phase), (reweighted_wake_sleep, PATH))
        assert float(scores.max()) < 4
        assert float(doubly.pooled()["encoder"]) > 1.3 * float(score.pooled()["encoder"])


def test_the_wake_phase_rests_at_the_posteriors_marginal_variances():
    """The forward KL's optimum has variances S_jj, where the reverse has 1 / Lambda_jj."""
    world = LinearGaussian.make(n_data=3, n_outputs=4, n_latents=2, correlation=0.6, noise_var=0.5)
    model = world.model("diagonal")
    options = {"codes": PATH, "n_latent_draws": 2000, "n_repeats": 100, "seed": 0}

    def log_scale_gradient():
        result = gradient_snr(model, world.x, reweighted_wake_sleep, **options)
        return result.mean["encoder.0.bias"][1::2]

    at_reverse = log_scale_gradient()
    with torch.no_grad():
        model.encoder[0].bias[1::2] = 0.5 * world.covariance.diagonal().log()
    at_forward = log_scale_gradient()
    assert bool((at_reverse > 0.3).all())  # wider
    assert float(at_forward.abs().max()) < 0.01  # O(1 / K)


@pytest.mark.parametrize("objective", [PIWAE(2), PIWAE(3)])
def test_one_step_moves_each_group_along_its_own_bound(objective):
    world = LinearGaussian.make(n_data=5, correlation=0.8)
    model, n_draws, rate = world.model("diagonal").train(), 6, 0.01
    start = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    stepper = Stepper(model, optimiser, objective, bae.codes.amortised, n_draws, 5, "constant", None, None)
    torch.manual_seed(7)
    (value,) = stepper.step([world.batch], bae.IsotropicNormal(2.0), 0.0)

    # by hand: rows (B, D), codes (K, B, Z)
    leaf = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    torch.manual_seed(7)
    eps = torch.randn(n_draws, 1, 5, 3, dtype=torch.float64)[:, 0]
    parameters = (world.x @ leaf["encoder.0.weight"].mT + leaf["encoder.0.bias"]).reshape(5, 3, 2)
    q = torch.distributions.Normal(parameters[..., 0], parameters[..., 1].exp())
    z = q.loc + q.scale * eps
    p = torch.distributions.Normal(z @ leaf["decoder.0.weight"].mT + leaf["decoder.0.bias"], world.noise_var**0.5)
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    w = p.log_prob(world.x).sum(-1) + prior.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    tight = (torch.logsumexp(w, 0) - math.log(n_draws)).mean()
    size = n_draws // objective.n_groups
    loose = sum((torch.logsumexp(g, 0) - math.log(size)).mean() for g in w.split(size)) / objective.n_groups
    assert value == pytest.approx(float(tight.detach()))
    weights = sum((leaf[name] ** 2).sum() for name in leaf)
    for group, bound in (("decoder", tight), ("encoder", loose)):
        names = [name for name in leaf if name.startswith(group)]
        # a prior of precision 2 is worth -2 / 2 theta^2 / N a row
        gradients = torch.autograd.grad(bound - weights / 5, [leaf[name] for name in names], retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            moved = dict(model.named_parameters())[name]
            torch.testing.assert_close(moved, start[name] + rate * gradient, rtol=0, atol=1e-12)


def test_training_reports_the_decoders_bound():
    model = bae.Autoencoder(bae.nets.mlp(64, [8], (2, 2)), bae.nets.mlp(2, [8], 64), bae.likelihoods.Gaussian(0.3))
    seen = []

    def objective(draws):
        values = dreg(draws)
        seen.append(float(values["decoder"].detach().mean()))
        return values

    history = bae.fit_model(
        model, torch.rand(40, 64), objective=objective, codes=PATH, n_latent_draws=4, epochs=2, seed=0
    )
    assert history.train == pytest.approx(seen)
