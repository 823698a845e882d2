"""Diagnostics of trained models and of how they are trained: evidence, inference gaps, collapse, gradients."""

from bayesae.evaluation.annealing import annealed_importance
from bayesae.evaluation.evidence import log_evidence
from bayesae.evaluation.snr import GradientSNR, gradient_snr
from bayesae.evaluation.sums import Annealed, LogEvidence

__all__ = ["Annealed", "GradientSNR", "LogEvidence", "annealed_importance", "gradient_snr", "log_evidence"]
