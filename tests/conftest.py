"""Fixtures: small networks in float64 with known weights."""

from __future__ import annotations

import os

import pytest
import torch

import bayesae as bae

torch.set_warn_always(True)  # what torch says once a process must not depend on the order of tests
# small tensors gain nothing by threads, and threads that wait for cores of other processes are ten times slower
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def digits():
    return bae.datasets.load("digits")


def small_model(likelihood=None, *, n_in=7, hidden=(6, 4), z=2, dtype=torch.float64, seed=0, **kwargs):
    torch.manual_seed(seed)
    likelihood = bae.likelihoods.Gaussian(0.3) if likelihood is None else likelihood
    encoder = bae.nets.mlp(n_in, hidden, z, **kwargs)
    decoder = bae.nets.mlp(z, hidden[::-1], n_in, **kwargs)
    return bae.Autoencoder(encoder, decoder, likelihood).to(dtype).eval()


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def rows():
    return torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
