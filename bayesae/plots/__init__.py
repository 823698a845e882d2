"""Figures: functions that take axes and return them."""

from bayesae.plots.figures import heat_map, images, latent_grid, latent_scatter, reliability, score_histograms

__all__ = ["heat_map", "images", "latent_grid", "latent_scatter", "reliability", "score_histograms"]
