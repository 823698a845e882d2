"""Isotonic recalibration of binary pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch.testing import assert_close

import bayesae as bae
from bayesae import calibration, metrics
from bayesae.calibration import IsotonicProbabilities, RecalibratedProbabilities
from tests.calibration.worlds import F64, moments_of, part_of

PARTS = ("noise", "code", "weights")
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def binary(n=300, shape=(2, 3), seed=0):
    """Moments whose parts add up to p (1 - p), and rows that are 1 with probability p squared."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, *shape, generator=generator, **F64)
    shares = torch.rand(3, n, *shape, generator=generator, **F64)
    parts = p * (1 - p) * shares / shares.sum(0)
    x = (torch.rand(n, *shape, generator=generator, **F64) < p**2).double()
    return moments_of(p, *parts, likelihood=bae.likelihoods.Bernoulli()), x


def slow_isotonic(p, x):
    """Of distinct p: the largest over starts of the smallest over ends of the mean between them."""
    order = np.argsort(p)
    sums = np.r_[0, np.cumsum(x[order])]
    n, found = len(p), np.empty(len(p))
    for k in range(n):
        found[order[k]] = max(
            min((sums[end] - sums[start]) / (end - start) for end in range(k + 1, n + 1)) for start in range(k + 1)
        )
    return found


def with_prior(p, x, n_prior):
    return (x + n_prior / len(p) * p) / (1 + n_prior / len(p))


@pytest.mark.parametrize("n_prior", [0.0, 1.0, 40.0])
def test_is_the_least_of_squares_and_scikit_learns(n_prior):
    moments, x = binary(10)
    fitted = IsotonicProbabilities(n_prior).fit(moments, x)
    found = fitted(moments).mean.flatten()
    p, y = moments.mean.flatten().numpy(), x.flatten().numpy()
    target = with_prior(p, y, n_prior)
    assert_close(found.numpy(), slow_isotonic(p, target), **TIGHT)
    regression = IsotonicRegression(out_of_bounds="clip").fit(p, target)
    grid = np.linspace(0, 1, 201)
    assert_close(fitted.probability(torch.from_numpy(grid)).numpy(), regression.predict(grid), **TIGHT)


def test_ties_share_their_ones():
    p = torch.tensor([[0.2], [0.2], [0.2], [0.7], [0.7], [0.9]], **F64)
    x = torch.tensor([[1.0], [0.0], [0.0], [1.0], [1.0], [0.0]], **F64)
    moments = moments_of(p, p * (1 - p), likelihood=bae.likelihoods.Bernoulli())
    found = IsotonicProbabilities(0).fit(moments, x)(moments).mean.flatten()
    assert_close(found, torch.tensor([1 / 3] * 3 + [2 / 3] * 3, **F64), **TIGHT)


def test_blocks_have_their_share_of_ones_and_no_rising_map_is_nearer():
    moments, x = binary()
    q = IsotonicProbabilities(0).fit(moments, x)(moments).mean
    for value in q.unique():
        assert float(x[q == value].mean()) == pytest.approx(float(value))
    best = float(metrics.brier_score(q, x).mean())
    for power in (1, 1.5, 2, 2.5, 3):
        assert best < float(metrics.brier_score(moments.mean**power, x).mean())


def test_the_map_is_found_on_new_rows():
    moments, x = binary(40_000)
    rows, rest = slice(0, 20_000), slice(20_000, None)
    fitted = IsotonicProbabilities().fit(part_of_binary(moments, rows), x[rows])
    grid = torch.linspace(0.05, 0.95, 10, **F64)
    assert (fitted.probability(grid) - grid**2).abs().max() < 0.04  # n^(-1/3), n of 120,000
    new = fitted(part_of_binary(moments, rest))
    before, after = (metrics.ece(mean, x[rest]) for mean in (moments.mean[rest], new.mean))
    assert before.error > 0.15 and after.error < 0.01
    assert new.log_prob(x[rest]).mean() > part_of_binary(moments, rest).log_prob(x[rest]).mean()


def part_of_binary(moments, rows):
    return replace(part_of(moments, rows), likelihood=moments.likelihood)


def test_parts_add_up_and_keep_their_shares():
    moments, x = binary()
    before = [getattr(moments, name).clone() for name in ("mean", *PARTS)]
    found = IsotonicProbabilities().fit(moments, x)(moments)
    assert_close(found.total, found.mean * (1 - found.mean), **TIGHT)
    for name in PARTS:
        assert_close(getattr(found, name) / found.total, getattr(moments, name) / moments.total, **TIGHT)
    for value, name in zip(before, ("mean", *PARTS), strict=True):
        assert torch.equal(value, getattr(moments, name))


def test_certain_pixels_are_all_noise():
    p = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    zero = torch.zeros_like(p)
    moments = moments_of(p, zero, likelihood=bae.likelihoods.Bernoulli())
    found = IsotonicProbabilities(0).fit(moments, torch.tensor([[0.0], [1.0], [1.0], [1.0]]))(moments)
    assert found.mean.flatten().tolist() == [0.5, 0.5, 1, 1] and found.noise.flatten().tolist() == [0.25, 0.25, 0, 0]
    assert found.code.abs().sum() == found.weights.abs().sum() == 0


def test_a_prior_keeps_probabilities_from_0_and_1():
    moments, _ = binary(20)
    dark = torch.zeros_like(moments.mean)
    for n_prior, is_inside in ((0.0, False), (1.0, True)):
        found = IsotonicProbabilities(n_prior).fit(moments, dark)(moments)
        assert bool(found.mean.min() > 0) == is_inside
    p = moments.mean.flatten()
    expected = with_prior(p, 0 * p, 1.0)  # rises already
    assert_close(IsotonicProbabilities().fit(moments, dark)(moments).mean.flatten(), expected, **TIGHT)


def test_one_probability_has_the_share_of_all():
    p = torch.full((8, 1), 0.3, **F64)
    moments = moments_of(p, p * (1 - p), likelihood=bae.likelihoods.Bernoulli())
    fitted = IsotonicProbabilities(2.0).fit(moments, (torch.arange(8) < 6).double())
    share = (6 + 2 * 0.3) / 10
    assert_close(fitted.probability(torch.tensor([0.0, 0.3, 1.0], **F64)), torch.full((3,), share, **F64), **TIGHT)


def test_standard_errors_go_through_the_map():
    fitted = RecalibratedProbabilities(torch.tensor([0.2, 0.6], **F64), torch.tensor([0.1, 0.9], **F64))  # slope 2
    p, error = torch.tensor([[0.4, 0.4, 0.2, 0.9]], **F64), torch.tensor([[0.01, torch.inf, 0.01, 0.01]], **F64)
    moments = replace(moments_of(p, p * (1 - p), likelihood=bae.likelihoods.Bernoulli()), standard_error=error)
    assert_close(fitted(moments).standard_error, torch.tensor([[0.02, torch.inf, 0.01, 0.0]], **F64), **TIGHT)
    assert fitted(replace(moments, standard_error=None)).is_exact


def test_masks_and_dtypes():
    moments, x = binary(60)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    holed = torch.where(mask, x, torch.nan)
    fitted, other = (IsotonicProbabilities().fit(moments, *pair) for pair in ((holed, mask), (x.numpy(), mask.numpy())))
    kept = replace(moments, **{name: getattr(moments, name)[mask][:, None] for name in ("mean", *PARTS)})
    alone = IsotonicProbabilities().fit(kept, x[mask])
    for one in (other, alone):
        assert torch.equal(fitted.predicted, one.predicted) and torch.equal(fitted.observed, one.observed)
    single = replace(moments, **{name: getattr(moments, name).float() for name in ("mean", *PARTS)})
    found = IsotonicProbabilities().fit(single, x)
    assert found.predicted.dtype == torch.float64
    assert {getattr(found(single), name).dtype for name in ("mean", *PARTS)} == {torch.float32}
    assert_close(found(single).total, found(single).mean * (1 - found(single).mean))


def test_what_is_refused():
    moments, x = binary(20)
    method = IsotonicProbabilities()
    assert isinstance(method, calibration.Recalibration)
    with pytest.raises(bae.errors.UnsupportedError, match="Bernoulli likelihood; got those of Gaussian"):
        method.fit(moments_of(moments.mean, moments.noise), x)
    with pytest.raises(bae.errors.UnsupportedError, match="Bernoulli likelihood"):
        method.fit(moments, x)(moments_of(moments.mean, moments.noise))
    with pytest.raises(bae.errors.DataError, match=r"x in \[0, 1\]"):
        method.fit(moments, x + 1)
    with pytest.raises(bae.errors.NonFiniteError, match="mask of what is missing"):
        method.fit(moments, x * torch.nan)
    with pytest.raises(bae.errors.ShapeError, match="x of shape"):
        method.fit(moments, x[:5])
    with pytest.raises(bae.errors.DataError, match="calibration row"):
        method.fit(moments, x, torch.zeros(x.shape, dtype=torch.bool))
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(bae.errors.DataError, match="n_prior of 0 or more"):
            IsotonicProbabilities(wrong)
    with pytest.raises(bae.errors.DataError, match=r"p in \[0, 1\]"):
        method.fit(moments, x).probability(torch.tensor([1.5]))
    with pytest.raises(bae.errors.UnsupportedError, match="IsotonicProbabilities"):
        calibration.Isotonic().fit(moments, x)


def test_maps_that_no_fit_gives_are_refused():
    half = torch.tensor([0.2, 0.5], **F64)
    for predicted, observed in (
        (half.flip(0), half),
        (half, half.flip(0)),
        (half[:0], half[:0]),
        (half, half + torch.nan),
    ):
        with pytest.raises(bae.errors.DataError, match="rise along their first axis"):
            RecalibratedProbabilities(predicted, observed)
    with pytest.raises(bae.errors.DataError, match=r"observed in \[0, 1\]"):
        RecalibratedProbabilities(half, half + 1)
    for other in (half[:1], half[:, None]):
        with pytest.raises(bae.errors.ShapeError, match=r"knots \(K,\)"):
            RecalibratedProbabilities(half, other)
