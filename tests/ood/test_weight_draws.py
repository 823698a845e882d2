"""Scores that are compared come from the same weight draws: what a seed each does to a guarantee, in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import bayesae as bae

F64 = {"dtype": torch.float64}


def code_scores(weights, n):
    """`code_variance` of n rows x ~ N(0, 1) whose codes are theta_s x: x² times the variance of the weights (S,)."""
    latents = weights[:, None] * torch.randn(n, **F64)
    values = torch.zeros(1, *latents.shape, **F64)
    return bae.ood.code_variance(bae.Draws(latents[None, ..., None], values, values, None, None))


@pytest.mark.parametrize("shares_draws", [True, False], ids=["one seed", "a seed each"])
def test_rates_hold_for_scores_of_the_same_weight_draws(shares_draws):
    """Of 8 draws each, the ratio of two calls' variances is F(7, 7) distributed: the law of alarms in closed form."""
    n, n_worlds, alarms = 99, 1500, {1: 0, 5: 0}
    ratio = np.ones((1, 1)) if shares_draws else stats.f.ppf((np.arange(300) + 0.5) / 300, 7, 7)[:, None]
    square = stats.chi2.isf((np.arange(300) + 0.5) / 300, 1)
    for _ in range(n_worlds):
        weights = torch.randn(8, **F64)
        calibration = code_scores(weights, n)
        new = code_scores(weights if shares_draws else torch.randn(8, **F64), 1)
        p = float(bae.ood.ConformalCalibration.fit(calibration).p_values(new))
        for k in alarms:
            alarms[k] += p <= k / 100
            assert (float(new) > bae.ood.threshold(calibration, k / 100)) == (p <= k / 100)
    for k, count in alarms.items():
        rate = stats.binom.cdf(k - 1, n, stats.chi2.sf(square * ratio, 1)).mean()
        assert rate == pytest.approx(k / 100, abs=1e-4) if shares_draws else {1: 3, 5: 1.7}[k] * k < 100 * rate < 4 * k
        low, high = stats.binom.ppf([0.005, 0.995], n_worlds, rate)
        assert low <= count <= high


def test_one_run_of_a_hundred_takes_nearly_half_of_familiar_rows_as_strange():
    """What the module says of a seed each: the rate given the draws, at 5 % and many calibration rows."""
    assert stats.chi2.sf(stats.chi2.isf(0.05, 1) * stats.f.ppf(0.01, 7, 7), 1) > 0.4


def test_one_seed_gives_calls_the_weight_draws_of_one_call(model, rows):
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(), model, rows))
    whole = bae.ood.code_variance(predictive(rows, n_weight_draws=8, seed=3))
    calls = [bae.ood.code_variance(predictive(part, n_weight_draws=8, seed=3)) for part in rows.split(4)]
    assert_close(torch.cat(calls), whole, rtol=1e-10, atol=0)
    other = bae.ood.code_variance(predictive(rows[4:], n_weight_draws=8, seed=4))
    assert not torch.allclose(other, whole[4:], rtol=1e-2)
