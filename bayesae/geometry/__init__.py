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
from bayesae.geometry.derivatives import DecoderDraws
from bayesae.geometry.distances import (
    Distances,
    Medoids,
    distance_matrix,
    frechet_mean,
    geodesic_neighbours,
    k_medoids,
)
from bayesae.geometry.fisher import bernoulli_fisher, categorical_fisher, gaussian_fisher
from bayesae.geometry.geodesics import Geodesics, geodesics
from bayesae.geometry.graph import CodeGraph, graph_starts, grid_graph, neighbour_graph
from bayesae.geometry.local import (
    christoffel,
    gaussian_curvature,
    log_volume_element,
    sectional_curvature,
    volume_element,
)
from bayesae.geometry.maps import exponential, logarithm, parallel_transport
from bayesae.geometry.metrics import Euclidean, FisherPullback, Metric, MetricFunction, SegmentEnergy
from bayesae.geometry.pullback import IndependentDraws, Pullback
from bayesae.geometry.uncertainty import DistanceDraws, GeodesicBand, distance_draws, geodesic_band

__all__ = [
    "CodeGraph",
    "CubicSpline",
    "Curve",
    "DecoderDraws",
    "DistanceDraws",
    "Distances",
    "Euclidean",
    "FisherPullback",
    "GeodesicBand",
    "Geodesics",
    "IndependentDraws",
    "Medoids",
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
    "distance_draws",
    "distance_matrix",
    "energy",
    "exponential",
    "frechet_mean",
    "gaussian_curvature",
    "gaussian_fisher",
    "geodesic_band",
    "geodesic_neighbours",
    "geodesics",
    "graph_starts",
    "grid_graph",
    "k_medoids",
    "length",
    "log_volume_element",
    "logarithm",
    "neighbour_graph",
    "parallel_transport",
    "sectional_curvature",
    "straight_lines",
    "volume_element",
]
