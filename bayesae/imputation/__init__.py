"""Missing entries as draws: methods over codes and weights, intervals, parts of the variance, pooled estimates."""

from bayesae.imputation.chain import Completions, impute_by_chain

__all__ = ["Completions", "impute_by_chain"]
