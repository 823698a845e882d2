"""How good scores, predictives and chains are: detection, likelihood, calibration, sharpness, convergence.

By batches, exactly, pooled and by pixel: `CalibrationSums` (likelihood, CRPS, intervals, PIT, ENCE), `BinarySums`
(Brier score, ECE) and `DrawSums` (CRPS and energy score of draws). What is an order of values (`sparsification`,
`auroc` and its like) needs all of them.
"""

from bayesae.metrics.binary import BinaryCalibration, BinarySums, brier_score, ece
from bayesae.metrics.chains import ess, split_rhat
from bayesae.metrics.detection import Interval, aupr, auroc, bootstrap_interval, fpr_at_tpr
from bayesae.metrics.draw_sums import DrawScores, DrawSums
from bayesae.metrics.intervals import DeviationBins, IntervalCoverage, deviation_edges, ence, interval_coverage
from bayesae.metrics.matched import matched_auroc
from bayesae.metrics.pit import Atoms, QuantileCalibration, pit, quantile_calibration
from bayesae.metrics.pixels import per_region_overlap, pixel_aupr, pixel_auroc, pixel_auroc_interval
from bayesae.metrics.predictions import gaussian_crps, gaussian_nll, sharpness
from bayesae.metrics.samples import crps_of_draws, energy_score, predictive_draws
from bayesae.metrics.sparsification import Sparsification, sparsification
from bayesae.metrics.streaming import Calibration, CalibrationSums

__all__ = [
    "Atoms",
    "BinaryCalibration",
    "BinarySums",
    "Calibration",
    "CalibrationSums",
    "DeviationBins",
    "DrawScores",
    "DrawSums",
    "Interval",
    "IntervalCoverage",
    "QuantileCalibration",
    "Sparsification",
    "aupr",
    "auroc",
    "bootstrap_interval",
    "brier_score",
    "crps_of_draws",
    "deviation_edges",
    "ece",
    "ence",
    "energy_score",
    "ess",
    "fpr_at_tpr",
    "gaussian_crps",
    "gaussian_nll",
    "interval_coverage",
    "matched_auroc",
    "per_region_overlap",
    "pit",
    "pixel_aupr",
    "pixel_auroc",
    "pixel_auroc_interval",
    "predictive_draws",
    "quantile_calibration",
    "sharpness",
    "sparsification",
    "split_rhat",
]
