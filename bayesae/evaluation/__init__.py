"""Diagnostics of trained models and of how they are trained."""

from bayesae.evaluation.snr import GradientSNR, gradient_snr

__all__ = ["GradientSNR", "gradient_snr"]
