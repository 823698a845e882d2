"""Every question of curvature against a brute-force Jacobian, for every kind of layer and every form of H."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from bayesae import curvature
from bayesae.curvature import (
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    Linearisation,
    LowRankCovariance,
    RotatedBlock,
)
from tests.curvature import zoo

EXACT = {"rtol": 1e-8, "atol": 1e-8}
PLAIN = ("scalar", "diagonal")


def case(name, hessian):
    network, x, jacobian, dense = zoo.build(name)
    of_outputs = zoo.dense_hessian(zoo.HESSIANS[hessian], network(x))
    return network, x, jacobian, dense, of_outputs


def ggn(dense, of_outputs):
    return torch.einsum("bop,boq,bqr->pr", dense, of_outputs, dense)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hessian", zoo.HESSIANS)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_diagonal(name, hessian, chunk_size):
    network, x, jacobian, _, of_outputs = case(name, hessian)
    lin = Linearisation(network, chunk_size=chunk_size)
    got = curvature.ggn_diagonal(lin, x, zoo.HESSIANS[hessian])
    expected = {k: torch.einsum("bo...,bop,bp...->...", j, of_outputs, j) for k, j in jacobian.items()}
    assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("hessian", zoo.HESSIANS)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_products(name, hessian):
    network, x, _, dense, of_outputs = case(name, hessian)
    vectors = zoo.random_like(network, 3)
    got = curvature.ggn_product(Linearisation(network), x, zoo.HESSIANS[hessian], vectors)
    flat = torch.cat([v.flatten(1) for v in vectors.values()], 1)
    assert_close(got, zoo.by_parameter(network, flat @ ggn(dense, of_outputs)), **EXACT)


def some_weights(network, share=0.3):
    generator = torch.Generator().manual_seed(0)
    return {k: torch.rand(p.shape, generator=generator) < share for k, p in network.named_parameters()}


@pytest.mark.parametrize("hessian", zoo.HESSIANS)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_block_of_any_weights(name, hessian):
    network, x, _, dense, of_outputs = case(name, hessian)
    masks = some_weights(network)
    chosen = torch.cat([m.flatten() for m in masks.values()])
    got = curvature.ggn_block(Linearisation(network), x, zoo.HESSIANS[hessian], masks)
    assert_close(got, ggn(dense[:, :, chosen], of_outputs), **EXACT)


@pytest.mark.parametrize("name", ["mlp", "tied", "conv"])
def test_block_of_one_layer_in_the_masks_own_order(name):
    network, x, jacobian, _, of_outputs = case(name, "diagonal")
    names = list(jacobian)[::-1][:2]
    masks = {k: torch.ones(jacobian[k].shape[2:], dtype=torch.bool) for k in names}
    got = curvature.ggn_block(Linearisation(network, chunk_size=2), x, zoo.diagonal, masks)
    assert_close(got, ggn(torch.cat([jacobian[k].flatten(2) for k in names], -1), of_outputs), **EXACT)


def bases_of(factors):
    result = {}
    for name, block in factors.blocks.items():
        outer, u = torch.linalg.eigh(block.outputs)
        inner, v = torch.linalg.eigh(block.inputs)
        result[name] = RotatedBlock(block.layout, u, v, outer[:, :, None] * inner[:, None] / block.count)
    return result


@pytest.mark.parametrize("hessian", zoo.HESSIANS)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_kronecker_factors_and_their_correction(name, hessian):
    network, x, jacobian, _, of_outputs = case(name, hessian)
    lin = Linearisation(network)
    got = curvature.kronecker_factors(lin, x, zoo.HESSIANS[hessian])
    exact = {k: torch.einsum("bo...,bop,bp...->...", j, of_outputs, j) for k, j in jacobian.items()}
    covered = {k for block in got.blocks.values() for k in block.layout.names}
    assert covered | got.rest.keys() == exact.keys() and not covered & got.rest.keys()
    for k, leaf in got.rest.items():
        assert_close(leaf, exact[k], **EXACT)
    for block in got.blocks.values():
        if block.count == len(x) and block.layout.bias:
            # once a row, a bias's curvature is M itself
            assert_close(block.outputs.diagonal(dim1=1, dim2=2).flatten(), exact[block.layout.bias], **EXACT)
            bias = jacobian[block.layout.bias]
            assert_close(block.outputs[0], torch.einsum("boi,bop,bpj->ij", bias, of_outputs, bias), **EXACT)
    bases = bases_of(got)
    corrected = curvature.eigencorrection(lin, x, zoo.HESSIANS[hessian], bases)
    for k, block in bases.items():
        turned = block.outputs.mT @ block.layout.join({n: jacobian[n] for n in block.layout.names}) @ block.inputs
        expected = torch.einsum("bogcj,bop,bpgcj->gcj", turned, of_outputs, turned)
        assert_close(corrected[k], expected, **EXACT)


def preactivation_gram(network, layer, block, row, of_outputs):
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, value: seen.append(value))
    network(row)
    handle.remove()

    def outputs(shift):
        handle = layer.register_forward_hook(lambda module, inputs, value: value + shift)
        try:
            return network(row)[0].flatten()
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(outputs, torch.zeros_like(seen[0])).detach()
    s = jacobian[:, 0].reshape(len(jacobian), block.layout.groups, block.layout.n_out, -1)
    return torch.einsum("ogct,op,pgdt->gcd", s, of_outputs, s)


@pytest.mark.parametrize("name", ["conv", "up-sampling", "one axis"])
def test_output_factors_of_convolutions_sum_over_positions(name):
    """S by autograd at the pre-activations, one output at a time."""
    network, x, _, _, of_outputs = case(name, "diagonal")
    factors = curvature.kronecker_factors(Linearisation(network), x, zoo.diagonal)
    for layer_name, block in factors.blocks.items():
        layer = network.get_submodule(layer_name)
        expected = sum(preactivation_gram(network, layer, block, x[b : b + 1], of_outputs[b]) for b in range(len(x)))
        assert_close(block.outputs, expected, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", zoo.NETWORKS)
class TestOutputVariance:
    def variance(self, name, chunk_size, covariance, **kwargs):
        network, x, _, _ = zoo.build(name)
        outputs, got = curvature.output_variance(Linearisation(network, chunk_size=chunk_size), x, covariance, **kwargs)
        assert_close(outputs, network(x))
        return got.flatten(1)

    def test_independent_weights(self, name, chunk_size):
        network, _, _, dense = zoo.build(name)
        variances = zoo.random_like(network, positive=True)
        got = self.variance(name, chunk_size, DiagonalCovariance(variances))
        flat = torch.cat([v.flatten() for v in variances.values()])
        assert_close(got, dense**2 @ flat, **EXACT)

    def test_along_directions(self, name, chunk_size):
        network, x, _, dense = zoo.build(name)
        variances = zoo.random_like(network, positive=True)
        flat = torch.cat([v.flatten() for v in variances.values()])
        for shape in ((2,), (len(x), 2)):
            directions = torch.randn(*shape, *network(x).shape[1:], dtype=torch.float64)
            got = self.variance(name, chunk_size, DiagonalCovariance(variances), directions=directions)
            moved = directions.reshape(*shape, -1) @ dense
            assert_close(got, moved**2 @ flat, **EXACT)

    def test_kronecker_blocks(self, name, chunk_size):
        network, x, jacobian, _ = zoo.build(name)
        factors = curvature.kronecker_factors(Linearisation(network), x, zoo.scalar)
        blocks = [
            RotatedBlock(b.layout, b.outputs, b.inputs, torch.rand_like(b.values)) for b in bases_of(factors).values()
        ]
        rest = {k: torch.rand_like(v) for k, v in factors.rest.items()}
        expected = sum((jacobian[k].flatten(2) ** 2 @ v.flatten() for k, v in rest.items()), torch.zeros(()))
        for b in blocks:
            turned = b.outputs.mT @ b.layout.join({n: jacobian[n] for n in b.layout.names}) @ b.inputs
            expected = expected + (turned**2 * b.values).flatten(2).sum(-1)
        assert_close(self.variance(name, chunk_size, KroneckerCovariance(blocks, rest)), expected, **EXACT)

    def test_dense_covariance(self, name, chunk_size):
        network, x, _, dense = zoo.build(name)
        masks = some_weights(network)
        chosen = torch.cat([m.flatten() for m in masks.values()])
        root = torch.randn(int(chosen.sum()), int(chosen.sum()), dtype=torch.float64)
        covariance = root @ root.T / len(root)
        j = dense[:, :, chosen]
        got = self.variance(name, chunk_size, DenseCovariance(masks, covariance))
        assert_close(got, torch.einsum("bos,st,bot->bo", j, covariance, j), **EXACT)
        directions = torch.randn(2, *network(x).shape[1:], dtype=torch.float64)
        got = self.variance(name, chunk_size, DenseCovariance(masks, covariance), directions=directions)
        along = directions.flatten(1) @ j
        assert_close(got, torch.einsum("bos,st,bot->bo", along, covariance, along), **EXACT)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_low_rank(self, name, chunk_size, sign):
        network, _, _, dense = zoo.build(name)
        variances, factor = zoo.random_like(network, positive=True), zoo.random_like(network, 3)
        factor = {k: v * 0.05 for k, v in factor.items()} if sign < 0 else factor
        variances = {k: v + 1 for k, v in variances.items()}
        flat = torch.cat([v.flatten() for v in variances.values()])
        rows = torch.cat([v.flatten(1) for v in factor.values()], 1)
        got = self.variance(name, chunk_size, LowRankCovariance(variances, factor, sign))
        assert_close(got, (dense**2 @ flat + sign * ((dense @ rows.T) ** 2).sum(-1)).clamp(min=0), **EXACT)


def test_weights_of_the_encoder_alone():
    network, x, jacobian, _ = zoo.build("mlp")
    variances = {k: torch.rand_like(j[0, 0]) for k, j in jacobian.items() if k.startswith("0.")}
    got = curvature.output_variance(Linearisation(network), x, DiagonalCovariance(variances))[1]
    expected = sum(jacobian[k].flatten(2) ** 2 @ v.flatten() for k, v in variances.items())
    assert_close(got, expected, **EXACT)
