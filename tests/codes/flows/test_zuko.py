"""The adapter for zuko: its direction, and that importing zuko changes nothing for others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae import codes
from tests.codes.flows.cases import additive_nice, affine, inputs, splines

AFTER_USE = """
import torch
import bayesae as bae
from bayesae import codes
validates = torch.distributions.Distribution._validate_args
zuko = codes.import_zuko()
flow = codes.Zuko(zuko.flows.NSF(3, 3), 1)
encoder = bae.nets.mlp(7, [5], (3, 3))
model = bae.Autoencoder(encoder, bae.nets.mlp(3, [5], 7), bae.likelihoods.Gaussian(0.3)).eval()
draws = codes.Flowed(codes.amortised, flow)(model.live(), bae.Batch(torch.rand(4, 7)))
assert torch.distributions.Distribution._validate_args is validates is True
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    print("refused")
"""


def test_validation_is_as_it_was_after_use():
    run = subprocess.run([sys.executable, "-c", AFTER_USE], capture_output=True, text=True)
    assert run.stdout.strip() == "refused", run.stderr


def test_additive_couplings_keep_volume():
    torch.manual_seed(0)
    flow = codes.Zuko(additive_nice(5, 5).double(), 1)
    latents, parameters = inputs(flow)
    moved, log_det = flow(latents, parameters)
    assert bool((log_det == 0).all()) and not torch.allclose(moved, latents, atol=0.1)


@pytest.mark.parametrize("make", [affine, splines, additive_nice], ids=lambda make: make.__name__)
def test_the_direction_is_the_one_of_a_single_pass(make):
    """Of a whole flow its transformation, as it stands; ``inv`` of it is the way back."""
    torch.manual_seed(0)
    whole = make(4, 4).double()
    latents, parameters = inputs(codes.Zuko(whole, 1), (2, 3, 4, 4))
    moved, log_det = codes.Zuko(whole, 1)(latents, parameters)
    back, log_back = codes.Zuko(whole.transform.inv, 1)(moved, parameters)
    torch.testing.assert_close(moved, codes.Zuko(whole.transform, 1)(latents, parameters)[0], rtol=0, atol=0)
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-8)
    torch.testing.assert_close(log_back, -log_det, rtol=0, atol=1e-8)
    context = parameters.flatten(-2)
    torch.testing.assert_close(moved, whole.transform(context)(latents), rtol=0, atol=0)


def test_an_autoregressive_one_sees_what_stood_before_it():
    """In one pass: the inverse autoregressive direction is triangular as ours is."""
    flow = codes.import_zuko().flows.autoregressive.MaskedAutoregressiveTransform(4, hidden_features=(9,)).double()
    latents, parameters = inputs(codes.Zuko(flow), (1, 1, 1, 4))
    jacobian = torch.func.jacrev(lambda z: codes.Zuko(flow)(z, parameters)[0][0, 0, 0])(latents)[:, 0, 0, 0]
    assert bool((jacobian.triu(1) == 0).all()) and bool((jacobian.tril(-1)[1:] != 0).any())


@pytest.mark.parametrize("flow", [nn.Linear(3, 3), codes.Planar()], ids=["layer", "own"])
def test_other_things_are_refused(flow):
    with pytest.raises(bae.errors.UnsupportedError, match="a zuko Flow or LazyTransform"):
        codes.Zuko(flow)
