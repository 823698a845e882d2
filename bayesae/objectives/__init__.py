"""Objectives: reductions of `Draws` to (S, B), larger is better."""

from bayesae.objectives.divergences import CUBO, Renyi
from bayesae.objectives.elbo import ELBO, AnnealedELBO, elbo, sampled_elbo
from bayesae.objectives.importance import CIWAE, PIWAE, MultiplyIWAE, iwae
from bayesae.objectives.reconstruction import reconstruction
from bayesae.objectives.reparameterised import DReG, dreg, reweighted_wake_sleep
from bayesae.objectives.warm_up import WarmUp

__all__ = [
    "CIWAE",
    "CUBO",
    "ELBO",
    "PIWAE",
    "AnnealedELBO",
    "DReG",
    "MultiplyIWAE",
    "Renyi",
    "WarmUp",
    "dreg",
    "elbo",
    "iwae",
    "reconstruction",
    "reweighted_wake_sleep",
    "sampled_elbo",
]
