"""Data sets as tensors: images in [0, 1], and tables with labelled anomalies."""

from bayesae.datasets.load import NAMES, load

__all__ = ["NAMES", "load"]
