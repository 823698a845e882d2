"""Families: what q(theta) is, whatever the method that fitted it."""

from bayesae.families.normals import DiagonalNormal
from bayesae.families.particles import Particles

__all__ = ["DiagonalNormal", "Particles"]
