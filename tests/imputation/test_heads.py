"""Every method with every likelihood, with contexts, images and both precisions; means and variances by quadrature."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.codes.base import draws_of, noise
from bayesae.imputation import (
    CodeHMC,
    CodeLaplace,
    FixedPoint,
    ImportanceResampling,
    MetropolisGibbs,
    PseudoGibbs,
)

pytestmark = pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")

L = bae.likelihoods
LAPLACE = bae.codes.Laplace(3, "line_search")


def prior(model, batch, *, n_latent_draws=1):
    """A proposal that does not look at x."""
    latents = noise(model, batch, n_latent_draws, 1, model.encode(batch.x)).expand(-1, 1, -1, -1)
    return draws_of(model, batch, latents, model.log_prior(latents))


# a likelihood of five numbers, the outputs that they take, and a row
HEADS = {
    "Bernoulli": (L.Bernoulli, 5, [1, 0, 1, 1, 0]),
    "ContinuousBernoulli": (L.ContinuousBernoulli, 5, [0.9, 0.1, 0.5, 0.3, 0.2]),
    "Poisson": (L.Poisson, 5, [2, 0, 1, 5, 3]),
    "NegativeBinomial": (lambda: L.NegativeBinomial(3.0), 5, [2, 0, 1, 5, 3]),
    "Categorical": (lambda: L.Categorical(3), (5, 3), [2, 0, 1, 1, 0]),
    "Categorical with values": (lambda: L.Categorical(3, [1, 2, 4]), (5, 3), [4, 1, 2, 2, 1]),
    "StudentT": (lambda: L.StudentT(6.0, scale=0.5), 5, [1.0, -0.5, 0.3, 2.0, 0.0]),
    "HeteroscedasticGaussian": (L.HeteroscedasticGaussian, (5, 2), [1.0, -0.5, 0.3, 2.0, 0.0]),
    "Mixed": (
        lambda: L.Mixed([L.Gaussian(0.5), L.Bernoulli(), L.Poisson(), L.Categorical(3, [0, 1, 2]), L.Gaussian(0.3)]),
        7,
        [0.5, 1, 2, 1, -0.3],
    ),
}  # fmt: skip
MASK = torch.tensor([True, False, True, False, True])
METHODS = [FixedPoint(5), PseudoGibbs(2, 8), MetropolisGibbs(2, 8), ImportanceResampling(20), CodeLaplace(2),
           CodeHMC(2, 8)]  # fmt: skip


def name_of(method):
    return type(method).__name__


def model_of(name, dtype=torch.float64):
    """Random networks around a code of one number, with weights large enough for laws that are no Normals."""
    head, shape, row = HEADS[name]
    torch.manual_seed(3)
    model = bae.Autoencoder(bae.nets.mlp(5, [6], (1, 2)), bae.nets.mlp(1, [6], shape), head()).to(dtype).eval()
    with torch.no_grad():
        for leaf in model.decoder.parameters():
            leaf.mul_(1.5)
    return model, torch.tensor(row, dtype=dtype)


def by_quadrature(model, row):
    """Mean and variance of every number given the observed ones; of classes those of their indicators."""
    z = torch.linspace(-9, 9, 6001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        outputs, head = model.decoder(z), model.likelihood
        rows = row.expand(len(z), -1)
        log_p = head.log_prob(outputs, rows, MASK.expand(len(z), -1)) + model.log_prior(z)
        means, variances = head.mean(outputs), head.variance(outputs)
    weights = log_p.softmax(0)
    mean = torch.tensordot(weights, means, 1)
    return mean, torch.tensordot(weights, variances + means**2, 1) - mean**2


def check_against_quadrature(name, method, n_rows=300, n_draws=24):
    model, row = model_of(name)
    x, mask = row.expand(n_rows, -1), MASK.expand(n_rows, -1)
    found = bae.impute(served(model), x, mask, method=method, n_draws=n_draws, seed=1)
    mean, var = by_quadrature(model, row)
    drawn = found.draws
    if model.likelihood.is_nominal:
        drawn = torch.nn.functional.one_hot(drawn.long(), 3).double()
    for values, truth in ((drawn, mean), ((drawn - mean) ** 2, var), (found.moments.mean[None], mean)):
        rows = values.mean(0)[:, ~MASK]
        error = rows.std(0) / n_rows**0.5
        assert float(((rows.mean(0) - truth[~MASK]) / error).abs().max()) < 4
    assert_close(found.variance[:, ~MASK].mean(0), var[~MASK], rtol=0.08, atol=0)


def served(model):
    weights = bae.families.Particles(bae.functional.stack_draws([bae.functional.parameters_of(model.network)]))
    return bae.Predictive(model, weights, codes=bae.codes.amortised)


@pytest.mark.parametrize("name", HEADS)
def test_importance_resampling_is_the_posterior_of_any_likelihood(name):
    # noise that varies leaves two modes here, of which a Normal has one
    has_two_modes = name == "HeteroscedasticGaussian"
    method = ImportanceResampling(1500, prior) if has_two_modes else ImportanceResampling(400, LAPLACE)
    check_against_quadrature(name, method)


@pytest.mark.parametrize("name", ["Bernoulli", "Mixed"])
@pytest.mark.parametrize("method", [MetropolisGibbs(60, 120), CodeHMC(40, 60)], ids=name_of)
def test_so_are_chains(name, method):
    check_against_quadrature(name, method)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", [MetropolisGibbs(100, 200), CodeHMC(60, 100)], ids=name_of)
def test_so_are_chains_with_any_likelihood(name, method):
    check_against_quadrature(name, method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_method_gives_data_of_every_likelihood(method, name, dtype):
    model, row = model_of(name, dtype)
    x, mask = row.repeat(4, 1), MASK.repeat(4, 1)
    if model.likelihood.is_nominal and isinstance(method, FixedPoint):
        with pytest.raises(bae.errors.UnsupportedError, match="data with a mean"):
            bae.impute(served(model), x, mask, method=method, n_draws=4)
        return
    found = bae.impute(served(model), x, mask, method=method, n_draws=4, seed=0)
    if method.has_noise:
        model.likelihood.check(found.draws.flatten(0, 1))
    assert found.draws.dtype == found.mean.dtype == found.variance.dtype == found.ess.dtype == dtype
    assert torch.equal(found.draws[:, mask], x[mask].expand(4, -1))
    extra = (3,) if model.likelihood.is_nominal else ()
    assert found.mean.shape == found.variance.shape == (4, 5, *extra)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_contexts_reach_the_networks_of_their_own_rows(method):
    """A decoder that adds a hundred times the context: of every row its own, also where rows take another way."""

    class Shifted(torch.nn.Module):
        takes_context = True

        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 5)

        def forward(self, z, context):
            return self.net(z) + 100 * context

    encoder = bae.nets.mlp(5, [4], (1, 2))
    model = bae.Autoencoder(encoder, Shifted(), L.Gaussian(0.5), data_shape=(5,)).double().eval()
    context = torch.arange(6.0)[:, None].double()
    x = 100 * context + torch.randn(6, 5).double()
    mask = MASK.repeat(6, 1)
    mask[2] = False  # drawn from the prior
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = bae.Batch(x, mask, context)
        found = bae.impute(served(model), batch, method=method, n_draws=6, seed=0, chunk_size=60)
    assert bool(((found.draws - 100 * context)[:, ~mask].abs() < 30).all())


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("head", [L.Bernoulli, lambda: L.Gaussian(0.3)], ids=["Bernoulli", "Gaussian"])
def test_images_through_convolutions(method, head):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(bae.nets.conv_encoder((1, 8, 8), 6), torch.nn.Unflatten(1, (3, 2)))
    model = bae.Autoencoder(encoder, bae.nets.conv_decoder(3, (1, 8, 8)), head()).eval()
    x = (torch.rand(5, 1, 8, 8) < 0.5).float()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, :, 4:] = False
    found = bae.impute(served(model), x, mask, method=method, n_draws=4, seed=0)
    assert found.draws.shape == (4, 5, 1, 8, 8) and found.mean.shape == found.variance.shape == x.shape
    assert torch.equal(found.draws[:, mask], x[mask].expand(4, -1))
    assert bool((found.variance[~mask] > 0).all()) or not method.has_noise
    if method.has_noise:
        model.likelihood.check(found.draws.flatten(0, 1))
