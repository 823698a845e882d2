"""`BayesianImputer`: means, draws and intervals in the units of the table."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bayesae as bae

N, D = 150, 5


def full_table():
    """Columns of very different units that two numbers explain, with little noise."""
    generator = np.random.RandomState(0)
    rows = generator.randn(N, 2) @ generator.randn(2, D) + 0.1 * generator.randn(N, D)
    return rows * [1.0, 1e3, 1e-2, 5.0, 1.0] + [0.0, 1e4, 3.0, -7.0, 0.0]


@pytest.fixture(scope="module")
def table():
    rows = full_table()
    missing = np.random.RandomState(1).rand(N, D) < 0.2
    missing[missing.all(1)] = False
    missing[:3] = False
    rows[missing] = np.nan
    return rows


@pytest.fixture(scope="module")
def imputer(table):
    return bae.BayesianImputer(
        latent_dim=2, hidden=[8], epochs=30, batch_size=40, learning_rate=2e-2, random_state=0
    ).fit(table)


def test_means_beat_the_columns_own(imputer, table):
    filled, truth, missing = imputer.transform(table), full_table(), np.isnan(table)
    np.testing.assert_array_equal(filled[~missing], table[~missing])
    scale = np.nanstd(table, 0)
    error = ((filled - truth) / scale)[missing]
    plain = ((np.nanmean(table, 0) - truth) / scale)[missing]
    assert (error**2).mean() < 0.5 * (plain**2).mean()
    np.testing.assert_array_equal(filled, imputer.transform(table))  # a table's draws are the same at every call


def test_draws_means_and_intervals_are_of_the_same_law(imputer, table):
    draws, filled, missing = imputer.sample(table, 200), imputer.transform(table), np.isnan(table)
    low, high = imputer.interval(table, 0.9)
    assert draws.shape == (200, N, D)
    scale = np.nanstd(table, 0)
    assert np.abs(((draws.mean(0) - filled) / scale)[missing]).mean() < 0.1
    inside = ((low <= draws) & (draws <= high))[:, missing].mean()
    assert abs(inside - 0.9) < 0.05
    assert ((low < high) == missing).all()
    np.testing.assert_array_equal(draws[:, ~missing], np.broadcast_to(table[~missing], (200, (~missing).sum())))


def test_is_impute_in_scaled_columns(imputer, table):
    rows = table[np.isnan(table).any(1)]
    predictive = bae.Predictive(imputer.model_, imputer.posterior_, bae.codes.amortised)
    found = bae.impute(predictive, (rows - imputer.mean_) / imputer.scale_, n_draws=50, seed=imputer._seed)
    expected = found.mean.numpy() * imputer.scale_ + imputer.mean_
    np.testing.assert_allclose(imputer.transform(rows), expected, rtol=1e-12)


def test_scales_by_what_is_observed(imputer, table):
    np.testing.assert_allclose(imputer.mean_, np.nanmean(table, 0), rtol=1e-12)
    np.testing.assert_allclose(imputer.scale_, np.nanstd(table, 0), rtol=1e-9)


def test_complete_rows_come_back(imputer, table):
    complete = table[:3]
    filled = imputer.transform(complete)
    np.testing.assert_array_equal(filled, complete)
    assert filled is not complete
    assert imputer.sample(complete, 2).shape == (2, 3, D)
    np.testing.assert_array_equal(imputer.interval(complete)[0], complete)


def test_goes_into_a_pipeline_and_keeps_dtypes_and_names(table):
    imputer = bae.BayesianImputer(epochs=1, n_draws=4, random_state=0)
    found = make_pipeline(imputer, StandardScaler()).fit_transform(table.astype(np.float32))
    assert found.shape == (N, D) and not np.isnan(found).any()
    assert imputer.transform(table.astype(np.float32)).dtype == np.float32
    assert imputer.get_feature_names_out(list("abcde")).tolist() == list("abcde")


def test_weights_and_methods_are_arguments(table):
    imputer = bae.BayesianImputer(
        epochs=2,
        weights=bae.weights.Ensemble(2, epochs=1),
        method=bae.imputation.CodeLaplace(2),
        n_draws=6,
        random_state=0,
    ).fit(table)
    draws = imputer.sample(table)
    assert draws.shape == (6, N, D) and imputer.posterior_.n_atoms == 2


class TestErrors:
    def test_columns_and_rows(self, table, imputer):
        with pytest.raises(bae.errors.DataError, match=r"in every column; got none in columns \[1\]"):
            bae.BayesianImputer().fit(np.where(np.arange(D) == 1, np.nan, table))
        with pytest.raises(ValueError, match="infinity"):
            bae.BayesianImputer().fit(np.where(np.arange(D) == 1, np.inf, table))
        with pytest.warns(RuntimeWarning, match="1 of 1 rows have no observed entry"):
            assert not np.isnan(imputer.transform(np.full((1, D), np.nan))).any()

    def test_arguments(self, table):
        with pytest.raises(bae.errors.UnsupportedError, match="a method of imputation"):
            bae.BayesianImputer(method="gibbs").fit(table)
        with pytest.raises(bae.errors.DataError, match="n_draws of at least 1"):
            bae.BayesianImputer(n_draws=0).fit(table)
        with pytest.raises(bae.errors.DataError, match="number of epochs"):
            bae.BayesianImputer(epochs=0).fit(table)

    def test_too_few_draws_for_an_interval(self, table):
        imputer = bae.BayesianImputer(epochs=1, n_draws=10, random_state=0).fit(table)
        with pytest.raises(bae.errors.DataError, match="19 draws or more"):
            imputer.interval(table, 0.9)
