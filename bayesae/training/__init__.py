"""The two loops: networks and weight posteriors."""

from bayesae.training.model import History, estimate_noise, fit_model
from bayesae.training.weights import fit_weights, log_joint

__all__ = ["History", "estimate_noise", "fit_model", "fit_weights", "log_joint"]
