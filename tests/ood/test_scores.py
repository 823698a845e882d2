from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae

F64 = {"dtype": torch.float64}


def draws(log_likelihood):
    values = torch.as_tensor(log_likelihood, **F64)[None]
    latents = torch.zeros(*values.shape, 1)
    return bae.Draws(latents, values, torch.zeros_like(values), None, bae.likelihoods.Gaussian(1.0))


def moments(mean, weights, noise=0.25):
    mean, weights = (torch.as_tensor(v, **F64) for v in (mean, weights))
    likelihood = bae.likelihoods.Gaussian(math.sqrt(noise))
    return bae.Moments(mean, torch.full_like(mean, noise), torch.zeros_like(mean), weights, likelihood)


def test_equal_draws():
    """WAIC and the log predictive are the log-likelihood; nobody disagrees."""
    d = draws([[-3.0, -700.0]] * 4)
    assert_close(bae.ood.waic(d), torch.tensor([3.0, 700.0], **F64))
    assert_close(bae.ood.negative_log_predictive(d), torch.tensor([3.0, 700.0], **F64))
    assert_close(bae.ood.disagreement(d), torch.zeros(2, **F64), rtol=0, atol=1e-12)


def test_against_a_python_loop():
    torch.manual_seed(0)
    values = torch.randn(6, 5, **F64) * 3
    d = draws(values)
    for b in range(5):
        column = [float(v) for v in values[:, b]]
        mean = sum(column) / 6
        weights = [math.exp(v) / sum(map(math.exp, column)) for v in column]
        assert float(bae.ood.negative_log_predictive(d)[b]) == pytest.approx(-math.log(sum(map(math.exp, column)) / 6))
        assert float(bae.ood.waic(d)[b]) == pytest.approx(-mean + sum((v - mean) ** 2 for v in column) / 6)
        assert float(bae.ood.disagreement(d)[b]) == pytest.approx(math.log(6 * sum(w**2 for w in weights)))


def test_disagreement_does_not_underflow():
    assert_close(bae.ood.disagreement(draws([[-1e5], [-2e5]])), torch.tensor([math.log(2)], **F64))
    with pytest.raises(bae.errors.UnsupportedError, match="two weight draws"):
        bae.ood.disagreement(draws([[-1.0]]))


def test_density_counts_error_and_variance():
    x = torch.tensor([[0.0, 1.0]], **F64)
    m = moments([[0.0, 0.5]], [[0.1, 0.3]])
    expected = -torch.distributions.Normal(m.mean, torch.tensor([0.35, 0.55], **F64).sqrt()).log_prob(x).sum(1)
    assert_close(bae.ood.negative_log_density(m, x), expected)
    assert_close(bae.ood.weight_variance(m), torch.tensor([0.4], **F64))
    assert_close(bae.ood.reconstruction_error(m, x), torch.tensor([0.25], **F64))


def test_without_weight_variance_the_density_ranks_as_the_error_does():
    x = torch.rand(20, 3, **F64)
    m = moments(torch.rand(20, 3), torch.zeros(20, 3))
    density, error = bae.ood.negative_log_density(m, x), bae.ood.reconstruction_error(m, x)
    assert torch.equal(density.argsort(), error.argsort())


def test_every_score_is_higher_for_what_is_stranger(rows):
    torch.manual_seed(0)
    model = bae.Autoencoder(bae.nets.mlp(7, [8], 2), bae.nets.mlp(2, [8], 7), bae.likelihoods.Gaussian()).double()
    bae.fit_model(model, rows, epochs=200, learning_rate=1e-2, seed=0)
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(), model, rows))
    familiar, strange = rows, rows + 3
    a, b = (predictive.moments(x) for x in (familiar, strange))
    c, d = (predictive(x, seed=0) for x in (familiar, strange))
    assert float(bae.ood.weight_variance(b).min()) > float(bae.ood.weight_variance(a).max())
    for score in (bae.ood.negative_log_density, bae.ood.reconstruction_error):
        assert float(score(b, strange).min()) > float(score(a, familiar).max())
    for score in (bae.ood.negative_log_predictive, bae.ood.waic):
        assert float(score(d).min()) > float(score(c).max())
    assert float(bae.ood.disagreement(d).mean()) > float(bae.ood.disagreement(c).mean())


def test_rows_must_be_those_of_the_moments():
    with pytest.raises(bae.errors.ShapeError, match="rows that the moments or draws"):
        bae.ood.reconstruction_error(moments([[0.0, 1.0]], [[0.0, 0.0]]), torch.zeros(2, 2))


def test_the_readmes_six_lines_on_a_plain_array(rows):
    """Arrays all the way, as `bayesae.__init__` and the README promise."""
    data = rows.float().numpy()
    model = bae.Autoencoder(bae.nets.mlp(7, [4], 2), bae.nets.mlp(2, [4], 7), bae.likelihoods.Gaussian())
    bae.fit_model(model, data, epochs=2)
    moments = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(), model, data)).moments(data)
    assert bae.ood.negative_log_density(moments, data).shape == (9,)
    assert bae.ood.reconstruction_error(moments, data).shape == (9,)
    assert moments.log_prob(data).shape == (9, 7)


def test_missing_entries_count_nothing_in_the_error():
    x = torch.tensor([[0.0, math.nan], [1.0, 3.0]], **F64)
    m = moments([[0.5, 1.0], [0.0, 1.0]], torch.zeros(2, 2))
    assert_close(bae.ood.reconstruction_error(m, x, ~x.isnan()), torch.tensor([0.25, 5.0], **F64))
