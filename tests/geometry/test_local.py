"""Curvature, volume and Christoffel symbols in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from tests.geometry.surfaces import HYPERBOLIC, RADII, SPHERE, TORUS, codes, linear


def test_curvature_of_known_surfaces():
    z, (wide, narrow) = codes(6), RADII
    ones = torch.ones(6, dtype=torch.float64)
    assert_close(geometry.gaussian_curvature(SPHERE, z), ones)
    assert_close(geometry.gaussian_curvature(HYPERBOLIC, z), -ones)
    assert_close(geometry.gaussian_curvature(geometry.Pullback(linear()[1]), z), 0 * ones)
    ring = wide + narrow * z[:, 0].cos()
    assert_close(geometry.gaussian_curvature(TORUS, z), z[:, 0].cos() / (narrow * ring))


def test_curvature_does_not_depend_on_coordinates():
    turn = torch.tensor([[1.0, 0.4], [-0.3, 0.8]]).double()

    def other(z):
        return SPHERE.decoder((z + 0.1 * z**2) @ turn)

    found = geometry.gaussian_curvature(geometry.Pullback(other), codes(5, low=(0.5, 0.5), high=(1, 1)))
    assert_close(found, torch.ones(5, dtype=torch.float64))


def test_volume_elements():
    z = codes(5)
    assert_close(geometry.volume_element(SPHERE, z), z[:, 0].sin())
    assert_close(geometry.log_volume_element(HYPERBOLIC, z), -2 * z[:, 1].log())
    weights, decoder = linear()
    gram = torch.einsum("sdi,sdj->ij", weights, weights) / 3
    expected = torch.linalg.det(gram).sqrt().expand(5)
    assert_close(geometry.volume_element(geometry.Pullback(decoder), z), expected)


def test_symbols_of_the_sphere():
    z = codes(4)
    found = geometry.christoffel(SPHERE, z)
    expected = torch.zeros(4, 2, 2, 2, dtype=torch.float64)
    expected[:, 0, 1, 1] = -z[:, 0].sin() * z[:, 0].cos()
    expected[:, 1, 0, 1] = expected[:, 1, 1, 0] = z[:, 0].cos() / z[:, 0].sin()
    assert_close(found, expected)


def test_what_is_refused():
    z = codes(3)
    with pytest.raises(bae.errors.ShapeError, match=r"codes \(B, 2\)"):
        geometry.gaussian_curvature(SPHERE, z[:, :1])
    singular = torch.tensor([[0.0, 1.0]], dtype=torch.float64)  # the pole
    for function in (geometry.gaussian_curvature, geometry.volume_element, geometry.christoffel):
        with pytest.raises(bae.errors.NonFiniteError, match="1 of 1 that are singular"):
            function(geometry.MetricFunction(lambda c: SPHERE(c) * torch.ones(2, 2).to(c)), singular)
    with pytest.raises(bae.errors.NonFiniteError, match="positive definite metrics"):
        geometry.log_volume_element(geometry.Pullback(lambda c: SPHERE.decoder(c) * math.nan), z)
