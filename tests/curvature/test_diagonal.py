from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.curvature import ggn_diagonal
from bayesae.curvature.chain import ELEMENTWISE
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.functional import parameters_of
from tests import twins
from tests.conftest import small_model

SHAPES = {
    "bottleneck": {},
    "wide outputs": {"n_in": 19, "hidden": (8, 5)},
    "no bottleneck": {"n_in": 4, "hidden": (9, 11), "z": 13},
    "code of one": {"z": 1},
    "linear": {"hidden": ()},
    "relu with dead units": {"activation": nn.ReLU},
    "in-place relu": {"activation": lambda: nn.ReLU(inplace=True)},
}
LIKELIHOODS = {"Gaussian": lambda: bae.likelihoods.Gaussian(0.3), "Bernoulli": bae.likelihoods.Bernoulli}


def close(got, expected, tolerance=1e-8):
    assert got.keys() == expected.keys()
    for name in got:
        assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_equals_one_jacobian_an_output(shape, likelihood):
    model = small_model(LIKELIHOODS[likelihood](), **SHAPES[shape])
    x = torch.rand(5, model.encoder[1].in_features, dtype=torch.float64)
    got = ggn_diagonal(model.network, parameters_of(model.network), x, model.likelihood.output_hessian)
    close(got, twins.ggn_diagonal(model.network, x, model.likelihood))


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda layer: layer.__name__)
def test_every_elementwise_layer(activation, rows):
    network = nn.Sequential(
        nn.Linear(7, 3), activation(*(0.1, 0.2) if activation is nn.Threshold else ()), nn.Linear(3, 7)
    )
    network = network.double()
    likelihood = bae.likelihoods.Gaussian(1.0).double()
    got = ggn_diagonal(network, parameters_of(network), rows, likelihood.output_hessian)
    close(got, twins.ggn_diagonal(network, rows, likelihood))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_any_chunk_and_any_shape_of_rows(likelihood, rows):
    model = small_model(LIKELIHOODS[likelihood]())
    params, hessian = parameters_of(model.network), model.likelihood.output_hessian
    whole = ggn_diagonal(model.network, params, rows, hessian)
    close(ggn_diagonal(model.network, params, rows.reshape(9, 1, 7, 1), hessian, chunk_size=2), whole, 1e-12)


def test_masked_outputs_do_not_count(rows):
    model = small_model(n_in=7)
    params = parameters_of(model.network)
    mask = torch.rand(rows.shape) > 0.5
    got = ggn_diagonal(model.network, params, rows, model.likelihood.output_hessian, mask=mask)
    jacobian = twins.output_jacobian(model.network, rows)
    expected = {k: torch.einsum("bo,bo...->...", mask.double() / 0.09, j**2) for k, j in jacobian.items()}
    close(got, expected)


def test_linearises_where_it_is_told_and_not_at_the_modules_weights(rows):
    model, other = small_model(seed=0), small_model(seed=1)
    got = ggn_diagonal(model.network, parameters_of(other.network), rows, other.likelihood.output_hessian)
    close(got, twins.ggn_diagonal(other.network, rows, other.likelihood))


def test_half_precision_weights_are_computed_with_in_float32(rows):
    model = small_model(dtype=torch.float32)
    half = {name: leaf.bfloat16() for name, leaf in parameters_of(model.network).items()}
    wide = {name: leaf.float() for name, leaf in half.items()}
    got, expected = (ggn_diagonal(model.network, p, rows, lambda _: torch.tensor(1 / 0.09)) for p in (half, wide))
    assert all(leaf.dtype == torch.float32 for leaf in got.values())
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(1, 1, 1), "no rule for Conv2d '0'"),
        (nn.PReLU(), "no rule for PReLU '0'"),
        (nn.LayerNorm(7), "no rule for LayerNorm '0'"),
        (nn.Dropout(0.5), "dropout in training mode"),
        (nn.BatchNorm1d(7), "running statistics in training mode"),
    ],
)
def test_a_layer_without_a_rule_is_named(layer, message, rows):
    network = nn.Sequential(layer, nn.Linear(7, 7)).double().train()
    with pytest.raises(bae.errors.UnsupportedError, match=message):
        ggn_diagonal(network, parameters_of(network), rows, lambda _: torch.tensor(1.0))


def test_tied_weights_are_refused(rows):
    layer = nn.Linear(7, 7).double()
    with pytest.raises(bae.errors.UnsupportedError, match="tied weights"):
        ggn_diagonal(
            nn.Sequential(layer, layer), parameters_of(nn.Sequential(layer)), rows, lambda _: torch.tensor(1.0)
        )


def test_a_shared_bias_is_refused(rows):
    network = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7)).double()
    network[2].bias = network[0].bias
    with pytest.raises(bae.errors.UnsupportedError, match="'2' with tied weights"):
        ggn_diagonal(network, parameters_of(network), rows, lambda _: torch.tensor(1.0))


def test_hooks_are_refused(rows):
    network = nn.Sequential(nn.Linear(7, 7), nn.Tanh()).double()
    network[1].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(bae.errors.UnsupportedError, match="Tanh '1' with one"):
        ggn_diagonal(network, parameters_of(network), rows, lambda _: torch.tensor(1.0))


def test_rows_of_another_width_are_refused(rows):
    network = nn.Sequential(nn.Linear(5, 7)).double()
    with pytest.raises(bae.errors.ShapeError, match="rows of 5 numbers for '0'; got 7"):
        ggn_diagonal(network, parameters_of(network), rows, lambda _: torch.tensor(1.0))


def test_linear_over_positions_is_refused():
    network = nn.Sequential(nn.Linear(3, 3)).double()
    with pytest.raises(bae.errors.ShapeError, match="Flatten"):
        ggn_diagonal(network, parameters_of(network), torch.ones(2, 5, 3), lambda _: torch.tensor(1.0))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_bottleneck_bounds_the_rows_that_are_carried(likelihood):
    """784 outputs, a code of 2: below it two rows are left, whatever the likelihood."""
    outputs = torch.randn(3, 784, dtype=torch.float64)
    form = QuadraticForm(784, LIKELIHOODS[likelihood]().output_hessian(outputs))
    for n_in, width in ((256, 784), (64, 256), (2, 64), (64, 2), (256, 64)):
        form = form.through_linear(torch.randn(width, n_in, dtype=torch.float64))
        form = form.through_slope(torch.rand(3, n_in, dtype=torch.float64))
        if n_in == 256 and width == 784 and likelihood == "Gaussian":
            assert form.n_rows == 256  # one QR of the output layer, shared by all rows
    assert form.n_rows == 2 and form.core.shape == (3, 2, 2)
