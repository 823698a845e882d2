from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics

F64 = {"dtype": torch.float64}


def two_gaussians(shift, n=40_000):
    torch.manual_seed(0)
    return torch.randn(n), torch.randn(n) + shift


def test_auroc_of_two_unit_gaussians():
    shift = 1.3
    exact = float(torch.special.ndtr(torch.tensor(shift / math.sqrt(2))))
    assert metrics.auroc(*two_gaussians(shift)) == pytest.approx(exact, abs=4.5 * 0.5 / math.sqrt(40_000))


def test_auroc_is_higher_for_stranger_and_counts_ties_half():
    assert metrics.auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1
    assert metrics.auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 0
    assert metrics.auroc(torch.ones(5), torch.ones(3)) == 0.5


def test_aupr_by_hand():
    # strange at ranks 1 and 3 from the top: (1/1 + 2/3) / 2
    assert metrics.aupr(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)


def test_fpr_at_tpr_equals_a_loop_over_thresholds():
    familiar, strange = two_gaussians(1.0, 500)
    best = min(float((familiar >= t).double().mean()) for t in strange if float((strange >= t).double().mean()) >= 0.95)
    assert metrics.fpr_at_tpr(familiar, strange) == pytest.approx(best)


def test_bootstrap_covers_the_truth_and_leaves_the_generator():
    exact = float(torch.special.ndtr(torch.tensor(0.8 / math.sqrt(2))))
    state, hits = torch.get_rng_state(), 0
    generator = torch.Generator().manual_seed(7)
    for trial in range(30):
        a = torch.randn(120, generator=generator)
        b = torch.randn(120, generator=generator) + 0.8
        interval = metrics.bootstrap_interval(metrics.auroc, a, b, seed=trial, n_resamples=60)
        hits += interval.low <= exact <= interval.high
    assert hits >= 24  # of 30 at 95 %: fewer has probability 6e-4
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bad", [(torch.zeros(0), torch.ones(2)), (torch.tensor([torch.nan]), torch.ones(2))])
def test_bad_scores(bad):
    with pytest.raises(bae.errors.BayesAEError, match="scores"):
        metrics.auroc(*bad)


def test_nll_is_the_normal_density():
    mean, var, x = torch.randn(5, **F64), torch.rand(5, **F64) + 0.1, torch.randn(5, **F64)
    assert_close(metrics.gaussian_nll(mean, var, x), -torch.distributions.Normal(mean, var.sqrt()).log_prob(x))


def test_crps_is_its_integral():
    mean, var, x = 0.3, 0.49, 1.1
    grid = np.linspace(-12, 12, 200_001)
    cdf = torch.special.ndtr(torch.as_tensor((grid - mean) / math.sqrt(var))).numpy()
    integral = np.trapezoid((cdf - (grid >= x)) ** 2, grid)
    got = metrics.gaussian_crps(*(torch.tensor(v, **F64) for v in (mean, var, x)))
    assert float(got) == pytest.approx(integral, rel=1e-4)


def test_calibration_of_a_calibrated_predictive_and_of_two_that_are_not():
    torch.manual_seed(0)
    mean, x = torch.zeros(200_000, **F64), torch.randn(200_000, **F64)
    good = metrics.quantile_calibration(mean, torch.ones_like(x), x)
    assert good.error < 4.5 * 0.5 / math.sqrt(200_000)
    assert_close(good.levels, torch.arange(1, 20, **F64) / 20)
    wide = metrics.quantile_calibration(mean, torch.full_like(x, 1e8), x).error
    narrow = metrics.quantile_calibration(mean, torch.full_like(x, 1e-8), x).error
    assert wide == pytest.approx(float((good.levels - 0.5).abs().clamp(max=1).mean()), abs=0.03)
    assert narrow == pytest.approx(wide, abs=0.01) and narrow > 0.2


def test_sharpness():
    assert metrics.sharpness(torch.tensor([1.0, 7.0])) == pytest.approx(2.0)


def test_a_share_is_a_share():
    with pytest.raises(bae.errors.DataError, match=r"tpr=95"):
        metrics.fpr_at_tpr(torch.zeros(2), torch.ones(2), tpr=95)


def test_calibration_of_nonsense_is_refused():
    with pytest.raises(bae.errors.NonFiniteError, match="standardised errors"):
        metrics.quantile_calibration(torch.full((3,), torch.nan), torch.ones(3), torch.zeros(3))
