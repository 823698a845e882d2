"""Exact second-order information of networks with many outputs; no word of Bayes in here."""

from bayesae.curvature.block import ggn_block
from bayesae.curvature.covariances import (
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    LowRankCovariance,
    RotatedBlock,
)
from bayesae.curvature.diagonal import ggn_diagonal
from bayesae.curvature.kronecker import KroneckerCurvature, KroneckerFactors, eigencorrection, kronecker_factors
from bayesae.curvature.layout import Layout
from bayesae.curvature.linearisation import Linearisation
from bayesae.curvature.monte_carlo import MonteCarloDiagonal, approximate_diagonal, monte_carlo_diagonal
from bayesae.curvature.plan import Plan
from bayesae.curvature.products import ggn_product
from bayesae.curvature.sweep import plan
from bayesae.curvature.variance import output_variance
from bayesae.types import BlockHessian, LowRankHessian

__all__ = [
    "BlockHessian",
    "DenseCovariance",
    "DiagonalCovariance",
    "KroneckerCovariance",
    "KroneckerCurvature",
    "KroneckerFactors",
    "Layout",
    "Linearisation",
    "LowRankCovariance",
    "LowRankHessian",
    "MonteCarloDiagonal",
    "Plan",
    "RotatedBlock",
    "approximate_diagonal",
    "eigencorrection",
    "ggn_block",
    "ggn_diagonal",
    "ggn_product",
    "kronecker_factors",
    "monte_carlo_diagonal",
    "output_variance",
    "plan",
]
