"""Figures: functions that take axes and return them."""

from bayesae.plots.calibration import coverage, coverage_by_deviation
from bayesae.plots.chains import chain_trace
from bayesae.plots.figures import heat_map, images, latent_grid, latent_scatter, reliability, score_histograms
from bayesae.plots.streams import stream_trace

__all__ = [
    "chain_trace",
    "coverage",
    "coverage_by_deviation",
    "heat_map",
    "images",
    "latent_grid",
    "latent_scatter",
    "reliability",
    "score_histograms",
    "stream_trace",
]
