"""Figures: functions that take axes and return them."""

from bayesae.plots.figures import images, reliability, score_histograms

__all__ = ["images", "reliability", "score_histograms"]
