"""Every structure of curvature of every network of `nets` under every likelihood, against a brute-force Jacobian."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import curvature, nets
from bayesae.curvature import (
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    Linearisation,
    LowRankCovariance,
    RotatedBlock,
)
from bayesae.weights.structures import LowRank
from tests import twins
from tests.curvature import zoo
from tests.curvature.test_exact import EXACT, bases_of, ggn

N = 2  # rows


def images(*shape):
    return torch.rand(N, *shape)


def labels(n):
    return (torch.arange(N) % n)[:, None].float()


def table(g):
    """Outputs of 5 numbers with g parameters each; of so many in all, where they are flat."""
    return -g if g < 0 else 5 if g == 1 else (5, g)


# by name: of g, the parameters a number, to encoder, decoder, rows, and their context
NETS = {
    "mlp": lambda g: (nets.mlp(5, [4], 2), nets.mlp(2, [4], table(g)), images(5), None),
    "normalised residual mlp": lambda g: (
        nets.mlp(5, [3], 2, norm="layer", activation=nn.SiLU),
        nets.mlp(2, [3], table(g), norm="layer", n_residual=1),
        images(5),
        None,
    ),
    "conditional mlp": lambda g: (
        nets.Conditional(nets.mlp(8, [3], 2), 3),
        nets.Conditional(nets.mlp(5, [4], table(g)), 3),
        images(5),
        labels(3),
    ),
    "covariates in the decoder alone": lambda g: (
        nets.mlp(5, [3], 2),
        nets.Conditional(nets.mlp(4, [4], table(g))),
        images(5),
        torch.rand(N, 2),
    ),
    "exposure": lambda g: (nets.mlp(5, [3], 2), nets.Offset(nets.mlp(2, [3], table(g))), images(5), torch.rand(N, 1)),
    "transposed convolutions": lambda g: (
        nets.conv_encoder((1, 5, 6), 2, channels=[2]),
        nets.conv_decoder(2, (1, 5, 6), channels=[2, 2], n_parameters=g),
        images(1, 5, 6),
        None,
    ),
    "up-sampling, colours": lambda g: (
        nets.conv_encoder((2, 4, 5), 2, channels=[2], activation=nn.ReLU),
        nets.conv_decoder(2, (2, 4, 5), channels=[2], upsampling="nearest", n_parameters=g, activation=nn.Softplus),
        images(2, 4, 5),
        None,
    ),
    "normalised residual images": lambda g: (
        nets.conv_encoder((1, 4, 4), 1, channels=[2], norm="group"),
        nets.conv_decoder(1, (1, 4, 4), channels=[2], n_residual=1, norm="layer", n_parameters=g),
        images(1, 4, 4),
        None,
    ),
    "conditional images": lambda g: (
        nets.Conditional(nets.conv_encoder((3, 4, 4), 1, channels=[2]), 2),
        nets.Conditional(nets.conv_decoder(3, (1, 4, 4), channels=[2], n_parameters=g), 2),
        images(1, 4, 4),
        labels(2),
    ),
    "series": lambda g: (
        nets.conv_encoder((2, 7), 2, channels=[3]),
        nets.conv_decoder(2, (2, 7), channels=[3], norm="group", n_parameters=g, activation=nn.GELU),
        images(2, 7),
        None,
    ),
    "sequences": lambda g: (
        nets.Conditional(nets.sequence_encoder(3, 6, 2, n_embedding=2, channels=[2], n_context=2), 2),
        nets.sequence_decoder(2, 6, g, channels=[2, 2]) if g > 1 else nets.mlp(2, [3], 6),
        torch.tensor([[0.0, 2, 1, 1, 0, 2], [1, 1, 2, 0, 2, 2]]),
        labels(2),
    ),
}


def mixed():
    given = {"values": range(3)}
    columns = [
        bae.likelihoods.Gaussian(0.5),
        bae.likelihoods.Categorical(3, **given),
        bae.likelihoods.Poisson(),
        bae.likelihoods.HeteroscedasticGaussian(),
        bae.likelihoods.Categorical(2, values=range(2)),
    ]
    return bae.likelihoods.Mixed(columns)


class Own(bae.likelihoods.Head):
    """A head made by hand: any form of H."""

    def __init__(self, hessian):
        super().__init__()
        self.output_hessian = hessian


# of n, the numbers of a row; by the name in `likelihoods.NAMES`, and what makes it special
LIKELIHOODS = {
    "Gaussian": lambda n: bae.likelihoods.Gaussian(0.3),
    "Gaussian, per output": lambda n: bae.likelihoods.Gaussian(torch.linspace(0.3, 1.2, n), per_output=True),
    "HeteroscedasticGaussian": lambda n: bae.likelihoods.HeteroscedasticGaussian(),
    "Bernoulli": lambda n: bae.likelihoods.Bernoulli(),
    "ContinuousBernoulli": lambda n: bae.likelihoods.ContinuousBernoulli(),
    "Categorical": lambda n: bae.likelihoods.Categorical(3),
    "Poisson": lambda n: bae.likelihoods.Poisson(),
    "NegativeBinomial": lambda n: bae.likelihoods.NegativeBinomial(2.0),
    "StudentT": lambda n: bae.likelihoods.StudentT(4.0, 0.5),
    "Mixed": lambda n: mixed(),
    "by hand, block": lambda n: Own(zoo.block),
    "by hand, low rank": lambda n: Own(zoo.low_rank),
}
TABLES = [name for name in NETS if "mlp" in name or name.startswith(("covariates", "exposure"))]
PAIRS = [(net, like) for net in NETS for like in LIKELIHOODS if like != "Mixed" or net in TABLES]
# a seventh of them, so that each network meets one or two forms of H, and each form one or two networks
QUICK = PAIRS[::7]
CASES = [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]


def test_every_likelihood_and_network_is_here_and_quick():
    assert {name.split(",")[0] for name in LIKELIHOODS if not name.startswith("by hand")} == set(bae.likelihoods.NAMES)
    assert {net for net, _ in QUICK} == set(NETS) and {like for _, like in QUICK} == set(LIKELIHOODS)


@cache
def autoencoder(name, g):
    """A network in float64, its inputs, and the Jacobian of its parameters: cached, since nothing may change them."""
    torch.manual_seed(5)
    encoder, decoder, x, context = NETS[name](g)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Bernoulli(), data_shape=tuple(x.shape[1:]))
    network = model.double().eval().requires_grad_(False).network
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    inputs = model.inputs(bae.Batch(x.double(), context=None if context is None else context.double()))
    jacobian = twins.output_jacobian(network, inputs)
    return network, inputs, jacobian, torch.cat([j.flatten(2) for j in jacobian.values()], -1)


def n_parameters(like):
    return -mixed().n_outputs if like == "Mixed" else LIKELIHOODS[like](1).n_parameters


@cache
def case(name, like):
    """Network, inputs, Jacobian by parameter, H as a function and written out, and J^T H J."""
    g = n_parameters(like)
    network, x, jacobian, dense = autoencoder(name, g)
    outputs = network(x).detach()
    hessian = LIKELIHOODS[like](math.prod(outputs.shape[1:] if g < 2 else outputs.shape[1:-1])).output_hessian
    of_outputs = zoo.dense_hessian(hessian, outputs)
    return network, x, jacobian, hessian, of_outputs, ggn(dense, of_outputs)


@pytest.mark.parametrize(("name", "like"), CASES)
class TestStructures:
    def test_diagonal(self, name, like):
        network, x, _, hessian, _, exact = case(name, like)
        got = curvature.ggn_diagonal(Linearisation(network), x, hessian)
        assert_close(got, zoo.by_parameter(network, exact.diagonal()), **EXACT)

    def test_dense(self, name, like):
        network, x, _, hessian, _, exact = case(name, like)
        masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in network.named_parameters()}
        assert_close(curvature.ggn_block(Linearisation(network), x, hessian, masks), exact, **EXACT)

    def test_low_rank_of_full_rank(self, name, like):
        network, x, _, hessian, _, exact = case(name, like)
        subset, structure, lin = (
            bae.Subset.of(network.requires_grad_(True)),
            LowRank(len(exact)),
            Linearisation(network),
        )
        sums = structure.start(lin, subset)
        for i in range(structure.n_passes):
            sums = structure.add(sums if i == 0 else structure.next_pass(sums, subset), lin, subset, x, hessian, None)
        found = structure.finish(sums, subset, 1.0)
        got = found.factor.mT @ found.factor + torch.diag(found.diagonal)
        assert_close(got, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))

    def test_kronecker_and_eigencorrected(self, name, like):
        network, x, jacobian, hessian, of_outputs, exact = case(name, like)
        lin = Linearisation(network)
        factors = curvature.kronecker_factors(lin, x, hessian)
        diagonal = zoo.by_parameter(network, exact.diagonal())
        covered = {key for block in factors.blocks.values() for key in block.layout.names}
        assert covered | factors.rest.keys() == diagonal.keys() and not covered & factors.rest.keys()
        for key, leaf in factors.rest.items():
            assert_close(leaf, diagonal[key], **EXACT)
        for key, block in factors.blocks.items():
            outputs, inputs = brute_factors(name, like, key, block.layout)
            assert_close(block.outputs[0], outputs, **EXACT)
            assert_close(block.inputs[0], inputs, **EXACT)
        bases = bases_of(factors)
        corrected = curvature.eigencorrection(lin, x, hessian, bases)
        for key, block in bases.items():
            turned = block.outputs.mT @ block.layout.join({n: jacobian[n] for n in block.layout.names}) @ block.inputs
            assert_close(corrected[key], torch.einsum("bogcj,bop,bpgcj->gcj", turned, of_outputs, turned), **EXACT)


@cache
def layer_jacobians(name, g, key):
    """By hooks: of the outputs in a layer's pre-activations, (B, O, C, T), and its patches [a, 1], (B, J, T)."""
    network, x, _, _ = autoencoder(name, g)
    layer, jacobians, patches = network.get_submodule(key), [], []
    for row in x.split(1):
        seen = []
        handle = layer.register_forward_hook(lambda module, inputs, value, seen=seen: seen.append((inputs[0], value)))
        network(row)
        handle.remove()
        inputs, value = seen[0]

        def outputs(shift, row=row):
            handle = layer.register_forward_hook(lambda module, inputs, before: before + shift)
            try:
                return network(row)[0].flatten()
            finally:
                handle.remove()

        jacobian = torch.autograd.functional.jacobian(outputs, torch.zeros_like(value))[:, 0].detach()
        jacobians.append(jacobian.reshape(len(jacobian), value.shape[1], -1))
        own = dict(layer.named_parameters())
        of_own = torch.func.jacrev(lambda p, a=inputs: torch.func.functional_call(layer, p, (a,))[0])(own)
        # every pre-activation of the first channel in the weights of that channel
        patches.append({n: leaf.reshape(value.shape[1], -1, *own[n].shape)[0] for n, leaf in of_own.items()})
    return torch.stack(jacobians), patches


def brute_factors(name, like, key, layout):
    jacobian, patches = layer_jacobians(name, n_parameters(like), key)
    of_outputs = case(name, like)[4]
    own = {n: n.rsplit(".", 1)[1] for n in layout.names}
    seen = torch.stack([layout.join({n: one[short] for n, short in own.items()})[:, 0, 0] for one in patches])
    return torch.einsum("boct,bop,bpdt->cd", jacobian, of_outputs, jacobian), torch.einsum("bti,btj->ij", seen, seen)


# every network with one number of parameters or the other
OF_NETS = [
    (name, g) if g == (1, 3)[i % 2] else pytest.param(name, g, marks=pytest.mark.slow)
    for i, name in enumerate(NETS)
    for g in (1, 3)
]


@pytest.mark.parametrize(("name", "g"), OF_NETS)
class TestOutputVariance:
    def variance(self, name, g, covariance):
        network, x, _, _ = autoencoder(name, g)
        outputs, got = curvature.output_variance(Linearisation(network), x, covariance)
        assert_close(outputs, network(x))
        return got.flatten(1)

    def test_independent_weights(self, name, g):
        network, _, _, dense = autoencoder(name, g)
        variances = zoo.random_like(network, positive=True)
        flat = torch.cat([v.flatten() for v in variances.values()])
        assert_close(self.variance(name, g, DiagonalCovariance(variances)), dense**2 @ flat, **EXACT)

    def test_kronecker_blocks(self, name, g):
        network, x, jacobian, _ = autoencoder(name, g)
        factors = curvature.kronecker_factors(Linearisation(network), x, zoo.diagonal)
        blocks = [
            RotatedBlock(b.layout, b.outputs, b.inputs, torch.rand_like(b.values)) for b in bases_of(factors).values()
        ]
        rest = {k: torch.rand_like(v) for k, v in factors.rest.items()}
        expected = sum((jacobian[k].flatten(2) ** 2 @ v.flatten() for k, v in rest.items()), torch.zeros(()))
        for b in blocks:
            turned = b.outputs.mT @ b.layout.join({n: jacobian[n] for n in b.layout.names}) @ b.inputs
            expected = expected + (turned**2 * b.values).flatten(2).sum(-1)
        assert_close(self.variance(name, g, KroneckerCovariance(blocks, rest)), expected, **EXACT)

    def test_dense_covariance(self, name, g):
        network, _, _, dense = autoencoder(name, g)
        root = torch.randn(dense.shape[-1], dense.shape[-1], dtype=torch.float64)
        covariance = root @ root.T / len(root)
        masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in network.named_parameters()}
        expected = torch.einsum("bos,st,bot->bo", dense, covariance, dense)
        assert_close(self.variance(name, g, DenseCovariance(masks, covariance)), expected, **EXACT)

    def test_low_rank(self, name, g):
        network, _, _, dense = autoencoder(name, g)
        variances, factor = zoo.random_like(network, positive=True), zoo.random_like(network, 3)
        flat = torch.cat([v.flatten() for v in variances.values()])
        rows = torch.cat([v.flatten(1) for v in factor.values()], 1)
        got = self.variance(name, g, LowRankCovariance(variances, factor, 1))
        assert_close(got, dense**2 @ flat + ((dense @ rows.T) ** 2).sum(-1), **EXACT)


@pytest.mark.parametrize("name", NETS)
def test_no_layer_is_left_to_general_products(name):
    network, x, _, _ = autoencoder(name, 3)
    assert "OpaqueStep" not in {type(step).__name__ for step in Linearisation(network).trace(x)}


@pytest.mark.parametrize("like", ["Bernoulli", "HeteroscedasticGaussian", "Categorical", "by hand, block"])
@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
def test_parameters_on_a_trailing_axis_keep_their_colours(upsampling, like):
    """Numbers that stand far apart share a row whatever parameters they have: H's blocks move to the channels."""
    torch.manual_seed(0)
    g, n_channels = n_parameters(like), 2
    decoder = nets.conv_decoder(1, (n_channels, 12, 11), channels=[1, 1], upsampling=upsampling, n_parameters=g)
    network = nn.Sequential(nn.Linear(3, 1), decoder).double().requires_grad_(False)
    x = torch.rand(N, 3, dtype=torch.float64)
    hessian, lin = LIKELIHOODS[like](1).output_hessian, Linearisation(network)
    assert like == "by hand, block" and g == 1 or "colours" in curvature.plan(lin, x, hessian).routes.values()
    jacobian = twins.output_jacobian(network, x)
    of_outputs = zoo.dense_hessian(hessian, network(x))
    expected = {key: torch.einsum("bo...,bop,bp...->...", j, of_outputs, j) for key, j in jacobian.items()}
    for chunk_size in (None, 1):
        got = curvature.ggn_diagonal(Linearisation(network, chunk_size=chunk_size), x, hessian)
        assert_close(got, expected, **EXACT)
    mask = torch.rand(N, n_channels, 12, 11) > 0.4
    of_mask = (mask if g == 1 else mask[..., None].expand(*mask.shape, g)).flatten(1).double()
    expected = {
        key: torch.einsum("bo...,bop,bo,bp,bp...->...", j, of_outputs, of_mask, of_mask, j)
        for key, j in jacobian.items()
    }
    assert_close(curvature.ggn_diagonal(lin, x, hessian, mask=of_mask.bool()), expected, **EXACT)


def test_kronecker_is_dense_for_one_linear_layer_under_squared_loss():
    network = nets.mlp(4, (), 3).double()
    x = torch.rand(6, 4, dtype=torch.float64)
    hessian = bae.likelihoods.Gaussian(0.7).output_hessian
    (block,) = curvature.kronecker_factors(Linearisation(network), x, hessian).blocks.values()
    product = torch.einsum("cd,ij->cidj", block.outputs[0], block.inputs[0]) / block.count
    masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in network.named_parameters()}
    dense = curvature.ggn_block(Linearisation(network), x, hessian, masks)
    # of [W, b] row by row; of the dense block weights come first
    order = block.layout.join({"1.weight": torch.arange(12.0).reshape(3, 4), "1.bias": torch.arange(12.0, 15)})
    order = order.flatten().long()
    assert_close(product.flatten(0, 1).flatten(1), dense[order][:, order], rtol=1e-10, atol=1e-10)
