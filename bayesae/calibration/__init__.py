"""Recalibration: predictive moments made right on rows that trained nothing, as deviations and as intervals."""

from bayesae.calibration.base import Recalibrated, Recalibration
from bayesae.calibration.conformal import ConformalQuantiles, SplitConformal
from bayesae.calibration.isotonic import Isotonic, IsotonicQuantiles
from bayesae.calibration.scaling import Rescaled, VarianceScaling
from bayesae.calibration.temperature import Temperature

__all__ = [
    "ConformalQuantiles",
    "Isotonic",
    "IsotonicQuantiles",
    "Recalibrated",
    "Recalibration",
    "Rescaled",
    "SplitConformal",
    "Temperature",
    "VarianceScaling",
]
