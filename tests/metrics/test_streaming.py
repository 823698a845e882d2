"""Sums over batches against the functions of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics
from bayesae.metrics import Atoms, CalibrationSums
from tests.metrics.test_pit import ATOMS, data_of, model

EDGES = (0.3, 0.5, 0.8)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def rows(atoms=ATOMS[0]):
    mean, var, y = (part.reshape(50, 2, 3) for part in model(300))
    return mean, var, data_of(atoms, y)


def summed(parts, atoms=ATOMS[0], sizes=(7, 43)):
    sums = CalibrationSums.of((2, 3), edges=EDGES, atoms=atoms, n_bins=10)
    for batch in zip(*(part.split(sizes) for part in parts), strict=True):
        sums = sums.update(*batch)
    return sums


@pytest.mark.parametrize("atoms", ATOMS, ids=str)
@pytest.mark.parametrize("is_pooled", [True, False])
def test_is_what_all_rows_at_once_give(atoms, is_pooled):
    parts = mean, var, x = rows(atoms)
    found = summed(parts, atoms).result(is_pooled=is_pooled)
    axes = (0, 1, 2) if is_pooled else (0,)
    assert_close(found.nll, metrics.gaussian_nll(mean, var, x).mean(axes), **TIGHT)
    assert_close(found.crps, metrics.gaussian_crps(mean, var, x).mean(axes), **TIGHT)
    assert (found.n_values == (300 if is_pooled else 50)).all()
    intervals = metrics.interval_coverage(mean, var, x, atoms=atoms, is_pooled=is_pooled)
    for ours, theirs in zip(found.intervals, intervals, strict=True):
        assert_close(ours, theirs, **TIGHT)
    for ours, theirs in zip(
        found.deviations, metrics.ence(mean, var, x, edges=EDGES, is_pooled=is_pooled), strict=True
    ):
        assert_close(ours, theirs, equal_nan=True, **TIGHT)
    observed = found.histogram.cumsum(0)[:-1]
    if is_pooled:
        assert_close(observed, metrics.quantile_calibration(mean, var, x, n_levels=9, atoms=atoms).observed, **TIGHT)
    else:
        at_once = metrics.quantile_calibration(mean, var, x, n_levels=9, atoms=atoms, is_pooled=False)
        assert_close(observed, at_once.observed, **TIGHT)


def test_merging_and_batches_do_not_matter():
    parts = rows()
    first, second = summed([part[:20] for part in parts], sizes=(20,)), summed([part[20:] for part in parts], sizes=30)
    assert_close(first.merge(second).sums, summed(parts).sums, **TIGHT)
    assert_close(first.over_ranks().sums, first.sums)


def test_rows_of_all_ranks_count(monkeypatch):
    """Two ranks with the same rows, without the processes."""
    monkeypatch.setattr("bayesae.metrics._sums.add_over_ranks", lambda parts: [2 * part for part in parts])
    one = summed(rows())
    both = one.over_ranks()
    assert_close(both.sums, one.merge(one).sums)
    assert one.result().n_values * 2 == both.result().n_values


def test_a_mask_leaves_entries_out():
    mean, var, x = rows()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    hidden = [torch.where(mask, part, torch.nan) for part in (mean, var, x)]
    sums = CalibrationSums.of((2, 3), edges=EDGES).update(*hidden, mask)
    whole = CalibrationSums.of((), edges=EDGES).update(mean[mask], var[mask], x[mask]).result()
    for ours, theirs in zip(sums.result()[:3], whole[:3], strict=True):
        assert_close(ours, theirs, **TIGHT)
    assert_close(sums.result().histogram, whole.histogram, **TIGHT)


def test_one_variance_and_arrays_will_do():
    mean, _, x = rows()
    sums = CalibrationSums.of((2, 3), edges=EDGES)
    expected = sums.update(mean, torch.full_like(x, 0.3), x, x > 0).sums
    assert_close(sums.update(mean, 0.3, x.numpy(), (x > 0).numpy()).sums, expected)
    assert_close(sums.update(mean.float().double(), torch.tensor(0.3), x, x > 0).sums, expected, rtol=1e-5, atol=1e-5)


def test_an_update_reads_nothing_from_the_device():
    """Tensors without data: whatever asks for a value fails."""
    sums = CalibrationSums.of((2, 3), edges=EDGES, atoms=Atoms(0.0, 1.0, 1 / 255), device="meta")
    parts = [part.to("meta") for part in rows()]
    updated = sums.update(*parts, torch.ones(50, 2, 3, dtype=torch.bool, device="meta"))
    assert updated.merge(updated).sums.device.type == "meta"


def test_state_is_new_and_float64():
    sums = CalibrationSums.of((2, 3))
    updated = sums.update(*(part.float() for part in rows()))
    assert sums.sums.abs().sum() == 0 and updated.sums.dtype == torch.float64


def test_what_is_refused():
    mean, var, x = rows()
    sums = CalibrationSums.of((2, 3), atoms=Atoms(0.0, 1.0))
    with pytest.raises(bae.errors.DataError, match="at least one value"):
        sums.result()
    with pytest.raises(bae.errors.DataError, match="outside"):
        sums.update(mean, var, x + 5).result()
    with pytest.raises(bae.errors.NonFiniteError, match="variance 0"):
        sums.update(mean, 0 * var, x.clamp(0, 1)).result()
    with pytest.raises(bae.errors.ShapeError, match=r"\(B, 2, 3\)"):
        sums.update(mean, var, x[:, :1])
    with pytest.raises(bae.errors.DataError, match="n_bins of at least 1"):
        CalibrationSums.of((2, 3), n_bins=0)
    for other in (CalibrationSums.of((2, 3)), metrics.BinarySums.of((2, 3), n_bins=11)):  # as many sums
        with pytest.raises(bae.errors.ShapeError, match="same settings"):
            sums.merge(other)
    with pytest.raises(bae.errors.ShapeError, match=r"\(B, 2, 3\)"):
        sums.update(mean, var[:, :1], x)
    with pytest.raises(bae.errors.ShapeError, match="a mask of dtype bool"):
        sums.update(mean, var, x, torch.ones_like(x))
    with pytest.raises(bae.errors.ShapeError, match=r"\(B, 2, 3\)"):
        sums.update(mean, var, x, torch.ones(50, dtype=torch.bool))
    with pytest.raises(bae.errors.ShapeError, match=r"expected \(B\) for all"):
        CalibrationSums.of(()).update(mean, var, x)
