"""Scores of unfamiliar data; every one of them is higher for what is stranger."""

from bayesae.ood.scores import (
    disagreement,
    negative_log_density,
    negative_log_predictive,
    reconstruction_error,
    waic,
    weight_variance,
)

__all__ = [
    "disagreement",
    "negative_log_density",
    "negative_log_predictive",
    "reconstruction_error",
    "waic",
    "weight_variance",
]
