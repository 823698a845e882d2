"""Probabilistic PCA with entries missing: every conditional in closed form."""

from __future__ import annotations

import torch

import bayesae as bae
from bayesae.testing import LinearGaussian

MISSING, OBSERVED = [1, 3, 4], [0, 2]


def world(**kwargs):
    made = {"seed": 7, "n_outputs": 5, "n_latents": 2, "noise_var": 1.0, "correlation": 0.9} | kwargs
    return LinearGaussian.make(**made)


def leaves_of(model, shift=0.0):
    leaves = bae.functional.parameters_of(model.network)
    leaves["decoder.0.bias"] = leaves["decoder.0.bias"] + shift
    return leaves


def predictive_of(model, codes, shifts=(0.0,), **kwargs):
    """Particles whose decoders have their biases apart."""
    particles = bae.functional.stack_draws([leaves_of(model, shift) for shift in shifts])
    return bae.Predictive(model, bae.families.Particles(particles), codes=codes, **kwargs)


def conditional(world, x, observed=OBSERVED, missing=MISSING, shift=0.0):
    """Means (N, m) and covariance (m, m) of the missing entries of rows given the others."""
    joint = world.weight @ world.weight.T + world.noise_var * torch.eye(len(world.bias), dtype=torch.float64)
    gain = torch.linalg.solve(joint[observed][:, observed], joint[observed][:, missing]).T
    bias = world.bias + shift
    mean = bias[missing] + (x - bias)[:, observed] @ gain.T
    return mean, joint[missing][:, missing] - gain @ joint[observed][:, missing]


def mask_of(n_rows, n_columns=5, observed=OBSERVED):
    mask = torch.zeros(n_rows, n_columns, dtype=torch.bool)
    mask[:, observed] = True
    return mask


def normal_rows(n, seed=3):
    """Rows of the Normal of covariance ((2, 1), (1, 2)), which is a world of one code: weights 1, noise 1."""
    root = torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ root.T
