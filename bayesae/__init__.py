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

from __future__ import annotations

from typing import TYPE_CHECKING

from bayesae import (
    adapters,
    calibration,
    codes,
    curvature,
    datasets,
    decisions,
    errors,
    evaluation,
    families,
    files,
    functional,
    geometry,
    imputation,
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
from bayesae.files import load, save
from bayesae.imputation import Imputations, impute
from bayesae.joint import IndependentNormal, IsotropicNormal, LogJoint, ScaleMixture
from bayesae.models import Autoencoder, wrap
from bayesae.predictive import Predictive
from bayesae.subset import Subset
from bayesae.training import (
    Evidence,
    EvidenceResult,
    HeldOut,
    History,
    estimate_noise,
    fit_model,
    fit_weights,
    held_out_precision,
    log_joint,
    maximise_evidence,
    recompute_statistics,
)
from bayesae.types import Batch

if TYPE_CHECKING:
    from bayesae import estimators
    from bayesae.estimators import BayesianAutoencoder, BayesianImputer, BayesianOutlierDetector

__all__ = [
    "Autoencoder",
    "Batch",
    "BayesianAutoencoder",
    "BayesianImputer",
    "BayesianOutlierDetector",
    "Draws",
    "Evidence",
    "EvidenceResult",
    "HeldOut",
    "History",
    "Imputations",
    "IndependentNormal",
    "IsotropicNormal",
    "LogJoint",
    "Moments",
    "Predictive",
    "ScaleMixture",
    "Subset",
    "adapters",
    "calibration",
    "codes",
    "curvature",
    "datasets",
    "decisions",
    "errors",
    "estimate_noise",
    "estimators",
    "evaluation",
    "families",
    "files",
    "fit_model",
    "fit_weights",
    "from_laplace",
    "functional",
    "geometry",
    "held_out_precision",
    "imputation",
    "impute",
    "likelihoods",
    "load",
    "log_joint",
    "maximise_evidence",
    "metrics",
    "nets",
    "objectives",
    "ood",
    "plots",
    "random",
    "recompute_statistics",
    "save",
    "weights",
    "wrap",
]


def __getattr__(name: str) -> object:
    # scikit-learn takes longer to load than the rest of the library: on first use only
    if name in {"estimators", "BayesianAutoencoder", "BayesianImputer", "BayesianOutlierDetector"}:
        from importlib import import_module

        module = import_module("bayesae.estimators")
        return module if name == "estimators" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
