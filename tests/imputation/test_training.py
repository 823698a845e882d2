"""Training from incomplete rows: what is missing is not scored, and the bound is that of the observed entries."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.testing import LinearGaussian
from tests.imputation.worlds import mask_of, normal_rows, world


def random_masks(n_rows, n_columns=5, seed=0):
    mask = torch.rand(n_rows, n_columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0], mask[1] = True, False
    return mask


def evidence(made, x, mask):
    """Log p(x_observed) of every row in closed form."""
    joint = made.weight @ made.weight.T + made.noise_var * torch.eye(len(made.bias)).double()
    values = []
    for row, seen in zip(x, mask, strict=True):
        law = torch.distributions.MultivariateNormal(made.bias[seen], joint[seen][:, seen]) if seen.any() else None
        values.append(torch.zeros(()).double() if law is None else law.log_prob(row[seen]))
    return torch.stack(values)


def draws_of(model, codes, x, mask, n=1, seed=0):
    batch = bae.Batch(torch.where(mask, x, 0), mask, index=torch.arange(len(x)))
    with bae.random.scope(seed):
        return codes(model.live(), batch, n_latent_draws=n)


class TestTheMissingDataBound:
    """`objectives.iwae` on masked rows: the missing-data importance-weighted autoencoder's bound."""

    def test_is_the_evidence_of_what_is_observed_under_the_exact_posterior(self):
        made = world(n_data=12)
        mask = random_masks(12)
        draws = draws_of(made.model("location"), bae.codes.Laplace(1, "newton"), made.x, mask, 4)
        exact = evidence(made, made.x, mask)
        assert_close(draws.log_ratio, exact.expand(4, 1, 12), rtol=0, atol=1e-9)
        assert_close(bae.objectives.iwae(draws)[0], exact, rtol=0, atol=1e-9)

    def test_lies_below_it_and_rises_with_draws(self):
        made = world(n_data=12)
        mask, model = random_masks(12), world(n_data=12).model("diagonal")
        with torch.no_grad():
            bounds = [
                torch.stack([
                    bae.objectives.iwae(draws_of(model, bae.codes.amortised, made.x, mask, n, seed)).mean()
                    for seed in range(100)
                ])
                for n in (1, 5, 50)
            ]
        means = [float(bound.mean()) for bound in bounds]
        assert (
            means[0]
            < means[1]
            < means[2]
            < float(evidence(made, made.x, mask).mean()) + 3 * float(bounds[2].std() / 10)
        )

    def test_of_a_mask_of_ones_is_the_ordinary_bound(self):
        made = world(n_data=6)
        ones = torch.ones(6, 5, dtype=torch.bool)
        masked = draws_of(made.model("diagonal"), bae.codes.amortised, made.x, ones, 7)
        with bae.random.scope(0):
            plain = bae.codes.amortised(made.model("diagonal").live(), made.batch, n_latent_draws=7)
        assert_close(bae.objectives.iwae(masked), bae.objectives.iwae(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", [bae.objectives.elbo, bae.objectives.iwae, bae.objectives.reconstruction])
def test_gradients_see_observed_entries_only(objective):
    made, mask, gradients = world(n_data=8), random_masks(8), []
    codes = bae.codes.encode if objective is bae.objectives.reconstruction else bae.codes.amortised
    n = 1 if codes is bae.codes.encode else 3
    for filler in (0.0, math.nan, math.inf):
        model = made.model("diagonal").train()
        x = torch.where(mask, made.x, filler)
        bae.fit_model(
            model, bae.Batch(x, mask), epochs=2, objective=objective, codes=codes, n_latent_draws=n, seed=0,
            progress=False,
        )  # fmt: skip
        gradients.append(torch.cat([leaf.detach().flatten() for leaf in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_a_column_that_is_never_observed_gets_no_gradient():
    made = world(n_data=8)
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[:, 3] = False
    model = made.model("diagonal").train()
    draws = draws_of(model, bae.codes.amortised, made.x, mask, 3)
    bae.objectives.iwae(draws).sum().backward()
    gradient = model.decoder[0].weight.grad
    assert not bool(gradient[3].any()) and bool(gradient[[0, 1, 2, 4]].all())


@pytest.mark.slow
def test_trained_on_incomplete_rows_it_imputes_near_the_optimum():
    """The Normal of covariance ((2, 1), (1, 2)), a third of its entries missing: 1.5 at best, 2 by the mean."""
    x = normal_rows(3000, seed=1)
    mask = torch.rand(3000, 2, generator=torch.Generator().manual_seed(2)) < 2 / 3
    mask[~mask.any(1), 0] = True
    torch.manual_seed(0)
    model = bae.Autoencoder(bae.nets.mlp(2, [16], (1, 2)), bae.nets.mlp(1, [16], 2), bae.likelihoods.Gaussian())
    bae.fit_model(
        model.double(), bae.Batch(x, mask), epochs=40, batch_size=64, learning_rate=3e-3, n_latent_draws=5,
        objective=bae.objectives.iwae, codes=bae.codes.amortised, seed=0, progress=False,
    )  # fmt: skip
    weights = bae.fit_weights(bae.weights.MAP(), model, bae.Batch(x, mask), progress=False)
    new, seen = normal_rows(4000, seed=5), mask_of(4000, 2, [0])
    found = bae.impute(bae.Predictive(model, weights, bae.codes.amortised), new, seen, n_draws=40, seed=0)
    assert 1.45 < float((found.mean - new)[:, 1].square().mean()) < 1.70
    assert abs(float(found.variance[:, 1].mean()) - 1.5) < 0.2
    low, high = found.interval(0.9)
    assert abs(float(((low <= new) & (new <= high))[:, 1].double().mean()) - 0.9) < 0.04


def test_the_world_of_this_table():
    made = LinearGaussian(torch.ones(2, 1).double(), torch.zeros(2).double(), 1.0, normal_rows(20000, seed=5))
    cov = made.weight @ made.weight.T + torch.eye(2).double()
    assert_close(cov, torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    assert_close(made.x.T.cov(), cov, rtol=0, atol=0.06)
