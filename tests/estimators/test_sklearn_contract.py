"""scikit-learn's own checks of what an estimator promises."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

import bayesae as bae

# few epochs: the checks look at the contract, not at the fit
ESTIMATORS = [
    bae.BayesianAutoencoder(epochs=2, patience=2),
    bae.BayesianOutlierDetector(epochs=2, patience=2),
    bae.BayesianImputer(epochs=2, patience=2, n_draws=4),
]


@pytest.mark.slow
@parametrize_with_checks(ESTIMATORS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_contract(estimator, check):
    check(estimator)
