"""Problems with their exact answers, and conformance checks that third parties can run on their own methods."""

from bayesae.testing.checks import check_weight_inference, run_inference
from bayesae.testing.linear import LinearGaussian
from bayesae.testing.worlds import ConjugateRegression

__all__ = ["ConjugateRegression", "LinearGaussian", "check_weight_inference", "run_inference"]
