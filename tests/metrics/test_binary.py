"""Scores of probabilities, against scikit-learn, and their sums over batches against all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics
from bayesae.metrics import BinarySums

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def pixels(n=2000):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    return p, (torch.rand(n, generator=generator, dtype=torch.float64) < p**2).double()


def rows():
    """Of six pixels; the first is nearly always dark and leaves bins empty."""
    p, x = (part.reshape(50, 2, 3) for part in pixels(300))
    p[:, 0, 0] *= 0.05
    return p, x


def summed(p, x, sizes=(7, 43), mask=None):
    sums = BinarySums.of((2, 3))
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    for batch in zip(p.split(sizes), x.split(sizes), masks, strict=True):
        sums = sums.update(*batch)
    return sums


def test_like_scikit_learn():
    p, x = pixels()
    assert float(metrics.brier_score(p, x).mean()) == pytest.approx(brier_score_loss(x.numpy(), p.numpy()))
    observed, predicted = calibration_curve(x.numpy(), p.numpy(), n_bins=10)
    found = metrics.ece(p, x)
    assert np.allclose(found.observed, observed) and np.allclose(found.predicted, predicted)
    weights = found.n_pixels.numpy() / len(p)
    assert float(found.error) == pytest.approx(float((weights * np.abs(observed - predicted)).sum()))
    assert float(found.brier) == pytest.approx(brier_score_loss(x.numpy(), p.numpy()))
    assert found.n_pixels.sum() == len(p)


def test_calibrated_probabilities():
    p, x = pixels(200_000)
    assert metrics.ece(p**2, x).error < 4 * 0.5 / np.sqrt(20_000)
    assert float(metrics.ece(p, x).error) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)  # E[p - p^2]


def test_edges_and_empty_bins():
    found = metrics.ece(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert found.error == 0 and found.n_pixels.tolist() == [1, *[0] * 8, 1]
    assert found.predicted.isnan().sum() == found.observed.isnan().sum() == 8
    assert found.predicted[[0, -1]].tolist() == [0, 1]
    p, x = np.array([0.25, 0.5, 0.75]), np.array([0.0, 1.0, 1.0])
    observed, predicted = calibration_curve(x, p, n_bins=2)
    found = metrics.ece(torch.from_numpy(p), torch.from_numpy(x), n_bins=2)
    assert np.allclose(found.observed, observed) and np.allclose(found.predicted, predicted)


def test_every_pixel_is_what_it_is_alone():
    p, x = rows()
    found = metrics.ece(p, x, is_pooled=False)
    assert found.error.shape == found.brier.shape == (2, 3) and found.observed.shape == (10, 2, 3)
    for i in range(2):
        for j in range(3):
            alone = metrics.ece(p[:, i, j], x[:, i, j])
            for ours, theirs in zip(found, alone, strict=True):
                assert_close(ours[..., i, j], theirs, equal_nan=True, **TIGHT)
    observed, predicted = calibration_curve(x[:, 0, 0].numpy(), p[:, 0, 0].numpy(), n_bins=10)
    assert float(found.error[0, 0]) == pytest.approx(float(np.abs(observed - predicted)[0]))


@pytest.mark.parametrize("is_pooled", [True, False])
def test_sums_are_what_all_rows_at_once_give(is_pooled):
    p, x = rows()
    found = summed(p, x).result(is_pooled=is_pooled)
    for ours, theirs in zip(found, metrics.ece(p, x, is_pooled=is_pooled), strict=True):
        assert_close(ours, theirs, equal_nan=True, **TIGHT)
    assert_close(found.brier, metrics.brier_score(p, x).mean((0, 1, 2) if is_pooled else 0), **TIGHT)
    assert_close(summed(p[:20], x[:20], (20,)).merge(summed(p[20:], x[20:], (30,))).sums, summed(p, x).sums, **TIGHT)


def test_a_mask_leaves_entries_out():
    p, x = rows()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[:, 1, 2] = False
    holed = [torch.where(mask, part, torch.nan) for part in (p, x)]
    sums = summed(*holed, mask=mask)
    for ours, theirs in zip(sums.result(), metrics.ece(p[mask], x[mask]), strict=True):
        assert_close(ours, theirs, equal_nan=True, **TIGHT)
    by_pixel = sums.result(is_pooled=False)
    assert by_pixel.error[1, 2].isnan() and by_pixel.brier[1, 2].isnan() and by_pixel.error.isnan().sum() == 1


def test_an_update_reads_nothing_from_the_device():
    """Tensors without data: whatever asks for a value fails."""
    sums, parts = BinarySums.of((2, 3), device="meta"), [part.to("meta") for part in rows()]
    assert sums.update(*parts, torch.ones(50, 2, 3, dtype=torch.bool, device="meta")).sums.device.type == "meta"


def test_single_precision_and_columns_in_any_order_in_memory():
    p, x = rows()
    found = BinarySums.of((3, 2)).update(p.float().mT, x.float().mT).result(is_pooled=False)
    assert found.error.dtype == torch.float64
    assert_close(found.brier.mT, metrics.ece(p.float(), x, is_pooled=False).brier, **TIGHT)


def test_truth_values_and_arrays_are_pixels():
    p, x = pixels(50)
    assert metrics.brier_score(x.bool(), x.bool()).sum() == metrics.ece(x.bool(), x).error == 0
    p = p.requires_grad_()
    for given in (x.bool(), x.bool().numpy(), x.int(), x.numpy()):
        assert_close(metrics.brier_score(p, given), metrics.brier_score(p, x))
        assert_close(metrics.ece(p, given).error, metrics.ece(p, x).error)
    assert metrics.brier_score(p, x).requires_grad and not metrics.ece(p, x).error.requires_grad


def test_what_is_refused():
    p, x = pixels(4)
    for score in (metrics.brier_score, metrics.ece):
        with pytest.raises(bae.errors.DataError, match="probabilities in"):
            score(p + 1, x)
        with pytest.raises(bae.errors.DataError, match="pixels 0 or 1"):
            score(p, x / 2 + 0.25)
        with pytest.raises(bae.errors.DataError, match="probabilities in"):
            score(p * torch.nan, x)
        with pytest.raises(bae.errors.ShapeError, match="one shape"):
            score(p, x[:2])
    with pytest.raises(bae.errors.DataError, match="n_bins of at least 1"):
        metrics.ece(p, x, n_bins=0)
        with pytest.raises(bae.errors.DataError, match="at least one pixel"):
            score(p[:0], x[:0])
        with pytest.raises(bae.errors.ShapeError, match="one shape"):
            score(p[:, None], x)
    with pytest.raises(bae.errors.ShapeError, match="for numbers by pixel"):
        metrics.ece(p[0], x[0], is_pooled=False)
    sums = BinarySums.of((2, 3))
    with pytest.raises(bae.errors.ShapeError, match="a mask of dtype bool"):
        sums.update(*rows(), torch.ones(50, 2, 3))
    with pytest.raises(bae.errors.DataError, match="at least one value"):
        sums.result()
    with pytest.raises(bae.errors.ShapeError, match=r"\(B, 2, 3\)"):
        sums.update(p, x)
    with pytest.raises(bae.errors.ShapeError, match="same settings"):
        sums.merge(BinarySums.of((2, 3), n_bins=5))
