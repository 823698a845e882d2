"""Exact second-order information of networks with many outputs; no word of Bayes in here."""

from bayesae.curvature.chain import Trace, trace
from bayesae.curvature.diagonal import ggn_diagonal
from bayesae.curvature.variance import output_variance

__all__ = ["Trace", "ggn_diagonal", "output_variance", "trace"]
