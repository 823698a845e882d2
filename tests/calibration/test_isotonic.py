"""Isotonic recalibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch.testing import assert_close

import bayesae as bae
from bayesae.calibration import Isotonic
from tests.calibration.worlds import F64, moments_of, normal, part_of


def skewed(n, seed=0):
    """Standardised errors of one skew law, scaled by the predicted deviation."""
    moments, _ = normal(n)
    noise = torch.empty(moments.mean.shape, **F64).exponential_(generator=torch.Generator().manual_seed(seed)) - 0.4
    return moments, moments.mean + moments.total.sqrt() * noise


def test_quantiles_of_a_skew_law():
    moments, x = skewed(20_000)
    fitted = Isotonic().fit(part_of(moments, slice(0, 10_000)), x[:10_000])
    rest, n = part_of(moments, slice(10_000, None)), x[10_000:].numel()
    for level in (0.05, 0.25, 0.5, 0.9, 0.975):
        exact = -math.log1p(-level) - 0.4
        found = ((fitted.quantile(rest, level) - rest.mean) / rest.total.sqrt()).flatten()[0]
        spread = math.sqrt(level * (1 - level) / n) / (1 - level)  # density at the quantile is 1 - level
        assert abs(float(found) - exact) < 4 * spread
        share = float((x[10_000:] <= fitted.quantile(rest, level)).double().mean())
        assert abs(share - level) < 4 * math.sqrt(2 * level * (1 - level) / n)


def test_is_scikit_learns_isotonic_regression():
    moments, x = skewed(40)
    levels = torch.special.ndtr((x - moments.mean) / moments.total.sqrt()).flatten().sort().values.numpy()
    shares = np.arange(1, len(levels) + 1) / len(levels)
    regression = IsotonicRegression(out_of_bounds="clip").fit(levels, shares)
    assert np.allclose(regression.predict(levels), shares)  # they rise: nothing is pooled
    fitted = Isotonic().fit(moments, x)
    for level in (0.1, 0.5, 0.9):
        z = (fitted.quantile(moments, level) - moments.mean) / moments.total.sqrt()
        back = regression.predict(torch.special.ndtr(z).flatten()[:1].numpy())
        assert abs(float(back[0]) - level) <= 2 / len(levels)


def test_order_statistics_stand_at_their_ranks():
    x = torch.tensor([[3.0], [1.0], [2.0], [4.0]], **F64)
    moments = moments_of(torch.zeros_like(x), torch.full_like(x, 4.0))
    fitted = Isotonic().fit(moments, x)
    for level, value in ((0.2, 1.0), (0.3, 1.5), (0.4, 2.0), (0.8, 4.0)):
        assert_close(fitted.quantile(moments, level), torch.full_like(x, value))
    with pytest.raises(bae.errors.DataError, match="9 calibration values for the quantile 0.9"):
        fitted.quantile(moments, 0.9)


def test_a_calibrated_predictive_stays():
    moments, x = normal(40_000)
    ratio = Isotonic().fit(moments, x)(moments).total / moments.total
    assert abs(float(ratio.mean()) - 1) < 0.02
