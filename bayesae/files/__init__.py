"""Files: a fitted model with its posterior, or an estimator, in one safetensors file from which no code is run."""

from bayesae.files.door import describe, load, save

__all__ = ["describe", "load", "save"]
