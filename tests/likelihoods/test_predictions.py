"""Every likelihood through curvature, posterior and predictive on a small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import likelihoods as L
from tests import twins
from tests.likelihoods.cases import CASES, F64, IDS, Case
from tests.likelihoods.test_mixed import full, simple

MIXED = [Case("Mixed", simple, None, None), Case("MixedFull", full, None, None)]
N_DRAWS = 20_000
QUICK = {"Mixed", "NegativeBinomial"}  # five closed forms column by column, and that of over-dispersed counts


def has_closed_form(case):
    return not (case.name.startswith("Categorical") or case.name == "MixedFull")


@pytest.fixture(params=CASES + MIXED, ids=[*IDS, "Mixed", "MixedFull"])
def case(request):
    return request.param


def data_of(case, n):
    """Rows that suit the likelihood."""
    torch.manual_seed(7)
    if not case.name.startswith("Mixed"):
        return case.data(torch.rand(n, 4, **F64))
    count = torch.poisson(torch.full((n,), 2.0, **F64))
    if case.name == "Mixed":
        return torch.stack([torch.randn(n), torch.randn(n), torch.rand(n).round(), count, torch.randn(n)], -1).double()
    return torch.stack([torch.randint(3, (n,)), torch.randn(n), count, 1 + 3 * torch.randint(2, (n,))], -1).double()


def model_of(case, x):
    torch.manual_seed(0)
    head, size = case.build(), x.shape[1]
    n_outputs = head.n_outputs if isinstance(head, L.Mixed) else size * case.n_parameters
    parts = [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, n_outputs)]
    if case.n_parameters > 1:
        parts.append(nn.Unflatten(1, (-1, case.n_parameters)))
    encoder = nn.Sequential(nn.Linear(size, 3), nn.Tanh(), nn.Linear(3, 2))
    return bae.Autoencoder(encoder, nn.Sequential(*parts), head).double().eval()


def fitted(case, n=60):
    x = data_of(case, n)
    model = model_of(case, x)
    weights = bae.fit_weights(bae.weights.Laplace(tunes_prior=False), model, x, weight_prior=bae.IsotropicNormal(40.0))
    return model, weights, x


def test_curvature_is_that_of_the_likelihood(case):
    """The generalised Gauss-Newton diagonal by autograd, of the Hessian or where that is not positive of the Fisher."""
    x = data_of(case, 5)
    model = model_of(case, x)
    mask = torch.rand(x.shape) > 0.3
    params = {name: p.detach() for name, p in model.network.named_parameters()}
    linearisation = bae.curvature.Linearisation(model.network, params)
    given = bae.curvature.ggn_diagonal(
        linearisation, x, model.likelihood.output_hessian, mask=model.likelihood.output_mask(mask)
    )
    jacobian = twins.dense_jacobian(model.network, x)
    hessian = twins.dense_hessian(model.likelihood, model.network(x).detach())
    keep = model.likelihood.output_mask(mask).flatten(1).double()
    hessian = hessian * keep[:, :, None] * keep[:, None, :]
    expected = torch.einsum("bop,boq,bqp->p", jacobian, hessian, jacobian)
    got = torch.cat([given[name].flatten() for name in params])
    assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in QUICK else pytest.mark.slow) for c in CASES + MIXED if has_closed_form(c)],
    ids=str,
)
def test_closed_form_against_draws(case):
    """In standard errors of the draws; means, noise and the weights' part."""
    model, weights, x = fitted(case)
    few = x[:3]
    predictive = bae.Predictive(model, weights)
    moments = predictive.moments(few)
    assert moments.is_exact
    outputs = predictive(few, n_weight_draws=N_DRAWS, seed=1, chunk_size=10**6, keep_outputs=True).outputs[0]
    mean, noise = model.likelihood.mean(outputs), model.likelihood.variance(outputs)
    assert bool((standard_errors(mean, moments.mean) < 4.8).all())
    assert bool((standard_errors(noise, moments.noise) < 4.8).all())
    assert bool((standard_errors((mean - moments.mean) ** 2, moments.weights) < 4.8).all())
    drawn = predictive.moments(few, n_weight_draws=64, seed=1)
    assert drawn.mean.shape == few.shape and not drawn.is_exact


def test_moments_fit_the_rows(case):
    model, weights, x = fitted(case)
    few = x[:3]
    is_exact = has_closed_form(case)
    moments = bae.Predictive(model, weights).moments(few, n_weight_draws=None if is_exact else 50, seed=0)
    extra = (3,) if case.name == "Categorical" else ()
    assert moments.is_exact is is_exact
    assert moments.mean.shape == moments.total.shape == (*few.shape, *extra)
    assert moments.log_prob(few).shape == few.shape
    assert_close(moments.log_prob(few[..., None].numpy()), moments.log_prob(few), rtol=0, atol=0)
    with pytest.raises(bae.errors.ShapeError, match="rows that the moments"):
        moments.log_prob(x[:2])


def standard_errors(draws, expected):
    error = draws.std(0) / len(draws) ** 0.5
    # a constant (a Gaussian's noise) has no error but rounding
    return (draws.mean(0) - expected).abs() / (error + 1e-12 * expected.abs())


def test_draws_score_rows_with_masks(case):
    model, weights, x = fitted(case)
    mask = torch.rand(x.shape) > 0.3
    draws = bae.Predictive(model, weights)(torch.where(mask, x, torch.nan), mask, n_weight_draws=3, seed=0)
    assert draws.log_likelihood.shape == (1, 3, len(x)) and bool(draws.log_likelihood.isfinite().all())


@pytest.mark.parametrize(
    "head",
    [
        L.Gaussian(per_output=True), L.StudentT(), L.NegativeBinomial(per_output=True), L.HeteroscedasticGaussian(),
        L.Mixed([L.Gaussian(), L.Bernoulli(), L.NegativeBinomial(), L.StudentT(per_output=True)]),
    ],
    ids=lambda head: type(head).__name__,
)  # fmt: skip
def test_trains_and_learns_its_noise(head):
    torch.manual_seed(2)
    x = torch.stack([torch.randint(2, (80,)) for _ in range(4)], -1).float()
    mask = torch.rand(80, 4) > 0.1
    n_outputs = 8 if head.n_parameters == 2 else 4
    last = nn.Unflatten(1, (-1, 2)) if head.n_parameters == 2 else nn.Identity()
    decoder = nn.Sequential(nn.Linear(2, n_outputs), last)
    model = bae.Autoencoder(nn.Linear(4, 2), decoder, head)
    history = bae.fit_model(model, bae.Batch(x, mask), epochs=15, learning_rate=0.02, batch_size=20, seed=0)
    assert history.train[-1] > history.train[0]
    assert head.is_estimated


def test_wrong_number_of_outputs_is_named():
    model = bae.Autoencoder(nn.Linear(4, 2), nn.Linear(2, 4), L.HeteroscedasticGaussian())
    with pytest.raises(bae.errors.ShapeError, match="Unflatten"):
        bae.fit_model(model, torch.randn(8, 4), epochs=1)
