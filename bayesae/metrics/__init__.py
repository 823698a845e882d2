"""How good scores, predictives and chains are: detection, likelihood, calibration, sharpness, convergence."""

from bayesae.metrics.chains import ess, split_rhat
from bayesae.metrics.detection import Interval, aupr, auroc, bootstrap_interval, fpr_at_tpr
from bayesae.metrics.pixels import per_region_overlap, pixel_aupr, pixel_auroc, pixel_auroc_interval
from bayesae.metrics.predictions import (
    QuantileCalibration,
    gaussian_crps,
    gaussian_nll,
    quantile_calibration,
    sharpness,
)

__all__ = [
    "Interval",
    "QuantileCalibration",
    "aupr",
    "auroc",
    "bootstrap_interval",
    "ess",
    "fpr_at_tpr",
    "gaussian_crps",
    "gaussian_nll",
    "per_region_overlap",
    "pixel_aupr",
    "pixel_auroc",
    "pixel_auroc_interval",
    "quantile_calibration",
    "sharpness",
    "split_rhat",
]
