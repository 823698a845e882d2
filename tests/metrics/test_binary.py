"""Scores of probabilities, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

import bayesae as bae
from bayesae import metrics


def pixels(n=2000):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    return p, (torch.rand(n, generator=generator, dtype=torch.float64) < p**2).double()


def test_like_scikit_learn():
    p, x = pixels()
    assert float(metrics.brier_score(p, x).mean()) == pytest.approx(brier_score_loss(x.numpy(), p.numpy()))
    observed, predicted = calibration_curve(x.numpy(), p.numpy(), n_bins=10)
    found = metrics.ece(p, x)
    assert np.allclose(found.observed, observed) and np.allclose(found.predicted, predicted)
    weights = found.n_pixels.numpy() / len(p)
    assert found.error == pytest.approx(float((weights * np.abs(observed - predicted)).sum()))
    assert found.n_pixels.sum() == len(p)


def test_calibrated_probabilities():
    p, x = pixels(200_000)
    assert metrics.ece(p**2, x).error < 4 * 0.5 / np.sqrt(20_000)
    assert metrics.ece(p, x).error == pytest.approx(1 / 2 - 1 / 3, abs=0.01)  # E[p - p^2]


def test_edges_and_empty_bins():
    found = metrics.ece(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert found.error == 0 and found.predicted.tolist() == [0, 1]
    p, x = np.array([0.25, 0.5, 0.75]), np.array([0.0, 1.0, 1.0])
    observed, predicted = calibration_curve(x, p, n_bins=2)
    found = metrics.ece(torch.from_numpy(p), torch.from_numpy(x), n_bins=2)
    assert np.allclose(found.observed, observed) and np.allclose(found.predicted, predicted)


def test_what_is_refused():
    p, x = pixels(4)
    for score in (metrics.brier_score, metrics.ece):
        with pytest.raises(bae.errors.DataError, match="probabilities in"):
            score(p + 1, x)
        with pytest.raises(bae.errors.DataError, match="pixels 0 or 1"):
            score(p, x / 2 + 0.25)
        with pytest.raises(bae.errors.ShapeError, match="one shape"):
            score(p, x[:2])
    with pytest.raises(bae.errors.DataError, match="n_bins of at least 1"):
        metrics.ece(p, x, n_bins=0)
