"""Every weight method under every consumer, with a plain and a stochastic code; new rows enter by themselves."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.errors import UnsupportedError
from bayesae.imputation import MetropolisGibbs
from tests.cases import WEIGHT_CASES

SCALE = 0.3
CODES = ("deterministic", "stochastic")
# chains of a few steps say that they are short
pytestmark = pytest.mark.filterwarnings("ignore:(SGLD|SGHMC|SGNHT|HMC|MALA):RuntimeWarning")


def wants_a_plain_code(case):
    """What linearises the outputs in x, or asks for the log-joint twice, is fitted under the plain code."""
    return case.needs_all_rows or ("Laplace" in case.name and case.name != "OnlineLaplace")


def all_rows():
    return torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def options(case, code):
    size = len(all_rows()) if case.needs_all_rows else 4
    basic = {"batch_size": size, "seed": 3, "progress": False}
    if code == "deterministic" or wants_a_plain_code(case):
        return basic
    return basic | {"codes": bae.codes.amortised, "objective": bae.objectives.elbo}


@functools.cache
def predictive(case_name, code, patterns=("**",)):
    case = next(case for case in WEIGHT_CASES if case.name == case_name)
    torch.manual_seed(0)
    encoder = bae.nets.mlp(7, [4], 2 if code == "deterministic" else (2, 2))
    model = bae.Autoencoder(encoder, bae.nets.mlp(2, [4], 7), bae.likelihoods.Gaussian(SCALE)).double().eval()
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(any(part == "**" or name.startswith(part) for part in patterns))
    weights = bae.fit_weights(case.quick(), model, all_rows(), **options(case, code))
    codes = bae.codes.encode if code == "deterministic" else bae.codes.amortised
    return bae.Predictive(model, weights, codes, linearised=False)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
class TestEveryMethod:
    def test_moments_are_those_of_the_mixture_of_its_draws(self, case, code):
        served, x, n_codes = predictive(case.name, code), all_rows(), 1 if code == "deterministic" else 5
        moments = served.moments(x, n_latent_draws=n_codes, seed=4, n_weight_draws=6)
        draws = served(x, n_latent_draws=n_codes, seed=4, n_weight_draws=6, keep_outputs=True)
        means = draws.outputs  # (K, S, B, D), of a Gaussian the means themselves
        assert means.shape == (n_codes, 6, 9, 7)
        noise = torch.full((9, 7), float(served.model.likelihood.scale) ** 2, dtype=torch.float64)
        assert_close(moments.mean, means.mean((0, 1)), rtol=1e-9, atol=1e-12)
        assert_close(moments.noise, noise, rtol=1e-9, atol=1e-12)
        assert_close(moments.code, means.var(0, correction=0).mean(0), rtol=1e-8, atol=1e-12)
        assert_close(moments.weights, means.mean(0).var(0, correction=0), rtol=1e-8, atol=1e-12)
        spread = means.flatten(0, 1).var(0, correction=0)
        assert_close(moments.total, noise + spread, rtol=1e-8, atol=1e-12)
        assert (float(moments.weights.max()) > 1e-20) == case.moves  # noise of codes is common to the draws
        assert (float(moments.code.max()) > 1e-20) == (code == "stochastic")

    def test_scores_are_finite(self, case, code):
        served, x = predictive(case.name, code), all_rows()
        moments, draws = served.moments(x, seed=4), served(x, seed=4, n_latent_draws=CODES.index(code) + 1)
        scores = [
            bae.ood.negative_log_density(moments, x),
            bae.ood.weight_variance(moments),
            bae.ood.reconstruction_error(moments, x),
            bae.ood.negative_log_predictive(draws),
            bae.ood.waic(draws),
        ]
        if len(draws.log_density()) > 1:
            scores.append(bae.ood.disagreement(draws))
        for score in scores:
            assert score.shape == (9,) and bool(score.isfinite().all())

    @pytest.mark.slow
    @pytest.mark.parametrize("part", ["encoder", "decoder"])
    def test_on_one_of_the_networks(self, case, code, part):
        served = predictive(case.name, code, (part,))
        draws = served.weights.sample(3)
        for name, parameter in served.model.network.named_parameters():
            if not name.startswith(part):
                assert torch.equal(draws[name], parameter.detach().expand(3, *parameter.shape)), name
        assert bool(served.moments(all_rows(), seed=0).total.isfinite().all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_fills_in_what_is_missing(case):
    x = all_rows()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 2:4] = False
    options = {"method": MetropolisGibbs(1, 4, 1), "n_draws": 6, "n_weight_draws": 2, "seed": 0}
    filled = bae.impute(predictive(case.name, "stochastic"), x, mask, **options)
    assert filled.draws.shape == (6, 9, 7) and bool(filled.draws.isfinite().all())
    assert_close(filled.draws[:, mask], x[mask].expand(6, -1), rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in WEIGHT_CASES if wants_a_plain_code(case)], ids=str)
def test_what_wants_a_plain_code_says_so(case):
    model = predictive(case.name, "stochastic").model
    with pytest.raises(UnsupportedError, match="codes=codes.encode"):
        bae.fit_weights(
            case.quick(), model, all_rows(), codes=bae.codes.amortised, objective=bae.objectives.elbo, batch_size=9
        )
