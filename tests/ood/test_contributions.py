from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from tests.conftest import small_model

F64 = {"dtype": torch.float64}


def fitted(rows, likelihood=None, method=None, **kwargs):
    model = small_model(likelihood, **kwargs)
    bae.fit_model(model, rows, epochs=30, learning_rate=1e-2, seed=0)
    return bae.Predictive(model, bae.fit_weights(method or bae.weights.Laplace(), model, rows, seed=0))


def pictures(n, *shape):
    return torch.rand(n, *shape, **F64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (5, 3)], ids=["table", "colours", "sequence"])
@pytest.mark.parametrize("likelihood", [bae.likelihoods.Gaussian, bae.likelihoods.Bernoulli])
def test_parts_add_up_to_the_score_and_have_the_shape_of_the_data(shape, likelihood):
    x = pictures(6, *shape)
    size = math.prod(shape)
    encoder, decoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 2)), nn.Linear(2, size)
    model = bae.Autoencoder(encoder, decoder, likelihood()).double()
    bae.fit_model(model, x, epochs=3, seed=0)
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(), model, x))
    moments, draws = predictive.moments(x), predictive(x, n_weight_draws=5, seed=0, keep_outputs=True)
    parts = bae.ood.contributions(moments, x)
    assert parts.shape == x.shape
    assert torch.equal(parts.flatten(1).sum(1), bae.ood.negative_log_density(moments, x))
    drawn = bae.ood.contribution_draws(draws, x)
    assert drawn.mean.shape == drawn.standard_deviation.shape == x.shape
    assert_close(drawn.mean.flatten(1).sum(1), -draws.log_likelihood.mean((0, 1)), rtol=1e-12, atol=1e-12)


heads = bae.likelihoods
HEADS = {
    "per number": (lambda: heads.Gaussian([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], per_output=True), "real"),
    "heteroscedastic": (heads.HeteroscedasticGaussian, "real"),
    "student": (lambda: heads.StudentT(scale=0.3), "real"),
    "bernoulli": (heads.Bernoulli, "binary"),
    "continuous bernoulli": (heads.ContinuousBernoulli, "unit"),
    "classes": (lambda: heads.Categorical(3), "classes"),
    "values": (lambda: heads.Categorical(3, [0.0, 0.5, 2.0]), "values"),
    "poisson": (heads.Poisson, "classes"),
    "negative binomial": (lambda: heads.NegativeBinomial(2.0), "classes"),
}
DATA = {
    "real": lambda u: 2 * u - 1,
    "unit": lambda u: u,
    "binary": lambda u: u.round(),
    "classes": lambda u: (3 * u).floor(),
    "values": lambda u: torch.tensor([0.0, 0.5, 2.0], **F64)[(3 * u).long()],
}


@pytest.mark.parametrize("name", HEADS)
def test_every_likelihood_gives_parts_that_add_up(name):
    head, kind = HEADS[name]
    likelihood, x = head(), DATA[kind](pictures(5, 2, 3))
    g = likelihood.n_parameters
    decoder = nn.Sequential(nn.Linear(2, 6 * g), nn.Unflatten(1, (2, 3, g) if g > 1 else (2, 3)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    model = bae.Autoencoder(encoder, decoder, likelihood).double().eval()
    weights = bae.fit_weights(bae.weights.Laplace(tunes_prior=False), model, x)
    predictive = bae.Predictive(model, weights)
    moments, draws = predictive.moments(x, seed=0), predictive(x, seed=0, keep_outputs=True)
    parts, drawn = bae.ood.contributions(moments, x), bae.ood.contribution_draws(draws, x)
    assert parts.shape == drawn.mean.shape == x.shape and parts.isfinite().all()
    assert torch.equal(parts.flatten(1).sum(1), bae.ood.negative_log_density(moments, x))
    assert_close(drawn.mean.flatten(1).sum(1), -draws.log_likelihood.mean((0, 1)), rtol=1e-10, atol=1e-10)
    assert (drawn.standard_deviation > 0).all()
    one = likelihood.log_prob(
        draws.outputs[0], x, torch.zeros_like(x, dtype=torch.bool).index_fill(2, torch.tensor(1), True)
    )
    assert_close(drawn.mean[..., 1].sum(1), -one.mean(0), rtol=1e-10, atol=1e-10)


def test_columns_of_a_table_have_their_own_parts():
    columns = [heads.Gaussian(0.3), heads.Bernoulli(), heads.Categorical(3, [0.0, 1.0, 2.0])]
    likelihood, u = heads.Mixed(columns), pictures(6, 3)
    x = torch.stack([u[:, 0], u[:, 1].round(), (3 * u[:, 2]).floor()], 1)
    model = bae.Autoencoder(nn.Linear(3, 2), nn.Linear(2, likelihood.n_outputs), likelihood).double().eval()
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(tunes_prior=False), model, x))
    draws = predictive(x, n_weight_draws=6, seed=0, keep_outputs=True)
    drawn = bae.ood.contribution_draws(draws, x)
    for column, (head, part) in enumerate(zip(columns, (slice(0, 1), slice(1, 2), slice(2, 5)), strict=True)):
        outputs = draws.outputs[0][..., part] if column == 2 else draws.outputs[0][..., column]
        expected = -head.log_prob(outputs[..., None, :] if column == 2 else outputs[..., None], x[:, column, None])
        assert_close(drawn.mean[:, column], expected.mean(0))
    moments = predictive.moments(x, seed=0)
    assert torch.equal(bae.ood.contributions(moments, x).sum(1), bae.ood.negative_log_density(moments, x))


def test_parts_by_hand():
    x, mean, weights = (torch.tensor([v], **F64) for v in ([0.0, 1.0], [0.1, 0.4], [0.11, 0.0]))
    likelihood = bae.likelihoods.Gaussian(0.5)
    moments = bae.Moments(mean, torch.full_like(x, 0.25), torch.zeros_like(x), weights, likelihood)
    expected = [0.5 * (e**2 / v + math.log(2 * math.pi * v)) for e, v in ((0.1, 0.36), (0.6, 0.25))]
    assert_close(bae.ood.contributions(moments, x), torch.tensor([expected], **F64))
    reference = torch.tensor([1.0, -2.0], **F64)
    less = bae.ood.contributions(moments, x.numpy(), reference=reference)
    assert_close(less, torch.tensor([[expected[0] - 1, expected[1] + 2]], **F64))


def test_what_was_not_observed_contributes_nothing(rows):
    predictive, mask = fitted(rows), torch.ones(9, 7, dtype=torch.bool)
    mask[:, 2] = False
    holed = torch.where(mask, rows, torch.nan)
    moments = predictive.moments(holed, mask)
    draws = predictive(holed, mask, n_weight_draws=4, seed=0, keep_outputs=True)
    parts = bae.ood.contributions(moments, holed, mask)
    assert not parts[:, 2].any() and parts[:, 3].all()
    assert torch.equal(parts.sum(1), bae.ood.negative_log_density(moments, holed, mask))
    drawn = bae.ood.contribution_draws(draws, holed, mask)
    assert_close(drawn.mean.sum(1), -draws.log_likelihood.mean((0, 1)))
    for spread in (drawn, bae.ood.contribution_moments(moments, holed, mask)):
        assert not spread.mean[:, 2].any() and not spread.standard_deviation[:, 2].any()


def test_closed_form_is_an_integral_over_the_normal_output():
    """Against a fine quadrature over f ~ N(mean, weights), a code variance included."""
    x, mean, weights, code, noise = 0.7, 0.3, 0.02, 0.05, 0.04
    grid = torch.linspace(-10, 10, 20_001, **F64)
    density = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    f = mean + math.sqrt(weights) * grid
    value = ((x - f) ** 2 + code) / (2 * noise) + 0.5 * math.log(2 * math.pi * noise)  # the code's average at f
    first = (density * value).sum()
    second = (density * (value - first) ** 2).sum().sqrt()
    likelihood = bae.likelihoods.Gaussian(math.sqrt(noise))
    parts = (torch.full((1, 1), v, **F64) for v in (mean, noise, code, weights))
    got = bae.ood.contribution_moments(bae.Moments(*parts, likelihood), torch.full((1, 1), x, **F64))
    assert_close(got.mean.squeeze(), first, rtol=1e-10, atol=1e-10)
    assert_close(got.standard_deviation.squeeze(), second, rtol=1e-10, atol=1e-10)


def test_closed_form_is_what_draws_tend_to(rows):
    predictive, n = fitted(rows), 4_000
    exact = bae.ood.contribution_moments(predictive.moments(rows), rows)
    drawn = bae.ood.contribution_draws(predictive(rows, n_weight_draws=n, seed=0, keep_outputs=True), rows)
    error = 5 * exact.standard_deviation / math.sqrt(n)
    assert ((drawn.mean - exact.mean).abs() < error).all()
    # squares of Normal variables have a kurtosis of at most 15: the error of their sd is below 2 sd / sqrt(n)
    assert_close(drawn.standard_deviation, exact.standard_deviation, rtol=5 * 2 / math.sqrt(n), atol=0)
    assert (exact.mean >= bae.ood.contributions(predictive.moments(rows), rows)).all()  # Jensen


def test_code_draws_are_averaged_before_weight_draws_are_compared(rows):
    outputs, likelihood = torch.randn(2, 3, 9, 7, **F64), bae.likelihoods.Gaussian(0.5)
    zeros = torch.zeros(2, 3, 9, **F64)
    draws = bae.Draws(zeros[..., None], zeros, zeros, zeros, likelihood, outputs=outputs)
    law = torch.distributions.Normal(outputs, 0.5).log_prob(rows)
    each = torch.stack([-(law[0, s] + law[1, s]) / 2 for s in range(3)])
    drawn = bae.ood.contribution_draws(draws, rows)
    assert_close(drawn.mean, each.mean(0))
    assert_close(drawn.standard_deviation, each.std(0, correction=0))


def test_an_ensemble_is_its_members(rows):
    predictive = fitted(rows, method=bae.weights.Ensemble(3, epochs=20, learning_rate=1e-2))
    draws = predictive(rows, keep_outputs=True)
    law = [torch.distributions.Normal(outputs, 0.3).log_prob(rows) for outputs in draws.outputs[0]]
    drawn = bae.ood.contribution_draws(draws, rows)
    assert_close(drawn.mean, -sum(law) / 3)
    assert_close(drawn.standard_deviation, torch.stack(law).std(0, correction=0))
    assert_close(bae.ood.contribution_moments(predictive.moments(rows), rows).mean, drawn.mean)


def test_one_network_is_sure(rows):
    predictive = fitted(rows, method=bae.weights.MAP())
    moments = predictive.moments(rows)
    drawn = bae.ood.contribution_draws(predictive(rows, keep_outputs=True), rows)
    closed = bae.ood.contribution_moments(moments, rows)
    for spread in (drawn, closed):
        assert_close(spread.mean, bae.ood.contributions(moments, rows))
        assert not spread.standard_deviation.any()


def test_the_changed_number_is_the_strange_one(rows):
    predictive = fitted(rows)
    changed = rows.clone()
    changed[:, 3] += 4
    reference = bae.ood.contributions(predictive.moments(rows), rows).mean(0)
    parts = bae.ood.contributions(predictive.moments(changed), changed, reference=reference)
    assert (parts.argmax(1) == 3).all()


def test_classes_without_an_order_have_an_axis_more():
    probabilities = torch.rand(4, 5, 3, **F64)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    x = torch.tensor([[0, 1, 2, 1, 0]] * 4)
    moments = bae.Moments(probabilities, *[torch.zeros(4, 5, 3, **F64)] * 3, heads.Categorical(3))
    expected = [[-math.log(probabilities[b, d, x[b, d]]) for d in range(5)] for b in range(4)]
    assert_close(bae.ood.contributions(moments, x), torch.tensor(expected, **F64))
    with pytest.raises(bae.errors.UnsupportedError, match="contribution_draws"):
        bae.ood.contribution_moments(moments, x)
    with pytest.raises(bae.errors.UnsupportedError, match="negative_log_density"):
        bae.ood.reconstruction_error(moments, x)


def test_what_does_not_fit_is_refused(rows):
    predictive = fitted(rows)
    moments, draws = predictive.moments(rows), predictive(rows, n_weight_draws=2, seed=0)
    with pytest.raises(bae.errors.UnsupportedError, match="keep_outputs=True"):
        bae.ood.contribution_draws(draws, rows)
    draws = predictive(rows, n_weight_draws=2, seed=0, keep_outputs=True)
    for bad in (rows[:4], rows[:, :5]):
        with pytest.raises(bae.errors.ShapeError, match="rows that the moments or draws"):
            bae.ood.contribution_draws(draws, bad)
        with pytest.raises(bae.errors.ShapeError, match="rows that the moments or draws"):
            bae.ood.contributions(moments, bad)
    with pytest.raises(bae.errors.ShapeError, match="over their first axis"):
        bae.ood.contributions(moments, rows, reference=rows)
    with pytest.raises(bae.errors.ShapeError, match="dtype bool"):
        bae.ood.contributions(moments, rows, rows)
    assert torch.equal(
        bae.ood.contributions(moments, rows.numpy(), (rows > 0).numpy()),
        bae.ood.contributions(moments, rows, rows > 0),
    )


def drawn_of(outputs, likelihood):
    """Draws that are these outputs (S, B, ...)."""
    zeros = torch.zeros(1, *outputs.shape[:2])
    return bae.Draws(zeros[..., None], zeros, zeros, zeros, likelihood, outputs=outputs[None])


@pytest.mark.parametrize("likelihood", [heads.ContinuousBernoulli(), heads.Poisson()])
def test_parts_in_single_precision_and_far_from_zero(likelihood):
    """Torch's own laws are off by 1.3 nats at a logit of 60, and lose the digits of counts of a million."""
    is_count = isinstance(likelihood, heads.Poisson)
    outputs = torch.linspace(11, 14, 10) if is_count else torch.linspace(-60, 60, 10)
    x = outputs.exp().round() if is_count else torch.full((10,), 0.9)
    got = bae.ood.contribution_draws(drawn_of(outputs[None, None], likelihood), x[None]).mean[0]
    assert_close(got.double(), -likelihood.log_density(outputs.double(), x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", [heads.Categorical(3), heads.Categorical(3, [1.0, 2.0, 4.0])])
def test_classes_under_a_mask_may_be_nan(likelihood):
    p = torch.rand(4, 5, 3, **F64).softmax(-1)
    mask = torch.rand(4, 5) > 0.4
    classes = torch.randint(3, (4, 5))
    x = (classes if likelihood.is_nominal else torch.tensor([1.0, 2.0, 4.0])[classes]).double()
    spoilt = torch.where(mask, x, torch.nan)
    mean, var = likelihood.mean(p.log()), likelihood.variance(p.log())
    moments = bae.Moments(mean, var, torch.zeros_like(mean), torch.zeros_like(mean), likelihood)
    draws = drawn_of(p.log()[None], likelihood)
    assert torch.equal(bae.ood.contributions(moments, spoilt, mask), bae.ood.contributions(moments, x, mask))
    assert bae.ood.negative_log_density(moments, spoilt, mask).isfinite().all()
    got = bae.ood.contribution_draws(draws, spoilt, mask)
    expected = -torch.where(mask, p.log().gather(-1, classes[..., None])[..., 0], 0.0)
    assert_close(got.mean, expected, rtol=1e-12, atol=1e-12)
    assert got.standard_deviation.isfinite().all()
    assert bae.ood.contributions(moments, spoilt)[~mask].isinf().all()  # never a class at random


@pytest.mark.parametrize("is_flat", [True, False])
def test_one_number_a_row_with_or_without_an_axis(is_flat):
    likelihood, outputs = heads.Gaussian(0.5), torch.randn(3, 6, **F64)
    x = torch.randn(6, **F64)
    outputs = outputs if is_flat else outputs[..., None]
    mean = outputs[0]
    parts = (torch.full_like(mean, v) for v in (0.25, 0.0, 0.1))
    moments = bae.Moments(mean, *parts, likelihood)
    expected = -torch.distributions.Normal(outputs.reshape(3, 6), 0.5).log_prob(x)
    for rows in (x, x[:, None]):
        assert_close(bae.ood.contributions(moments, rows).flatten(), bae.ood.contributions(moments, x).flatten())
        assert_close(bae.ood.negative_log_density(moments, rows), -moments.log_prob(x).flatten())
        assert bae.ood.contribution_moments(moments, rows).mean.shape == mean.shape
        assert bae.ood.reconstruction_error(moments, rows).shape == (6,)
        assert_close(bae.ood.weight_variance(moments), torch.full((6,), 0.1, **F64))
        got = bae.ood.contribution_draws(drawn_of(outputs, likelihood), rows)
        assert got.mean.shape == rows.shape
        assert_close(got.mean.flatten(), expected.mean(0))


def test_rows_are_never_broadcast_along_an_axis_of_the_data():
    """Numbers (2, 3) of two rows are no classes of data (2,), whatever their shapes would allow."""
    mean = torch.zeros(3, 2, 3, **F64)
    moments = bae.Moments(mean, mean + 1, mean, mean, heads.Gaussian(0.5))
    for bad in (torch.zeros(3, 2), torch.zeros(3), torch.zeros(18), torch.zeros(2, 2, 3), torch.tensor(0.0)):
        with pytest.raises(bae.errors.ShapeError, match="rows that the moments or draws"):
            bae.ood.contributions(moments, bad)
        with pytest.raises(bae.errors.ShapeError, match="rows that the moments or draws"):
            moments.log_prob(bad)
