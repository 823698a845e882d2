"""Decoders of one weight draw each are those of all, taken apart."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.families import DiagonalNormal, Mixture
from bayesae.functional import parameters_of


def normal(model, seed, *, is_linearised):
    subset = bae.Subset.of(model.network)
    mean = {name: value + 0.1 * seed for name, value in parameters_of(model.network).items()}
    return DiagonalNormal(mean, torch.full((len(subset),), 1e-2), subset, is_linearised=is_linearised)


@pytest.mark.parametrize("is_linearised", [True, False])
@pytest.mark.parametrize("is_mixture", [True, False])
def test_single_draws_are_those_of_all(is_linearised, is_mixture):
    torch.manual_seed(0)
    model = bae.Autoencoder(bae.nets.mlp(5, [4], 2), bae.nets.mlp(2, [4], 5), bae.likelihoods.Gaussian()).double()
    model.eval()
    weights = [normal(model, seed, is_linearised=is_linearised) for seed in range(2)]
    decoder = bae.Predictive(model, Mixture(weights) if is_mixture else weights[0]).decoder(4, seed=0)
    z = torch.randn(3, 2, dtype=torch.float64)
    assert len(decoder.singles) == 4
    outputs = decoder(z)
    assert (outputs[1:] - outputs[:1]).abs().amin() > 1e-6  # no two draws alike
    for number, single in enumerate(decoder.singles):
        assert_close(single(z), outputs[number : number + 1], rtol=1e-12, atol=1e-13)


def test_single_draws_keep_the_context():
    model = bae.Autoencoder(
        bae.nets.Conditional(bae.nets.mlp(5 + 1, [4], 2)),
        bae.nets.Conditional(bae.nets.mlp(2 + 1, [4], 5)),
        bae.likelihoods.Gaussian(),
        data_shape=(5,),
    ).double()
    model.eval()
    context = torch.tensor([[0.7]], dtype=torch.float64)
    decoder = bae.Predictive(model, normal(model, 0, is_linearised=False)).decoder(2, seed=0, context=context)
    z = torch.randn(3, 2, dtype=torch.float64)
    assert_close(torch.cat([single(z) for single in decoder.singles]), decoder(z))
