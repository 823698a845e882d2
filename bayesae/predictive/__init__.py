"""The predictive: everything that follows from a model and posteriors over its weights and codes."""

from bayesae.predictive.predictive import Predictive

__all__ = ["Predictive"]
