"""Surfaces whose geometry is known, as decoders (B, 2) -> (1, B, 3) and metrics."""

from __future__ import annotations

import torch

from bayesae import geometry

RADII = 2.0, 0.7


def sphere(z):
    polar, azimuth = z[:, 0], z[:, 1]
    return torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()], -1)[None]


def torus(z):
    wide, narrow = RADII
    ring = wide + narrow * z[:, 0].cos()
    return torch.stack([ring * z[:, 1].cos(), ring * z[:, 1].sin(), narrow * z[:, 0].sin()], -1)[None]


def sphere_metric(z):
    return torch.diag_embed(torch.stack([torch.ones_like(z[:, 0]), z[:, 0].sin().square()], -1))


def torus_metric(z):
    wide, narrow = RADII
    ring = wide + narrow * z[:, 0].cos()
    return torch.diag_embed(torch.stack([torch.full_like(ring, narrow**2), ring.square()], -1))


def half_space(z):
    return torch.eye(z.shape[1]).to(z) / z[:, -1, None, None] ** 2


SPHERE = geometry.Pullback(sphere)
TORUS = geometry.Pullback(torus)
SPHERE_METRIC = geometry.MetricFunction(sphere_metric)  # as SPHERE, and cheaper to differentiate
TORUS_METRIC = geometry.MetricFunction(torus_metric)
HYPERBOLIC = geometry.MetricFunction(half_space)  # of any dimension


def codes(n, seed=0, low=(0.5, 0.5), high=(2.5, 2.5)):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return low + (high - low) * torch.rand(n, len(low), generator=generator, dtype=torch.float64)


def boxed(n, n_latents, seed=0):
    return codes(n, seed, (0.5,) * n_latents, (2.5,) * n_latents)


def sphere_distance(a, b):
    return torch.arccos((sphere(a)[0] * sphere(b)[0]).sum(-1))


def hyperbolic_distance(a, b):
    return torch.arccosh(1 + (a - b).square().sum(-1) / (2 * a[:, -1] * b[:, -1]))


def linear(n_draws=3, n_outputs=7, n_latents=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_draws, n_outputs, n_latents, generator=generator, dtype=torch.float64)
    return weights, lambda z: torch.einsum("sdz,bz->sbd", weights, z)


def network(n_draws=3, n_outputs=5, seed=0, spread=0.2, n_latents=2):
    """A smooth decoder of fixed weights and draws around them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        mean = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return mean + spread * torch.randn(n_draws, *shape, generator=generator, dtype=torch.float64)

    first, bias, second = draw(16, n_latents), draw(16), draw(n_outputs, 16) / 4
    return lambda z: torch.einsum("sdh,sbh->sbd", second, torch.tanh(z @ first.mT + bias[:, None]))


# what torch loads with the first derivative warns, and must not do so within a test of our own warnings
SPHERE(codes(1))
