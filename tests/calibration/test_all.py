"""What every recalibration keeps: laws, purity, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import calibration
from tests.calibration.worlds import moments_of, normal, part_of

ALL = [
    calibration.VarianceScaling(),
    calibration.VarianceScaling("pixel"),
    calibration.Temperature(),
    calibration.Isotonic(),
    calibration.SplitConformal(),
    calibration.SplitConformal("position"),
    calibration.SplitConformal("image"),
]


@pytest.mark.parametrize("method", ALL, ids=str)
class TestRecalibration:
    def test_parts_add_up_and_the_mean_stays(self, method):
        moments, x = normal(factors=(2, 1, 3))
        before = {name: getattr(moments, name).clone() for name in ("mean", "noise", "code", "weights")}
        fitted = method.fit(moments, x)
        found = fitted(moments)
        assert isinstance(method, calibration.Recalibration) and isinstance(fitted, calibration.Recalibrated)
        assert_close(found.mean, moments.mean)
        for name, value in before.items():
            assert torch.equal(getattr(moments, name), value)
        low, high = fitted.interval(moments, math.erf(1 / math.sqrt(2)))
        assert_close(found.total, ((high - low) / 2) ** 2)

    def test_intervals_are_nested_quantiles(self, method):
        moments, x = normal()
        fitted = method.fit(moments, x)
        quantiles = [fitted.quantile(moments, level) for level in (0.05, 0.2, 0.5, 0.8, 0.95)]
        assert all(bool((first < second).all()) for first, second in zip(quantiles, quantiles[1:], strict=False))
        assert_close(fitted.interval(moments, 0.6), (quantiles[1], quantiles[3]))

    def test_dtype_is_kept(self, method):
        moments, x = normal()
        single = moments_of(*(getattr(moments, name).float() for name in ("mean", "noise", "code", "weights")))
        fitted = method.fit(single, x)
        assert fitted(single).total.dtype == fitted.quantile(single, 0.9).dtype == torch.float32

    def test_what_is_refused(self, method):
        moments, x = normal(20)
        with pytest.raises(bae.errors.DataError, match="calibration row"):
            method.fit(*((lambda m, rows: (m, rows))(moments_of(moments.mean[:0], moments.noise[:0]), x[:0])))
        with pytest.raises(bae.errors.DataError, match="positive predictive variances"):
            method.fit(moments_of(moments.mean, 0 * moments.noise), x)
        with pytest.raises(bae.errors.NonFiniteError, match="mask of what is missing"):
            method.fit(moments, x * torch.nan)
        with pytest.raises(bae.errors.ShapeError, match="x of shape"):
            method.fit(moments, x[:5])
        with pytest.raises(bae.errors.DataError, match=r"a level in \(0, 1\)"):
            method.fit(moments, x).quantile(moments, 95.0)
        for level in (95.0, 1.0, 0.0, -0.5, math.nan):  # a level of -0.5 was an interval whose ends had changed places
            with pytest.raises(bae.errors.DataError, match=rf"a level in \(0, 1\); got {level}\."):
                method.fit(moments, x).interval(moments, level)

    @pytest.mark.parametrize("name", ["Bernoulli", "ContinuousBernoulli", "Mixed"])
    def test_laws_that_the_mean_settles_are_refused(self, method, name):
        heads = bae.likelihoods
        head = heads.Mixed([heads.Gaussian(1.0), heads.Bernoulli()]) if name == "Mixed" else getattr(heads, name)()
        mean = torch.full((5, 2), 0.5)
        with pytest.raises(bae.errors.UnsupportedError, match="variance of their own"):
            method.fit(moments_of(mean, 0.25 * torch.ones(5, 2), likelihood=head), torch.ones(5, 2))

    def test_a_mask_of_everything_changes_nothing(self, method):
        moments, x = normal(30)
        fitted, masked = method.fit(moments, x), method.fit(moments, x, torch.ones(30, 2, 3, dtype=torch.bool))
        assert torch.equal(fitted.quantile(moments, 0.8), masked.quantile(moments, 0.8))
        assert torch.equal(fitted(moments).total, masked(moments).total)

    def test_what_is_missing_decides_nothing(self, method):
        moments, x = normal(60)
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) < 0.7
        fitted = method.fit(moments, torch.where(mask, x, torch.nan), mask)
        other = method.fit(moments, torch.where(mask, x, 1e3), mask.flatten(1).numpy())
        assert torch.equal(fitted.quantile(moments, 0.8), other.quantile(moments, 0.8))
        assert not torch.equal(fitted.quantile(moments, 0.8), method.fit(moments, x).quantile(moments, 0.8))

    def test_rows_of_which_nothing_was_observed_are_no_rows(self, method):
        moments, x = normal(40)
        mask = torch.arange(40)[:, None, None].expand(40, 2, 3) < 30
        fitted, fewer = method.fit(moments, x, mask), method.fit(part_of(moments, slice(30)), x[:30])
        assert_close(fitted.quantile(moments, 0.8), fewer.quantile(moments, 0.8), rtol=1e-9, atol=1e-12)

    def test_masks_that_are_refused(self, method):
        moments, x = normal(20)
        with pytest.raises(bae.errors.DataError, match="nothing was observed"):
            method.fit(moments, x, torch.zeros(20, 2, 3, dtype=torch.bool))
        with pytest.raises(bae.errors.ShapeError, match="dtype bool"):
            method.fit(moments, x, torch.ones(20, 2, 3))
        with pytest.raises(bae.errors.ShapeError, match="a mask of shape"):
            method.fit(moments, x, torch.ones(19, 2, 3, dtype=torch.bool))
