"""Every structure over every part of an autoencoder, against J^T H J of the chosen weights written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.functional import parameters_of
from bayesae.weights import Laplace, LowRank, last_layer, random_weights
from tests.conftest import small_model
from tests.twins import dense_jacobian
from tests.weights.test_structures import covariance_of, positions, whole_ggn

PRECISION = 2.0
# a rank that is that of the curvature: then the low rank is exact too
STRUCTURES = {"diagonal": "diagonal", "kronecker": "kronecker", "eigencorrected": "eigencorrected",
              "low_rank": LowRank(70), "dense": "dense"}  # fmt: skip
PARTS = {
    "all": lambda network: bae.Subset.of(network),
    "encoder": lambda network: bae.Subset.of(network, ["encoder.**"]),
    "decoder": lambda network: bae.Subset.of(network, ["decoder.**"]),
    "last layer": last_layer,
    "both ends": lambda network: bae.Subset.of(
        network, [f"{next(iter(last_layer(network).masks))[:-6]}*", "encoder.0*"]
    ),
    "biases": lambda network: bae.Subset.of(network, ["**.bias"]),
    "arbitrary": lambda network: random_weights(network, 25, seed=1),
}
WHOLE_LAYERS = ("all", "encoder", "decoder", "last layer", "both ends")


def convolutional():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2))
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Bernoulli()).double().eval()


def perceptron():
    model = small_model(bae.likelihoods.Gaussian(0.3), hidden=(3,))
    model.encoder = nn.Sequential(*list(model.encoder)[1:])  # so that the first layer is encoder.0 in both
    return model


@pytest.fixture(params=["convolutional", "perceptron"], scope="module")
def world(request):
    """A model, rows and the whole curvature."""
    model = convolutional() if request.param == "convolutional" else perceptron()
    shape = (6, 1, 3, 3) if request.param == "convolutional" else (9, 7)
    rows = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if request.param == "convolutional":
        return model, rows, flat_ggn(model, rows)
    return model, rows, whole_ggn(model, rows)


def flat_ggn(model, rows):
    jacobian = dense_jacobian(model.network, rows)
    hessian = model.likelihood.output_hessian(model(rows).detach()).flatten(1)
    return torch.einsum("bop,bo,boq->pq", jacobian, hessian, jacobian)


def fit(structure, model, rows, subset=("**",), tunes_prior=False):
    method = Laplace(structure, subset=subset, tunes_prior=tunes_prior)
    return bae.fit_weights(method, model, rows, batch_size=4, weight_prior=bae.IsotropicNormal(PRECISION), seed=0)


def places(subset, model):
    """Where the chosen weights stand among all."""
    index = positions(parameters_of(model.network))
    return torch.cat([index[name][mask] for name, mask in subset.masks.items()])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "dense"])
def test_covariance_is_the_inverse_of_what_is_kept_of_the_chosen_block(world, structure, part):
    model, rows, ggn = world
    subset = PARTS[part](model.network)
    got = covariance_of(fit(STRUCTURES[structure], model, rows, subset))
    chosen = places(subset, model)
    block = ggn[chosen[:, None], chosen]
    block = torch.diag(block.diagonal()) if structure == "diagonal" else block
    expected = torch.zeros_like(ggn)
    eye = torch.eye(len(block), dtype=torch.float64)
    expected[chosen[:, None], chosen] = torch.linalg.inv(block + PRECISION * eye)
    assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("part", WHOLE_LAYERS)
@pytest.mark.parametrize("structure", ["kronecker", "eigencorrected"])
def test_layers_of_a_part_are_those_of_the_whole(world, structure, part):
    """Layers are independent in a Kronecker structure: fixing some leaves the others as they are."""
    model, rows, ggn = world
    subset = PARTS[part](model.network)
    posterior, whole = fit(structure, model, rows, subset), covariance_of(fit(structure, model, rows))
    chosen = places(subset, model)
    expected = torch.zeros_like(whole)
    expected[chosen[:, None], chosen] = whole[chosen[:, None], chosen]
    got = covariance_of(posterior)
    assert_close(got, expected, rtol=1e-10, atol=1e-12)
    if structure == "eigencorrected":  # a basis does not change the trace of a layer's own block
        own = torch.linalg.inv(got[chosen[:, None], chosen]) - PRECISION * torch.eye(len(chosen), dtype=torch.float64)
        assert_close(own.trace(), ggn.diagonal()[chosen].sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("part", ["biases", "arbitrary"])
@pytest.mark.parametrize("structure", ["kronecker", "eigencorrected"])
def test_a_kronecker_structure_does_not_cut_a_layer(world, structure, part):
    model, rows, _ = world
    with pytest.raises(bae.errors.UnsupportedError, match="whole layers, weight and bias"):
        fit(structure, model, rows, PARTS[part](model.network))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictions_and_draws(world, structure, part):
    model, rows, _ = world
    subset = PARTS[part](model.network)
    if structure in {"kronecker", "eigencorrected"} and part not in WHOLE_LAYERS:
        return
    posterior = fit(STRUCTURES[structure], model, rows, subset)
    jacobian, covariance = dense_jacobian(model.network, rows), covariance_of(posterior)
    expected = (jacobian @ covariance * jacobian).sum(-1)
    outputs, variance = posterior.output_variance(model.network, rows)
    assert_close(outputs, model(rows).detach(), rtol=1e-12, atol=1e-12)
    assert_close(variance.flatten(1), expected, rtol=1e-8, atol=1e-12)
    if isinstance(model.likelihood, bae.likelihoods.Gaussian):
        assert_close(bae.Predictive(model, posterior).moments(rows).weights, expected, rtol=1e-8, atol=1e-12)
    chosen = places(subset, model)
    draws = torch.cat([leaf.flatten(1) for leaf in posterior.sample(3).values()], 1)
    is_moved = (draws != torch.cat([leaf.flatten() for leaf in posterior.mean.values()])).any(0)
    assert torch.equal(is_moved.nonzero()[:, 0], chosen.sort().values)
    assert_close(torch.cat([v.flatten() for v in posterior.variances().values()]), covariance.diagonal())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "dense"])
def test_the_evidence_counts_the_chosen_weights_alone(world, structure, part):
    model, rows, ggn = world
    subset = PARTS[part](model.network)
    info = fit(STRUCTURES[structure], model, rows, subset).info
    chosen = places(subset, model)
    block = ggn[chosen[:, None], chosen]
    block = torch.diag(block.diagonal()) if structure == "diagonal" else block
    theta = subset.ravel(parameters_of(model.network))
    log_likelihood = float(model.likelihood.log_prob(model(rows).detach(), rows).sum())
    log_det = float(torch.logdet(torch.eye(len(block), dtype=torch.float64) + block / PRECISION))
    expected = log_likelihood - 0.5 * (PRECISION * float(theta @ theta) + log_det)
    assert info["log_evidence"] == pytest.approx(expected, rel=1e-9)
    values = torch.linalg.eigvalsh(block)
    assert info["n_effective"] == pytest.approx(float((values / (values + PRECISION)).sum()), rel=1e-8)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_trains_no_other_weight(world, part):
    """Frozen parameters are no candidates of a pattern, and the model stays as it was."""
    model, rows, _ = world
    before = {name: leaf.clone() for name, leaf in model.state_dict().items() if isinstance(leaf, torch.Tensor)}
    fit("dense", model, rows, PARTS[part](model.network), tunes_prior=True)
    after = model.state_dict()
    assert all(torch.equal(leaf, after[name]) for name, leaf in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
