from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.curvature import ggn_diagonal, output_variance
from bayesae.functional import parameters_of
from tests import twins
from tests.conftest import small_model
from tests.curvature.test_diagonal import SHAPES, close


def setting(shape):
    model = small_model(**SHAPES[shape])
    params = parameters_of(model.network)
    variances = {name: torch.rand_like(leaf) for name, leaf in params.items()}
    x = torch.rand(6, model.encoder[1].in_features, dtype=torch.float64)
    return model, params, variances, x


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_formula(shape):
    model, params, variances, x = setting(shape)
    outputs, variance = output_variance(model.network, params, variances, x)
    jacobian = twins.dense_jacobian(model.network, x)
    dense = torch.diag(torch.cat([variances[name].flatten() for name in params]))
    expected = (jacobian @ dense @ jacobian.mT).diagonal(dim1=-2, dim2=-1)
    assert_close(variance, expected, rtol=1e-10, atol=1e-12)
    assert_close(outputs, model(x).detach(), rtol=1e-12, atol=1e-12)


def test_any_chunk_gives_the_same_numbers():
    model, params, variances, x = setting("wide outputs")
    whole = output_variance(model.network, params, variances, x)[1]
    assert_close(output_variance(model.network, params, variances, x, chunk_size=1)[1], whole, rtol=1e-12, atol=0)


def test_fixed_weights_add_nothing():
    model, params, variances, x = setting("bottleneck")
    only = {name: v if name.startswith("decoder.5") else torch.zeros_like(v) for name, v in variances.items()}
    layer = model.decoder[:5](model.encoder(x)).detach()
    expected = layer**2 @ variances["decoder.5.weight"].mT + variances["decoder.5.bias"]
    assert_close(output_variance(model.network, params, only, x)[1], expected, rtol=1e-12, atol=0)


def test_outputs_keep_their_own_shape():
    model, params, variances, x = setting("bottleneck")
    network = torch.nn.Sequential(model.network, torch.nn.Unflatten(1, (7, 1)))
    renamed = {f"0.{k}": v for k, v in params.items()}, {f"0.{k}": v for k, v in variances.items()}
    assert output_variance(network, *renamed, x)[1].shape == (6, 7, 1)


@pytest.mark.parametrize("widths", [(7, 5, 3), (7, 3, 5), (7, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_chain_that_ends_in_an_activation(widths, bias, rows):
    layers = [nn.Linear(a, b, bias=bias) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    network = nn.Sequential(*(part for layer in layers for part in (layer, nn.Sigmoid()))).double()
    params = parameters_of(network)
    variances = {name: torch.rand_like(leaf) for name, leaf in params.items()}
    jacobian = twins.dense_jacobian(network, rows)
    expected = (jacobian**2) @ torch.cat([variances[name].flatten() for name in params])
    assert_close(output_variance(network, params, variances, rows)[1], expected, rtol=1e-10, atol=1e-14)
    likelihood = bae.likelihoods.Gaussian(0.3)
    target = torch.zeros(9, widths[-1], dtype=torch.float64)
    diagonal = ggn_diagonal(network, params, rows, likelihood.output_hessian)
    close(diagonal, twins.ggn_diagonal(network, rows, likelihood, target))
