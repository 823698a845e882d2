from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone

import bayesae as bae
from bayesae import files
from bayesae.errors import BayesAEError, NotFittedError, UnsupportedError
from tests.files.test_damage import as_skeleton, value_of, with_tree

L = bae.likelihoods
TABLE = np.random.RandomState(0).randn(40, 5) * [1, 2, 3, 4, 5]
COUNTS = abs(TABLE) // 1
ARGUMENTS = {"hidden": [4], "latent_dim": 2, "epochs": 2, "random_state": 0}
ESTIMATORS = {
    "autoencoder": lambda: bae.BayesianAutoencoder(**ARGUMENTS).fit(TABLE),
    "autoencoder of single precision": lambda: bae.BayesianAutoencoder(**ARGUMENTS).fit(TABLE.astype(np.float32)),
    "detector": lambda: bae.BayesianOutlierDetector(**ARGUMENTS).fit(TABLE),
    "contaminated": lambda: bae.BayesianOutlierDetector(**ARGUMENTS, contamination=0.1).fit(TABLE),
    "counts": lambda: bae.BayesianAutoencoder(**ARGUMENTS, likelihood=L.Poisson(), standardise=False).fit(COUNTS),
    "methods": lambda: bae.BayesianAutoencoder(
        **ARGUMENTS, weights=bae.weights.Laplace(bae.weights.LowRank(3), subset=("decoder.**",), prior_groups="layer")
    ).fit(TABLE),
    "ensemble": lambda: bae.BayesianOutlierDetector(**ARGUMENTS, weights=bae.weights.Ensemble(2, epochs=1)).fit(TABLE),
    "MAP": lambda: bae.BayesianAutoencoder(**ARGUMENTS, weights=bae.weights.MAP()).fit(TABLE),
}


def check_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    elif isinstance(a, torch.nn.Module):
        assert repr(a) == repr(b) and a.arguments == b.arguments
    else:
        assert a == b


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_comes_back(name, tmp_path):
    before = ESTIMATORS[name]()
    bae.save(before, tmp_path / "file")
    after = bae.load(tmp_path / "file")
    assert type(after) is type(before)
    one, other = before.get_params(), after.get_params()
    assert list(one) == list(other)
    for key in one:
        check_equal(one[key], other[key])
    assert vars(before).keys() == vars(after).keys()
    for key in vars(before).keys() - {"model_", "posterior_", "likelihood"}:
        check_equal(getattr(before, key), getattr(after, key))
    table = TABLE[::-1].copy() if name != "counts" else COUNTS
    assert np.array_equal(before.contributions(table), after.contributions(table))
    if hasattr(before, "transform"):
        assert np.array_equal(before.transform(table), after.transform(table))
    else:
        assert np.array_equal(before.predict(table), after.predict(table))
        assert np.array_equal(before.tail_probability(table), after.tail_probability(table))
    clone(after)


def test_column_names_come_back(tmp_path):
    before = ESTIMATORS["autoencoder"]()
    before.feature_names_in_ = np.array(list("abcde"), dtype=object)  # as of a frame
    bae.save(before, tmp_path / "file")
    check_equal(before.feature_names_in_, bae.load(tmp_path / "file").feature_names_in_)


def test_a_loaded_estimator_fits_as_the_saved_one_would(tmp_path):
    before = ESTIMATORS["detector"]()
    bae.save(before, tmp_path / "file")
    after = bae.load(tmp_path / "file").fit(TABLE)
    assert np.array_equal(before.decision_scores_, after.decision_scores_)


def test_what_an_estimator_may_not_have_is_named(tmp_path):
    with pytest.raises(NotFittedError, match="fit"):
        bae.save(bae.BayesianAutoencoder(), tmp_path / "file")
    with pytest.raises(UnsupportedError, match="LinearRegression"):
        from sklearn.linear_model import LinearRegression

        bae.save(LinearRegression(), tmp_path / "file")
    estimator = ESTIMATORS["autoencoder"]()
    estimator.extra_ = 3
    with pytest.raises(UnsupportedError, match="extra_"):
        bae.save(estimator, tmp_path / "file")
    state = np.random.RandomState(0)
    estimator = bae.BayesianAutoencoder(**(ARGUMENTS | {"random_state": state})).fit(TABLE)
    with pytest.raises(UnsupportedError, match=r"RandomState at 'arguments/random_state'.*set_params\(random_state"):
        bae.save(estimator, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    scores = estimator.score_samples(TABLE)  # the advice is sound
    bae.save(estimator.set_params(random_state=None), tmp_path / "file")
    assert np.array_equal(bae.load(tmp_path / "file").score_samples(TABLE), scores)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"latent_dim": np.int64(2), "epochs": np.int32(2), "learning_rate": np.float32(0.5)}, {"latent_dim": 2}),
        ({"hidden": np.array([8, 4])}, {"hidden": [8, 4]}),
        ({"hidden": (np.int64(8), 4)}, {"hidden": (8, 4)}),
        ({"standardise": np.bool_(True), "random_state": np.int64(3)}, {"standardise": True, "random_state": 3}),
        ({"weights": bae.weights.Laplace(bae.weights.LowRank(np.int64(2)))}, {}),
        ({"weights": bae.weights.Ensemble(np.int64(2), np.int64(1))}, {"weights": bae.weights.Ensemble(2, 1)}),
        ({"likelihood": L.StudentT(np.float32(4), floor=np.float32(0.25))}, {}),
    ],
)
def test_arguments_of_numpy_come_back_as_numbers(arguments, expected, tmp_path):
    before = bae.BayesianAutoencoder(**(ARGUMENTS | arguments)).fit(TABLE)
    bae.save(before, tmp_path / "file")
    after = bae.load(tmp_path / "file")
    assert np.array_equal(before.score_samples(TABLE), after.score_samples(TABLE))
    for key, value in expected.items():
        assert getattr(after, key) == value and type(getattr(after, key)) is type(value)
    assert all(getattr(before, key) is value for key, value in arguments.items())


def test_keywords_of_predictives_are_not_for_estimators(tmp_path):
    bae.save(ESTIMATORS["autoencoder"](), tmp_path / "file")
    for keyword in ({"dtype": torch.float32}, {"device": "cpu"}, {"encoder": torch.nn.Linear(1, 1)}):
        with pytest.raises(UnsupportedError, match="estimator"):
            bae.load(tmp_path / "file", **keyword)


def test_a_description_for_people(tmp_path):
    bae.save(ESTIMATORS["detector"](), tmp_path / "file")
    found = files.describe(tmp_path / "file")
    assert found["type"] == "BayesianOutlierDetector" and found["arguments"]["epochs"] == 2
    assert found["attributes"]["mean_"] == "float64 (5,)"


HOSTILE = {
    "another class": (("type",), "os.system"),
    "a class of the base": (("type",), "TableModel"),
    "the other class": (("type",), "BayesianAutoencoder"),
    "no arguments": (("arguments",), as_skeleton({})),
    "a likelihood of code": (("arguments", "likelihood"), as_skeleton({"name": "os", "arguments": {}, "state": {}})),
    "an attribute of a method": (("attributes",), as_skeleton({"fit": 1})),
    "a mean of no columns": (("attributes", "mean_"), as_skeleton([1.0])),
    "columns without end": (("attributes", "n_features_in_"), 10**12),
    "a scale of 0": (("attributes", "scale_"), {"true": [5]}),
    "a threshold of words": (("attributes", "threshold_"), "x"),
    "a history of words": (("history",), as_skeleton({"train": "x"})),
    "a predictive of nothing": (("predictive",), as_skeleton({})),
    "weights of nothing": (("predictive", "weights"), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_estimators_are_refused(name, tmp_path):
    bae.save(ESTIMATORS["detector"](), tmp_path / "file")
    path, value = HOSTILE[name]

    def change(metadata):
        container, key = value_of(metadata, *path)
        container[key] = value

    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(with_tree(whole, change))
    with pytest.raises(BayesAEError):
        bae.load(tmp_path / "file")
