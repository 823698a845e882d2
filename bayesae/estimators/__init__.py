"""scikit-learn estimators for tables: the six lines as `fit`, `transform` and `score_samples`.

The only part of the library that needs scikit-learn to be imported; ``import bayesae`` loads it on first use.
"""

from bayesae.estimators.autoencoder import BayesianAutoencoder
from bayesae.estimators.imputer import BayesianImputer
from bayesae.estimators.outliers import BayesianOutlierDetector

__all__ = ["BayesianAutoencoder", "BayesianImputer", "BayesianOutlierDetector"]
