"""Batch typicality: its law over all orders, a loop, and the monitor of windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import bayesae as bae
from bayesae.ood import TypicalityMonitor

F64 = {"dtype": torch.float64}


def test_permutation_p_values_are_exact_over_all_orders():
    """Every division of six rows into calibration and batch: p <= a for a share of a at most, for any R."""
    rows = torch.tensor([0.0, 1.0, 3.0, 7.0, 15.0, 40.0], **F64)
    divisions = [torch.tensor([i, j]) for i in range(6) for j in range(i)]
    p = []
    for batch in divisions:
        rest = torch.tensor([i for i in range(6) if i not in batch.tolist()])
        for seed in range(40):
            p.append(bae.ood.batch_typicality(rows[rest], rows[batch][None], n_resamples=9, seed=seed).p_values)
    p = torch.cat(p)
    for rate in (0.1, 0.2, 0.5):
        assert float((p <= rate).double().mean()) <= rate + 3 * math.sqrt(rate / 40 / 15)


def test_p_values_against_a_loop():
    calibration, batches = torch.randn(12, **F64), torch.randn(3, 4, **F64) + 0.5
    found = bae.ood.batch_typicality(calibration, batches, n_resamples=99, seed=3)
    keys = torch.rand(99, 16, generator=torch.Generator().manual_seed(3), **F64)
    for m in range(3):
        pool, count = torch.cat([calibration, batches[m]]), 1
        observed = abs(float(batches[m].mean() - calibration.mean()))
        for row in keys.argsort(1):
            chosen = pool[row[:4]].mean() - pool[row[4:]].mean()
            count += abs(float(chosen)) >= observed - 1e-12
        assert float(found.statistics[m]) == pytest.approx(observed)
        assert float(found.p_values[m]) == count / 100


def test_permutation_p_values_have_their_discrete_law():
    """With R = 19, uniform on k / 20: chi-squared over 2,000 independent worlds."""
    scores = torch.distributions.Exponential(1.0).sample((2000, 30)).double()
    p = [
        float(bae.ood.batch_typicality(row[:20], row[None, 20:], n_resamples=19, seed=i).p_values)
        for i, row in enumerate(scores)
    ]
    counts = np.bincount(np.round(np.array(p) * 20).astype(int) - 1, minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_bootstrap_is_too_eager_where_batches_are_large():
    """What "Biased when" says: at B = n the variance is half of what it should be, so 10 % become 24 %."""
    rows = torch.randn(600, 80, **F64)
    rates = {}
    for method in ("bootstrap", "permutation"):
        p = [
            bae.ood.batch_typicality(row[:40], row[None, 40:], method=method, n_resamples=199, seed=i).p_values
            for i, row in enumerate(rows)
        ]
        rates[method] = float((torch.cat(p) <= 0.1).double().mean())
    low, high = stats.binom.ppf([0.005, 0.995], 600, 2 * stats.norm.sf(1.645 / math.sqrt(2))) / 600
    assert 0.19 < low < high < 0.3
    assert low - 0.02 <= rates["bootstrap"] <= high + 0.02
    assert rates["permutation"] <= stats.binom.ppf(0.995, 600, 0.1) / 600


def test_typicality_sees_both_sides_and_the_windows_of_a_stream():
    calibration = torch.randn(500)
    stream = torch.cat([torch.randn(100), torch.randn(100) - 1, torch.randn(100) + 1])
    for method in ("permutation", "bootstrap"):
        p = bae.ood.batch_typicality(calibration, stream.unfold(0, 50, 50), method=method).p_values
        assert bool((p[2:] == 1 / 1000).all()) and bool((p[:2] > 1 / 1000).all())


def test_sums_that_differ_in_their_last_bits_are_ties():
    """Tenths, whose sums round by their order, against whole numbers."""
    calibration, batches = torch.randint(0, 3, (9,)), torch.randint(0, 3, (30, 3))
    found = bae.ood.batch_typicality(calibration.double() / 10, batches.double() / 10, n_resamples=99, seed=1)
    keys = torch.rand(99, 12, generator=torch.Generator().manual_seed(1), **F64)
    for batch, p in zip(batches, found.p_values, strict=True):
        pool = torch.cat([calibration, batch])
        means = [abs(9 * int(pool[row[:3]].sum()) - 3 * int(pool[row[3:]].sum())) for row in keys.argsort(1)]
        observed = abs(9 * int(batch.sum()) - 3 * int(calibration.sum()))
        assert float(p) == (1 + sum(value >= observed for value in means)) / 100


def test_equal_scores_are_typical():
    found = bae.ood.batch_typicality(torch.full((37,), 0.1), torch.full((2, 11), 0.1))
    assert torch.equal(found.p_values, torch.ones(2, **F64))


def test_a_monitor_is_the_test_of_each_window():
    calibration, stream = torch.randn(200), torch.cat([torch.randn(75), torch.randn(60) + 2])
    monitor = TypicalityMonitor(window=25)
    state, info = monitor.update(monitor.init(calibration, seed=2), stream)
    expected = bae.ood.batch_typicality(calibration, stream[:125].reshape(5, 25), seed=2)
    assert_close(info.p_values, expected.p_values)
    assert_close(info.statistics, expected.statistics)
    assert info.is_alarm.tolist() == [False, False, False, True, True]
    assert state.alarmed_at == 100 and state.n_seen == 135
    pieces = []
    again = monitor.init(calibration, seed=2)
    for piece in stream.split([10, 14, 1, 60, 50]):
        again, part = monitor.update(again, piece)
        pieces.append(part.p_values)
    assert [len(piece) for piece in pieces] == [0, 0, 1, 2, 2]
    assert_close(torch.cat(pieces), info.p_values)
    assert (again.alarmed_at, again.n_seen) == (100, 135)


def test_typicality_of_bad_input():
    with pytest.raises(bae.errors.ShapeError, match=r"batches \(M, B\)"):
        bae.ood.batch_typicality(torch.rand(9), torch.rand(9))
    with pytest.raises(bae.errors.NonFiniteError, match="finite scores"):
        bae.ood.batch_typicality(torch.rand(9), torch.tensor([[math.inf, 0.0]]))
    with pytest.raises(bae.errors.DataError, match="n_resamples of at least 1"):
        bae.ood.batch_typicality(torch.rand(9), torch.rand(2, 2), n_resamples=0)
    with pytest.raises(bae.errors.DataError, match=r"n_resamples for a level of 0.001; got 99. Take 999"):
        TypicalityMonitor(level=0.001, n_resamples=99)
    with pytest.raises(bae.errors.DataError, match="window of at least 1 row"):
        TypicalityMonitor(window=0)
    with pytest.raises(bae.errors.UnsupportedError, match="method, one of"):
        TypicalityMonitor(method="jackknife")
    with pytest.raises(bae.errors.UnsupportedError, match="method, one of"):
        bae.ood.batch_typicality(torch.rand(9), torch.rand(1, 2), method="jackknife")


def test_an_infinite_score_is_refused_when_it_comes_not_when_its_window_is_full():
    monitor = TypicalityMonitor(window=50)
    with pytest.raises(bae.errors.NonFiniteError, match="finite scores"):
        monitor.init(torch.tensor([0.0, math.inf]), seed=0)
    state = monitor.init(torch.rand(9), seed=0)
    with pytest.raises(bae.errors.NonFiniteError, match="finite scores"):
        monitor.update(state, torch.tensor([-math.inf]))


@pytest.mark.parametrize("n", [1, 4, 48, 97, 102, 106, 999])
def test_the_fewest_resamples_of_a_level_are_enough(n):
    """1 / (n + 1) is a p-value that they can give, whichever way its inverse rounds."""
    calibration, monitor = torch.arange(40.0), TypicalityMonitor(window=30, level=1 / (n + 1), n_resamples=n)
    _, info = monitor.update(monitor.init(calibration, seed=0), 1e6 + torch.arange(30.0))
    assert float(info.p_values) == 1 / (n + 1) and bool(info.is_alarm)
    with pytest.raises(bae.errors.DataError, match=f"Take {n} or more"):
        TypicalityMonitor(level=1 / (n + 1), n_resamples=n - 1)
    with pytest.raises(bae.errors.DataError, match=f"Take {n + 1} or more"):
        TypicalityMonitor(level=math.nextafter(1 / (n + 1), 0), n_resamples=n)
