"""Recalibration: predictive moments made right on rows that trained nothing, as deviations and as intervals.

Binary pixels have no deviation of their own: `IsotonicProbabilities` recalibrates their mean.
"""

from bayesae.calibration.base import Recalibrated, Recalibration
from bayesae.calibration.conformal import ConformalQuantiles, SplitConformal
from bayesae.calibration.isotonic import Isotonic, IsotonicQuantiles
from bayesae.calibration.probabilities import IsotonicProbabilities, RecalibratedProbabilities
from bayesae.calibration.scaling import Rescaled, VarianceScaling
from bayesae.calibration.temperature import Temperature

__all__ = [
    "ConformalQuantiles",
    "Isotonic",
    "IsotonicProbabilities",
    "IsotonicQuantiles",
    "Recalibrated",
    "RecalibratedProbabilities",
    "Recalibration",
    "Rescaled",
    "SplitConformal",
    "Temperature",
    "VarianceScaling",
]
