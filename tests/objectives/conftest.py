"""Draws of made-up densities, every axis of another length."""

from __future__ import annotations

import pytest
import torch

import bayesae as bae

K, M, S, B, G, Z = 12, 3, 2, 5, 6, 7


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    densities = [normal(K, S, B) for _ in range(3)]
    return bae.Draws(normal(K, S, B, Z), *densities, bae.likelihoods.Gaussian(0.3), kl=0.3 * normal(S, B, G) ** 2)
