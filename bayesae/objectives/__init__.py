"""Objectives: reductions of `Draws` to (S, B), larger is better."""

from bayesae.objectives.elbo import elbo
from bayesae.objectives.importance import iwae
from bayesae.objectives.reconstruction import reconstruction

__all__ = ["elbo", "iwae", "reconstruction"]
