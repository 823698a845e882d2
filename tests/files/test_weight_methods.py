"""Every weight method through files and estimators; new rows of the table enter by themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

import bayesae as bae
from bayesae import encoding
from tests.cases import WEIGHT_CASES
from tests.conftest import small_model
from tests.files.cases import rows
from tests.files.test_round_trip import check_predicts_the_same_bits, check_same_model, through_a_file
from tests.test_encoding import check_same

# chains of a few steps say that they are short
pytestmark = pytest.mark.filterwarnings("ignore:(SGLD|SGHMC|SGNHT|HMC|MALA):RuntimeWarning")


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
class TestEveryMethod:
    def test_its_predictive_comes_back(self, case, tmp_path):
        model, x = small_model(hidden=(4,)), rows()
        size = len(x) if case.needs_all_rows else 4
        before = bae.Predictive(model, bae.fit_weights(case.quick(), model, x, batch_size=size, seed=0, progress=False))
        after = through_a_file(before, tmp_path / "file")
        check_same(before.weights, after.weights)
        check_same_model(before.model, after.model)
        check_predicts_the_same_bits(before, after, x)

    def test_its_settings_come_back(self, case):
        method = case.quick()
        skeleton, tensors = encoding.flatten(method)
        assert encoding.unflatten(json.loads(json.dumps(skeleton)), tensors) == method

    @pytest.mark.slow
    def test_estimators_take_it(self, case, tmp_path):
        table = np.random.RandomState(0).randn(24, 4)
        # noise that is given: what perturbs data asks for a Gaussian, and short chains for no narrow column
        arguments = {"weights": case.quick(), "likelihood": bae.likelihoods.Gaussian(0.5)}
        arguments |= {"epochs": 1, "hidden": (3,), "latent_dim": 2, "random_state": 0}
        for kind in (bae.BayesianAutoencoder, bae.BayesianOutlierDetector):
            before = kind(batch_size=24, **arguments).fit(table)
            scores = before.score_samples(table)
            assert scores.shape == (24,) and np.isfinite(scores).all()
            bae.save(before, tmp_path / "file")
            after = bae.load(tmp_path / "file")
            assert after.get_params()["weights"] == arguments["weights"]
            assert np.array_equal(scores, after.score_samples(table))
