"""What likelihoods are compared with: closed forms and a grid."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import likelihoods, ood

F64 = {"dtype": torch.float64}
COUNTS = torch.tensor([[0.0, 1.0, 7.0, 40.0]], **F64)


class TestAttainable:
    @pytest.mark.parametrize(
        ("likelihood", "x"),
        [
            (likelihoods.Gaussian(0.3), torch.tensor([[0.0, 0.4, 2.0]], **F64)),
            (likelihoods.StudentT(4.0, 0.3), torch.tensor([[0.0, 0.4, 2.0]], **F64)),
            (likelihoods.Bernoulli(), torch.tensor([[0.0, 0.25, 0.5, 1.0]], **F64)),
            (likelihoods.Poisson(), COUNTS),
            (likelihoods.NegativeBinomial(3.0), COUNTS),
        ],
        ids=lambda v: type(v).__name__,
    )
    def test_is_the_maximum_over_a_grid(self, likelihood, x):
        grid = torch.linspace(-40, 40, 160_001, **F64)[:, None, None].expand(-1, *x.shape)
        best = likelihood.log_density(grid, x).amax(0)
        found = likelihood.attainable(x)
        assert float((best - found).max()) < 1e-12, "nothing is above it"
        assert_close(found, best, rtol=0, atol=1e-6)
        assert_close(ood.attainable(likelihood, x), found.sum(1))

    def test_of_classes_and_of_tables(self):
        assert_close(ood.attainable(likelihoods.Categorical(3), torch.tensor([[0.0, 2.0]])), torch.zeros(1))
        table = likelihoods.Mixed([likelihoods.Bernoulli(), likelihoods.Gaussian(0.5)])
        x = torch.tensor([[0.5, 3.0]], **F64)
        expected = -math.log(2) + float(likelihoods.Gaussian(0.5).attainable(torch.zeros(1, 1, **F64)))
        assert float(ood.attainable(table, x)) == pytest.approx(expected)

    def test_takes_the_grey_levels_out_of_a_bernoulli_score(self):
        """A network that knows every pixel has a score of 0 whatever the image."""
        x = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.3, 0.6]], **F64)
        logits = torch.logit(x.clamp(1e-12, 1 - 1e-12))
        score = -likelihoods.Bernoulli().log_prob(logits, x)
        assert float(score[1]) > 1.5
        assert_close(score + ood.attainable(likelihoods.Bernoulli(), x), torch.zeros(2, **F64), rtol=0, atol=1e-9)

    def test_masks_and_images(self):
        x = torch.tensor([[[[0.5, math.nan]]]])
        found = ood.attainable(likelihoods.Bernoulli(), x, torch.tensor([[[[True, False]]]]))
        assert_close(found, torch.tensor([-math.log(2)]))
        assert_close(ood.attainable(likelihoods.Bernoulli(), x.numpy(), (~x.isnan()).numpy().reshape(1, 2)), found)

    @pytest.mark.parametrize("likelihood", [likelihoods.Bernoulli(), likelihoods.Gaussian(0.3)], ids=["grey", "real"])
    def test_what_is_not_a_number_has_to_be_masked(self, likelihood):
        x = torch.tensor([[0.5, math.nan], [0.25, math.inf]])
        for mask in (None, torch.tensor([[True, True], [True, False]])):
            with pytest.raises(bae.errors.NonFiniteError, match=r"finite entries; got . NaN .* Give a mask"):
                ood.attainable(likelihood, x, mask)
        expected = ood.attainable(likelihood, x[:, :1])
        assert_close(ood.attainable(likelihood, x, x.isfinite()), expected)

    @pytest.mark.parametrize("mask", [torch.ones(2, 3), np.ones((2, 3), int), torch.ones(3, 2) > 0, torch.ones(3) > 0])
    def test_a_mask_of_another_kind(self, mask):
        with pytest.raises(bae.errors.ShapeError, match=r"a mask of shape \(2, 3\) and dtype bool"):
            ood.attainable(likelihoods.Gaussian(1.0), torch.zeros(2, 3), mask)

    def test_refusals(self):
        for likelihood in (likelihoods.ContinuousBernoulli(), likelihoods.HeteroscedasticGaussian()):
            with pytest.raises(bae.errors.UnsupportedError, match="grow without bound"):
                ood.attainable(likelihood, torch.rand(2, 3))
        with pytest.raises(bae.errors.DataError, match="Bernoulli data"):
            ood.attainable(likelihoods.Bernoulli(), torch.full((1, 2), 3.0))


def vae():
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(5, [6], (2, 2)), torch.nn.Linear(2, 5)
    model = bae.Autoencoder(encoder, decoder, likelihoods.Gaussian(0.5)).double().eval()
    return model, bae.fit_weights(bae.weights.MAP(), model, torch.randn(3, 5, **F64))


def test_regret_is_the_amortisation_gap_of_a_linear_decoder():
    """There `codes.Laplace` is the exact posterior, whose bound is log p(x)."""
    model, weights = vae()
    x = torch.randn(4, 5, **F64)
    first = bae.Predictive(model, weights, bae.codes.amortised)(x, n_latent_draws=2000, seed=0)
    exact = bae.Predictive(model, weights, bae.codes.Laplace())(x, n_latent_draws=2000, seed=0)
    regret = ood.likelihood_regret(first, exact)
    law = bae.codes.amortised.law(model.at({n: v[None] for n, v in weights.mean.items()}), bae.Batch(x))
    w, noise = model.decoder.weight.detach(), 0.25
    precision = torch.eye(2, **F64) + w.T @ w / noise
    mean = torch.linalg.solve(precision, w.T @ (x - model.decoder.bias.detach()).T / noise).T
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    q = torch.distributions.MultivariateNormal(law.loc[0], torch.diag_embed((2 * law.log_scale[0]).exp()))
    assert_close(regret, torch.distributions.kl_divergence(q, posterior), rtol=0.05, atol=0.05)
    assert_close(ood.likelihood_regret(first, first), torch.zeros(4, **F64))
    with pytest.raises(bae.errors.ShapeError, match="one seed"):
        ood.likelihood_regret(first, bae.Predictive(model, weights, bae.codes.amortised)(x[:2], seed=0))


def test_regret_takes_the_divergence_in_closed_form_where_there_is_one():
    """Of two codes the mean of log q - log p is far from it: both bounds against the divergence of the laws."""
    model, weights = vae()
    x = torch.randn(4, 5, **F64)
    first, second = (
        bae.Predictive(model, weights, codes)(x, n_latent_draws=2, seed=0)
        for codes in (bae.codes.amortised, bae.codes.Laplace())
    )
    law = bae.codes.amortised.law(model.at({n: v[None] for n, v in weights.mean.items()}), bae.Batch(x))
    q = torch.distributions.Normal(law.loc[0], law.log_scale[0].exp())
    bound = first.log_likelihood.mean(0)[0] - torch.distributions.kl_divergence(
        q, torch.distributions.Normal(torch.zeros((), **F64), 1.0)
    ).sum(-1)
    without = replace(second, kl=None)
    assert_close(ood.likelihood_regret(first, without), without.log_ratio.mean(0)[0] - bound)
    assert (
        float(
            (ood.likelihood_regret(first, without) - ood.likelihood_regret(replace(first, kl=None), without))
            .abs()
            .max()
        )
        > 0.1
    )


def test_ratio_to_itself_is_nothing_and_else_the_difference():
    model, weights = vae()
    x = torch.randn(4, 5, **F64)
    d = bae.Predictive(model, weights, bae.codes.amortised)(x, n_latent_draws=3, seed=0)
    assert_close(ood.likelihood_ratio(d, d), torch.zeros(4, **F64))
    other = bae.Draws(d.latents, d.log_likelihood - 2, d.log_prior, d.log_q, d.likelihood)
    assert_close(ood.likelihood_ratio(d, other), torch.full((4,), -2.0, **F64))
    with pytest.raises(bae.errors.ShapeError, match="one x"):
        ood.likelihood_ratio(d, bae.Predictive(model, weights, bae.codes.amortised)(x[:2], seed=0))


class TestComplexity:
    def test_noise_needs_its_bytes_and_a_constant_next_to_none(self):
        x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        x[0] = 0.5
        x[1] = torch.linspace(0, 1, 28)
        found = ood.input_complexity(x)
        assert float(found[0]) < float(found[1]) < float(found[2])
        entropy = 784 * 8 * math.log(2)
        assert entropy < float(found[2]) < 1.1 * entropy

    def test_a_row_has_one_length_whatever_rows_come_along_if_the_range_is_given(self):
        x = torch.rand(3, 1, 28, 28) / 2
        more = torch.cat([x, torch.ones(1, 1, 28, 28)])
        alone, together = (ood.input_complexity(rows, value_range=(0.0, 1.0)) for rows in (x, more))
        assert torch.equal(alone, together[:3])
        assert torch.equal(together, ood.input_complexity(torch.cat([more, torch.zeros(1, 1, 28, 28)]))[:4])
        with pytest.raises(bae.errors.DataError, match="rows within"):
            ood.input_complexity(x + 1, value_range=(0.0, 1.0))
        with pytest.raises(bae.errors.DataError, match="rows within"):
            ood.input_complexity(0 * x, value_range=(1.0, 0.0))

    @pytest.mark.parametrize("n_levels", [256, 9])
    def test_is_the_shorter_of_two_codes_of_the_bytes(self, n_levels):
        generator = torch.Generator().manual_seed(0)
        levels = torch.randint(n_levels, (3, 20, 20), generator=generator)
        levels[0] = torch.arange(20) % n_levels  # differences are the shorter code
        levels[1] = levels[1, 0, torch.randint(2, (20, 20), generator=generator)]  # levels are
        levels[2, 0, :2] = torch.tensor([0, n_levels - 1])
        found, is_plain = ood.input_complexity(levels / (n_levels - 1), n_levels=n_levels), []
        for row, length in zip(levels.numpy().astype(np.uint8), found.tolist(), strict=True):
            steps = np.concatenate([row[:, :1], row[:, 1:] - row[:, :-1]], 1)
            both = [len(zlib.compress(code.tobytes(), 9)) for code in (row, steps)]
            assert length == pytest.approx(8 * math.log(2) * min(both))
            assert np.array_equal(steps.cumsum(1, dtype=np.uint8), row)  # nothing is lost
            is_plain.append(both[0] < both[1])
        assert is_plain[:2] == [False, True]

    def test_arrays_and_the_callers_rows(self):
        x = torch.rand(2, 5)
        before = x.clone()
        assert torch.equal(ood.input_complexity(x), ood.input_complexity(x.numpy()))
        assert torch.equal(x, before)

    def test_bad_input(self):
        for x, n in ((torch.full((1, 3), math.nan), 256), (torch.zeros(0, 3), 256), (torch.rand(1, 3), 1000)):
            with pytest.raises(bae.errors.DataError, match="finite rows"):
                ood.input_complexity(x, n_levels=n)
