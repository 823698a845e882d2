"""Weight posteriors: how q(theta) is fitted."""

from bayesae.weights.base import Info, WeightInference
from bayesae.weights.dropout import Dropout
from bayesae.weights.ensemble import Ensemble
from bayesae.weights.laplace import Laplace
from bayesae.weights.map import MAP
from bayesae.weights.mean_field import MeanField
from bayesae.weights.mixture import MixtureOf
from bayesae.weights.online_laplace import OnlineLaplace
from bayesae.weights.sgmcmc import HMC, MALA, SGHMC, SGLD, SGNHT, Cyclical, Decay, RMSProp, ScaleAdaptation
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
from bayesae.weights.swag import SWAG

__all__ = [
    "HMC",
    "MALA",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "Cyclical",
    "Decay",
    "RMSProp",
    "ScaleAdaptation",
    "MAP",
    "SWAG",
    "Dropout",
    "Ensemble",
    "Info",
    "Laplace",
    "LowRank",
    "MixtureOf",
    "OnlineLaplace",
    "MeanField",
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
