"""What a network may look like, what is refused and how, and what stays untouched."""

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
    DiagonalCovariance,
    KroneckerCovariance,
    Layout,
    Linearisation,
    LowRankHessian,
    RotatedBlock,
    ggn_diagonal,
    ggn_product,
    output_variance,
)
from bayesae.curvature.elementwise import ELEMENTWISE
from bayesae.functional import parameters_of
from tests import twins
from tests.conftest import small_model

LIKELIHOODS = {"Gaussian": lambda: bae.likelihoods.Gaussian(0.3), "Bernoulli": bae.likelihoods.Bernoulli}
SHAPES = {
    "bottleneck": {},
    "wide outputs": {"n_in": 19, "hidden": (8, 5)},
    "no bottleneck": {"n_in": 4, "hidden": (9, 11), "z": 13},
    "code of one": {"z": 1},
    "linear": {"hidden": ()},
    "relu with dead units": {"activation": nn.ReLU},
    "in-place relu": {"activation": lambda: nn.ReLU(inplace=True)},
}


def ones(outputs):
    return outputs.new_tensor(1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_autoencoders_of_any_shape(shape, likelihood):
    """H by autograd from the likelihood's own density, J one output at a time."""
    model = small_model(LIKELIHOODS[likelihood](), **SHAPES[shape])
    x = torch.rand(5, model.encoder[1].in_features, dtype=torch.float64)
    got = ggn_diagonal(Linearisation(model.network), x, model.likelihood.output_hessian)
    assert_close(got, twins.ggn_diagonal(model.network, x, model.likelihood), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the twin
@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda layer: layer.__name__)
def test_every_elementwise_layer(activation, rows):
    given = (0.1, 0.2) if activation is nn.Threshold else ()
    network = nn.Sequential(nn.Linear(7, 3), activation(*given), nn.Linear(3, 7)).double().eval()
    likelihood = bae.likelihoods.Gaussian(1.0)
    lin = Linearisation(network)
    assert type(lin.trace(rows)[2]).__name__ == "SlopeStep"
    got = ggn_diagonal(lin, rows, likelihood.output_hessian)
    assert_close(got, twins.ggn_diagonal(network, rows, likelihood), rtol=1e-8, atol=1e-8)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(7, 3), nn.Linear(3, 7), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.tanh,
        lambda h: h.sigmoid(),
        lambda h: 2 * h + 1,
        lambda h: h / 3 - 0.5,
        lambda h: -h,
        lambda h: h**2,
        lambda h: F.leaky_relu(h, 0.2),
        lambda h: 1 - h.exp(),
        lambda h: h.clone().relu_(),
        lambda h: h.float().double(),
    ],
)
def test_element_wise_functions_are_as_cheap_as_layers(function, rows):
    network = Functional(function).double()
    lin = Linearisation(network)
    assert "OpaqueStep" not in {type(step).__name__ for step in lin.trace(rows)}
    got = ggn_diagonal(lin, rows, ones)
    assert_close(got, twins.ggn_diagonal(network, rows, bae.likelihoods.Gaussian(1.0)), rtol=1e-6, atol=1e-6)


def test_masked_outputs_do_not_count(rows):
    model = small_model(n_in=7)
    mask = torch.rand(rows.shape) > 0.5
    jacobian = twins.output_jacobian(model.network, rows)
    lin = Linearisation(model.network, chunk_size=2)
    got = ggn_diagonal(lin, rows, model.likelihood.output_hessian, mask=mask)
    expected = {k: torch.einsum("bo,bo...->...", mask.double() / 0.09, j**2) for k, j in jacobian.items()}
    assert_close(got, expected, rtol=1e-8, atol=1e-8)
    blocks = ggn_diagonal(
        lin, rows, lambda o: BlockHessian(torch.eye(7).double().expand(len(o), 7, 7) / 0.09), mask=mask
    )
    assert_close(blocks, expected, rtol=1e-8, atol=1e-8)
    low = ggn_diagonal(lin, rows, lambda o: LowRankHessian(torch.eye(7).double().expand(len(o), 7, 7) / 0.3), mask=mask)
    assert_close(low, expected, rtol=1e-8, atol=1e-8)


def test_linearises_where_it_is_told_and_leaves_the_module_alone(rows):
    model, other = small_model(seed=0), small_model(seed=1)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    lin = Linearisation(model.network, parameters_of(other.network))
    got = ggn_diagonal(lin, rows, other.likelihood.output_hessian)
    assert_close(got, twins.ggn_diagonal(other.network, rows, other.likelihood), rtol=1e-8, atol=1e-8)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_half_precision_weights_are_computed_with_in_float32(rows):
    network = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.LayerNorm(4), nn.Linear(4, 7)).eval()
    half = {name: leaf.bfloat16() for name, leaf in parameters_of(network).items()}
    wide = {name: leaf.float() for name, leaf in half.items()}
    got, expected = (ggn_diagonal(Linearisation(network.bfloat16(), p), rows, ones) for p in (half, wide))
    assert all(leaf.dtype == torch.float32 for leaf in got.values())
    assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["encoder.1.weight", "decoder.1.weight", "decoder.5.bias"])
def test_float32_agrees_to_the_layers_largest_entry(name):
    wide = small_model(n_in=40, hidden=(20, 10))
    narrow = copy.deepcopy(wide).float()
    x = torch.rand(16, 40, dtype=torch.float64)
    got, expected = (ggn_diagonal(Linearisation(m.network), x, m.likelihood.output_hessian) for m in (narrow, wide))
    assert float((got[name] - expected[name]).abs().max()) < 1e-5 * float(expected[name].max())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5), "dropout in training mode"),
        (nn.BatchNorm1d(7), "running statistics in training mode"),
        (nn.RReLU(), "random slopes in training mode"),
    ],
)
def test_training_mode_is_refused_where_it_matters(layer, message):
    with pytest.raises(bae.errors.UnsupportedError, match=message):
        Linearisation(nn.Sequential(layer, nn.Linear(7, 7)).train())


def test_random_functions_are_refused(rows):
    network = Functional(lambda h: F.dropout(h, 0.5)).double()
    with pytest.raises(bae.errors.UnsupportedError, match="dropout.* that draws random numbers"):
        ggn_diagonal(Linearisation(network), rows, ones)


def test_hooks_are_refused(rows):
    network = nn.Sequential(nn.Linear(7, 7), nn.Tanh()).double()
    network[1].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(bae.errors.UnsupportedError, match="Tanh '1' with one"):
        Linearisation(network)


def test_rows_of_another_width_are_refused(rows):
    with pytest.raises(bae.errors.ShapeError, match="rows of 5 numbers for '0'; got 7"):
        ggn_diagonal(Linearisation(nn.Sequential(nn.Linear(5, 7)).double()), rows, ones)
    with pytest.raises(bae.errors.ShapeError, match="3 channels for '0'"):
        ggn_diagonal(Linearisation(nn.Sequential(nn.Conv2d(3, 1, 1)).double()), torch.ones(2, 1, 4, 4), ones)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_overwritten_input_that_is_read_again_is_refused(rows, is_first):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(7, 7), nn.Linear(7, 7), nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.a(x)
            return self.act(h) + self.b(h) if is_first else self.b(h) + self.act(h)

    with pytest.raises(bae.errors.UnsupportedError, match="'act' overwriting the output of 'a'"):
        ggn_diagonal(Linearisation(Overwrites().double()), rows, ones)


def test_arguments_beyond_the_first_keep_their_defaults(rows):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)

        def forward(self, x, shift=None, scale=2.0):
            return self.a(x) * scale if shift is None else self.b(x) + shift

    network = Optional().double()
    got = ggn_diagonal(Linearisation(network), rows, ones)
    assert float(got["b.weight"].abs().max()) == 0
    assert_close(got, twins.ggn_diagonal(network, rows, bae.likelihoods.Gaussian(1.0)), rtol=1e-8, atol=1e-8)


def test_a_layer_that_mixes_rows_of_the_batch_is_named(rows):
    class Mixes(nn.Module):
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return x[:1]

    with pytest.raises(bae.errors.UnsupportedError, match="Mixes '1' giving"):
        ggn_diagonal(Linearisation(nn.Sequential(nn.Linear(7, 7), Mixes()).double()), rows, ones)


def test_every_parameter_is_needed(rows):
    network = nn.Sequential(nn.Linear(7, 7))
    with pytest.raises(bae.errors.ParameterError, match="0.bias"):
        Linearisation(network, {"0.weight": network[0].weight})


def test_wrong_forms_of_the_hessian_are_refused(rows):
    lin = Linearisation(nn.Sequential(nn.Linear(7, 6), nn.Unflatten(1, (2, 3))).double())
    with pytest.raises(bae.errors.ShapeError, match=r"blocks of shape \(9, 3, 2, 2\)"):
        ggn_diagonal(lin, rows, lambda o: BlockHessian(torch.eye(3).double().expand(9, 2, 3, 3)))
    with pytest.raises(bae.errors.ShapeError, match=r"a factor \(B, R"):
        ggn_diagonal(lin, rows, lambda o: LowRankHessian(torch.ones(9, 1, 6).double()))
    with pytest.raises(bae.errors.ShapeError, match="directions"):
        output_variance(lin, rows, DiagonalCovariance({}), directions=torch.ones(4, 6).double())
    with pytest.raises(bae.errors.ParameterError, match="nowhere"):
        output_variance(lin, rows, DiagonalCovariance({"nowhere": torch.ones(1)}))


def test_unused_parameters_have_no_curvature(rows):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.spare = nn.Linear(7, 7), nn.Linear(2, 2)

        def forward(self, x):
            self.a(x).tanh()  # computed and dropped
            return self.a(x)

    got = ggn_diagonal(Linearisation(Spare().double()), rows, ones)
    assert float(got["spare.weight"].abs().max()) == 0 and float(got["a.bias"].min()) == 9


def test_a_linearisation_can_be_sent_elsewhere(rows):
    lin = Linearisation(small_model().network, chunk_size=3)
    again = pickle.loads(pickle.dumps(lin))
    assert_close(ggn_diagonal(again, rows, ones), ggn_diagonal(lin, rows, ones), rtol=0, atol=0)
    assert copy.deepcopy(lin) is lin and again.chunk_size == 3


def test_a_block_without_its_bias_is_named(rows):
    network = nn.Sequential(nn.Linear(7, 3)).double()
    layout = Layout("0.weight", None, network[0].weight.shape)
    block = RotatedBlock(layout, torch.eye(3)[None], torch.eye(7)[None], torch.ones(1, 3, 7))
    with pytest.raises(bae.errors.ParameterError, match="Weight and bias stand in one block"):
        output_variance(Linearisation(network), rows, KroneckerCovariance([block]))


def test_no_vector_no_product(rows):
    network = nn.Sequential(nn.Linear(7, 3)).double()
    none = {name: p.new_zeros(0, *p.shape) for name, p in network.named_parameters()}
    got = ggn_product(Linearisation(network), rows, ones, none)
    assert got["0.weight"].shape == (0, 3, 7)
