"""Data sets as tensors: images in [0, 1], tables with labelled anomalies or regression targets, shifts of images."""

from bayesae.datasets.load import NAMES, load
from bayesae.datasets.shifts import shifted

__all__ = ["NAMES", "load", "shifted"]
