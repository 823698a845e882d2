"""Scores of unfamiliar data, and their parts number by number; every one of them is higher for what is stranger."""

from bayesae.ood.contributions import Contributions, contribution_draws, contribution_moments, contributions
from bayesae.ood.scores import (
    disagreement,
    negative_log_density,
    negative_log_predictive,
    reconstruction_error,
    waic,
    weight_variance,
)

__all__ = [
    "Contributions",
    "contribution_draws",
    "contribution_moments",
    "contributions",
    "disagreement",
    "negative_log_density",
    "negative_log_predictive",
    "reconstruction_error",
    "waic",
    "weight_variance",
]
