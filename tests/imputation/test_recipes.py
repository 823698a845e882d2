"""Recipes of imputation run end to end with ``--fast``."""

from __future__ import annotations

import pytest

from tests.test_recipes import run


@pytest.mark.slow
def test_impute_tables(tmp_path):
    records = run("impute_tables.py", tmp_path, row="| iterative, draws")
    assert {row.setting for row in records.rows} == {"MCAR 50 %", "all settings"}
    assert records.mean(method="ensemble", metric="CRPS") < 0.7 * records.mean(method="mean", metric="CRPS")
    assert abs(records.mean(method="ensemble", metric="coverage 90") - 0.9) < 0.08


@pytest.mark.slow
def test_impute_mnist(tmp_path):
    records = run("impute_mnist.py", tmp_path, row="| ensemble")
    assert {row.setting for row in records.rows} >= {"lower half", "random half"}
    for method in ("MAP", "Laplace", "ensemble", "MAP, Student-t", "ensemble, Student-t", "MAP, noise of the code"):
        where = {"setting": "random half", "method": method}
        assert records.mean(metric="accuracy", **where) > records.mean(
            setting="random half", method="zeros", metric="accuracy"
        )
