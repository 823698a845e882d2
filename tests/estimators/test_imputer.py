"""`BayesianImputer`: means, draws and intervals in the units of the table."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn
import torch
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


def test_frames_and_their_missing_values(table, imputer):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table, columns=list("abcde"))
    nullable = frame.convert_dtypes()  # Float64 with pandas.NA
    assert nullable.isna().to_numpy().any() and nullable.dtypes["a"] == "Float64"
    named = bae.BayesianImputer(epochs=1, n_draws=4, random_state=0).fit(frame).set_output(transform="pandas")
    filled = named.transform(nullable)
    assert list(filled.columns) == list("abcde") and (filled.index == frame.index).all()
    np.testing.assert_array_equal(filled.to_numpy(), named.transform(frame).to_numpy())
    with pytest.raises(ValueError, match="feature names"):
        named.transform(frame.rename(columns={"a": "z"}))


def test_what_was_missing_can_stand_beside(table):
    """What other imputers call add_indicator."""
    from sklearn.impute import MissingIndicator
    from sklearn.pipeline import make_union

    imputer = bae.BayesianImputer(epochs=1, n_draws=4, random_state=0)
    found = make_union(imputer, MissingIndicator(features="all")).fit_transform(table)
    np.testing.assert_array_equal(found[:, D:].astype(bool), np.isnan(table))
    np.testing.assert_array_equal(found[:, :D], imputer.fit_transform(table))


def test_whole_numbers_and_a_seed(table):
    counts = np.random.RandomState(0).poisson(3, (40, 3))
    options = {"epochs": 1, "n_draws": 4, "likelihood": bae.likelihoods.Poisson(), "standardise": False}
    holed = np.where(np.random.RandomState(1).rand(40, 3) < 0.2, np.nan, counts)
    holed[:, 0] = counts[:, 0]
    one, again = (bae.BayesianImputer(**options, random_state=3).fit(holed).sample(holed) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, one.round())
    assert not np.array_equal(one[0], one[1])
    filled = bae.BayesianImputer(**options, random_state=3).fit(counts).transform(counts)  # nothing to do
    np.testing.assert_array_equal(filled, counts)


def test_columns_of_every_kind():
    generator, likelihoods = np.random.RandomState(0), bae.likelihoods
    code = generator.randn(60)
    columns = [code, code > 0, generator.poisson(np.exp(code)), 1 + (code > 0.5) + (code > -0.5), -code]
    full = np.stack(columns, 1).astype(float)
    table = np.where(generator.rand(60, 5) < 0.2, np.nan, full)
    heads = [likelihoods.Gaussian(), likelihoods.Bernoulli(), likelihoods.Poisson(),
             likelihoods.Categorical(3, [1, 2, 3]), likelihoods.Gaussian()]  # fmt: skip
    imputer = bae.BayesianImputer(
        2, [8], likelihoods.Mixed(heads), standardise=False, epochs=3, n_draws=8, random_state=0
    ).fit(table)
    draws = imputer.sample(table)
    imputer.model_.likelihood.check(torch.from_numpy(draws.reshape(-1, 5)))
    observed = ~np.isnan(table)
    np.testing.assert_array_equal(draws[:, observed], np.broadcast_to(full[observed], (8, observed.sum())))
    filled = imputer.transform(table)
    assert not np.isnan(filled).any() and filled[:, 3].min() >= 1 and filled[:, 3].max() <= 3


@pytest.mark.parametrize(
    "likelihood", [bae.likelihoods.HeteroscedasticGaussian(), bae.likelihoods.Categorical(3)], ids=repr
)
def test_likelihoods_with_several_parameters(likelihood):
    generator = np.random.RandomState(0)
    table = generator.randint(3, size=(40, 3)).astype(float)
    table[generator.rand(40, 3) < 0.2] = np.nan
    table[:, 0] = 1
    imputer = bae.BayesianImputer(likelihood=likelihood, standardise=False, epochs=1, n_draws=4, random_state=0).fit(
        table
    )
    assert imputer.sample(table).shape == (4, 40, 3)
    if likelihood.is_nominal:
        with pytest.raises(bae.errors.UnsupportedError, match="columns with a mean"):
            imputer.transform(table)


def test_transform_keeps_no_draws(imputer, table, monkeypatch):
    from bayesae.estimators import imputer as module

    seen = []
    monkeypatch.setattr(module, "impute", lambda *args, **kwargs: seen.append(bae.impute(*args, **kwargs)) or seen[-1])
    filled = imputer.transform(table)
    draws = imputer.sample(table)
    assert len(seen[0].draws) == 0 and len(seen[1].draws) == 50
    assert not np.isnan(filled).any() and draws.shape[0] == 50


def test_intervals_of_more_draws_than_the_estimators_own(imputer, table):
    draws, missing = imputer.sample(table, 199), np.isnan(table)
    low, high = imputer.interval(table, 0.99, n_draws=199)
    np.testing.assert_allclose(low[missing], draws.min(0)[missing], rtol=1e-12)
    np.testing.assert_allclose(high[missing], draws.max(0)[missing], rtol=1e-12)
    wide, narrow = (np.subtract(*imputer.interval(table, level)[::-1])[missing] for level in (0.9, 0.5))
    assert (wide > narrow).all()


class TestDiagnose:
    def test_is_the_figures_of_what_transform_imputes(self, imputer, table):
        found, missing = imputer.diagnose(table), np.isnan(table).any(1)
        assert list(found) == ["ess", "rhat", "acceptance", "n_divergent", "residual"]
        scaled = torch.from_numpy((table - imputer.mean_) / imputer.scale_)[missing]
        predictive = bae.Predictive(imputer.model_, imputer.posterior_, bae.codes.amortised)
        twin = bae.impute(predictive, scaled, n_draws=50, seed=imputer._seed)
        for name in ("ess", "acceptance"):
            assert np.isnan(found[name][~missing]).all()
            np.testing.assert_array_equal(found[name][missing], getattr(twin, name).numpy())
        assert all(np.isnan(found[name]).all() for name in ("rhat", "n_divergent", "residual"))
        assert found["ess"][missing].max() <= 50 and imputer.diagnose(table, 20)["ess"][missing].max() <= 20

    @pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
    def test_of_chains_and_of_a_table_without_anything_missing(self, imputer, table):
        chains = sklearn.base.clone(imputer).set_params(epochs=1, n_draws=10, method=bae.imputation.CodeHMC(3, 10))
        found, missing = chains.fit(table).diagnose(table), np.isnan(table).any(1)
        for name in ("ess", "rhat", "acceptance", "n_divergent"):
            np.testing.assert_array_equal(np.isnan(found[name]), ~missing)
        nothing = imputer.diagnose(np.nan_to_num(table)[:4])
        assert all(values.shape == (4,) and np.isnan(values).all() for values in nothing.values())


def test_a_row_has_the_same_law_among_others_and_alone(imputer, table):
    """Draws differ, as the docstring of ``transform`` says: by what 300 of them can."""
    row = int(np.flatnonzero(np.isnan(table).any(1))[5])
    entry, missing = table[row : row + 1], np.isnan(table[row])
    many, alone = imputer.sample(table, 300)[:, row, missing], imputer.sample(entry, 300)[:, 0, missing]
    assert not np.array_equal(many, alone)
    error = np.sqrt((many.var(0) + alone.var(0)) / 300)
    ess = imputer.diagnose(entry, 300)["ess"][0]
    assert (np.abs(many.mean(0) - alone.mean(0)) < 4 * error * np.sqrt(300 / ess)).all()


def test_draws_of_networks_that_do_not_divide_them(table):
    """Three networks and 20 draws: the networks once each, and both parts of the variance there."""
    imputer = bae.BayesianImputer(epochs=2, weights=bae.weights.Ensemble(3, epochs=1), n_draws=20, random_state=0).fit(
        table
    )
    scaled = torch.from_numpy((table - imputer.mean_) / imputer.scale_)
    predictive = bae.Predictive(imputer.model_, imputer.posterior_, bae.codes.amortised)
    rows = scaled[scaled.isnan().any(1)]
    found = bae.impute(predictive, rows, n_draws=20, seed=imputer._seed)
    assert found.n_weight_draws == 3 and bool((found.moments.code[rows.isnan()] > 0).all())
    missing = np.isnan(table)
    filled = torch.from_numpy(((imputer.sample(table) - imputer.mean_) / imputer.scale_)[:, missing.any(1)])
    torch.testing.assert_close(filled[:, rows.isnan()], found.draws[:, rows.isnan()], rtol=1e-9, atol=1e-9)


def test_draws_of_networks_pool_in_nests(table):
    imputer = bae.BayesianImputer(epochs=2, weights=bae.weights.Ensemble(3, epochs=1), n_draws=12, random_state=0).fit(
        table
    )
    draws = imputer.sample(table)
    pooled = bae.imputation.pool(draws.mean(1), draws.var(1, ddof=1) / N, n_nests=imputer.posterior_.n_atoms)
    networks = draws.reshape(3, 4, N, D).mean((1, 2))
    total = (draws.var(1, ddof=1) / N).mean(0) + (1 + 1 / 3) * networks.var(0, ddof=1)
    total += (1 - 1 / 4) * draws.mean(1).reshape(3, 4, D).var(1, ddof=1).mean(0)
    np.testing.assert_allclose(pooled.var.numpy(), total, rtol=1e-9)


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
        with pytest.raises(
            bae.errors.UnsupportedError, match="takes drawn codes; got Laplace. Use bae.weights.Ensemble"
        ):
            bae.BayesianImputer(weights=bae.weights.Laplace()).fit(table)
        with pytest.raises(bae.errors.DataError, match="n_draws of at least 1"):
            bae.BayesianImputer(n_draws=0).fit(table)
        with pytest.raises(bae.errors.DataError, match="number of epochs"):
            bae.BayesianImputer(epochs=0).fit(table)

    def test_too_few_draws_for_an_interval(self, table):
        imputer = bae.BayesianImputer(epochs=1, n_draws=10, random_state=0).fit(table)
        with pytest.raises(bae.errors.DataError, match="19 draws or more"):
            imputer.interval(table, 0.9)
        assert imputer.interval(table, 0.9, n_draws=19)[0].shape == table.shape

    def test_arguments_are_read_of_complete_tables_too(self, imputer, table):
        complete = np.nan_to_num(table)
        for rows in (table, complete):
            with pytest.raises(bae.errors.DataError, match=r"a level of intervals in \(0, 1\); got 7"):
                imputer.interval(rows, 7.0)
            for method in (imputer.sample, imputer.diagnose, lambda x, n: imputer.interval(x, 0.5, n)):
                with pytest.raises(bae.errors.DataError, match="n_draws of at least 1"):
                    method(rows, 0)
        low, high = imputer.interval(complete)
        np.testing.assert_array_equal(low, complete)
        np.testing.assert_array_equal(high, complete)
