"""Scores of unfamiliar data, each higher for what is stranger, their parts, and what guarantees an alarm can have."""

from bayesae.ood.batches import (
    BatchTypicality,
    TypicalityInfo,
    TypicalityMonitor,
    TypicalityState,
    batch_typicality,
)
from bayesae.ood.betting import Bet, PowerMixture, SimpleJumper
from bayesae.ood.codes import CodeFlow, Mahalanobis, code_covariance, code_variance, code_volume
from bayesae.ood.conformal import CombinedCalibration, ConformalCalibration, threshold
from bayesae.ood.contributions import Contributions, contribution_draws, contribution_moments, contributions
from bayesae.ood.corrections import attainable, input_complexity, likelihood_ratio, likelihood_regret
from bayesae.ood.densities import (
    all_scores,
    disagreement,
    largest_weight,
    log_density_deviation,
    negative_expected_log_density,
    negative_log_predictive,
    share_saturated,
    typicality,
    waic,
    weight_entropy,
)
from bayesae.ood.drift import DriftInfo, DriftMonitor, DriftState
from bayesae.ood.information import information_gain, information_gain_bound, information_gram, joint_information
from bayesae.ood.multiple import benjamini_hochberg, merge_p_values, null_share
from bayesae.ood.scores import negative_log_density, reconstruction_error, weight_variance

__all__ = [
    "BatchTypicality",
    "Bet",
    "CodeFlow",
    "CombinedCalibration",
    "ConformalCalibration",
    "Contributions",
    "DriftInfo",
    "DriftMonitor",
    "DriftState",
    "Mahalanobis",
    "PowerMixture",
    "SimpleJumper",
    "TypicalityInfo",
    "TypicalityMonitor",
    "TypicalityState",
    "all_scores",
    "attainable",
    "batch_typicality",
    "benjamini_hochberg",
    "code_covariance",
    "code_variance",
    "code_volume",
    "contribution_draws",
    "contribution_moments",
    "contributions",
    "disagreement",
    "information_gain",
    "information_gain_bound",
    "information_gram",
    "input_complexity",
    "joint_information",
    "largest_weight",
    "likelihood_ratio",
    "likelihood_regret",
    "log_density_deviation",
    "merge_p_values",
    "negative_expected_log_density",
    "negative_log_density",
    "negative_log_predictive",
    "null_share",
    "reconstruction_error",
    "share_saturated",
    "threshold",
    "typicality",
    "waic",
    "weight_entropy",
    "weight_variance",
]
