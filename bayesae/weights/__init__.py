"""Weight posteriors: how q(theta) is fitted."""

from bayesae.weights.base import Info, WeightInference
from bayesae.weights.ensemble import Ensemble
from bayesae.weights.laplace import Laplace
from bayesae.weights.map import MAP
from bayesae.weights.structures import LowRank
from bayesae.weights.subnetworks import (
    VarianceKept,
    largest_magnitude,
    largest_predictive_share,
    largest_variance,
    last_layer,
    random_weights,
    reference_laplace,
    share_of_variance_kept,
)

__all__ = [
    "MAP",
    "Ensemble",
    "Info",
    "Laplace",
    "LowRank",
    "VarianceKept",
    "WeightInference",
    "largest_magnitude",
    "largest_predictive_share",
    "largest_variance",
    "last_layer",
    "random_weights",
    "reference_laplace",
    "share_of_variance_kept",
]
