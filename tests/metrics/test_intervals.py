"""Coverage and width of intervals, and bins of predicted deviation."""

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
from tests.metrics.test_pit import ATOMS, F64, data_of, model

LEVELS = (0.5, 0.8, 0.9, 0.95)


@pytest.mark.parametrize("atoms", ATOMS, ids=str)
def test_coverage_is_the_level_on_data_of_the_model(atoms):
    n = 40_000
    mean, var, y = model(n)
    found = metrics.interval_coverage(mean, var, data_of(atoms, y), atoms=atoms)
    assert (found.coverage - found.levels).abs().max() < 4 * 0.5 / math.sqrt(n)


def test_like_uncertainty_toolbox():
    mean, var, x = model(400)
    found = metrics.interval_coverage(mean, var, 1.4 * x)
    args = mean.numpy(), var.sqrt().numpy(), (1.4 * x).numpy()
    theirs = [uncertainty_toolbox.metrics_calibration.get_proportion_in_interval(*args, level) for level in LEVELS]
    assert np.allclose(found.coverage, theirs)
    for level, width in zip(LEVELS, found.width, strict=True):
        bounds = uncertainty_toolbox.metrics_calibration.get_prediction_interval(*args[:2], np.array([level]), None)
        assert float(width) == pytest.approx(float((bounds.upper - bounds.lower).mean()), rel=1e-9)


def test_by_pixel_is_each_pixel_alone():
    mean, var, x = (part.reshape(25, 2, 3) for part in model(150))
    found = metrics.interval_coverage(mean, var, x, atoms=Atoms(bin_width=0.1), is_pooled=False)
    bins = metrics.ence(mean, var, x, edges=(0.4, 0.8), is_pooled=False)
    for i in range(2):
        for j in range(3):
            one = [part[:, i, j] for part in (mean, var, x)]
            alone = metrics.interval_coverage(*one, atoms=Atoms(bin_width=0.1))
            assert_close(found.coverage[:, i, j], alone.coverage)
            assert_close(found.width[:, i, j], alone.width)
            for ours, theirs in zip(bins, metrics.ence(*one, edges=(0.4, 0.8)), strict=True):
                assert_close(ours[..., i, j], theirs, equal_nan=True)


def test_width_is_clipped_with_the_law():
    one = torch.ones(1, **F64)
    width = metrics.interval_coverage(0 * one, one, 0.5 * one, levels=(0.9,), atoms=Atoms(0.0, 1.0)).width
    assert_close(width, one)
    assert_close(metrics.interval_coverage(0 * one, one, one, levels=(0.6826894921370859,)).width, 2 * one)


def test_ence_is_a_loop_over_bins():
    mean, var, x = model(3000)
    found = metrics.ence(mean, var, 1.2 * x)
    order, terms = var.argsort(), []
    for k, part in enumerate(order.split(300)):
        deviation = math.sqrt(float(var[part].mean()))
        error = math.sqrt(float(((1.2 * x - mean)[part] ** 2).mean()))
        assert float(found.deviation[k]) == pytest.approx(deviation) and float(found.error[k]) == pytest.approx(error)
        terms.append(abs(deviation - error) / deviation)
    assert float(found.ence) == pytest.approx(sum(terms) / len(terms))
    assert found.n_values.tolist() == [300] * 10


def test_ence_goes_to_zero_where_variances_are_true():
    mean, var, x = model(400_000)
    assert float(metrics.ence(mean, var, x).ence) < 4 / math.sqrt(2 * 40_000)
    assert float(metrics.ence(mean, 4 * var, x).ence) == pytest.approx(0.5, abs=0.01)


def test_equal_variances_are_one_bin():
    mean, _, x = model(50)
    assert metrics.deviation_edges(torch.ones(50)) == ()
    found = metrics.ence(mean, torch.ones_like(x), x)
    assert found.n_values.tolist() == [50]
    assert float(found.ence) == pytest.approx(abs(1 - float(((x - mean) ** 2).mean().sqrt())))


def test_empty_bins_are_left_out():
    mean, var, x = model(50)
    found = metrics.ence(mean, var, x, edges=(0.6, 50.0))
    assert found.n_values[2] == 0 and math.isnan(found.deviation[2])
    assert_close(found.ence, metrics.ence(mean, var, x, edges=(0.6,)).ence)


def test_levels_and_edges_may_be_arrays():
    mean, var, x = model(40)
    first = metrics.interval_coverage(mean, var, x, levels=torch.tensor([0.5, 0.9], **F64))
    for ours, theirs in zip(first, metrics.interval_coverage(mean, var, x, levels=(0.5, 0.9)), strict=True):
        assert_close(ours, theirs)
    assert_close(metrics.ence(mean, var, x, edges=np.array([0.4])).ence, metrics.ence(mean, var, x, edges=(0.4,)).ence)
    assert metrics.deviation_edges(var.numpy()) == metrics.deviation_edges(var.requires_grad_())


def test_what_is_refused():
    mean, var, x = model(3)
    with pytest.raises(bae.errors.DataError, match="levels of intervals"):
        metrics.interval_coverage(mean, var, x, levels=(95.0,))
    for edges in ((0.3, 0.1), (math.nan,), np.array([0.2, 0.2])):
        with pytest.raises(bae.errors.DataError, match="edges that rise"):
            metrics.ence(mean, var, x, edges=edges)
    for measure in (metrics.interval_coverage, metrics.ence):
        with pytest.raises(bae.errors.ShapeError, match="for numbers by pixel"):
            measure(mean[0], var[0], x[0], is_pooled=False)
    with pytest.raises(bae.errors.DataError, match="levels of intervals"):
        metrics.interval_coverage(mean, var, x, levels=np.array([]))
    with pytest.raises(bae.errors.DataError, match="n_bins of at least 1"):
        metrics.deviation_edges(var, 0)
    with pytest.raises(bae.errors.DataError, match="at least one variance"):
        metrics.deviation_edges(var[:0])
    with pytest.raises(bae.errors.NonFiniteError, match="variances"):
        metrics.deviation_edges(var * torch.nan)
