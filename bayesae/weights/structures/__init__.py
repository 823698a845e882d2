"""The structures of `Laplace`: which part of a curvature is kept, one small class each."""

from bayesae.weights.structures.base import Curvature, Precision, Structure
from bayesae.weights.structures.elementary import Dense, Diagonal
from bayesae.weights.structures.kronecker import Eigencorrected, Kronecker
from bayesae.weights.structures.low_rank import LowRank

__all__ = ["Curvature", "Dense", "Diagonal", "Eigencorrected", "Kronecker", "LowRank", "Precision", "Structure"]
