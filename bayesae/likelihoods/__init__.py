r"""Likelihoods p(x | outputs): heads that turn a network's tensor into a distribution over data.

Outputs have shape (..., B, \*O), targets (B, \*D); see `bayesae.types.Likelihood`.
"""

from bayesae.likelihoods.base import Head
from bayesae.likelihoods.bernoulli import Bernoulli
from bayesae.likelihoods.gaussian import Gaussian

__all__ = ["Bernoulli", "Gaussian", "Head"]
