"""Variance scaling and the temperature."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.calibration import Rescaled, Temperature, VarianceScaling
from tests.calibration.worlds import F64, moments_of, normal, part_of


def nll(moments, x):
    return float(bae.metrics.gaussian_nll(moments.mean, moments.total, x).mean())


class TestVarianceScaling:
    @pytest.mark.parametrize("by", ["all", "pixel"])
    def test_is_maximum_likelihood(self, by):
        moments, x = normal()
        fitted = VarianceScaling(by, n_prior=0).fit(moments, x)
        best = nll(fitted(moments), x)
        for step in (0.99, 1.01):
            assert nll(Rescaled(*[fitted.noise * step] * 3)(moments), x) > best
        # the stationary point: mean squared standardised errors are 1, of all or of every pixel
        squares = (x - moments.mean) ** 2 / fitted(moments).total
        ones = squares.mean() if by == "all" else squares.mean(0)
        assert_close(ones, torch.ones_like(ones))

    def test_finds_the_factor(self):
        moments, x = normal(20_000, factors=(3, 3, 3))
        n = x.numel()
        factor = float(VarianceScaling().fit(moments, x).noise)
        assert abs(factor - 3) < 4 * 3 * math.sqrt(2 / n)
        by_pixel = VarianceScaling("pixel", n_prior=0).fit(moments, x).code
        assert by_pixel.shape == (2, 3) and (by_pixel - 3).abs().max() < 4.5 * 3 * math.sqrt(2 / 20_000)

    def test_shrinkage_goes_from_each_pixel_to_all(self):
        moments, x = normal(50)
        shared = VarianceScaling().fit(moments, x).noise
        alone, some, much = (VarianceScaling("pixel", n).fit(moments, x).noise for n in (0, 50, 1e12))
        assert_close(some, (alone + shared) / 2)
        assert_close(much, shared.expand(2, 3), rtol=1e-9, atol=0)

    def test_refusals(self):
        moments, x = normal(50)
        with pytest.raises(bae.errors.DataError, match="errors that are not all 0"):
            VarianceScaling("pixel", 0).fit(moments, torch.where(torch.arange(3) == 1, moments.mean, x))
        for by in ("all", "pixel"):
            with pytest.raises(bae.errors.DataError, match="errors that are not all 0; got no other"):
                VarianceScaling(by).fit(moments, moments.mean)
        for wrong in (-1, math.inf, math.nan):
            with pytest.raises(bae.errors.DataError, match="n_prior of 0"):
                VarianceScaling(n_prior=wrong)
        with pytest.raises(bae.errors.UnsupportedError, match="by, one of .*; got 'image'"):
            VarianceScaling("image")
        fitted = VarianceScaling("pixel").fit(moments, x)
        with pytest.raises(bae.errors.ShapeError, match=r"rows of shape \(2, 3\)"):
            fitted(moments_of(moments.mean[:, :1], moments.noise[:, :1]))

    def test_counts_what_was_observed(self):
        moments, x = normal(50)
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[:, 1, 2] = False
        squares = ((x - moments.mean) ** 2 / moments.total)[mask]
        shared = VarianceScaling().fit(moments, x, mask).noise
        assert_close(shared, squares.mean())
        by_pixel = VarianceScaling("pixel", 7.0).fit(moments, x, mask).noise
        own = ((x - moments.mean) ** 2 / moments.total)[:, 0, 1][mask[:, 0, 1]]
        assert_close(by_pixel[0, 1], (7 * shared + own.sum()) / (7 + len(own)))
        assert_close(by_pixel[1, 2], shared)
        with pytest.raises(bae.errors.DataError, match="1 pixels without any"):
            VarianceScaling("pixel", 0).fit(moments, x, mask)

    def test_factors_that_are_none_are_refused(self):
        one = torch.ones((), **F64)
        for bad in (-one, one * torch.nan, one * torch.inf):
            with pytest.raises(bae.errors.DataError, match="code factors of 0 or more"):
                Rescaled(one, bad, one)


class TestTemperature:
    def test_finds_factor_and_temperature(self):
        moments, x = normal(20_000, factors=(0.5, 1, 3))
        fitted = Temperature().fit(moments, x)
        # of one part alone the deviation would be sqrt(2 / n); together they are known less well
        information = torch.stack([part / fitted(moments).total for part in (0.5 * moments.noise, 3 * moments.weights)])
        deviations = (0.5 * torch.einsum("anij,bnij->ab", information, information)).inverse().diagonal().sqrt()
        assert abs(math.log(float(fitted.noise) / 0.5)) < 4 * float(deviations[0]) < 0.3
        assert abs(math.log(float(fitted.weights) / 3)) < 4 * float(deviations[1]) < 0.3
        assert float(fitted.code) == 1

    def test_is_the_best_of_a_grid(self):
        moments, x = normal(100, factors=(0.5, 1, 3))
        fitted = Temperature().fit(moments, x)
        best = nll(fitted(moments), x)
        for noise in np.geomspace(0.1, 10, 9):
            for weights in np.geomspace(0.1, 10, 9):
                one = replace(fitted, noise=torch.tensor(noise), weights=torch.tensor(weights))
                assert nll(one(moments), x) >= best - 1e-12
        for step in (0.999, 1.001):
            assert nll(replace(fitted, noise=fitted.noise * step)(moments), x) > best
            assert nll(replace(fitted, weights=fitted.weights * step)(moments), x) > best

    def test_a_part_that_the_rows_do_not_want_is_said(self):
        moments, _ = normal(200)
        still = moments_of(moments.mean, moments.noise, weights=moments.weights)
        x = still.mean + (2 * still.weights - 0.15 * still.noise).sqrt()  # less noise than none
        with pytest.warns(UserWarning, match="noise factor .* end of its range: 1e-06"):
            fitted = Temperature().fit(still, x)
        assert 1.5 < float(fitted.weights) < 2

    def test_one_network_is_variance_scaling(self):
        moments, x = normal(100)
        plain = moments_of(moments.mean, moments.total)
        fitted = Temperature().fit(plain, x)
        assert float(fitted.weights) == 1
        assert_close(fitted.noise, VarianceScaling().fit(plain, x).noise, rtol=1e-7, atol=0)

    def test_a_linearised_normal_posterior_is_tempered(self):
        """The factor of the weights' part is that of the covariance, refitted at that temperature."""
        torch.manual_seed(0)
        model = bae.Autoencoder(
            bae.nets.mlp(3, [4], 2), bae.nets.mlp(2, [4], 3), bae.likelihoods.Gaussian(0.3)
        ).double()
        x = torch.randn(220, 3, **F64)
        weights = bae.fit_weights(bae.weights.Laplace(), model, x[:20])
        moments = bae.Predictive(model, weights).moments(x)
        held_out = part_of(moments, slice(20, None))
        spread = (2 * held_out.noise + 3 * held_out.weights).sqrt()
        fitted = Temperature().fit(held_out, held_out.mean + spread * torch.randn(200, 3, **F64))
        tempered = bae.families.DiagonalNormal(
            weights.mean, weights.var * fitted.weights, weights.subset, is_linearised=True
        )
        found = bae.Predictive(model, tempered).moments(x)
        assert moments.weights.min() > 0 and float(fitted.weights) != 1
        assert_close(fitted(moments).weights, found.weights)

    def test_a_search_that_stops_short_is_said(self, monkeypatch):
        import scipy.optimize

        search, moments_and_x = scipy.optimize.minimize, normal(100, factors=(0.5, 1, 3))

        def stopped(*args, options, **kwargs):
            return search(*args, options=options | {"maxiter": 1}, **kwargs)

        monkeypatch.setattr(scipy.optimize, "minimize", stopped)
        with pytest.warns(RuntimeWarning, match="has not converged: the likelihood still rises by"):
            Temperature().fit(*moments_and_x)

    def test_masked_rows_are_those_without_what_is_missing(self):
        moments, x = normal(100, factors=(0.5, 1, 3))
        mask = torch.ones(x.shape, dtype=torch.bool)
        mask[:, 0] = False
        kept = moments_of(*(getattr(moments, name)[:, 1] for name in ("mean", "noise", "code", "weights")))
        fitted = Temperature().fit(moments, torch.where(mask, x, torch.nan), mask)
        alone = Temperature().fit(kept, x[:, 1])
        assert_close(fitted.noise, alone.noise, rtol=1e-6, atol=0)
        assert_close(fitted.weights, alone.weights, rtol=1e-6, atol=0)
