"""Other libraries' objects, read and served: laplace-torch both ways.

``bayesae.adapters.laplace_backend.BayesaeGGN`` is a backend for laplace-torch; its module imports laplace-torch, and so
is imported by who wants it and never by ``import bayesae``.
"""

from bayesae.adapters.laplace_posterior import from_laplace
from bayesae.adapters.outputs import OutputPredictive

__all__ = ["OutputPredictive", "from_laplace"]
