r"""Likelihoods p(x | outputs): heads that turn a network's tensor into a distribution over data.

Outputs have shape (..., B, \*O), targets (B, \*D); see `bayesae.types.Likelihood`.
"""

from bayesae.likelihoods.base import Head
from bayesae.likelihoods.bernoulli import Bernoulli
from bayesae.likelihoods.categorical import Categorical
from bayesae.likelihoods.continuous_bernoulli import ContinuousBernoulli
from bayesae.likelihoods.counts import NegativeBinomial, Poisson, size_factors
from bayesae.likelihoods.gaussian import Gaussian
from bayesae.likelihoods.heteroscedastic import HeteroscedasticGaussian
from bayesae.likelihoods.mixed import Mixed
from bayesae.likelihoods.names import NAMES, build
from bayesae.likelihoods.student_t import StudentT

__all__ = [
    "NAMES",
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Gaussian",
    "Head",
    "HeteroscedasticGaussian",
    "Mixed",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "build",
    "size_factors",
]
