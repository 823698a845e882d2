"""What to do with uncertainty: which rows to take in next, and which ones to leave to somebody else."""

from bayesae.decisions.acquisition import Acquisition, acquire
from bayesae.decisions.selective import RiskCoverage, SelectiveThreshold, risk_coverage, selective_threshold

__all__ = ["Acquisition", "RiskCoverage", "SelectiveThreshold", "acquire", "risk_coverage", "selective_threshold"]
