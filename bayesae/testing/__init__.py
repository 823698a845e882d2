"""Problems with their exact answers, and conformance checks that third parties can run on their own methods."""

from bayesae.testing.checks import check_weight_inference, run_inference
from bayesae.testing.code_checks import check_code_posterior
from bayesae.testing.linear import LinearGaussian
from bayesae.testing.worlds import ConjugateRegression

__all__ = ["ConjugateRegression", "LinearGaussian", "check_code_posterior", "check_weight_inference", "run_inference"]
