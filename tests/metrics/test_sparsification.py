"""Sparsification curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics
from tests.metrics.test_pit import model

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def test_is_a_loop_over_shares():
    mean, var, x = model(437)
    found = metrics.sparsification(mean, var, x, n_shares=20)
    squares = ((x - mean) ** 2).numpy()
    for curve, key in ((found.error, var.numpy()), (found.oracle, squares)):
        order = np.argsort(-key)
        for k in range(20):
            left = squares[order][k * 437 // 20 :]
            assert float(curve[k]) == pytest.approx(math.sqrt(left.mean() / squares.mean()))
    assert found.ause == pytest.approx(float(np.trapezoid(found.error - found.oracle, found.removed)))


def test_nothing_is_lost_where_variances_rank_as_errors_do():
    mean, _, x = model(300)
    found = metrics.sparsification(mean, ((x - mean) ** 2).exp(), x)
    assert found.ause == pytest.approx(0, abs=1e-12) and float(found.error[0]) == 1


def test_ties_are_the_mean_over_orders():
    mean, _, x = model(300)
    flat = metrics.sparsification(mean, torch.ones_like(x), x, n_shares=10)
    assert flat.error.tolist() == pytest.approx([1] * 10)
    var = torch.tensor([1.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    error = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    found = metrics.sparsification(0 * error, var, error, n_shares=4)
    squares = [(1 + 4 + 16 + 9) / 4, (1 + 4 + 16) / 3, (1 + 10) / 2, 1]
    assert found.error.tolist() == pytest.approx([math.sqrt(s / squares[0]) for s in squares])


def test_by_pixel_is_each_pixel_alone():
    mean, var, x = (part.reshape(50, 2, 3) for part in model(300))
    var = (4 * var).round() + 1  # with ties, other ones in each pixel
    found = metrics.sparsification(mean, var, x, n_shares=20, is_pooled=False)
    assert found.error.shape == found.oracle.shape == (20, 2, 3) and found.ause.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = metrics.sparsification(mean[:, i, j], var[:, i, j], x[:, i, j], n_shares=20)
            assert_close(found.error[:, i, j], alone.error, **TIGHT)
            assert_close(found.oracle[:, i, j], alone.oracle, **TIGHT)
            assert float(found.ause[i, j]) == pytest.approx(alone.ause, abs=1e-12)
    still = torch.where(torch.arange(3) == 1, mean, x)  # pixels without any error have no curve, the others keep theirs
    assert_close(
        metrics.sparsification(mean, var, still, n_shares=20, is_pooled=False).ause[:, [0, 2]], found.ause[:, [0, 2]]
    )


def test_a_variance_that_is_one_number_takes_nothing_away():
    mean, _, x = model(60)
    found = metrics.sparsification(mean, 0.3, x.numpy(), n_shares=10)
    assert found.error.tolist() == pytest.approx([1] * 10) and isinstance(found.ause, float)


def test_what_is_refused():
    mean, var, x = model(30)
    with pytest.raises(bae.errors.ShapeError, match="of one shape"):
        metrics.sparsification(mean[:, None], var[:, None], x, n_shares=3)
    with pytest.raises(bae.errors.ShapeError, match="for numbers by pixel"):
        metrics.sparsification(mean[0], var[0], x[0], n_shares=3, is_pooled=False)
    with pytest.raises(bae.errors.DataError, match="100 values or more"):
        metrics.sparsification(*(part.reshape(3, 10) for part in (mean, var, x)), is_pooled=False)
    with pytest.raises(bae.errors.DataError, match="100 values or more"):
        metrics.sparsification(mean, var, x)
    with pytest.raises(bae.errors.DataError, match="an error to explain"):
        metrics.sparsification(mean, var, mean, n_shares=3)
    with pytest.raises(bae.errors.DataError, match="at least two shares"):
        metrics.sparsification(mean, var, x, n_shares=1)
