"""Networks that once gave wrong numbers, or could: each against a brute-force Jacobian."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import bayesae as bae
from bayesae.curvature import (
    BlockHessian,
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    Layout,
    Linearisation,
    LowRankCovariance,
    RotatedBlock,
    ggn_diagonal,
    kronecker_factors,
    output_variance,
)
from tests import twins
from tests.curvature import zoo

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def check_diagonal(network, x, hessian=zoo.diagonal, **kwargs):
    network = network.double().eval()
    of_outputs = zoo.dense_hessian(hessian, network(x).detach())
    expected = {
        k: torch.einsum("bo...,bop,bp...->...", j, of_outputs, j) for k, j in twins.output_jacobian(network, x).items()
    }
    assert_close(ggn_diagonal(Linearisation(network, **kwargs), x, hessian), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the twin
@pytest.mark.parametrize(("n", "factor"), [(8, 1.3), (6, 1.3), (5, 2), (4, 2.5), (7, 0.7)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "nearest-exact"])
@pytest.mark.parametrize("recompute", [None, True])
def test_up_sampling_by_any_factor(n, factor, mode, recompute):
    up = nn.Upsample(scale_factor=factor, mode=mode, recompute_scale_factor=recompute)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(9, 2), nn.Linear(2, 2 * n * n), nn.Unflatten(1, (2, n, n)), nn.Tanh(),
        nn.Conv2d(2, 2, 1), nn.Tanh(), up, nn.Conv2d(2, 1, 1),
    )  # fmt: skip
    for hessian in (zoo.scalar, zoo.diagonal):
        check_diagonal(network, torch.rand(2, 9).double(), hessian)


@pytest.mark.parametrize("size", [10, 100])
def test_softmax_hessians_in_single_precision(size):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, size)), torch.rand(3, 5)

    def hessian(outputs):
        p = outputs.softmax(1)
        return BlockHessian(torch.diag_embed(p) - p[:, :, None] * p[:, None], 1)

    got = ggn_diagonal(Linearisation(network), x, hessian)
    expected = ggn_diagonal(Linearisation(copy.deepcopy(network).double()), x.double(), hessian)
    for name, leaf in got.items():
        assert float((leaf - expected[name]).abs().max()) < 1e-5 * float(expected[name].max())


def test_dense_covariances_in_single_precision():
    network, x = nn.Sequential(nn.Linear(20, 40)), torch.rand(2, 20)
    masks = {"0.weight": torch.ones(40, 20, dtype=torch.bool)}
    got = output_variance(Linearisation(network), x, DenseCovariance(masks, torch.eye(800)))[1]
    assert_close(got, (x**2).sum(1, keepdim=True).expand(2, 40))


def test_what_curves_down_is_refused(rows):
    lin = Linearisation(nn.Sequential(nn.Linear(7, 2)).double())
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).double()
    with pytest.raises(bae.errors.NonFiniteError, match="positive semi-definite Hessian block"):
        ggn_diagonal(lin, rows, lambda o: BlockHessian(indefinite.expand(len(o), 2, 2)))
    with pytest.raises(bae.errors.NonFiniteError, match="positive semi-definite covariance"):
        output_variance(lin, rows, DenseCovariance({"0.bias": torch.ones(2, dtype=torch.bool)}, indefinite))


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 6)

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        return left * right.sigmoid()


class Own(nn.Linear):
    pass


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 7)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    "network", [Chunks(), nn.Sequential(Own(7, 6), nn.Tanh()), Twice()], ids=["opaque", "own", "twice"]
)
def test_kronecker_blocks_of_layers_that_no_step_owns(network, rows):
    network = network.double()
    name = "a" if hasattr(network, "a") else "0"
    layout = Layout(f"{name}.weight", f"{name}.bias", network.get_parameter(f"{name}.weight").shape)
    u, v = (
        torch.linalg.qr(torch.randn(layout.n_out, layout.n_out).double()).Q,
        torch.linalg.qr(torch.randn(8, 8).double()).Q,
    )
    block = RotatedBlock(layout, u[None], v[None], torch.rand(1, layout.n_out, 8).double())
    turned = u.T @ layout.join(twins.output_jacobian(network, rows)) @ v
    got = output_variance(Linearisation(network), rows, KroneckerCovariance([block]))[1]
    assert_close(got, (turned**2 * block.values).flatten(2).sum(-1), **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_factors_where_all_data_share_the_same_curvature(chunk_size):
    network = nn.Sequential(
        nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 32), nn.Unflatten(1, (2, 4, 4)),
        nn.ConvTranspose2d(2, 1, 4, 2, 1),
    ).double()  # fmt: skip
    x = torch.rand(6, 9).double()
    factors = kronecker_factors(Linearisation(network, chunk_size=chunk_size), x, zoo.scalar)
    bias = twins.output_jacobian(network, x)["3.bias"]
    assert_close(factors.blocks["3"].outputs[0], 2.5 * torch.einsum("boi,boj->ij", bias, bias), **EXACT)
    bias = twins.output_jacobian(network, x)["2.bias"]
    assert_close(factors.blocks["2"].outputs[0], 2.5 * torch.einsum("boi,boj->ij", bias, bias), **EXACT)


def _relu_in_place(s, h):
    F.relu(h, inplace=True)
    return s.b(h)


def _sum_in_place(s, h):
    skip = h
    h *= 2
    return skip + s.b(h)


def _view_in_place(s, h):
    h.view(-1, 2, 3).relu_()
    return s.b(h)


def _part_in_place(s, h):
    h[:, 0].mul_(3)
    return s.b(h)


@pytest.mark.parametrize(
    "body", [_relu_in_place, _sum_in_place, _view_in_place, _part_in_place], ids=lambda f: f.__name__
)
def test_writes_through_an_alias(body):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)

        def forward(self, x):
            return body(self, self.a(x))

    torch.manual_seed(0)
    network, x = Network().double(), torch.randn(3, 5).double()
    lin = Linearisation(network)
    assert_close(lin.trace(x)[-1].value, network(x))
    assert_close(sum(v.sum() for v in ggn_diagonal(lin, x, zoo.scalar).values()), by_loops(network, x))


def by_loops(network, x):
    """Sum of the diagonal, one output and datum at a time, which in-place operations allow."""
    total = 0.0
    for row in x:
        for o in range(network(row[None]).numel()):
            leaves = torch.autograd.grad(network(row[None]).flatten()[o], list(network.parameters()))
            total = total + 2.5 * sum((leaf**2).sum() for leaf in leaves)
    return total


def test_noise_in_a_forward_is_refused(rows):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(7, 7)

        def forward(self, x):
            return self.a(x + torch.randn_like(x))

    with pytest.raises(bae.errors.UnsupportedError, match="same outputs twice"):
        ggn_diagonal(Linearisation(Noisy().double()), rows, zoo.scalar)


def test_a_convolution_with_a_shared_weight_and_a_bias_of_its_own():
    a, b = nn.ConvTranspose2d(2, 2, 4, 2, 1), nn.ConvTranspose2d(2, 2, 4, 2, 1)
    b.weight = a.weight
    network = nn.Sequential(
        nn.Linear(5, 2), nn.Linear(2, 32), nn.Tanh(), nn.Unflatten(1, (2, 4, 4)), a, nn.Tanh(), b
    ).double()
    x = torch.rand(2, 5).double()
    lin = Linearisation(network)
    exact, factors = ggn_diagonal(lin, x, zoo.diagonal), kronecker_factors(lin, x, zoo.diagonal)
    check_diagonal(network, x)
    assert_close(factors.rest, {name: exact[name] for name in factors.rest}, **EXACT)


def test_a_function_is_not_taken_for_the_module_of_its_name():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.avg_pool2d = nn.AvgPool2d(1)
            self.a, self.b, self.c = nn.Linear(4, 2), nn.Linear(2, 64), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            h = self.b(torch.tanh(self.a(x))).view(-1, 1, 8, 8)
            return self.avg_pool2d(self.c(F.avg_pool2d(self.c.weight.sum() * 0 + h.tanh(), 3, 1, 1)))

    check_diagonal(Network(), torch.rand(3, 4).double())


def test_functions_of_the_number_of_data():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(16, 60)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h.unsqueeze(1).expand(h.shape[0], 2, 8).flatten(1))

    network, x = Network(), torch.rand(9, 4).double()
    check_diagonal(network, x)
    lin = Linearisation(network, memory=2**12)
    assert_close(ggn_diagonal(lin, x, zoo.diagonal), ggn_diagonal(Linearisation(network), x, zoo.diagonal))
    variances = {k: torch.ones_like(p) for k, p in network.named_parameters()}
    got = output_variance(lin, x, DiagonalCovariance(variances))[1]
    assert_close(got, output_variance(Linearisation(network), x, DiagonalCovariance(variances))[1])


def test_attention_is_one_operation():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.attention = nn.Linear(4, 12), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            h = self.a(x).view(-1, 3, 4)
            return self.attention(h, h, h)[0].flatten(1)

    check_diagonal(Network(), torch.rand(2, 4).double())


def test_reading_leaves_the_module_as_it_was():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.z = self.a(x)
            self.n.add_(1)
            return self.b(self.z)

    network, x = Network().double(), torch.rand(2, 4).double()
    ggn_diagonal(Linearisation(network), x, zoo.scalar)
    assert float(network.n) == 0 and not isinstance(getattr(network, "z", None), torch.fx.Proxy)
    pickle.dumps(network.state_dict())


def test_output_padding_beyond_the_stride():
    network = nn.Sequential(
        nn.Linear(4, 2), nn.Linear(2, 32), nn.Tanh(), nn.Unflatten(1, (2, 4, 4)),
        nn.ConvTranspose2d(2, 1, 3, 1, 0, dilation=2, output_padding=1),
    )  # fmt: skip
    check_diagonal(network, torch.rand(2, 4).double())


def test_pieces_are_of_equal_size():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x):
            return self.a(x.unsqueeze(1)).squeeze()

    network, x = Network().double(), torch.rand(257, 2).double()
    got = ggn_diagonal(Linearisation(network), x, zoo.scalar)
    assert float(got["a.bias"].sum()) == pytest.approx(3 * 257 * 2.5)


def test_inputs_that_do_not_fit(rows):
    lin = Linearisation(nn.Sequential(nn.Linear(7, 2)).double())
    with pytest.raises(bae.errors.ParameterError, match="nope"):
        output_variance(lin, rows, LowRankCovariance({}, {"nope": torch.ones(1, 2)}))
    for shape in ((7, 3, 2), (1, 3, 2)):
        with pytest.raises(bae.errors.ShapeError, match="directions"):
            output_variance(lin, rows, DiagonalCovariance({}), directions=torch.ones(shape).double())
    with pytest.raises(bae.errors.ShapeError, match=r"a diagonal \(\) or \(9, 2\)"):
        ggn_diagonal(lin, rows, lambda o: torch.ones(2).double())
    outputs, variance = output_variance(lin, rows[:0], DiagonalCovariance({}))
    assert outputs.shape == variance.shape == (0, 2)
    empty, some = (kronecker_factors(lin, r, zoo.scalar) for r in (rows[:0], rows))
    assert_close((empty + some).blocks["0"].outputs, some.blocks["0"].outputs)
