"""Diagnostics of trained models and of how they are trained: evidence, inference gaps, collapse, gradients."""

from bayesae.evaluation.annealing import annealed_importance
from bayesae.evaluation.code_size import IntegratedEvidence, integrated_evidence
from bayesae.evaluation.collapse import CollapseReport, active_units, collapse_report
from bayesae.evaluation.convergence import Convergence, convergence
from bayesae.evaluation.evidence import log_evidence
from bayesae.evaluation.gaps import InferenceGaps, inference_gaps
from bayesae.evaluation.information import MutualInformation, mutual_information
from bayesae.evaluation.pruning import prune_codes
from bayesae.evaluation.relevance import CodeRelevance, Relevance, code_relevance
from bayesae.evaluation.snr import GradientSNR, gradient_snr
from bayesae.evaluation.sums import Annealed, LogEvidence

__all__ = [
    "Annealed",
    "CodeRelevance",
    "CollapseReport",
    "Convergence",
    "GradientSNR",
    "InferenceGaps",
    "IntegratedEvidence",
    "LogEvidence",
    "MutualInformation",
    "Relevance",
    "active_units",
    "annealed_importance",
    "code_relevance",
    "collapse_report",
    "convergence",
    "gradient_snr",
    "inference_gaps",
    "integrated_evidence",
    "log_evidence",
    "mutual_information",
    "prune_codes",
]
