"""Moments and data of known laws."""

from __future__ import annotations

import torch

import bayesae as bae

F64 = {"dtype": torch.float64}


def moments_of(mean, noise, code=None, weights=None, likelihood=None):
    zero = torch.zeros_like(mean)
    likelihood = bae.likelihoods.Gaussian(1.0) if likelihood is None else likelihood
    return bae.Moments(
        mean, noise, zero if code is None else code, zero if weights is None else weights, likelihood, None
    )


def normal(n=400, shape=(2, 3), seed=0, factors=(1.0, 1.0, 1.0)):
    """Moments with all three parts, and rows whose parts are that many times as large."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, *shape, generator=generator, **F64)
    parts = [0.1 + torch.rand(n, *shape, generator=generator, **F64) * scale for scale in (1, 0.5, 4)]
    var = sum(factor * part for factor, part in zip(factors, parts, strict=True))
    return moments_of(mean, *parts), mean + var.sqrt() * torch.randn(n, *shape, generator=generator, **F64)


def part_of(moments, rows):
    return moments_of(*(getattr(moments, name)[rows] for name in ("mean", "noise", "code", "weights")))
