"""Figures: functions that take axes and return them."""

from bayesae.plots.calibration import coverage, coverage_by_deviation
from bayesae.plots.chains import chain_trace
from bayesae.plots.figures import heat_map, images, latent_grid, latent_scatter, reliability, score_histograms
from bayesae.plots.geometry import code_curves, curve_band, film_strip, volume_background
from bayesae.plots.streams import stream_trace

__all__ = [
    "chain_trace",
    "code_curves",
    "coverage",
    "coverage_by_deviation",
    "curve_band",
    "film_strip",
    "heat_map",
    "images",
    "latent_grid",
    "latent_scatter",
    "reliability",
    "score_histograms",
    "stream_trace",
    "volume_background",
]
