"""Flows under test, and models whose encoders give their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import bayesae as bae
from bayesae import codes


def additive_nice(z, context):
    zuko = codes.import_zuko()
    return zuko.flows.NICE(
        z, context, transforms=2, univariate=zuko.transforms.AdditiveTransform, shapes=[()], activation=nn.Tanh
    )


def splines(z, context):
    return codes.import_zuko().flows.NSF(z, context, transforms=2, activation=nn.Tanh, hidden_features=(9,))


def affine(z, context):
    return codes.import_zuko().flows.MAF(z, context, transforms=2, activation=nn.Tanh, hidden_features=(9,))


def elementwise(z):
    zuko = codes.import_zuko()
    make = zuko.transforms.MonotonicAffineTransform
    return zuko.lazy.UnconditionalTransform(make, torch.randn(z), torch.randn(z))


@dataclass(frozen=True)
class Case:
    name: str
    make: object
    splits: bool = False  # over dimensions

    def __str__(self):
        return self.name

    def flow(self, z=5, dtype=torch.float64):
        torch.manual_seed(4)
        flow = self.make(z)
        for module in codes.modules_of(flow):
            module.to(dtype)
        return flow


ELEMENTARY = [
    Case("planar", lambda z: codes.Planar(3)),
    Case("radial", lambda z: codes.Radial(3)),
]
AUTOREGRESSIVE = [
    Case("linear", lambda z: codes.AutoregressiveFlow(z, hidden=()), splits=True),
    Case("gated", lambda z: codes.AutoregressiveFlow(z, 3, (4, 7), 2), splits=True),
    Case("shifts", lambda z: codes.AutoregressiveFlow(z, 2, (11,), 0, is_volume_preserving=True), splits=True),
]
ZUKO = [
    Case("nice", lambda z: codes.Zuko(additive_nice(z, 2 * z), 2)),
    Case("splines", lambda z: codes.Zuko(splines(z, z), 1)),
    Case("affine", lambda z: codes.Zuko(affine(z, 0).transform)),
    Case("elementwise", lambda z: codes.Zuko(elementwise(z)), splits=True),
]
FLOWS = [*ELEMENTARY, *AUTOREGRESSIVE, *ZUKO]


def inputs(flow, shape=(2, 3, 4, 5), dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64)
    parameters = torch.randn(*shape[1:], flow.n_parameters, generator=generator, dtype=torch.float64)
    return latents.to(dtype), (scale * parameters).to(dtype)


def jacobians(function, latents):
    """Of every code alone, (K, S, B, Z, Z), by reverse differentiation."""
    sums = torch.func.jacrev(lambda z: function(z).flatten(0, -2).sum(0))(latents)
    return sums.movedim(0, -2)


def widened(model, n_more, scale=0.5):
    """The model with an encoder that gives more numbers for each code dimension, random ones."""
    linear, shape = model.encoder[0], model.encoder[1].unflattened_size
    wide = nn.Linear(linear.in_features, shape[0] * (shape[1] + n_more), dtype=linear.weight.dtype)
    with torch.no_grad():
        for old, new in ((linear.weight, wide.weight), (linear.bias, wide.bias)):
            more = scale * torch.randn(shape[0], n_more, *old.shape[1:], dtype=old.dtype)
            new.copy_(torch.cat([old.unflatten(0, tuple(shape)), more], 1).flatten(0, 1))
    encoder = nn.Sequential(wide, nn.Unflatten(1, (shape[0], shape[1] + n_more)))
    return bae.Autoencoder(encoder, model.decoder, model.likelihood).eval()


def params_of(model, n=1, spread=0.0):
    generator = torch.Generator().manual_seed(7)
    named = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
    return {
        name: leaf + spread * torch.randn(n, *leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        for name, leaf in named.items()
    }


def draws_of(model, posterior, batch, n, seed=0, params=None):
    with bae.random.scope(seed), torch.no_grad():
        return posterior(model.at(params_of(model) if params is None else params), batch, n_latent_draws=n)
