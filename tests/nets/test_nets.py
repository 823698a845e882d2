"""Shapes, recipes, training and mapping of the networks; their curvature is in tests/curvature/test_nets.py."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import nets
from bayesae.functional import map_over_draws, parameters_of

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 8, 8), (2, 5, 9), (1, 140), (3, 218)]
TINY = {
    "mlp": lambda **k: (nets.mlp(16, [8], 2, **k), nets.mlp(2, [8], 16, **k), torch.rand(6, 16)),
    "transposed": lambda **k: (
        nets.conv_encoder((1, 5, 6), 2, channels=[4], **k),
        nets.conv_decoder(2, (1, 5, 6), channels=[4], **k),
        torch.rand(6, 1, 5, 6),
    ),
    "nearest": lambda **k: (
        nets.conv_encoder((2, 9), 2, channels=[4], **k),
        nets.conv_decoder(2, (2, 9), channels=[4], upsampling="nearest", **k),
        torch.rand(6, 2, 9),
    ),
}
KINDS = {
    "plain": {},
    "layer": {"norm": "layer", "activation": nn.GELU},
    "residual": {"n_residual": 1, "activation": nn.ReLU},
    "both": {"norm": "layer", "n_residual": 2},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestShapes:
    def test_of_encoder_and_decoder(self, shape):
        x, encoder = torch.rand(2, *shape), nets.conv_encoder(shape, 3)
        z = encoder(x)
        assert z.shape == (2, 3)
        assert_close(encoder(x.flatten(1)), z)
        for upsampling in ("transposed", "nearest"):
            assert nets.conv_decoder(3, shape, upsampling=upsampling)(z).shape == x.shape

    def test_parameters_stand_last(self, shape):
        decoder = nets.conv_decoder(3, shape, n_parameters=2)
        z = torch.rand(2, 3)
        outputs, channels = decoder(z), decoder[:-2](z)
        assert outputs.shape == (2, *shape, 2) and channels.shape == (2, 2 * shape[0], *shape[1:])
        for c in range(shape[0]):
            for g in range(2):
                assert_close(outputs[:, c, ..., g], channels[:, 2 * c + g])


def test_defaults_halve_while_there_are_eight():
    channels = {
        shape: nets.conv_encoder(shape, 2).recipe["arguments"]["channels"]
        for shape in [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 8, 8), (1, 4, 4)]
    }
    assert list(channels.values()) == [[32, 64], [32, 64, 128], [32, 64, 128, 128], [32], [32]]
    assert nets.conv_decoder(2, (3, 32, 32)).recipe["arguments"]["channels"] == [128, 64, 32]


def test_an_mlp_of_several_parameters_a_number():
    assert nets.mlp(6, [4], (3, 2))(torch.rand(5, 6)).shape == (5, 3, 2)
    net = nets.mlp(6, [4], 3, norm="layer", n_residual=1)
    assert [type(layer).__name__ for layer in net] == ["Flatten", "Linear", "Residual", "LayerNorm", "Tanh", "Linear"]


def test_a_residual_block_adds():
    block = nets.Residual(4, 2, "group", nn.SiLU)
    x = torch.rand(2, 4, 5, 3)
    assert_close(block(x), x + block.body(x))
    nn.init.zeros_(block.body[-1].weight), nn.init.zeros_(block.body[-1].bias)
    assert_close(block(x), x)


class TestSequences:
    def test_shapes(self):
        x = torch.randint(0, 21, (2, 218))
        encoder, decoder = nets.sequence_encoder(21, 218, 3, channels=[8, 8]), nets.sequence_decoder(3, 218, 21)
        z = encoder(x.float())
        assert decoder(z).shape == (2, 218, 21)

    def test_an_embedding_is_a_table(self):
        encoder = nets.sequence_encoder(4, 6, 2, n_embedding=3)
        x = torch.randint(0, 4, (5, 6))
        table = encoder[1].weight[:, :, 0].T + encoder[1].bias
        assert_close(encoder[:2](x.float()), table[x].transpose(1, 2))

    @pytest.mark.parametrize("bad", [-1.0, 4.0, 1.5, math.nan])
    def test_other_numbers_are_refused(self, bad):
        with pytest.raises(bae.errors.DataError, match="whole numbers from 0 to 3"):
            nets.sequence_encoder(4, 6, 2)(torch.full((2, 6), bad))

    def test_end_to_end(self):
        """A code of two tells apart four families of sequences; random ones are strange."""
        torch.manual_seed(0)
        families = torch.randint(0, 5, (4, 12))
        x = families[torch.arange(64) % 4].float()
        likelihood = bae.likelihoods.Categorical(5)
        encoder = nets.sequence_encoder(5, 12, 2, channels=[8], n_embedding=4)
        model = bae.Autoencoder(encoder, nets.sequence_decoder(2, 12, 5, channels=[16]), likelihood)
        bae.fit_model(model, x, epochs=40, learning_rate=2e-2, batch_size=32, seed=0, progress=False)
        predictive = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(), model, x, progress=False))
        familiar = predictive(x[:4], seed=0).log_likelihood.flatten()
        strange = predictive(torch.randint(0, 5, (4, 12)).float(), seed=0).log_likelihood.flatten()
        assert float(familiar.min()) > float(strange.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TINY)
class TestEveryNetwork:
    def test_trains(self, name, kind):
        torch.manual_seed(0)
        encoder, decoder, x = TINY[name](**KINDS[kind])
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3))
        before = parameters_of(model)
        history = bae.fit_model(model, x, epochs=15, learning_rate=1e-2, seed=0, progress=False)
        assert history.train[-1] > history.train[0]
        # the bias before a normalisation over everything it adds to is the one thing that cannot matter
        still = [key for key, leaf in parameters_of(model).items() if torch.equal(leaf, before[key])]
        assert not still

    def test_mapped_or_in_a_loop(self, name, kind):
        encoder, _, x = TINY[name](**KINDS[kind])
        params = {key: torch.stack([leaf, 2 * leaf, -leaf]) for key, leaf in parameters_of(encoder).items()}
        mapped, looped = (map_over_draws(encoder, params, x, False, use_vmap=use) for use in (True, False))
        assert_close(mapped, looped)

    def test_recipe_builds_the_same(self, name, kind):
        for net in TINY[name](**KINDS[kind])[:2]:
            again = nets.build(json.loads(json.dumps(net.recipe)))
            shapes = [(key, leaf.shape) for key, leaf in net.state_dict().items()]
            assert [(key, leaf.shape) for key, leaf in again.state_dict().items()] == shapes
            again.load_state_dict(net.state_dict())
            assert str(again) == str(net) and again.recipe == net.recipe
            assert copy.deepcopy(net).recipe == net.recipe


class TestRecipes:
    def test_nest(self):
        net = nets.Conditional(nets.sequence_encoder(4, 6, 2, n_context=3), 3)
        again = nets.build(json.loads(json.dumps(net.recipe)))
        assert str(again) == str(net) and again.takes_context
        assert str(nets.build(nets.Offset(nets.mlp(2, [], 3)).recipe).net[1]) == str(nn.Linear(2, 3))
        assert set(nets.NAMES) >= {net.recipe["net"], "mlp", "Offset", "conv_encoder"}

    def test_what_has_no_name_has_none(self):
        for activation in (lambda: nn.Tanh(), nn.Hardtanh, type("Tanh", (nn.Tanh,), {})):
            net = nets.mlp(2, [3], 1, activation=activation)
            assert not hasattr(net, "recipe") and not hasattr(nets.Offset(net), "recipe")

    def test_seeds_count_as_for_the_network_itself(self):
        recipe = nets.mlp(3, [4], 2).recipe
        torch.manual_seed(0)
        first = nets.mlp(3, [4], 2)
        torch.manual_seed(0)
        assert_close(nets.build(recipe).state_dict(), first.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            (None, "a recipe"),
            ([], "a recipe"),
            ({"net": "mlp"}, "a recipe"),
            ({"net": "os.system", "arguments": {}}, "one of the networks"),
            ({"net": ["mlp"], "arguments": {}}, "one of the networks"),
            ({"net": "__class__", "arguments": {}}, "one of the networks"),
            ({"net": "mlp", "arguments": []}, "arguments of mlp among"),
            (
                {"net": "mlp", "arguments": {"n_in": 2, "hidden": [], "n_out": 1, "shell": "ls"}},
                "arguments of mlp among",
            ),
            ({"net": "mlp", "arguments": {"n_in": 2}}, "arguments that mlp takes"),
            ({"net": "mlp", "arguments": {"n_in": 2, "hidden": [10**9], "n_out": 1}}, "from 1 to 16777216 for hidden"),
            (
                {"net": "mlp", "arguments": {"n_in": 2, "hidden": [2**24] * 2, "n_out": 1}},
                "at most 2147483648 parameters",
            ),
            ({"net": "mlp", "arguments": {"n_in": 2, "hidden": [1] * 65, "n_out": 1}}, "At most 64 numbers"),
            ({"net": "mlp", "arguments": {"n_in": 2, "hidden": "abc", "n_out": 1}}, "for hidden"),
            ({"net": "mlp", "arguments": {"n_in": 2, "hidden": [[3]], "n_out": 1}}, "for hidden"),
            ({"net": "mlp", "arguments": {"n_in": True, "hidden": [], "n_out": 1}}, "for n_in; got True"),
            ({"net": "mlp", "arguments": {"n_in": 2.0, "hidden": [], "n_out": 1}}, "for n_in; got 2.0"),
            ({"net": "mlp", "arguments": {"n_in": -1, "hidden": [], "n_out": 1}}, "for n_in; got -1"),
            (
                {"net": "mlp", "arguments": {"n_in": 2, "hidden": [3], "n_out": 1, "n_residual": 10**12}},
                "0 to 64 for n_res",
            ),
            ({"net": "mlp", "arguments": {"n_in": 2, "hidden": [3], "n_out": 1, "norm": ["layer"]}}, "norm="),
            (
                {"net": "mlp", "arguments": {"n_in": 2, "hidden": [3], "n_out": 1, "activation": "eval"}},
                "an activation",
            ),
            ({"net": "mlp", "arguments": {"n_in": 2, "hidden": [3], "n_out": 1, "activation": {}}}, "an activation"),
            (
                {"net": "conv_encoder", "arguments": {"shape": [2**24] * 3, "n_out": 2, "channels": [1]}},
                "takes|at most",
            ),
            ({"net": "conv_encoder", "arguments": {"shape": 5, "n_out": 2}}, "for shape|a shape"),
            (
                {"net": "conv_decoder", "arguments": {"n_in": 2, "shape": [1, 8, 8], "channels": [4] * 60}},
                "at least 2 before",
            ),
            ({"net": "conv_decoder", "arguments": {"n_in": 2, "shape": [1, 8, 8], "upsampling": 3}}, "upsampling="),
            ({"net": "Conditional", "arguments": {"net": 5}}, "a recipe"),
            ({"net": "Conditional", "arguments": {}}, "arguments that Conditional takes"),
            ({"net": "Offset", "arguments": {"net": {"net": "Offset", "arguments": {}}}}, "takes"),
        ],
    )
    def test_hostile_ones_are_refused_before_anything_is_allocated(self, recipe, message):
        with pytest.raises(bae.errors.DataError, match=message):
            nets.build(recipe)

    def test_depth_is_bounded(self):
        recipe = nets.mlp(2, [], 1).recipe
        for _ in range(100):
            recipe = {"net": "Conditional", "arguments": {"net": recipe, "n_classes": None}}
        with pytest.raises((bae.errors.DataError, bae.errors.UnsupportedError), match="a recipe"):
            nets.build(recipe)


class TestErrors:
    def test_sizes(self):
        with pytest.raises(bae.errors.DataError, match="for n_out; got 0"):
            nets.mlp(3, [2], 0)
        with pytest.raises(bae.errors.DataError, match=r"a shape \(C, H, W\) or \(C, L\)"):
            nets.conv_encoder((28,), 2)
        with pytest.raises(bae.errors.DataError, match="an axis of at least 2 before every halving"):
            nets.conv_encoder((1, 4, 4), 2, channels=[2, 2, 2])
        with pytest.raises(bae.errors.DataError, match="channels of at least one layer"):
            nets.conv_decoder(2, (1, 4, 4), channels=[])

    def test_choices(self):
        with pytest.raises(bae.errors.DataError, match="norm=\"layer\" or None; got 'batch'. Batch normalisation"):
            nets.mlp(3, [2], 1, norm="batch")
        with pytest.raises(bae.errors.DataError, match='norm="layer", "group" or None'):
            nets.conv_encoder((1, 8, 8), 2, norm="batch")
        with pytest.raises(bae.errors.DataError, match='upsampling="transposed" or "nearest"; got \'cubic\''):
            nets.conv_decoder(2, (1, 8, 8), upsampling="cubic")

    def test_in_place_activations_in_residual_blocks(self):
        with pytest.raises(bae.errors.UnsupportedError, match="inplace=True"):
            nets.mlp(3, [2], 1, n_residual=1, activation=lambda: nn.ReLU(inplace=True))

    def test_rows_with_channels_last(self):
        torch.manual_seed(0)
        encoder, x = nets.conv_encoder((3, 8, 8), 2), torch.rand(2, 3, 8, 8)
        with pytest.raises(bae.errors.ShapeError, match=r"rows of shape \(3, 8, 8\), or flat; got \(8, 8, 3\)"):
            encoder(x.movedim(1, -1))
        assert_close(encoder(x.flatten(1)), encoder(x))
        grey, x = nets.conv_encoder((1, 8, 6), 2), torch.rand(2, 1, 8, 6)
        for same in (x[:, 0], x.movedim(1, -1), x.flatten(1)):
            assert_close(grey(same), grey(x))
        model = bae.Autoencoder(encoder, nets.conv_decoder(2, (3, 8, 8)), bae.likelihoods.Gaussian(0.3)).eval()
        rows = torch.rand(2, 8, 8, 3)
        mode = bae.fit_weights(bae.weights.Laplace(), model, rows.movedim(-1, 1), progress=False)
        for call in (bae.Predictive(model, mode), bae.Predictive(model, mode).moments):
            with pytest.raises(bae.errors.ShapeError, match=r"got \(8, 8, 3\). Put channels first"):
                call(rows)

    def test_normalisations_that_leave_nothing(self):
        for make in (
            lambda **k: nets.conv_encoder((1, 8, 8), 2, channels=(8, 8, 8), **k),
            lambda **k: nets.conv_decoder(2, (1, 8, 8), channels=(8, 8, 8), **k),
            lambda **k: nets.sequence_encoder(4, 8, 2, channels=(8, 8), **k),
        ):
            with pytest.raises(
                bae.errors.DataError, match="numbers to normalise with norm='group'; got .*norm=\"layer\""
            ):
                make(norm="group")
            make(norm="layer")
        for width in (1, 2):
            with pytest.raises(bae.errors.DataError, match=f"got {width}, of a layer of width {width}. Use wider"):
                nets.mlp(3, [8, width], 3, norm="layer")

    def test_sizes_of_numpy(self):
        net = nets.mlp(np.int64(3), [np.int32(4)], np.int64(2), n_residual=np.uint8(1))
        assert net(torch.rand(2, 3)).shape == (2, 2)
        assert json.loads(json.dumps(net.recipe)) == nets.mlp(3, [4], 2, n_residual=1).recipe
        net = nets.conv_encoder(np.zeros((1, 8, 8)).shape, np.int64(2), channels=[np.int64(4)])
        assert str(nets.build(json.loads(json.dumps(net.recipe)))) == str(net)
        assert nets.OneHot(np.int64(3))(torch.zeros(1, 1)).shape == (1, 3, 1)
        for bad in (np.float64(3), np.True_, True, "3"):
            with pytest.raises(bae.errors.DataError, match="whole numbers from 1 to 16777216 for n_in"):
                nets.mlp(bad, [4], 2)
