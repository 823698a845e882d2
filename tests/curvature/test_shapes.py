"""What networks read of their input, concatenations, axes in another order, normalisation over a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import bayesae as bae
from bayesae import curvature
from bayesae.curvature import DiagonalCovariance, Linearisation
from bayesae.curvature.linearisation import cuts
from tests import twins
from tests.curvature import zoo
from tests.curvature.test_traps import EXACT, check_diagonal


class Reads(nn.Module):
    """A network that is a function of its input and two Linear layers."""

    def __init__(self, function, n_in=4, n_out=3):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(n_in, 3), nn.Linear(n_out, 5)

    def forward(self, x):
        return self.b(self.function(self, x))


# by name: of the network and x (B, 7), sizes of the two Linear layers' inputs, steps that no rule serves
FORWARDS = {
    "slices": (lambda s, x: torch.tanh(s.a(x[:, :4])) * x[:, 4:], 4, 3, 0),
    "one hot": (lambda s, x: s.a((x[:, :1] > torch.arange(4) / 4).to(x.dtype)).sin(), 4, 3, 0),
    "beside what it made": (lambda s, x: torch.cat([x[:, 4:], torch.tanh(s.a(x[:, :4]))], 1), 4, 6, 0),
    "beside itself": (lambda s, x: torch.cat((h := torch.tanh(s.a(x[:, :4])), x[:, :1], h), dim=-1), 4, 7, 0),
    "as positions": (lambda s, x: torch.tanh(s.a(x[:, :4])).unsqueeze(2).transpose(1, 2).flatten(1), 4, 3, 0),
    "a skip from the input": (lambda s, x: s.a(torch.tanh(x[:, :4])) - x.flatten(1)[:, 4:], 4, 3, 0),
    "chunks": (lambda s, x: s.a(x.chunk(2, 1)[0]) + x.split([4, 3], 1)[1].relu(), 4, 3, 0),
    "dropout of the input": (lambda s, x: s.a(F.dropout(x, 0.5, False)[:, :4]), 4, 3, 0),
    "overwriting a copy": (lambda s, x: s.a(x[:, :4].clone().mul_(2).exp()), 4, 3, 0),
    "along the batch's own axis": (lambda s, x: torch.stack([s.a(x[:, :4]).tanh(), x[:, 4:]], 1).sum(1), 4, 3, 2),
    "a size": (lambda s, x: torch.cat([s.a(x[:, :4]), x.new_ones(x.shape[0], 1)], 1), 4, 4, 0),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_read_of_the_input_is_constant(name):
    function, n_in, n_out, n_opaque = FORWARDS[name]
    network, x = Reads(function, n_in, n_out), torch.rand(4, 7, dtype=torch.float64)
    for chunk_size in (None, 3):
        check_diagonal(network, x, chunk_size=chunk_size)
    kinds = [type(step).__name__ for step in Linearisation(network).trace(x)]
    assert kinds.count("OpaqueStep") == n_opaque, kinds
    variances = zoo.random_like(network, positive=True)
    flat = torch.cat([leaf.flatten() for leaf in variances.values()])
    got = curvature.output_variance(Linearisation(network), x, DiagonalCovariance(variances))[1]
    assert_close(got, twins.dense_jacobian(network, x) ** 2 @ flat, **EXACT)


def test_layers_before_the_first_weight_are_not_carried():
    network = nn.Sequential(nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    check_diagonal(network, x)
    kinds = [type(step).__name__ for step in Linearisation(network).trace(x)]
    assert kinds == ["InputStep", "InputStep", "LinearStep"]


def test_a_context_leaves_the_code_a_cut():
    """As without one: the encoder's curvature passes the code's two numbers alone."""
    encoder = bae.nets.Conditional(bae.nets.mlp(9, [5], 2), 3)
    decoder = bae.nets.Conditional(bae.nets.mlp(5, [5], 6), 3)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(1.0), data_shape=(6,)).double().eval()
    x = torch.cat([torch.rand(4, 6), torch.tensor([[0.0], [2], [1], [2]])], 1).double()
    steps = Linearisation(model.network).trace(x)
    assert min(steps[i].width for i in cuts(steps) if i) == 2
    check_diagonal(model.network, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the twin
@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.LayerNorm(6)], (6,)),
        ([nn.LayerNorm(6, elementwise_affine=False)], (6,)),
        ([nn.LayerNorm(3), nn.Tanh()], (2, 3)),
        ([nn.LayerNorm((2, 3)), nn.Tanh()], (2, 3)),
        ([nn.GroupNorm(2, 6)], (6,)),
        ([nn.GroupNorm(2, 6, affine=False), nn.Tanh()], (6, 1)),
        ([nn.GroupNorm(1, 2), nn.Tanh()], (2, 3)),
        ([nn.InstanceNorm1d(2), nn.Tanh()], (2, 3)),
        ([nn.InstanceNorm1d(2, affine=True), nn.Tanh()], (2, 3)),
        ([nn.InstanceNorm1d(2, track_running_stats=True, affine=True), nn.Tanh()], (2, 3)),
        ([nn.InstanceNorm2d(1, affine=True), nn.Tanh()], (1, 2, 3)),
    ],
)
def test_normalisation_over_a_row(layers, shape):
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, shape), *layers, nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9)
    ).double()
    for module in network.modules():
        if getattr(module, "weight", None) is not None and not isinstance(module, nn.Linear):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    x = torch.rand(3, 4, dtype=torch.float64)
    for hessian in zoo.HESSIANS.values():
        check_diagonal(network, x, hessian)
    kinds = {type(step).__name__ for step in Linearisation(network.eval()).trace(x)}
    has_rule = getattr(layers[0], "running_mean", None) is None and getattr(layers[0], "normalized_shape", (1,)) != (
        2,
        3,
    )
    assert has_rule == ("NormStep" in kinds) and has_rule != ("OpaqueStep" in kinds)
