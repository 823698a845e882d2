"""The probability integral transform, with and without atoms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import uncertainty_toolbox
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics
from bayesae.metrics import Atoms

F64 = {"dtype": torch.float64}
ATOMS = [Atoms(), Atoms(0.0), Atoms(high=0.7), Atoms(0.0, 1.0), Atoms(bin_width=0.25), Atoms(0.0, 1.0, 1 / 4)]


def model(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, var = torch.rand(n, generator=generator, **F64), 0.01 + torch.rand(n, generator=generator, **F64)
    return mean, var, mean + var.sqrt() * torch.randn(n, generator=generator, **F64)


def data_of(atoms, y):
    if atoms.low is not None or atoms.high is not None:
        y = y.clamp(atoms.low, atoms.high)
    return (y / atoms.bin_width).round() * atoms.bin_width if atoms.bin_width else y


@pytest.mark.parametrize("atoms", ATOMS, ids=str)
def test_uniform_where_data_come_from_the_model(atoms):
    n = 40_000
    mean, var, y = model(n)
    u = metrics.pit(mean, var, data_of(atoms, y), atoms=atoms, seed=1).sort().values
    largest = float((u - (torch.arange(n, **F64) + 0.5) / n).abs().max())
    assert largest < 1.95 / math.sqrt(n)  # Kolmogorov's bound at 1e-3
    x = data_of(atoms, y)
    assert metrics.quantile_calibration(mean, var, x, atoms=atoms).error < 4 * 0.5 / math.sqrt(n)


def test_atoms_that_are_not_named_are_seen():
    mean, var, y = model(40_000)
    assert metrics.quantile_calibration(mean, var, y.clamp(0, 1)).error > 0.05


@pytest.mark.parametrize("atoms", ATOMS, ids=str)
def test_quantile_calibration_averages_the_random_part(atoms):
    mean, var, y = model(50)
    x = data_of(atoms, y)
    draws = torch.stack([metrics.pit(mean, var, x, atoms=atoms, seed=seed) for seed in range(2000)])
    for level, observed in zip(*metrics.quantile_calibration(mean, var, x, n_levels=9, atoms=atoms)[:2], strict=True):
        share = (draws <= level).double().mean()
        assert abs(float(share - observed)) < 4 * 0.5 / math.sqrt(2000 * 50) + 1e-12


@pytest.mark.parametrize("atoms", ATOMS, ids=str)
def test_by_pixel_is_each_pixel_alone(atoms):
    mean, var, y = (part.reshape(25, 2, 3) for part in model(150))
    x = data_of(atoms, y)
    found = metrics.quantile_calibration(mean, var, x, n_levels=9, atoms=atoms, is_pooled=False)
    assert found.observed.shape == (9, 2, 3) and found.error.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = [part[:, i, j] for part in (mean, var, x)]
            alone = metrics.quantile_calibration(*one, n_levels=9, atoms=atoms)
            assert_close(found.observed[:, i, j], alone.observed, rtol=1e-12, atol=1e-12)
            assert float(found.error[i, j]) == pytest.approx(alone.error, abs=1e-12)


def test_the_error_of_a_hundred_rows_is_what_the_page_says():
    mean, var, x = (part.reshape(100, 400) for part in model(40_000))
    error = metrics.quantile_calibration(mean, var, x, is_pooled=False).error
    assert float(error.mean()) == pytest.approx(0.031, abs=4 * float(error.std()) / 20)


def test_nothing_is_broadcast():
    """Means (B, 1) and data (B,) were B squared numbers, and a calibration of none of them."""
    mean, var, x = model(20)
    scores = [
        metrics.pit, metrics.quantile_calibration, metrics.interval_coverage, metrics.ence,
        metrics.gaussian_nll, metrics.gaussian_crps,
    ]  # fmt: skip
    for score in scores:
        for wrong in ((mean[:, None], var[:, None], x), (mean, var[:, None], x), (mean, var, x[0]), (mean, var[:1], x)):
            with pytest.raises(bae.errors.ShapeError, match=r"of one shape; got \(20,"):
                score(*wrong)


def test_one_variance_arrays_and_truth_values_will_do():
    mean, _, x = model(20)
    mean = mean.float().requires_grad_()
    full = torch.full((20,), 0.25, **F64)
    for score in (metrics.pit, metrics.gaussian_nll, metrics.gaussian_crps):
        expected = score(mean, full, x)
        assert_close(score(mean, 0.25, x.numpy()), expected)
        assert_close(score(mean, full[0], x), expected)
        assert_close(score(mean, full, x > 0).double(), score(mean, full, (x > 0).double()))
    assert metrics.gaussian_nll(mean, 0.25, x).requires_grad
    for measure in (metrics.interval_coverage, metrics.ence, metrics.quantile_calibration):
        for ours, theirs in zip(measure(mean, 0.25, x.numpy()), measure(mean, full, x), strict=True):
            assert_close(ours, theirs)


def test_by_hand():
    mean, var = torch.tensor([0.0, 0.0, 0.0], **F64), torch.ones(3, **F64)
    x = torch.tensor([0.0, 0.5, 1.0], **F64)
    below, upto = Atoms(0.0, 1.0).levels_of(mean, var, x)
    at = torch.special.ndtr(x)
    assert_close(below, torch.tensor([0.0, at[1], at[2]], **F64))
    assert_close(upto, torch.tensor([at[0], at[1], 1.0], **F64))
    below, upto = Atoms(0.0, 1.0, 0.5).levels_of(mean, var, x)
    edges = torch.special.ndtr(torch.tensor([0.25, 0.75], **F64))
    assert_close(below, torch.tensor([0.0, edges[0], edges[1]], **F64))
    assert_close(upto, torch.tensor([edges[0], edges[1], 1.0], **F64))


def test_like_uncertainty_toolbox():
    mean, var, x = model(500)
    x = 1.3 * x
    levels, observed, error = metrics.quantile_calibration(mean, var, x, n_levels=9)
    above = uncertainty_toolbox.metrics_calibration.get_proportion_under_quantile  # of mean - x: the other side
    args = mean.numpy(), var.sqrt().numpy(), x.numpy()
    theirs = [1 - above(*args, 1 - float(level)) for level in levels]
    assert np.allclose(observed, theirs, atol=1e-12)
    assert error == pytest.approx(float(np.abs(np.array(theirs) - levels.numpy()).mean()))


def test_seed_and_the_callers_generator():
    mean, var, y = model(20)
    state, atoms = torch.get_rng_state(), Atoms(0.5)
    first, again, other = (metrics.pit(mean, var, y.clamp(0.5), atoms=atoms, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_refused():
    mean, var, x = model(3)
    with pytest.raises(bae.errors.DataError, match="outside"):
        metrics.pit(mean, var, x - 5, atoms=Atoms(0.0, 1.0))
    with pytest.raises(bae.errors.NonFiniteError, match="standardised"):
        metrics.pit(mean, 0 * var, x)
    with pytest.raises(bae.errors.DataError, match="at least one"):
        metrics.pit(mean[:0], var[:0], x[:0])
    with pytest.raises(bae.errors.DataError, match="n_levels of at least 1"):
        metrics.quantile_calibration(mean, var, x, n_levels=0)
    with pytest.raises(bae.errors.DataError, match="low < high"):
        Atoms(1.0, 0.0)
    for width in (-1.0, math.inf, math.nan):
        with pytest.raises(bae.errors.DataError, match="bin width"):
            Atoms(bin_width=width)
    for low, high in ((math.nan, None), (None, math.nan), (0.0, math.nan), (-math.inf, 1.0)):
        with pytest.raises(bae.errors.DataError, match="low < high"):
            Atoms(low, high)
    for measure in (metrics.pit, metrics.interval_coverage, metrics.ence):  # no error were left of any
        with pytest.raises(bae.errors.NonFiniteError, match="in 'var'"):
            measure(mean, math.inf, x)
