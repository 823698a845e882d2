"""Predictives of every kind, small."""

from __future__ import annotations

import torch
from torch import nn

import bayesae as bae
from bayesae.families import Chains, DiagonalNormal, IndependentNormals, KroneckerNormal, Mixture, Particles
from bayesae.functional import parameters_of
from tests.conftest import small_model

F64 = {"dtype": torch.float64}
STRUCTURES = ("diagonal", "kronecker", "eigencorrected", "low_rank", "dense")


def rows(n=9, *shape):
    return torch.rand(n, *(shape or (7,)), generator=torch.Generator().manual_seed(1), **F64)


def laplace(structure, model=None, **kwargs):
    model = small_model() if model is None else model
    method = bae.weights.Laplace(structure, **kwargs)
    return bae.Predictive(model, bae.fit_weights(method, model, rows(), seed=0, progress=False))


def particles(model=None, n=3, codes=None):
    model = small_model() if model is None else model
    torch.manual_seed(3)
    atoms = {k: v + 0.1 * torch.randn(n, *v.shape, **F64).to(v) for k, v in parameters_of(model.network).items()}
    return bae.Predictive(model, Particles(atoms, info={"log_joint": -3.5}), codes)


def side_by_side():
    """A matrix Normal for the weights of the encoder, independent ones for the biases of the decoder."""
    model = small_model()
    mean = parameters_of(model.network)
    parts = []
    for family, pattern in (("kronecker", "encoder.**"), ("diagonal", "decoder.*.bias")):
        part = bae.fit_weights(bae.weights.Laplace(family, subset=(pattern,)), model, rows(), progress=False)
        parts.append(part)
    parts = [
        KroneckerNormal(mean, parts[0].blocks, parts[0].rest, is_linearised=True),
        DiagonalNormal(mean, parts[1].var, parts[1].subset, is_linearised=True),
    ]
    return bae.Predictive(model, IndependentNormals(parts, info={"n_effective": 2.5}))


def half_a_tensor():
    """A mask with holes."""
    model = small_model()
    mean = parameters_of(model.network)
    mask = torch.zeros_like(mean["decoder.1.weight"], dtype=torch.bool)
    mask[::2, 0] = True
    subset = bae.Subset({"decoder.1.weight": mask})
    return bae.Predictive(model, DiagonalNormal(mean, torch.rand(len(subset), **F64), subset), linearised=True)


def chains():
    one = particles(n=4)
    return bae.Predictive(one.model, Chains(one.weights.atoms, n_chains=2, log_joint=torch.rand(2, 2, **F64)))


def swag(rank):
    model = small_model()
    method = bae.weights.SWAG(rank=rank, epochs=4)
    return bae.Predictive(model, bae.fit_weights(method, model, rows(), seed=0, progress=False))


def dropped():
    model = small_model()
    method = bae.weights.Dropout(0.3, ("decoder.**",), epochs=1)
    return bae.Predictive(model, bae.fit_weights(method, model, rows(), seed=0, progress=False))


def mixture(each):
    model = small_model()
    method = bae.weights.MixtureOf(bae.weights.Ensemble(2, epochs=1), each)
    return bae.Predictive(model, bae.fit_weights(method, model, rows(), seed=0, progress=False))


def mixture_of_unlike():
    """A component that is a mixture, one of particles, and one with noise that it learned."""
    model = small_model(bae.likelihoods.Gaussian())
    mean = parameters_of(model.network)
    likelihood = bae.likelihoods.Gaussian()
    likelihood.set_noise_var(0.04)
    subset = bae.Subset.of(model.network)
    flat = DiagonalNormal(mean, 0.01 * torch.rand(len(subset), **F64), subset, noise=likelihood.state_dict())
    bae.estimate_noise(model, rows())
    return bae.Predictive(model, Mixture([Mixture([flat, flat]), particles(model).weights], {"log_joint": -2.0}))


FAMILIES = {
    **{structure: lambda structure=structure: laplace(structure) for structure in STRUCTURES},
    "tuned by layer": lambda: laplace("diagonal", prior_groups="layer"),
    "not linearised": lambda: bae.Predictive(small_model(), laplace("kronecker").weights, linearised=False),
    "part of the weights": lambda: laplace("dense", subset=("decoder.**",)),
    "half a tensor": half_a_tensor,
    "particles": particles,
    "one particle": lambda: particles(n=1, codes=bae.codes.encode),
    "side by side": side_by_side,
    "chains": chains,
    "diagonal plus low rank": lambda: swag(2),
    "SWAG-diagonal": lambda: swag(0),
    "dropped inputs": dropped,
    "mixture of Laplace": lambda: mixture(bae.weights.Laplace("kronecker")),
    "multi-SWAG": lambda: mixture(bae.weights.SWAG(rank=2, epochs=4)),
    "mixture of unlike families": mixture_of_unlike,
}

L = bae.likelihoods
LIKELIHOODS = {
    "Gaussian": lambda: L.Gaussian(0.3),
    "Gaussian, learned": lambda: L.Gaussian(floor=0.01),
    "Gaussian, one each": lambda: L.Gaussian([0.1 * k for k in range(1, 8)], per_output=True),
    "Gaussian, one each, learned": lambda: L.Gaussian(per_output=True),
    "HeteroscedasticGaussian": lambda: L.HeteroscedasticGaussian(floor=0.02),
    "Bernoulli": L.Bernoulli,
    "ContinuousBernoulli": L.ContinuousBernoulli,
    "Categorical": lambda: L.Categorical(3, values=[0.0, 1.0, 2.5]),
    "Poisson": L.Poisson,
    "NegativeBinomial": lambda: L.NegativeBinomial(1.7),
    "NegativeBinomial, learned": L.NegativeBinomial,
    "StudentT": lambda: L.StudentT(5.0, 0.2),
    "StudentT, learned": lambda: L.StudentT(per_output=True),
    "Mixed": lambda: L.Mixed([L.Gaussian(), L.Bernoulli(), L.Categorical(3, values=range(3)), L.Poisson()]),
}


def with_likelihood(name):
    likelihood = LIKELIHOODS[name]()
    torch.manual_seed(0)
    n, g = (4, 1) if name == "Mixed" else (7, likelihood.n_parameters)
    n_outputs = likelihood.n_outputs if name == "Mixed" else n * g
    decoder = bae.nets.mlp(2, [5], n_outputs)
    decoder = nn.Sequential(*decoder, nn.Unflatten(1, (-1, g))) if g > 1 else decoder
    model = bae.Autoencoder(bae.nets.mlp(n, [5], 2), decoder, likelihood).double().eval()
    x = rows(12, n)
    if "Gaussian" not in name and "StudentT" not in name and "Continuous" not in name:
        x = (x * 1.99).floor()
    if likelihood.is_learned:
        bae.estimate_noise(model, x)
    return particles(model), x, decoder


class BatchNormEncoder(nn.Module):
    """A network of somebody else's: convolutions, running statistics, a mask and a table that are buffers."""

    def __init__(self, n_channels=2):
        super().__init__()
        self.conv = nn.Conv2d(1, n_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(n_channels, momentum=0.3)
        self.head = nn.Linear(n_channels * 16, 2)
        self.register_buffer("keep", torch.rand(n_channels * 16) > 0.3)
        self.register_buffer("scale", torch.rand(1, dtype=torch.float64))
        self.register_buffer("fixed", torch.arange(3), persistent=False)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1) * self.keep * self.scale.to(x.dtype))


def image_model():
    torch.manual_seed(5)
    encoder = BatchNormEncoder()
    encoder.train()
    encoder(torch.randn(20, 1, 4, 4))
    decoder = nn.Sequential(nn.Linear(2, 32), nn.Unflatten(1, (2, 4, 4)), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    encoder.conv.to(memory_format=torch.channels_last)
    decoder.to(memory_format=torch.channels_last)
    model = bae.Autoencoder(encoder, decoder, L.Gaussian(0.3), data_shape=(1, 4, 4)).double().eval()
    model.encoder.conv.bias.requires_grad_(False)
    model.decoder[3].training = True
    return model


NETS = {
    "mlp": lambda n: (n.mlp(6, [4, 4], 2, norm="layer", n_residual=1), n.mlp(2, [], 6, activation=nn.ReLU), (6,), None),
    "conv": lambda n: (
        n.conv_encoder((1, 8, 8), 2, channels=[3, 4], norm="group"),
        n.conv_decoder(2, (1, 8, 8), channels=[4]),
        (1, 8, 8),
        None,
    ),
    "context": lambda n: (n.Conditional(n.mlp(6, [4], 2)), n.Conditional(n.mlp(5, [4], 5), n_classes=3), (5,), 1),
    "offset": lambda n: (n.mlp(5, [4], 2), n.Offset(n.mlp(2, [4], 5)), (5,), 1),
}


def with_nets(name, dtype=torch.float64):
    torch.manual_seed(0)
    encoder, decoder, shape, n_context = NETS[name](bae.nets)
    model = bae.Autoencoder(encoder, decoder, L.Gaussian(0.2), data_shape=shape).to(dtype).eval()
    x = rows(6, *shape).to(dtype)
    context = None if n_context is None else torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0], [1.0]]).to(dtype)
    return particles(model), bae.Batch(x, context=context)
