from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

import bayesae as bae

N, D = 120, 5


@pytest.fixture(scope="module")
def table():
    """Columns of very different units that two numbers explain, with little noise."""
    generator = np.random.RandomState(0)
    rows = generator.randn(N, 2) @ generator.randn(2, D) + 0.05 * generator.randn(N, D)
    return rows * [1.0, 1e3, 1e-2, 5.0, 1.0] + [0.0, 1e4, 3.0, -7.0, 0.0]


@pytest.fixture(scope="module")
def detector(table):
    return bae.BayesianOutlierDetector(epochs=60, hidden=[6], random_state=0).fit(table)


@pytest.fixture(scope="module")
def autoencoder(table):
    return bae.BayesianAutoencoder(epochs=60, hidden=[6], random_state=0).fit(table)


def jacobian_variance(network, posterior, rows, names):
    """diag(J Sigma J^T) by autograd, a Jacobian an output, for independent weights."""
    params = {name: posterior.mean[name] for name in names}
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda p, row: torch.func.functional_call(network, p, (row[None],))[0]), (None, 0)
    )(params, rows)
    variances = posterior.variances()
    return sum((leaf**2 * variances[name]).flatten(2).sum(2) for name, leaf in jacobian.items())


def test_contributions_are_the_formula_in_the_units_of_the_table(table):
    noise, weights = bae.likelihoods.Gaussian(per_output=True), bae.weights.Laplace()
    found = bae.BayesianOutlierDetector(epochs=3, hidden=[4], likelihood=noise, weights=weights, random_state=1)
    found.fit(table)
    rows = torch.from_numpy((table - found.mean_) / found.scale_)
    network, names = found.model_.network, list(found.posterior_.mean)
    variance = jacobian_variance(network, found.posterior_, rows, names).numpy()
    mean = found.model_(rows).detach().numpy() * found.scale_ + found.mean_
    noise = found.model_.likelihood.noise_var.numpy()
    total = (noise + variance) * found.scale_**2
    expected = 0.5 * (np.log(2 * np.pi * total) + (table - mean) ** 2 / total)
    np.testing.assert_allclose(found.contributions(table), expected, rtol=1e-8, atol=1e-8)


def test_scores_agree_and_have_their_signs(detector, table):
    score = detector.anomaly_score(table)
    np.testing.assert_allclose(detector.contributions(table).sum(1), score, rtol=1e-12)
    np.testing.assert_array_equal(detector.score_samples(table), -score)
    np.testing.assert_allclose(detector.decision_function(table), detector.threshold_ - score, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(detector.predict(table), np.where(score > detector.threshold_, -1, 1))
    np.testing.assert_array_equal(detector.labels_ == 1, detector.predict(table) == -1)
    np.testing.assert_allclose(detector.decision_scores_, score, rtol=1e-12)
    assert detector.score(table) == pytest.approx(-score.mean())


def test_strange_rows_are_found(detector, table):
    strange = table[:20].copy()
    strange[:, 3] += 2 * table[:, 3].std()
    familiar, unfamiliar = (torch.from_numpy(detector.anomaly_score(rows)) for rows in (table, strange))
    assert bae.metrics.auroc(familiar, unfamiliar) > 0.95
    assert len(familiar.unique()) == N
    # the code moves with a strange value, and other columns with the code: the column itself is not always the largest
    assert (detector.contributions(strange)[:, 3] > np.median(detector.contributions(table)[:, 3])).mean() > 0.6
    far = table.mean(0) + 50 * table.std(0)
    assert detector.predict(far[None]) == -1


def test_training_moves_the_weights(autoencoder, table):
    fresh = bae.BayesianAutoencoder(epochs=1, hidden=[6], learning_rate=1e-12, random_state=0).fit(table)
    for before, after in zip(fresh.model_.parameters(), autoencoder.model_.parameters(), strict=True):
        assert float((before - after).detach().abs().max()) > 1e-3
    assert autoencoder.score(table) > fresh.score(table) + 1


def test_threshold_is_a_quantile_of_held_out_rows(table):
    found = bae.BayesianOutlierDetector(epochs=2, false_alarm_rate=0.25, validation_fraction=0.5, random_state=0)
    found.fit(table)
    assert len(found.held_out_scores_) == N // 2 and set(found.held_out_scores_) <= set(found.decision_scores_)
    assert (found.held_out_scores_ > found.threshold_).mean() == pytest.approx(0.25, abs=1 / N)
    polluted = clone(found).set_params(contamination=0.1).fit(table)
    assert polluted.labels_.sum() == 12


def test_tail_probability_counts_held_out_rows(detector, table):
    rows = table[:30]
    slow = [
        (1 + sum(held_out >= score for held_out in detector.held_out_scores_)) / (1 + len(detector.held_out_scores_))
        for score in detector.anomaly_score(rows)
    ]
    np.testing.assert_array_equal(detector.tail_probability(rows), slow)
    assert detector.tail_probability(1e6 * rows).max() == 1 / (1 + len(detector.held_out_scores_))


@pytest.mark.parametrize("weights", [bae.weights.Laplace(), bae.weights.Laplace(subset=("decoder.**",))])
def test_code_uncertainty_is_the_linearised_one(table, weights):
    found = bae.BayesianAutoencoder(epochs=2, hidden=[4], weights=weights, random_state=0).fit(table)
    codes, deviation = found.transform(table, return_std=True)
    network = nn.Sequential(OrderedDict(encoder=found.model_.encoder))
    rows = torch.from_numpy((table - found.mean_) / found.scale_)
    names = [name for name in found.posterior_.mean if name.startswith("encoder.")]
    slow = jacobian_variance(network, found.posterior_, rows, names).sqrt().detach().numpy()
    np.testing.assert_allclose(deviation, slow, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(codes, found.transform(table))
    assert (deviation > 0).all() == (weights.subset == ("**",))


def test_codes_of_point_weights_are_certain_and_of_ensembles_refused(table):
    found = bae.BayesianAutoencoder(epochs=1, weights=bae.weights.MAP(), random_state=0).fit(table)
    assert not found.transform(table, return_std=True)[1].any()
    members = bae.weights.Ensemble(2, 1, 1e-3)
    found = bae.BayesianAutoencoder(epochs=1, weights=members, random_state=0).fit(table)
    assert np.isfinite(found.score_samples(table)).all()
    with pytest.raises(bae.errors.UnsupportedError, match="Normal posterior"):
        found.transform(table, return_std=True)


def test_inverse_transform_gives_rows_in_their_units(autoencoder, table):
    codes = autoencoder.transform(table)
    assert codes.shape == (N, 2) and list(autoencoder.get_feature_names_out()) == [
        "bayesianautoencoder0",
        "bayesianautoencoder1",
    ]
    error = (autoencoder.inverse_transform(codes) - table) / table.std(0)
    assert (error**2).mean() < 0.2
    with pytest.raises(bae.errors.ShapeError, match="codes of 2 columns"):
        autoencoder.inverse_transform(codes[:, :1])


def test_units_do_not_matter(table):
    """Another unit and another zero shift every log-density by the same constant."""
    model = bae.BayesianOutlierDetector(epochs=5, random_state=0)
    unit = np.array([2.0, 0.5, 1e4, 1.0, 8.0])
    here, there = (clone(model).fit(rows) for rows in (table, table * unit + 3))
    shift = np.log(unit).sum()
    np.testing.assert_allclose(there.anomaly_score(table * unit + 3), here.anomaly_score(table) + shift, atol=1e-5)


def test_random_state_decides_and_the_callers_generators_stay(table):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (bae.BayesianOutlierDetector(epochs=2, random_state=3).fit(table) for _ in range(2))
    np.testing.assert_array_equal(first.anomaly_score(table), second.anomaly_score(table))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    other = bae.BayesianOutlierDetector(epochs=2, random_state=np.random.RandomState(4)).fit(table)
    assert not np.array_equal(first.anomaly_score(table), other.anomaly_score(table))
    assert np.isfinite(bae.BayesianOutlierDetector(epochs=1).fit(table).score(table))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :1],
        lambda x: x[:2],
        lambda x: x[:7],
        lambda x: np.hstack([x, np.full((len(x), 2), 0.1)]),
        lambda x: np.asfortranarray(x)[::2, ::-1],
        lambda x: x.astype(np.float32),
        lambda x: np.round(x).astype(np.int32),
        lambda x: np.repeat(x[:3], 20, 0),
        lambda x: np.hstack([x, np.sign(x[:, :1]) * 10 ** (5 * np.abs(x[:, :1]))]),
    ],
    ids=["one column", "two rows", "few rows", "constant", "strided", "float32", "integers", "copies", "heavy tail"],
)
def test_tables_of_every_kind(table, change):
    rows = change(table)
    kept = rows.copy()
    found = bae.BayesianOutlierDetector(epochs=3, random_state=0).fit(rows)
    assert np.isfinite(found.anomaly_score(rows)).all() and found.n_features_in_ == rows.shape[1]
    np.testing.assert_array_equal(rows, kept)
    codes = bae.BayesianAutoencoder(epochs=1, random_state=0).fit_transform(rows)
    assert np.isfinite(codes).all() and codes.dtype == (np.float32 if rows.dtype == np.float32 else np.float64)


def test_other_likelihoods_come_without_scaling():
    bits = (np.random.RandomState(0).rand(40, 6) < 0.3).astype(float)
    model = bae.BayesianOutlierDetector(
        likelihood=bae.likelihoods.Bernoulli(), standardise=False, epochs=2, random_state=0
    )
    score = model.fit(bits).anomaly_score(bits)
    assert (score > 0).all() and not model.mean_.any() and (model.scale_ == 1).all()


def test_fitted_estimators_travel(detector, table):
    again = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(again.anomaly_score(table), detector.anomaly_score(table))
    assert not hasattr(clone(detector), "model_")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contamination": 0.7}, "contamination"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"hidden": [4, 0]}, "hidden"),
        ({"hidden": [4.5]}, "hidden"),
        ({"hidden": 16}, r"hidden, or None; got 16\. \[16\]"),
        ({"hidden": "16"}, "hidden"),
        ({"latent_dim": 2.0}, "latent_dim"),
        ({"contamination": "auto"}, "contamination"),
        ({"contamination": float("nan")}, "contamination"),
        ({"false_alarm_rate": None}, "false_alarm_rate"),
        ({"validation_fraction": "a"}, "validation_fraction"),
        ({"epochs": 3.0}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"patience": 0}, "a patience"),
        ({"patience": -5}, "patience"),
        ({"patience": 1.5}, "patience"),
    ],
)
def test_mistakes_are_named(table, arguments, message):
    with pytest.raises(bae.errors.DataError, match=message):
        bae.BayesianOutlierDetector(**arguments).fit(table)


@pytest.mark.parametrize("given", ["gaussian", bae.likelihoods.Gaussian, 3])
def test_what_is_no_likelihood_and_no_method_is_named(table, given):
    for name, message in (("likelihood", "a likelihood, or None"), ("weights", "a method of the weights")):
        with pytest.raises(bae.errors.UnsupportedError, match=message):
            bae.BayesianAutoencoder(**{name: given}).fit(table)


def test_training_without_patience_and_with_numbers_of_numpy(table):
    found = bae.BayesianAutoencoder(np.int64(2), np.array([4, 3]), epochs=np.int64(3), patience=None, random_state=0)
    assert found.fit(table).n_iter_ == 3 and found.transform(table[:1]).shape == (1, 2)


@pytest.mark.parametrize("unit", [1e-290, 1e-200, 1e-160, 1e160, 1e200, 1e304])
def test_columns_of_any_magnitude_are_scaled(table, unit):
    plain, found = (bae.BayesianAutoencoder(epochs=1, random_state=0) for _ in range(2))
    rows = table / table.std(0)
    plain._set_scale(rows)
    found._set_scale(rows * unit)
    np.testing.assert_allclose(found.scale_ / unit, plain.scale_, rtol=1e-9)
    np.testing.assert_allclose(found.mean_ / unit, plain.mean_, rtol=1e-9)


def test_a_huge_value_leaves_finite_scores(table):
    rows = np.vstack([table, np.full((1, D), 1e200)])
    found = bae.BayesianOutlierDetector(epochs=2, random_state=0).fit(rows)
    assert np.isfinite(found.scale_).all() and np.isfinite(found.decision_scores_).all()
    np.testing.assert_allclose(found.mean_, 1e200 / len(rows))


def test_ordinary_columns_keep_every_bit_of_their_scale(table):
    rows = np.hstack([table, np.full((N, 2), 0.1), np.zeros((N, 1)), 1e9 + 1e-3 * table])
    found = bae.BayesianAutoencoder(random_state=0)
    found._set_scale(np.hstack([rows, 1e200 * table]))
    deviation = rows.std(0)
    np.testing.assert_array_equal(found.mean_[: rows.shape[1]], rows.mean(0))
    is_constant = deviation <= 1e-12 * np.abs(rows.mean(0))
    assert is_constant[D : D + 3].all()
    np.testing.assert_array_equal(found.scale_[: rows.shape[1]], np.where(is_constant, 1.0, deviation))


def test_rows_beyond_floats_are_named():
    rows = np.random.RandomState(0).randn(20, 3)
    rows[:, 1] = 1.7e308
    rows[0, 1] = -1.7e308
    with pytest.raises(bae.errors.DataError, match=r"columns \[1\] \(1 in all\)"):
        bae.BayesianAutoencoder(epochs=1, random_state=0).fit(rows)


def test_they_load_on_first_use():
    assert {"estimators", "BayesianAutoencoder", "BayesianOutlierDetector"} <= set(dir(bae))
    assert bae.estimators.BayesianAutoencoder is bae.BayesianAutoencoder
    with pytest.raises(AttributeError, match="no attribute 'BayesianForest'"):
        _ = bae.BayesianForest
