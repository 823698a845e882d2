"""The generative network of a deep latent Gaussian model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import curvature, nets
from bayesae.curvature import Linearisation
from tests import twins

SIZES, WIDTHS = (3, 2, 1), (4, 5, 2)


def net(**kwargs):
    torch.manual_seed(0)
    return nets.deep_latent_decoder(SIZES, [4], 6, **kwargs).double()


def test_it_is_the_recursion_from_the_top():
    decoder = net(widths=WIDTHS)
    code = torch.randn(7, 6, dtype=torch.float64)
    first, second, third = code[:, :3], code[:, 3:5], code[:, 5:]
    matrices = [layer.weight for layer in decoder.innovations]
    h = third @ matrices[2].T
    h = decoder.transforms[2](h) + second @ matrices[1].T
    h = decoder.transforms[1](h) + first @ matrices[0].T
    assert_close(decoder(code), decoder.transforms[0](h), rtol=0, atol=1e-12)
    assert [tuple(matrix.shape) for matrix in matrices] == [(4, 3), (5, 2), (2, 1)]
    assert all(layer.bias is None for layer in decoder.innovations)


def test_one_layer_is_a_perceptron_of_the_mixed_code():
    decoder = nets.deep_latent_decoder((3,), [4], (5, 2))
    code = torch.randn(7, 3)
    assert_close(decoder(code), decoder.transforms[0](decoder.innovations[0](code)))
    assert decoder(code).shape == (7, 5, 2)


def test_layers_begin_as_torch_begins_them():
    """Of a linear layer: uniform, up to 1 / sqrt(inputs)."""
    decoder = nets.deep_latent_decoder((400, 100), [200], 50)
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("widths", [None, WIDTHS])
def test_recipe_builds_the_same(widths):
    decoder = net(widths=widths, activation=nn.SiLU)
    again = nets.build(json.loads(json.dumps(decoder.recipe)))
    assert str(again) == str(decoder) and again.recipe == decoder.recipe
    again.double().load_state_dict(decoder.state_dict())
    code = torch.randn(7, 6, dtype=torch.float64)
    assert_close(again(code), decoder(code), rtol=0, atol=0)
    assert "deep_latent_decoder" in nets.NAMES


class TestCurvature:
    def test_the_engine_reads_it_layer_by_layer(self):
        decoder = net()
        graph = Linearisation(decoder).graph
        layers = [name for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear)]
        assert graph.nodes is not None and set(layers) <= set(graph.names)

    @pytest.mark.parametrize("alone", [True, False])
    def test_diagonal_against_brute_force(self, alone):
        likelihood = bae.likelihoods.Bernoulli()
        decoder = net(widths=WIDTHS)
        network = decoder if alone else nn.Sequential(nets.mlp(6, [4], 6).double(), decoder)
        x = torch.rand(2, 6, dtype=torch.float64)
        got = curvature.ggn_diagonal(Linearisation(network), x, likelihood.output_hessian)
        assert_close(got, twins.ggn_diagonal(network, x, likelihood), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("sizes", "widths"), [((), None), ((2, 3), (2,)), (3, None), ((2,), 2), ((2, 0), None), ((2.5,), None)]
)
def test_sizes_that_are_none(sizes, widths):
    with pytest.raises(bae.errors.DataError, match="whole numbers|for every layer"):
        nets.deep_latent_decoder(sizes, [4], 6, widths=widths)


@pytest.fixture(scope="module")
def trained():
    """Digits under two stochastic layers with a rank-one recognition model each."""
    x = bae.datasets.load("digits").reshape(-1, 64)[:600]
    sizes = (6, 3)
    codes = bae.codes.Amortised("rank_one", layers=sizes)
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        decoder = nets.deep_latent_decoder(sizes, [32], 64, widths=(16, 8))
        model = bae.Autoencoder(nets.mlp(64, [32], (9, 3)), decoder, bae.likelihoods.Bernoulli())
        settings = {"objective": bae.objectives.elbo, "codes": codes, "seed": seed, "progress": False}
        history = bae.fit_model(model, x, epochs=6, learning_rate=5e-3, **settings)
        members.append((model, history))
    return members, codes, x


class TestDigits:
    def test_training_raises_the_bound(self, trained):
        for _, history in trained[0]:
            assert history.train[-1] > history.train[0] + 5

    def test_each_layer_has_its_own_kl(self, trained):
        (model, _), codes = trained[0][0], trained[1]
        bound = model.live()
        draws = codes(bound, bae.Batch(trained[2][:5]), n_latent_draws=3)
        assert draws.kl.shape == (1, 5, 2) and draws.latents.shape == (3, 1, 5, 9)
        assert bool((draws.kl > 0).all())

    @pytest.mark.parametrize("method", ["map", "particles", "laplace"])
    def test_predicts(self, trained, method):
        members, codes, x = trained
        model = members[0][0]
        if method != "particles":
            inference = bae.weights.MAP() if method == "map" else bae.weights.Laplace()
            weights = bae.fit_weights(inference, model, x, progress=False)
        else:
            leaves = [bae.functional.parameters_of(member.network) for member, _ in members]
            weights = bae.families.Particles(bae.functional.stack_draws(leaves))
        predictive = bae.Predictive(model, weights, codes=codes)
        n = {"map": 1, "particles": 2, "laplace": 3}[method]
        draws = predictive(x[:8], n_weight_draws=n, n_latent_draws=4, seed=0)
        assert draws.log_ratio.shape == (4, n, 8) and bool(draws.log_ratio.isfinite().all())
        score = bae.ood.negative_log_predictive(draws)
        assert score.shape == (8,) and float(score.std()) > 0.1
        noise = predictive(torch.rand(8, 64), n_weight_draws=n, n_latent_draws=4, seed=0)
        assert float(bae.ood.negative_log_predictive(noise).min()) > float(score.max())
        moments = predictive.moments(x[:8], n_weight_draws=n, n_latent_draws=4, seed=0)
        assert bool(moments.total.isfinite().all()) and bool((moments.code.mean() > 0).all())
