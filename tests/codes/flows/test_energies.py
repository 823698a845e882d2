"""Planar flows on energies in two dimensions: longer ones come nearer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bayesae import codes
from tests.codes.flows.energies import energy, fitted_divergence, log_normaliser


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_grid_settles_the_normaliser(number):
    """Two grids agree; of the second energy it is known, a wall of width 0.1 at either end included."""
    fine, coarse = log_normaliser(number, 601), log_normaliser(number, 401)
    assert abs(fine - coarse) < 1e-4
    if number == 2:
        root = math.sqrt(2 * math.pi)
        assert abs(fine - math.log(0.4 * root * (8 + 0.1 * root))) < 1e-4


def test_a_flow_that_is_the_target_has_no_divergence():
    """Of a standard Normal target, by the same bookkeeping: an identity flow is left with 0."""
    flow = codes.Planar(1)
    latents = torch.randn(50, 1, 1, 2, dtype=torch.float64)
    moved, log_det = flow(latents, torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    assert torch.equal(moved, latents) and bool((log_det == 0).all())
    assert energy(2, torch.zeros(2).double()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_longer_flows_come_nearer(number):
    """KL(q || p) of 2, 8 and 32 planar steps, fitted alike: each by more than four standard errors below the last."""
    fits = [fitted_divergence(number, codes.Planar(n_steps), steps=400) for n_steps in (2, 8, 32)]
    assert all(value > -4 * error for value, error in fits)
    for (value, error), (less, other) in itertools.pairwise(fits):
        assert less < value - 4 * (error**2 + other**2) ** 0.5
