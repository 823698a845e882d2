"""The benchmark's own arithmetic; no method is judged."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

import bayesae as bae
from bayesae import report
from benchmarks import adbench


def test_mean_ranks_share_ties():
    values = np.random.RandomState(0).randint(4, size=(9, 5)).astype(float)
    np.testing.assert_array_equal(adbench.mean_ranks(values), [rankdata(-row) for row in values])


def test_ranks_are_among_the_default_and_the_peers(monkeypatch):
    """Another score of ours stands in the default's place, and what did not run everywhere is left out."""
    monkeypatch.setattr(adbench, "SETS", {"all": ("a", "b"), "second": ("b",)})
    records = report.Records()
    ours = {"a": {"bayesae": 0.9, "bayesae, other": 0.6}, "b": {"bayesae": 0.6, "bayesae, other": 0.95}}
    peers = {"a": {"y": 0.5, "z": 0.7, "partial": 1.0}, "b": {"y": 0.8, "z": 0.7}}
    for table in ("a", "b"):
        for method, value in (ours[table] | peers[table]).items():
            for metric in ("AUROC", "AUPR"):
                records.add(data=table, setting="", method=method, metric=metric, seed=0, value=value)
    adbench.add_ranks(records)

    def rank(method, data="all", metric="AUROC rank"):
        return records.mean(method=method, metric=metric, data=data)

    assert [rank(m) for m in ("bayesae", "bayesae, other", "y", "z")] == [2, 1.5, 2, 2]
    assert [rank(m, "second") for m in ("bayesae", "bayesae, other", "y", "z")] == [3, 1, 1, 2]
    assert rank("bayesae", metric="AUROC rank low") == 1 and rank("bayesae", metric="AUROC rank high") == 3
    assert rank("y", metric="AUROC") == pytest.approx(0.65)
    assert not any(row.method == "partial" and row.data == "all" for row in records.rows)


def test_a_missing_peer_is_left_out_with_its_reason(monkeypatch):
    generator = np.random.RandomState(0)
    rows = torch.from_numpy(generator.randn(60, 3))
    test = torch.cat([rows, rows[:9] + 9]), torch.cat([torch.zeros(60), torch.ones(9)]).long()
    monkeypatch.setattr(bae.datasets, "load", lambda *_, **__: ((rows, torch.zeros(60)), test))

    def absent(*_):
        raise ImportError("No module named 'pyod'")

    monkeypatch.setitem(adbench.CONTENDERS, "PyOD VAE", absent)
    records = report.Records()
    missing = adbench.measure("t", 0, ["PyOD VAE", "IsolationForest", "LocalOutlierFactor"], records)
    assert missing == {"PyOD VAE": "No module named 'pyod': pip install pyod"}
    assert records.mean(method="IsolationForest", metric="AUROC") > 0.9
    assert records.mean(method="LocalOutlierFactor", metric="AUROC") > 0.9
