"""Data sets as tensors of images in [0, 1]."""

from bayesae.datasets.load import NAMES, load

__all__ = ["NAMES", "load"]
