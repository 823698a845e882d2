"""The chain between codes and completions, against what it converges to with a q that is not the posterior."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.imputation import MetropolisGibbs, PseudoGibbs
from tests.imputation.worlds import MISSING, conditional, leaves_of, mask_of, predictive_of, world

pytestmark = pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")


def ratios(family, method, seed, n_rows=1500):
    """Variance of the imputations over that of the truth, shift of their mean in its deviations, acceptance."""
    made = world()
    x = made.x[:1].expand(n_rows, 5)  # as many chains
    predictive = predictive_of(made.model(family), bae.codes.Amortised(family))
    n_draws = method.n_steps // 4
    found = bae.impute(predictive, x, mask_of(n_rows), method=method, n_draws=n_draws, seed=seed)
    mean, cov = conditional(made, x[:1])
    shifts, var = found.draws[..., MISSING] - mean[0], cov.diagonal()
    return (shifts**2).mean((0, 1)) / var, shifts.mean((0, 1)) / var.sqrt(), found.acceptance.mean()


def stationary_ratios(made):
    """Of the plain chain under the best diagonal q, in closed form: codes are z' = A z + noise of covariance V.

    A = G W over the missing entries, with G the gain of the posterior mean; V = v G G^T + diag(1 / precision).
    """
    gain = (made.covariance @ made.weight.T / made.noise_var)[:, MISSING]
    step, weight = gain @ made.weight[MISSING], made.weight[MISSING]
    noise = made.noise_var * gain @ gain.T + torch.diag(1 / made.precision.diagonal())
    codes = torch.linalg.solve(torch.eye(4).double() - torch.kron(step, step), noise.flatten()).reshape(2, 2)
    return ((weight @ codes @ weight.T).diagonal() + made.noise_var) / conditional(made, made.x)[1].diagonal()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
class TestVariances:
    """The table of biases: exact q, mean-field q, and its repair."""

    def test_of_an_exact_q_are_those_of_the_conditional_normal(self, seed):
        ratio, shift, _ = ratios("full", PseudoGibbs(100, 400, 1), seed)
        assert bool(((ratio - 1).abs() < 0.03).all()) and bool((shift.abs() < 0.02).all())

    def test_of_a_mean_field_q_are_too_wide_as_the_algebra_says(self, seed):
        ratio, shift, _ = ratios("diagonal", PseudoGibbs(100, 400, 1), seed)
        assert bool((ratio > 1.05).all()) and bool((shift.abs() < 0.02).all())
        assert_close(ratio, stationary_ratios(world()), rtol=0.03, atol=0)

    def test_of_a_mean_field_q_are_repaired_by_metropolis(self, seed):
        ratio, shift, acceptance = ratios("diagonal", MetropolisGibbs(100, 400, 1), seed)
        assert bool(((ratio - 1).abs() < 0.03).all()) and bool((shift.abs() < 0.02).all())
        assert 0.2 < float(acceptance) < 0.9


def test_a_few_steps_already_tell_them_apart():
    assert bool(((ratios("full", MetropolisGibbs(40, 60, 1), 0, 600)[0] - 1).abs() < 0.1).all())
    assert float(ratios("diagonal", PseudoGibbs(40, 60, 1), 0, 600)[0].mean()) > 1.15


class TestTheChain:
    def test_an_exact_q_is_always_taken_and_a_plain_chain_takes_all(self):
        made, mask = world(), mask_of(6)
        full = predictive_of(made.model("full"), bae.codes.Amortised("full"))
        diagonal = predictive_of(made.model("diagonal"), bae.codes.amortised)
        cases = ((full, MetropolisGibbs(3, 40)), (diagonal, PseudoGibbs(3, 40)), (diagonal, MetropolisGibbs(3, 40)))
        shares = [
            bae.impute(predictive, made.x[:6], mask, method=method, n_draws=4, seed=0).acceptance
            for predictive, method in cases
        ]
        assert_close(shares[0], torch.ones(6), rtol=0, atol=1e-6)
        assert_close(shares[1], torch.ones(6), rtol=0, atol=1e-6)
        assert bool((shares[2] < 1).all()) and bool((shares[2] > 0.1).all())

    def test_acceptance_is_that_of_the_steps_after_the_burn_in(self):
        """Of one step and one chain it is 0 or 1, whatever was taken before."""
        made = world()
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
        method = MetropolisGibbs(20, 4, 1)
        found = bae.impute(predictive, made.x, mask_of(40), method=method, n_draws=1, seed=0)
        steps = 4 * found.acceptance
        assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        assert 0 <= float(steps.min()) < float(steps.max()) <= 4

    def test_a_seed_gives_the_same_and_another_others(self):
        made = world()
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
        options = {"method": MetropolisGibbs(2, 8), "n_draws": 3}
        first, second, other = (
            bae.impute(predictive, made.x[:6], mask_of(6), seed=seed, **options).draws for seed in (0, 0, 1)
        )
        assert torch.equal(first, second) and not torch.equal(first, other)

    @pytest.mark.parametrize(
        "likelihood",
        [bae.likelihoods.Bernoulli(), bae.likelihoods.Poisson(), bae.likelihoods.Categorical(3)],
        ids=lambda head: type(head).__name__,
    )
    def test_of_deep_codes_completes_with_data_of_the_likelihood(self, likelihood):
        torch.manual_seed(0)
        shape = (5, 3) if isinstance(likelihood, bae.likelihoods.Categorical) else 5
        decoder = bae.nets.deep_latent_decoder((1, 1), [4], shape)
        model = bae.Autoencoder(bae.nets.mlp(5, [4], (2, 3)), decoder, likelihood).eval()
        codes = bae.codes.Amortised("rank_one", layers=(1, 1))
        mask = torch.rand(6, 5) < 0.5
        mask[:, 0], mask[:, 1] = True, False
        weights = bae.families.Particles(bae.functional.stack_draws([bae.functional.parameters_of(model.network)]))
        predictive = bae.Predictive(model, weights, codes=codes)
        found = bae.impute(predictive, torch.ones(6, 5), mask, method=MetropolisGibbs(5, 20), n_draws=20, seed=0)
        likelihood.check(found.draws.flatten(0, 1))
        assert bool((found.draws.var(0)[~mask] > 0).any())


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
    options = {"method": MetropolisGibbs(0, 4, 1), "n_draws": 2, "n_weight_draws": 2, "seed": 0}
    found = bae.impute(predictive, made.x[:1].expand(40, 5), mask_of(40), **options)
    spread = found.draws[..., MISSING].std(1).amax(1)
    assert float(spread[0]) < 20 < 300 < float(spread[1])
    with pytest.raises(bae.errors.UnsupportedError, match="one noise for all draws"):
        bae.evaluation.inference_gaps(predictive, made.x[:4], made.x[:4], n_latent_draws=2)
