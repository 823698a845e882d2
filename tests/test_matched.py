"""Detection among rows that are alike in a covariate."""

from __future__ import annotations

import pytest
import torch

import bayesae as bae
from bayesae.metrics import auroc, matched_auroc


def test_a_score_that_is_the_covariate_tells_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(6, (4000,), generator=generator), torch.randint(6, (4000,), generator=generator) + 2
    noise = torch.randn(2, 4000, generator=generator)
    assert matched_auroc(a.float(), b.float(), a, b, n_bins=40) == 0.5  # ties count half
    familiar, strange = a + 0.3 * noise[0], b + 0.3 * noise[1]
    assert auroc(familiar, strange) > 0.75
    assert matched_auroc(familiar, strange, a, b, n_bins=40) == pytest.approx(0.5, abs=0.02)


def test_few_values_have_a_stratum_each_however_rare_they_are():
    """Two of a hundred rows are dark: quantiles alone would have put them with the others."""
    by = torch.tensor([0.0] * 2 + [1.0] * 98)
    x, y = torch.arange(100.0), torch.arange(100.0) + 3 + 500 * (by == 0)
    pairs = [(y[j] > x[i]) + 0.5 * (y[j] == x[i]) for i in range(100) for j in range(100) if by[i] == by[j]]
    assert matched_auroc(x, y, by, by, n_bins=2) == pytest.approx(float(sum(pairs)) / len(pairs))


def test_against_all_pairs():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(3, (n,), generator=generator) for n in (30, 20))
    x, y = torch.randn(30, generator=generator), torch.randn(20, generator=generator) + b
    pairs = [float(y[j] > x[i]) for i in range(30) for j in range(20) if a[i] == b[j]]
    assert matched_auroc(x, y, a, b, n_bins=100) == pytest.approx(sum(pairs) / len(pairs))


def test_a_covariate_that_says_nothing_changes_nothing():
    x, y, one = torch.arange(5.0), torch.arange(5.0) + 2, torch.zeros(5)
    assert matched_auroc(x, y, one, one) == pytest.approx(auroc(x, y))


def test_bad_input():
    x = torch.arange(5.0)
    with pytest.raises(bae.errors.DataError, match="rows of both kinds"):
        matched_auroc(x, x, torch.zeros(5), torch.ones(5), n_bins=2)
    with pytest.raises(bae.errors.ShapeError, match="one covariate for every score"):
        matched_auroc(x, x, torch.zeros(4), torch.ones(5))
    with pytest.raises(bae.errors.DataError, match="n_bins of at least 1"):
        matched_auroc(x, x, x, x, n_bins=0)
    with pytest.raises(bae.errors.NonFiniteError, match="covariates"):
        matched_auroc(x, x, x * torch.nan, x)
