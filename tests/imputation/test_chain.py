"""Imputation by a Markov chain, against the conditional Normal of probabilistic PCA."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.imputation import impute_by_chain
from bayesae.testing import LinearGaussian

MISSING = [1, 3, 4]
OBSERVED = [0, 2]


def world():
    return LinearGaussian.make(seed=7, n_outputs=5, n_latents=2, noise_var=1.0, correlation=0.9)


def predictive_of(model, codes):
    return bae.Predictive(model, bae.families.Particles(bae.functional.stack_draws([leaves_of(model)])), codes=codes)


def leaves_of(model):
    return bae.functional.parameters_of(model.network)


def conditional(world, x):
    """Mean and variance of the missing entries of one row given the others."""
    joint = world.weight @ world.weight.T + world.noise_var * torch.eye(5, dtype=torch.float64)
    gain = torch.linalg.solve(joint[OBSERVED][:, OBSERVED], joint[OBSERVED][:, MISSING]).T
    mean = world.bias[MISSING] + gain @ (x - world.bias)[OBSERVED]
    return mean, (joint[MISSING][:, MISSING] - gain @ joint[OBSERVED][:, MISSING]).diagonal()


def ratios(family, metropolis, seed, n_rows=1500, **kwargs):
    """Variance of the imputations over that of the truth, shift of their mean in its deviations, acceptance."""
    made = world()
    x = made.x[:1].expand(n_rows, 5)  # as many chains
    mask = torch.zeros(n_rows, 5, dtype=torch.bool)
    mask[:, OBSERVED] = True
    predictive = predictive_of(made.model(family), bae.codes.Amortised(family))
    settings = {"n_steps": 400, "n_burn_in": 100, "thinning": 4, "metropolis": metropolis} | kwargs
    found = impute_by_chain(predictive, x, mask, seed=seed, **settings)
    drawn = found.draws[:, 0, :, MISSING]
    mean, var = conditional(made, x[0])
    return ((drawn - mean) ** 2).mean((0, 1)) / var, (drawn.mean((0, 1)) - mean) / var.sqrt(), found.acceptance.mean()


def stationary_ratios(made):
    """Of the plain chain under the best diagonal q, in closed form: codes are z' = A z + noise of covariance V.

    A = G W over the missing entries, with G the gain of the posterior mean; V = v G G^T + diag(1 / precision).
    """
    gain = (made.covariance @ made.weight.T / made.noise_var)[:, MISSING]
    step, weight = gain @ made.weight[MISSING], made.weight[MISSING]
    noise = made.noise_var * gain @ gain.T + torch.diag(1 / made.precision.diagonal())
    codes = torch.linalg.solve(torch.eye(4).double() - torch.kron(step, step), noise.flatten()).reshape(2, 2)
    return ((weight @ codes @ weight.T).diagonal() + made.noise_var) / conditional(made, made.x[0])[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
class TestVariances:
    """The table of biases: exact q, mean-field q, and its repair."""

    def test_of_an_exact_q_are_those_of_the_conditional_normal(self, seed):
        ratio, shift, _ = ratios("full", False, seed)
        assert bool(((ratio - 1).abs() < 0.03).all()) and bool((shift.abs() < 0.02).all())

    def test_of_a_mean_field_q_are_too_wide_as_the_algebra_says(self, seed):
        ratio, shift, _ = ratios("diagonal", False, seed)
        assert bool((ratio > 1.05).all()) and bool((shift.abs() < 0.02).all())
        assert_close(ratio, stationary_ratios(world()), rtol=0.03, atol=0)

    def test_of_a_mean_field_q_are_repaired_by_metropolis(self, seed):
        ratio, shift, acceptance = ratios("diagonal", True, seed)
        assert bool(((ratio - 1).abs() < 0.03).all()) and bool((shift.abs() < 0.02).all())
        assert 0.2 < float(acceptance) < 0.9


def test_a_few_steps_already_tell_them_apart():
    settings = {"n_rows": 600, "n_steps": 60, "n_burn_in": 40}
    assert bool(((ratios("full", True, 0, **settings)[0] - 1).abs() < 0.1).all())
    assert float(ratios("diagonal", False, 0, **settings)[0].mean()) > 1.15


class TestTheChain:
    def small(self, **kwargs):
        made = world()
        x, mask = made.x[:6].clone(), torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[0], mask[1] = True, False  # nothing and everything missing
        x[~mask] = torch.nan
        settings = {"n_steps": 7, "n_burn_in": 2, "n_chains": 3, "seed": 0} | kwargs
        return impute_by_chain(predictive_of(made.model("diagonal"), bae.codes.amortised), x, mask, **settings), x, mask

    def test_keeps_what_was_observed(self):
        found, x, mask = self.small(thinning=3)
        assert found.draws.shape == (3, 3, 6, 5) and found.acceptance.shape == (3, 6)
        assert_close(found.draws[:, :, mask], x[mask].expand(3, 3, -1), rtol=0, atol=0)
        assert bool(found.draws.isfinite().all()) and bool((found.draws[0, 0] != found.draws[1, 0])[~mask].all())
        assert_close(found.mean, found.draws.flatten(0, 1).mean(0))
        assert_close(found.variance[mask], torch.zeros_like(found.variance[mask]), rtol=0, atol=1e-20)
        assert bool((found.variance[~mask] > 0).all())

    def test_a_seed_gives_the_same_and_leaves_the_generator(self):
        state = torch.get_rng_state()
        first, second, other = self.small(), self.small(), self.small(seed=1)
        assert torch.equal(first[0].draws, second[0].draws)
        assert not torch.equal(first[0].draws, other[0].draws)
        assert torch.equal(state, torch.get_rng_state())

    def test_what_is_missing_does_not_matter(self):
        made, mask = world(), torch.rand(6, 5) < 0.5
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
        found = [
            impute_by_chain(predictive, torch.where(mask, made.x[:6], filler), mask, n_steps=3, seed=0).draws
            for filler in (0.0, 1e6, torch.nan)
        ]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

    def test_an_exact_q_is_always_taken_and_a_plain_chain_takes_all(self):
        made = world()
        mask = torch.rand(6, 5) < 0.5
        full = predictive_of(made.model("full"), bae.codes.Amortised("full"))
        assert_close(impute_by_chain(full, made.x[:6], mask, n_steps=20, seed=0).acceptance, torch.ones(1, 6))
        found = self.small(metropolis=False)[0]
        assert_close(found.acceptance, torch.ones(3, 6)) and bool((self.small()[0].acceptance < 1).any())

    def test_chains_have_weights_of_their_own(self):
        made = world()
        model = made.model("full")
        leaves, other = leaves_of(model), leaves_of(model)
        other["decoder.0.bias"] = other["decoder.0.bias"] + 100
        particles = bae.families.Particles(bae.functional.stack_draws([leaves, other]))
        predictive = bae.Predictive(model, particles, codes=bae.codes.Amortised("full"))
        mask = torch.tensor([[True, False, True, False, False]]).expand(6, 5)
        found = impute_by_chain(
            predictive, made.x[:6], mask, n_steps=3, n_burn_in=0, n_chains=2, metropolis=False, seed=0
        )
        assert float(found.draws[:, 1][..., MISSING].mean() - found.draws[:, 0][..., MISSING].mean()) > 50

    @pytest.mark.parametrize(
        "likelihood",
        [bae.likelihoods.Bernoulli(), bae.likelihoods.Poisson(), bae.likelihoods.Categorical(3)],
        ids=lambda head: type(head).__name__,
    )
    def test_completions_are_data_of_the_likelihood(self, likelihood):
        torch.manual_seed(0)
        g = 3 if isinstance(likelihood, bae.likelihoods.Categorical) else 1
        model = bae.Autoencoder(
            bae.nets.mlp(5, [4], (2, 3)),
            bae.nets.deep_latent_decoder((1, 1), [4], (5, 3) if g == 3 else 5),
            likelihood,
        ).eval()
        codes = bae.codes.Amortised("rank_one", layers=(1, 1))
        mask = torch.rand(6, 5) < 0.5
        found = impute_by_chain(predictive_of(model, codes), torch.ones(6, 5), mask, n_steps=20, n_chains=2, seed=0)
        likelihood.check(found.draws.flatten(0, 2))
        assert bool((found.variance[~mask] > 0).any())


class TestErrors:
    def test_what_it_cannot_do(self):
        made = world()
        mask = torch.ones(40, 5, dtype=torch.bool)
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
        with pytest.raises(bae.errors.DataError, match="a mask that says"):
            impute_by_chain(predictive, made.x)
        with pytest.raises(bae.errors.DataError, match="n_steps"):
            impute_by_chain(predictive, made.x, mask, n_steps=0)
        with pytest.raises(bae.errors.DataError, match="n_burn_in"):
            impute_by_chain(predictive, made.x, mask, n_burn_in=-1)
        with pytest.raises(bae.errors.UnsupportedError, match="explain themselves"):
            impute_by_chain(predictive, bae.Batch(made.x, mask, target=made.x))
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
            impute_by_chain(predictive_of(made.model("location"), None), made.x, mask)
        laplace = bae.fit_weights(bae.weights.Laplace(), made.model("location"), made.x, progress=False)
        with pytest.raises(bae.errors.UnsupportedError, match="a linearised predictive"):
            impute_by_chain(bae.Predictive(made.model("location"), laplace), made.x, mask)


def test_components_of_a_mixture_complete_with_their_own_noise():
    made = world()
    model = made.model("full")
    subset, mean = bae.Subset.of(model.network), leaves_of(model)
    parts = []
    for scale in (1e-6, 1e3):
        noise = bae.likelihoods.Gaussian(scale).double().state_dict()
        zeros = torch.zeros(len(subset), dtype=torch.float64)
        parts.append(bae.families.DiagonalNormal(mean, zeros, subset, noise=noise))
    predictive = bae.Predictive(model, bae.families.Mixture(parts), codes=bae.codes.Amortised("full"))
    mask = torch.zeros(40, 5, dtype=torch.bool)
    mask[:, OBSERVED] = True
    found = impute_by_chain(predictive, made.x[:1].expand(40, 5), mask, n_steps=1, n_chains=2, seed=0)
    spread = found.draws[..., MISSING].std(2).amax((0, 2))
    assert float(spread[0]) < 20 < 300 < float(spread[1])
    with pytest.raises(bae.errors.UnsupportedError, match="one noise for all draws"):
        bae.evaluation.inference_gaps(predictive, made.x[:4], made.x[:4], n_latent_draws=2)
