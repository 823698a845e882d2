"""Families: what q(theta) is, whatever the method that fitted it."""

from bayesae.families.dense import DenseNormal
from bayesae.families.dropped import DroppedInputs
from bayesae.families.factor import FactorNormal
from bayesae.families.independent import IndependentNormals
from bayesae.families.kronecker import KroneckerNormal
from bayesae.families.low_rank import LowRankNormal
from bayesae.families.mixture import Mixture
from bayesae.families.normals import DiagonalNormal
from bayesae.families.particles import Chains, Particles

__all__ = [
    "Chains",
    "DenseNormal",
    "DiagonalNormal",
    "DroppedInputs",
    "FactorNormal",
    "IndependentNormals",
    "KroneckerNormal",
    "LowRankNormal",
    "Mixture",
    "Particles",
]
