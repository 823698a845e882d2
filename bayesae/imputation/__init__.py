"""Missing entries as draws: methods over codes and weights, intervals, parts of the variance, pooled estimates."""

from bayesae.imputation.base import Found, Method, Problem
from bayesae.imputation.door import impute
from bayesae.imputation.iterated import FixedPoint, MetropolisGibbs, PseudoGibbs
from bayesae.imputation.latent import CodeHMC, CodeLaplace, ImportanceResampling
from bayesae.imputation.pooling import Pooled, pool
from bayesae.imputation.record import Imputations

__all__ = [
    "CodeHMC",
    "CodeLaplace",
    "FixedPoint",
    "Found",
    "ImportanceResampling",
    "Imputations",
    "Method",
    "MetropolisGibbs",
    "Pooled",
    "Problem",
    "PseudoGibbs",
    "impute",
    "pool",
]
