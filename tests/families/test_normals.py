"""Normal families: draws, marginal variances and output variances against covariances built entry by entry."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import random
from bayesae.curvature import Layout, RotatedBlock
from bayesae.families import DenseNormal, DiagonalNormal, FactorNormal, KroneckerNormal, LowRankNormal
from bayesae.functional import parameters_of
from tests.twins import dense_jacobian

DOUBLE = torch.float64


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()


def normal_matrix(size, seed, n=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n or size, size, generator=generator, dtype=DOUBLE)


def orthogonal(size, seed):
    return torch.linalg.qr(normal_matrix(size, seed)).Q


def some(net):
    """Every weight but two of the first layer."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    masks["0.weight"][1:, 1] = False
    return bae.Subset(masks)


def block(name, weight, seed):
    layout = Layout(f"{name}.weight", f"{name}.bias", weight.shape)
    n_out, n_in = layout.n_out, layout.n_in
    values = normal_matrix(n_in, seed, n_out)[None] ** 2 + 0.1
    return RotatedBlock(layout, orthogonal(n_out, seed + 1)[None], orthogonal(n_in, seed + 2)[None], values)


def diagonal():
    net = network()
    var = normal_matrix(len(some(net)), 3, 1)[0] ** 2 + 0.1
    return net, DiagonalNormal(parameters_of(net), var, some(net)), embed(net, some(net), torch.diag(var))


def dense():
    net = network()
    root = normal_matrix(len(some(net)), 3)
    precision = root @ root.mT + torch.eye(len(root), dtype=DOUBLE)
    family = DenseNormal(parameters_of(net), precision, some(net))
    return net, family, embed(net, some(net), torch.linalg.inv(precision))


def low_rank():
    net = network()
    size = len(some(net))
    d, factor = normal_matrix(size, 3, 1)[0] ** 2 + 0.5, normal_matrix(size, 4, 3)
    family = LowRankNormal(parameters_of(net), d, factor, some(net))
    return net, family, embed(net, some(net), torch.linalg.inv(torch.diag(d) + factor.mT @ factor))


def factor():
    net = network()
    size = len(some(net))
    var, rows = normal_matrix(size, 3, 1)[0] ** 2 + 0.2, normal_matrix(size, 4, 3)
    return (
        net,
        FactorNormal(parameters_of(net), var, rows, some(net)),
        embed(net, some(net), torch.diag(var) + rows.mT @ rows),
    )


def kronecker():
    """The first layer a block; of the second one bias is fixed."""
    net = network()
    params = parameters_of(net)
    first = block("0", params["0.weight"], 5)
    rest = {"2.weight": params["2.weight"] ** 2, "2.bias": torch.tensor([0.5, 0.0, 0.2], dtype=DOUBLE)}
    family = KroneckerNormal(params, [first], rest)
    basis = torch.kron(first.outputs[0], first.inputs[0])
    matrix = basis @ torch.diag(first.values.flatten()) @ basis.mT  # rows (W_i0, W_i1, b_i) for i = 0, 1, 2
    order = [0, 1, 3, 4, 6, 7, 2, 5, 8]  # to weight, bias
    independent = torch.cat([rest["2.weight"].flatten(), rest["2.bias"]])
    return net, family, torch.block_diag(matrix[order][:, order], torch.diag(independent))


def embed(net, subset, matrix):
    """A covariance of the chosen weights among all, in the order of ``named_parameters``."""
    chosen = torch.cat([subset.masks[name].flatten() for name, _ in net.named_parameters()])
    full = torch.zeros(len(chosen), len(chosen), dtype=DOUBLE)
    full[chosen.nonzero(), chosen.nonzero()[:, 0]] = matrix
    return full


FAMILIES = [diagonal, dense, low_rank, factor, kronecker]


@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
class TestNormal:
    def test_draws_have_its_moments(self, build):
        _, family, covariance = build()
        n = 20000
        draws = family.sample(n)
        deviations = torch.cat([(draws[name] - leaf).flatten(1) for name, leaf in family.mean.items()], 1)
        free = covariance.diagonal() > 0
        assert float(deviations[:, ~free].abs().max()) == 0 if bool((~free).any()) else True
        standard = deviations[:, free] @ torch.linalg.inv(torch.linalg.cholesky(covariance[free][:, free])).mT
        # whitened: means have standard error 1 / sqrt(n), products as well, and squares sqrt(2 / n)
        assert float(standard.mean(0).abs().max()) * n**0.5 < 4.5
        second = standard.mT @ standard / n - torch.eye(int(free.sum()), dtype=DOUBLE)
        assert float(second.abs().max()) * (n / 2) ** 0.5 < 4.5

    def test_marginal_variances(self, build):
        _, family, covariance = build()
        got = torch.cat([value.flatten() for value in family.variances().values()])
        assert_close(got, covariance.diagonal(), rtol=1e-10, atol=1e-12)

    def test_output_variance_is_that_of_the_explicit_covariance(self, build):
        net, family, covariance = build()
        x = normal_matrix(2, 9, 5)
        jacobian = dense_jacobian(net, x)
        outputs, variance = family.output_variance(net, x)
        assert_close(outputs, net(x).detach(), rtol=1e-12, atol=1e-12)
        assert_close(variance, (jacobian @ covariance * jacobian).sum(-1), rtol=1e-9, atol=1e-12)
        assert_close(family.output_variance(net, x, 2)[1], variance, rtol=1e-12, atol=0)

    def test_more_draws_begin_with_the_fewer(self, build):
        _, family, _ = build()
        with random.scope(3):
            few = family.sample(2)
        with random.scope(3):
            many = family.sample(5)
        assert all(torch.equal(few[name], many[name][:2]) for name in few)

    def test_pickles(self, build):
        _, family, covariance = build()
        again = pickle.loads(pickle.dumps(family))
        got = torch.cat([value.flatten() for value in again.variances().values()])
        assert_close(got, covariance.diagonal(), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_draws_have_the_dtype_of_the_mean(self, build, dtype):
        _, family, _ = build()
        narrow = dataclasses.replace(family, mean={name: leaf.to(dtype) for name, leaf in family.mean.items()})
        assert {leaf.dtype for leaf in narrow.sample(2).values()} == {dtype}
        assert {leaf.dtype for leaf in narrow.variances().values()} == {dtype}

    def test_of_no_weight_at_all(self, build):
        net, family, _ = build()
        none = bae.Subset({})
        empty = {
            DiagonalNormal: lambda: DiagonalNormal(family.mean, torch.zeros(0, dtype=DOUBLE), none),
            DenseNormal: lambda: DenseNormal(family.mean, torch.zeros(0, 0, dtype=DOUBLE), none),
            LowRankNormal: lambda: LowRankNormal(
                family.mean, torch.zeros(0, dtype=DOUBLE), torch.zeros(0, 0, dtype=DOUBLE), none
            ),
            FactorNormal: lambda: FactorNormal(
                family.mean, torch.zeros(0, dtype=DOUBLE), torch.zeros(0, 0, dtype=DOUBLE), none
            ),
            KroneckerNormal: lambda: KroneckerNormal(family.mean, []),
        }[type(family)]()
        assert_close(empty.sample(2), {name: leaf.expand(2, *leaf.shape) for name, leaf in family.mean.items()})
        assert float(empty.output_variance(net, normal_matrix(2, 9, 5))[1].abs().max()) == 0


class TestRefusals:
    def test_shapes(self):
        net = network()
        params, subset = parameters_of(net), some(net)
        size = len(subset)
        with pytest.raises(bae.errors.ShapeError, match=rf"precision of shape \({size}, {size}\)"):
            DenseNormal(params, torch.eye(3, dtype=DOUBLE), subset)
        with pytest.raises(bae.errors.ShapeError, match=rf"factor \(K, {size}\)"):
            LowRankNormal(params, torch.ones(size, dtype=DOUBLE), torch.ones(size, 2, dtype=DOUBLE), subset)
        with pytest.raises(bae.errors.ShapeError, match=rf"var \({size},\) and factor \(K, {size}\)"):
            FactorNormal(params, torch.ones(size, dtype=DOUBLE), torch.ones(size, 2, dtype=DOUBLE), subset)
        with pytest.raises(bae.errors.ShapeError, match="variances of shape .* for '2.bias'"):
            KroneckerNormal(params, [], {"2.bias": torch.ones(1, dtype=DOUBLE)})
        first = block("0", params["0.weight"], 5)
        with pytest.raises(bae.errors.ShapeError, match="values of shape .* for '0.weight'"):
            KroneckerNormal(params, [dataclasses.replace(first, values=first.values[0])])
        transposed = dataclasses.replace(first.layout, shape=torch.Size((3, 1, 2)))
        with pytest.raises(bae.errors.ShapeError, match=r"\(3, 2\) for '0.weight'"):
            KroneckerNormal(params, [dataclasses.replace(first, layout=transposed)])

    def test_names(self):
        params = parameters_of(network())
        first = block("0", params["0.weight"], 5)
        with pytest.raises(bae.errors.ParameterError, match=r"'0.bias'\] twice"):
            KroneckerNormal(params, [first], {"0.bias": torch.ones(3, dtype=DOUBLE)})
        with pytest.raises(bae.errors.ParameterError, match=r"unknown \['nobody'\]"):
            KroneckerNormal(params, [], {"nobody": torch.ones(2, dtype=DOUBLE)})

    def test_signs(self):
        net = network()
        params, subset = parameters_of(net), some(net)
        wrong = torch.ones(len(subset), dtype=DOUBLE)
        wrong[2] = -0.5
        with pytest.raises(bae.errors.DataError, match="non-negative variances; got -0.5"):
            DiagonalNormal(params, wrong, subset)
        with pytest.raises(bae.errors.DataError, match="non-negative variances; got -0.5"):
            FactorNormal(params, wrong, wrong[None], subset)
        with pytest.raises(bae.errors.DataError, match="positive diagonal of the precision"):
            LowRankNormal(params, wrong.clamp(min=0), wrong[None], subset)
        with pytest.raises(bae.errors.DataError, match="non-negative variances of '2.bias'"):
            KroneckerNormal(params, [], {"2.bias": wrong[:3]})
        first = block("0", params["0.weight"], 5)
        with pytest.raises(bae.errors.DataError, match="non-negative variances of '0.weight'"):
            KroneckerNormal(params, [dataclasses.replace(first, values=-first.values)])

    def test_a_precision_that_is_none(self):
        net = network()
        params, subset = parameters_of(net), some(net)
        eye = torch.eye(len(subset), dtype=DOUBLE)
        bent = eye.clone()
        bent[3, 3] = -1.0
        with pytest.raises(bae.errors.DataError, match="positive definite precision; got a leading minor of 4 rows"):
            DenseNormal(params, bent, subset)
        skewed = eye.clone()
        skewed[0, 1] = 0.5
        with pytest.raises(bae.errors.DataError, match="symmetric precision"):
            DenseNormal(params, skewed, subset)

    def test_numbers_that_are_not_finite(self):
        net = network()
        params, subset = parameters_of(net), some(net)
        size = len(subset)
        nan = torch.full((size, size), torch.nan, dtype=DOUBLE)
        first = block("0", params["0.weight"], 5)
        for build in (
            lambda: DenseNormal(params, nan, subset),
            lambda: LowRankNormal(params, nan[0], nan, subset),
            lambda: FactorNormal(params, nan[0].nan_to_num(1.0), nan, subset),
            lambda: KroneckerNormal(params, [dataclasses.replace(first, values=first.values * torch.nan)]),
            lambda: KroneckerNormal(params, [], {"2.bias": nan[0, :3]}),
        ):
            with pytest.raises(bae.errors.NonFiniteError, match="NaN or infinite"):
                build()


def test_a_nearly_singular_low_rank_precision_is_solved(model):
    """Curvature of 1e10 over a prior of 1: what is left along the factor is 1e-10 of it."""
    params = parameters_of(model.network)
    subset = bae.Subset.of(model.network, ("encoder.1.*",))
    size = len(subset)
    factor = 1e5 * orthogonal(size, 0)[:2]
    family = LowRankNormal(params, torch.ones(size, dtype=DOUBLE), factor, subset)
    deviations = subset.ravel(family.sample(500)) - subset.ravel(params)
    along = deviations @ factor.mT  # of unit variance
    assert float(along.std(0).sub(1).abs().max()) < 4.5 / 1000**0.5
