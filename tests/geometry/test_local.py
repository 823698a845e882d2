"""Curvature, volume and Christoffel symbols in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from tests.geometry.surfaces import HYPERBOLIC, RADII, SPHERE, TORUS, boxed, codes, linear, network


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


def test_curvature_of_planes_in_three_dimensions():
    """Hyperbolic space is alike in all; a sphere times a line is curved in one plane only."""
    z, u, v = boxed(6, 3), boxed(6, 3, seed=1), boxed(6, 3, seed=2) - 1.5
    assert_close(geometry.sectional_curvature(HYPERBOLIC, z, u, v), -torch.ones(6).double())

    def product(c):
        last = 0.3 * c[:, 2:] + 0.1 * c[:, :1]  # coordinates that are not orthogonal
        return torch.cat([SPHERE.decoder(c[:, :2]), last[None]], -1)

    def height(c):  # along the line only
        return torch.tensor([0.0, 0.0, 1.0]).to(c).expand_as(c)

    def level(c):  # the tangent of the sphere's first coordinate, its height held
        return torch.tensor([1.0, 0.0, -1 / 3]).to(c).expand_as(c)

    metric, turn = geometry.Pullback(product), torch.tensor([0.0, 1.0, 0.0]).to(z).expand_as(z)
    assert_close(geometry.sectional_curvature(metric, z, level(z), turn), torch.ones(6).double())
    assert_close(geometry.sectional_curvature(metric, z, height(z), turn), torch.zeros(6).double())
    # a plane that leans by an angle: the curvature is its cosine squared
    lean = level(z) + height(z) / 0.3  # both of unit length
    assert_close(geometry.sectional_curvature(metric, z, lean, turn), torch.full((6,), 0.5).double())


def test_curvature_belongs_to_the_plane():
    z, u, v = boxed(4, 3), boxed(4, 3, seed=1), boxed(4, 3, seed=2) - 1.5
    metric = geometry.Pullback(network(n_latents=3))
    found = geometry.sectional_curvature(metric, z, u, v)
    assert_close(geometry.sectional_curvature(metric, z, 2 * u - v, u + 3 * v), found)
    assert_close(geometry.sectional_curvature(metric, z, v, u), found)


def test_gradients_pass():
    z = codes(3).requires_grad_()
    (slope,) = torch.autograd.grad(geometry.log_volume_element(SPHERE, z).sum(), z)
    assert_close(slope[:, 0], (z[:, 0].cos() / z[:, 0].sin()).detach())
    assert_close(slope[:, 1], torch.zeros(3, dtype=torch.float64))


def test_what_is_refused():
    z = codes(3)
    with pytest.raises(bae.errors.ShapeError, match=r"codes \(B, 2\)"):
        geometry.gaussian_curvature(SPHERE, z[:, :1])
    with pytest.raises(bae.errors.ShapeError, match=r"directions \(3, 2\)"):
        geometry.sectional_curvature(SPHERE, z, z, z[:1])
    with pytest.raises(bae.errors.DataError, match="parallel ones at 1 of 3 codes"):
        geometry.sectional_curvature(SPHERE, z, z, torch.cat([-2 * z[:1], z[1:].flip(1)]))
    for function in (geometry.volume_element, geometry.christoffel, geometry.log_volume_element):
        with pytest.raises(bae.errors.ShapeError, match=r"codes \(B, Z\) of floating numbers"):
            function(SPHERE, z[0])
    singular = torch.tensor([[0.0, 1.0]], dtype=torch.float64)  # the pole
    for function in (geometry.gaussian_curvature, geometry.volume_element, geometry.christoffel):
        with pytest.raises(bae.errors.NonFiniteError, match="1 of 1 that are singular"):
            function(geometry.MetricFunction(lambda c: SPHERE(c) * torch.ones(2, 2).to(c)), singular)
    skew = geometry.MetricFunction(lambda c: torch.tensor([[1.0, 5.0], [0.0, 1.0]]).to(c).expand(len(c), 2, 2))
    for function in (geometry.gaussian_curvature, geometry.volume_element, geometry.christoffel):
        with pytest.raises(bae.errors.DataError, match="a symmetric metric; got 3 of 3 that are not"):
            function(skew, z)
        with pytest.raises(bae.errors.UnsupportedError, match="a metric; got IndependentDraws"):
            function(geometry.IndependentDraws(SPHERE.decoder), z)
    with pytest.raises(bae.errors.NonFiniteError, match="positive definite metrics"):
        geometry.log_volume_element(geometry.Pullback(lambda c: SPHERE.decoder(c) * math.nan), z)
