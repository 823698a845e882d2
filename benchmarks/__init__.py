"""Side by side with the peers; see ``python -m benchmarks.curvature --help``."""
