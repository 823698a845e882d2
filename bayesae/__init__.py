"""Bayesian representation learning on PyTorch: autoencoders whose weights carry posteriors.

From data to scores::

    import bayesae as bae

    train, test = bae.datasets.load("digits", split=("train", "test"))
    model = bae.Autoencoder(bae.nets.mlp(64, [32], 2), bae.nets.mlp(2, [32], 64), bae.likelihoods.Gaussian())
    bae.fit_model(model, train, epochs=20)
    weights = bae.fit_weights(bae.weights.Laplace(), model, train)
    moments = bae.Predictive(model, weights).moments(test)
    score = bae.ood.negative_log_density(moments, test)
"""

from bayesae import (
    adapters,
    codes,
    curvature,
    datasets,
    errors,
    families,
    functional,
    likelihoods,
    metrics,
    nets,
    objectives,
    ood,
    plots,
    random,
    weights,
)
from bayesae.adapters import from_laplace
from bayesae.draws import Draws, Moments
from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.models import Autoencoder, wrap
from bayesae.predictive import Predictive
from bayesae.subset import Subset
from bayesae.training import History, estimate_noise, fit_model, fit_weights, log_joint
from bayesae.types import Batch

__all__ = [
    "Autoencoder",
    "Batch",
    "Draws",
    "History",
    "IsotropicNormal",
    "LogJoint",
    "Moments",
    "Predictive",
    "Subset",
    "adapters",
    "codes",
    "curvature",
    "datasets",
    "errors",
    "estimate_noise",
    "families",
    "fit_model",
    "fit_weights",
    "from_laplace",
    "functional",
    "likelihoods",
    "log_joint",
    "metrics",
    "nets",
    "objectives",
    "ood",
    "plots",
    "random",
    "weights",
    "wrap",
]
