"""The two loops: networks and weight posteriors."""

from bayesae.training.evidence import Evidence, EvidenceResult, maximise_evidence
from bayesae.training.held_out import HeldOut, held_out_precision
from bayesae.training.model import History, fit_model
from bayesae.training.noise import estimate_noise
from bayesae.training.statistics import recompute_statistics
from bayesae.training.weights import fit_weights, log_joint

__all__ = [
    "Evidence",
    "EvidenceResult",
    "HeldOut",
    "History",
    "estimate_noise",
    "fit_model",
    "fit_weights",
    "held_out_precision",
    "log_joint",
    "maximise_evidence",
    "recompute_statistics",
]
