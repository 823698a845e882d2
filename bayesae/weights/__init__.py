"""Weight posteriors: how q(theta) is fitted."""

from bayesae.weights.base import Info, WeightInference
from bayesae.weights.ensemble import Ensemble
from bayesae.weights.laplace import Laplace
from bayesae.weights.map import MAP
from bayesae.weights.structures import LowRank

__all__ = ["MAP", "Ensemble", "Info", "Laplace", "LowRank", "WeightInference"]
