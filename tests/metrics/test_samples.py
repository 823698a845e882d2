"""Scores from draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics

F64 = {"dtype": torch.float64}


def rows(s=7, b=4, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(s, b, d, generator=generator, **F64), torch.randn(b, d, generator=generator, **F64)


@pytest.mark.parametrize("is_fair", [False, True])
def test_both_scores_are_loops_over_pairs(is_fair):
    draws, x = rows()
    n = len(draws)
    pairs = n * (n - 1) if is_fair else n * n
    for score, norm in ((metrics.crps_of_draws, torch.abs), (metrics.energy_score, lambda v: v.norm(dim=-1))):
        expected = sum(norm(one - x) for one in draws) / n
        expected = expected - sum(norm(one - other) for one in draws for other in draws) / (2 * pairs)
        assert_close(score(draws, x, is_fair=is_fair), expected)


def test_energy_score_of_one_number_is_the_ranked_probability_score():
    draws, x = rows(d=1)
    assert_close(metrics.energy_score(draws, x), metrics.crps_of_draws(draws, x)[:, 0])


@pytest.mark.parametrize("is_fair", [False, True])
def test_of_a_normal_law(is_fair):
    """Fair scores have the closed form as mean over draws; others are too large by E|X - X'| / (2 S)."""
    generator, n, s = torch.Generator().manual_seed(1), 20_000, 5
    draws = 0.3 + 0.7 * torch.randn(s, n, generator=generator, **F64)
    found = metrics.crps_of_draws(draws, torch.full((n,), 0.9, **F64), is_fair=is_fair)
    exact = metrics.gaussian_crps(*(torch.tensor(v, **F64) for v in (0.3, 0.49, 0.9)))
    excess = 0 if is_fair else 0.7 * 2 / math.sqrt(math.pi) / (2 * s)
    assert float(found.mean() - exact - excess) == pytest.approx(0, abs=4 * float(found.std()) / math.sqrt(n))


@pytest.mark.parametrize("score", [metrics.crps_of_draws, metrics.energy_score])
def test_single_precision_is_scored_in_double(score):
    draws, x = (1000 + 1e-2 * part.float() for part in rows(s=300))
    assert_close(score(draws, x), score(draws.double(), x.double()), rtol=1e-12, atol=0)


def test_a_single_draw_is_an_absolute_error():
    draws, x = rows(s=1)
    assert_close(metrics.crps_of_draws(draws, x), (draws[0] - x).abs())
    with pytest.raises(bae.errors.ShapeError, match="2 or more"):
        metrics.crps_of_draws(draws, x, is_fair=True)


def test_predictive_draws_have_the_moments():
    torch.manual_seed(0)
    model = bae.Autoencoder(bae.nets.mlp(3, [], 2), bae.nets.mlp(2, [], 3), bae.likelihoods.Gaussian(0.5))
    posterior = bae.families.Particles(bae.functional.stack_draws([bae.functional.parameters_of(model)] * 2000))
    x = torch.randn(2, 3)
    predictive = bae.Predictive(model, posterior)
    found, state = predictive(x, keep_outputs=True), torch.get_rng_state()
    draws = metrics.predictive_draws(found, seed=3)
    assert torch.equal(state, torch.get_rng_state()) and draws.shape == (2000, 2, 3)
    assert (draws.mean(0) - predictive.moments(x).mean).abs().max() < 4.5 * 0.5 / math.sqrt(2000)
    assert (draws.var(0) - 0.25).abs().max() < 4.5 * 0.25 * math.sqrt(2 / 2000)
    with pytest.raises(bae.errors.UnsupportedError, match="with outputs"):
        metrics.predictive_draws(predictive(x), seed=3)


def test_what_is_refused():
    draws, x = rows()
    with pytest.raises(bae.errors.ShapeError, match="draws"):
        metrics.energy_score(draws, x[:2])
    with pytest.raises(bae.errors.NonFiniteError, match="'x'"):
        metrics.crps_of_draws(draws, x * torch.nan)
