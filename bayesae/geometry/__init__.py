"""Geometry of code spaces under weight uncertainty: metrics, curves, geodesics, maps, distances and their spread."""

from bayesae.geometry.curves import (
    CubicSpline,
    Curve,
    Polyline,
    chord_energy,
    chord_length,
    energy,
    length,
    straight_lines,
)
from bayesae.geometry.derivatives import Decoder
from bayesae.geometry.fisher import Fisher, bernoulli_fisher, categorical_fisher, gaussian_fisher
from bayesae.geometry.geodesics import Geodesics, geodesics
from bayesae.geometry.local import christoffel, gaussian_curvature, log_volume_element, volume_element
from bayesae.geometry.maps import exponential, logarithm, parallel_transport
from bayesae.geometry.metrics import Euclidean, FisherPullback, Metric, MetricFunction, SegmentEnergy
from bayesae.geometry.pullback import IndependentDraws, Pullback

__all__ = [
    "CubicSpline",
    "Curve",
    "Decoder",
    "Euclidean",
    "Fisher",
    "FisherPullback",
    "Geodesics",
    "IndependentDraws",
    "Metric",
    "MetricFunction",
    "Polyline",
    "Pullback",
    "SegmentEnergy",
    "bernoulli_fisher",
    "categorical_fisher",
    "chord_energy",
    "chord_length",
    "christoffel",
    "energy",
    "exponential",
    "gaussian_curvature",
    "gaussian_fisher",
    "geodesics",
    "length",
    "log_volume_element",
    "logarithm",
    "parallel_transport",
    "straight_lines",
    "volume_element",
]
