"""MC-dropout: its covariance in closed form, layers against dropped inputs, and what training climbs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import random, testing
from bayesae.errors import DataError, DivergedError, ParameterError, ShapeError, UnsupportedError
from bayesae.families import DroppedInputs
from bayesae.functional import parameters_of
from bayesae.testing import ConjugateRegression
from bayesae.weights import Dropout
from tests.conftest import small_model

F64 = {"dtype": torch.float64}


def test_draws_have_the_covariance_of_dropped_columns():
    """The full matrix, within four standard errors: weights of one input move together, others apart."""
    rate, n = 0.3, 5000
    mean = {"weight": torch.randn(2, 3, **F64), "bias": torch.randn(2, **F64)}
    family = DroppedInputs(mean, {"weight": 1}, rate)
    with random.scope(0):
        draws = family.sample(n)
    assert torch.equal(draws["bias"], mean["bias"].expand(n, 2))
    centre = mean["weight"].flatten()
    same_input = torch.eye(3, **F64).repeat(2, 2)
    expected = rate / (1 - rate) * torch.outer(centre, centre) * same_input
    shift = draws["weight"].flatten(1) - centre
    squares = shift[:, :, None] * shift[:, None]
    assert float(((squares.mean(0) - expected) / squares.std(0) * math.sqrt(n)).abs().max()) < 4
    assert float((shift.mean(0) / shift.std(0) * math.sqrt(n)).abs().max()) < 4
    assert_close(family.variances()["weight"].flatten(), expected.diagonal(), rtol=1e-12, atol=0)
    assert float(family.variances()["bias"].abs().max()) == 0
    assert set((draws["weight"] / mean["weight"]).round(decimals=9).unique().tolist()) == {0, round(1 / 0.7, 9)}


def test_outputs_of_a_linear_layer_have_the_variance_of_dropped_inputs():
    """Var[y_o] = p / (1 - p) sum_i (w_oi x_i)^2, what nn.Dropout before the layer gives."""
    rate, n = 0.25, 20_000
    layer, x = nn.Linear(5, 3).double(), torch.randn(4, 5, **F64)
    weight = layer.weight.detach()
    family = DroppedInputs(parameters_of(layer), {"weight": 1}, rate)
    with random.scope(0):
        draws = family.sample(n)
    outputs = x @ draws["weight"].mT + draws["bias"][:, None]
    expected = rate / (1 - rate) * (x**2) @ (weight**2).mT
    squares = (outputs - layer(x).detach()) ** 2
    assert float(((squares.mean(0) - expected) / squares.std(0) * math.sqrt(n)).abs().max()) < 4
    by_torch = torch.func.functional_call(layer, {}, (nn.functional.dropout(x.expand(n, 4, 5), rate),))
    squares = (by_torch.detach() - layer(x).detach()) ** 2
    assert float(((squares.mean(0) - expected) / squares.std(0) * math.sqrt(n)).abs().max()) < 4


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "conv": (lambda: nn.Conv2d(4, 3, 2), (4, 3, 3)),
    "conv in one dimension": (lambda: nn.Conv1d(4, 3, 2), (4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), (4, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_masked_weight_is_a_layer_whose_input_was_dropped(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(2, *shape, **F64)
    axes = Dropout(0.5)._axes(layer, bae.Subset.of(layer))
    with random.scope(3):
        draws = DroppedInputs(parameters_of(layer), axes, 0.5).sample(6)
    for s in range(6):
        own = {key: leaf[s] for key, leaf in draws.items()}
        ratio = (own["weight"] / layer.weight.detach()).transpose(0, axes["weight"]).flatten(1)
        kept = ratio[:, 0]
        assert_close(ratio, kept[:, None].expand_as(ratio), rtol=1e-12, atol=0)
        expected = layer(x * kept.reshape(1, 4, *[1] * (len(shape) - 1)))
        assert_close(torch.func.functional_call(layer, own, (x,)), expected, rtol=1e-10, atol=1e-12)
    assert 0 < float((draws["weight"] == 0).double().mean()) < 1


def optimum(world, rate):
    """Of E_b log p(D, m b / (1 - p)), in closed form: weights (O, D) and bias.

    E ||y - X theta||^2 gains p / (1 - p) sum_i m_i^2 (X^T X)_ii, and E ||theta||^2 = ||m||^2 / (1 - p).
    """
    design = torch.cat([world.batch.x, torch.ones(len(world.batch.x), 1, **F64)], 1)
    gram, is_masked = design.mT @ design / 0.5**2, torch.tensor([1.0, 1, 1, 0], **F64)
    extra = is_masked * (rate / (1 - rate) * gram.diagonal() + 2 / (1 - rate)) + (1 - is_masked) * 2
    return torch.linalg.solve(gram + extra.diag(), design.mT @ world.batch.target / 0.5**2).mT


def test_training_climbs_the_expectation_over_masks():
    """At the closed form the mean gradient over many masks is 0, within four standard errors; elsewhere it is not."""
    world, rate, n = ConjugateRegression.make(is_orthogonal=False), 0.3, 3000
    best = optimum(world, rate)
    method = Dropout(rate, n_draws=n)
    sizes = []
    for theta in (best, torch.cat([world.mean["weight"], world.mean["bias"][:, None]], 1)):
        start = {"weight": theta[:, :-1].contiguous(), "bias": theta[:, -1].contiguous()}
        state = method.init(start, world.joint)
        method.update(state, world.batch, world.joint)
        with random.scope(1):
            draws = DroppedInputs(start, {"weight": 1}, rate).sample(n)
        design = torch.cat([draws["weight"], draws["bias"][..., None]], 2)  # (n, O, D + 1)
        x = torch.cat([world.batch.x, torch.ones(24, 1, **F64)], 1)
        slopes = ((world.batch.target - x @ design.mT).mT @ x / 0.5**2 - 2 * design) / 24
        slopes = slopes * torch.cat([draws["weight"] / start["weight"], torch.ones(n, 2, 1, **F64)], 2)
        error = slopes.std(0) / math.sqrt(n)
        gradient = torch.cat([-state.theta.grad[:6].reshape(2, 3), -state.theta.grad[6:, None]], 1)
        sizes.append(float((gradient / error).abs().max()))
    assert sizes[0] < 4 and sizes[1] > 20


def test_training_moves_the_network_and_draws_differ(rows):
    model = small_model()
    posterior = bae.fit_weights(Dropout(0.2, epochs=3, layers=("decoder.3", "decoder.5")), model, rows, seed=0)
    assert set(posterior.axes) == {"decoder.3.weight", "decoder.5.weight"}
    draws = posterior.sample(20)
    assert float(draws["decoder.5.weight"].var(0).min()) > 0
    assert float(draws["decoder.1.weight"].var(0).max()) == 0
    for name, leaf in parameters_of(model.network).items():
        assert float((posterior.mean[name] - leaf).abs().max()) > 1e-4, name
    moments = bae.Predictive(model, posterior).moments(rows, seed=0)
    assert float(moments.weights.min()) > 0 and not moments.is_exact


def test_the_same_seed_drops_the_same_inputs_in_every_dtype_and_more_draws_refine():
    mean = parameters_of(nn.Linear(9, 2))
    masks = []
    for dtype in (torch.float32, torch.float64):
        family = DroppedInputs({name: leaf.to(dtype) for name, leaf in mean.items()}, {"weight": 1}, 0.5)
        for n in (3, 6):
            with random.scope(2):
                masks.append(family.sample(n)["weight"][:3] == 0)
    assert all(torch.equal(masks[0], one) for one in masks) and 0 < float(masks[0].double().mean()) < 1


def test_part_of_the_weights(rows):
    model = small_model()
    posterior = bae.fit_weights(Dropout(0.2, epochs=1, subset=["decoder.**"]), model, rows, seed=0)
    assert all(name.startswith("decoder") for name in posterior.axes) and len(posterior.axes) == 3


def test_what_cannot_be_is_refused(model, rows):
    for wrong in ({"rate": 1.0}, {"rate": -0.1}, {"learning_rate": 0}, {"epochs": 0}, {"n_draws": 0}):
        with pytest.raises(DataError):
            Dropout(**wrong)
    with pytest.raises(ParameterError, match="none of"):
        bae.fit_weights(Dropout(layers=("middle",)), model, rows)
    own = bae.Autoencoder(
        nn.Sequential(nn.Linear(7, 4), nn.Dropout(0.2), nn.Linear(4, 2)), nn.Linear(2, 7), bae.likelihoods.Gaussian(0.3)
    )
    with pytest.raises(UnsupportedError, match=r"without dropout of its own; got Dropout 'encoder\.1'"):
        bae.fit_weights(Dropout(), own.double().eval(), rows)
    with pytest.raises(UnsupportedError, match="layers without groups"):
        Dropout()._axes(nn.Conv2d(4, 4, 2, groups=2), bae.Subset.of(nn.Conv2d(4, 4, 2, groups=2)))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match="whole weight a parameter"):
        Dropout()._axes(normed, bae.Subset.of(normed))
    half = torch.zeros(2, 3, dtype=torch.bool)
    half[0] = True
    with pytest.raises(UnsupportedError, match="in the subset"):
        Dropout()._axes(nn.Linear(3, 2), bae.Subset({"weight": half}))
    with pytest.raises(DivergedError, match="Lower learning_rate"):
        bae.fit_weights(Dropout(learning_rate=1e200), model, rows, batch_size=3)
    mean = {"weight": torch.zeros(2, 3)}
    with pytest.raises(ParameterError):
        DroppedInputs(mean, {"other": 1}, 0.1)
    with pytest.raises(ShapeError):
        DroppedInputs(mean, {"weight": 2}, 0.1)
    with pytest.raises(DataError):
        DroppedInputs(mean, {"weight": 1}, 1.0)


def test_no_seeded_run_touches_the_network():
    world = ConjugateRegression.make()
    before = {name: leaf.clone() for name, leaf in world.mean.items()}
    posterior = testing.run_inference(Dropout(0.3, epochs=5, learning_rate=1e-2), world)
    assert all(torch.equal(before[name], leaf) for name, leaf in world.mean.items())
    assert posterior.info["rate"] == 0.3
