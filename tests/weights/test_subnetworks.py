"""Rules that choose weights, and what a choice keeps, against sums and Wasserstein distances written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.errors import DataError, NonFiniteError, ParameterError
from bayesae.families import DiagonalNormal
from bayesae.functional import parameters_of
from bayesae.weights import (
    Laplace,
    largest_magnitude,
    largest_predictive_share,
    largest_variance,
    last_layer,
    random_weights,
    reference_laplace,
    share_of_variance_kept,
)
from tests.conftest import small_model
from tests.twins import dense_jacobian

PRIOR = bae.IsotropicNormal(2.0)
RULES = ["largest_variance", "largest_predictive_share", "largest_magnitude", "random_weights"]


def fit(model, rows, structure="dense", subset=("**",), prior=PRIOR, **kwargs):
    method = Laplace(structure, subset=subset, tunes_prior=False)
    return bae.fit_weights(method, model, rows, batch_size=4, weight_prior=prior, **kwargs)


def choose(rule, model, rows, n, within=None):
    if rule == "largest_magnitude":
        return largest_magnitude(model.network, n, within=within)
    if rule == "random_weights":
        return random_weights(model.network, n, seed=3, within=within)
    diagonal = fit(model, rows, "diagonal")
    if rule == "largest_variance":
        return largest_variance(diagonal, n, within=within)
    return largest_predictive_share(diagonal, model.network, rows, n, within=within)


def flat_mask(subset, params):
    full = {name: torch.zeros(leaf.shape, dtype=torch.bool) for name, leaf in params.items()} | dict(subset.masks)
    return torch.cat([full[name].flatten() for name in params])


def flat(params):
    return torch.cat([leaf.flatten() for leaf in params.values()])


def squared_wasserstein(one, two):
    """Of N(0, one) and N(0, two): Tr(one + two - 2 (one^1/2 two one^1/2)^1/2)."""

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    half = root(one)
    return float(torch.trace(one + two - 2 * root(half @ two @ half)))


@pytest.fixture
def narrow():
    """7-3-2-3-7, 69 weights."""
    return small_model(hidden=(3,))


class TestLargestVariance:
    def test_is_the_choice_closest_in_wasserstein_distance(self):
        network = nn.Linear(2, 2, dtype=torch.float64)
        params = parameters_of(network)
        var = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4, 0.05], dtype=torch.float64)
        whole = DiagonalNormal(params, var, bae.Subset.of(network))
        for n in range(7):
            chosen = flat_mask(largest_variance(whole, n), params)
            distances = {}
            for kept in itertools.combinations(range(6), n):
                is_kept = torch.zeros(6, dtype=torch.bool)
                is_kept[list(kept)] = True
                distances[kept] = squared_wasserstein(torch.diag(var), torch.diag(var * is_kept))
                assert distances[kept] == pytest.approx(float(var[~is_kept].sum()), abs=1e-12)
            best = min(distances, key=distances.__getitem__)
            assert chosen.nonzero()[:, 0].tolist() == list(best)

    def test_is_the_smallest_curvature_whatever_the_prior(self, narrow, rows):
        choices = [
            flat_mask(largest_variance(fit(narrow, rows, "diagonal", prior=bae.IsotropicNormal(p)), 20), p_of(narrow))
            for p in (1e-3, 1.0, 1e3)
        ]
        assert all(bool((c == choices[0]).all()) for c in choices)

    @pytest.mark.parametrize("structure", ["diagonal", "kronecker", "low_rank", "dense"])
    def test_any_family_will_do(self, narrow, rows, structure):
        posterior = fit(narrow, rows, structure)
        var, chosen = flat(posterior.variances()), flat_mask(largest_variance(posterior, 20), posterior.mean)
        assert int(chosen.sum()) == 20
        assert float(var[chosen].min()) >= float(var[~chosen].max())

    def test_dead_weights_come_first_unless_the_prior_says_what_they_are(self, narrow, rows):
        rows = rows.clone()
        rows[:, 2] = 0  # what leaves pixel 2 moves nothing
        dead = {"encoder.1.weight": torch.zeros(3, 7, dtype=torch.bool)}
        dead["encoder.1.weight"][:, 2] = True
        dead = flat_mask(bae.Subset(dead), p_of(narrow))
        for prior in (PRIOR, bae.IndependentNormal({name: 0.5 + i for i, name in enumerate(p_of(narrow))})):
            posterior = fit(narrow, rows, "diagonal", prior=prior, temperature=0.5)
            if prior is PRIOR:
                assert bool((flat_mask(largest_variance(posterior, 3), p_of(narrow)) == dead).all())
            all_others = flat_mask(largest_variance(posterior, 66, prior=prior), p_of(narrow))
            assert bool((all_others == ~dead).all())
            with pytest.raises(DataError, match="0 to 66"):
                largest_variance(posterior, 67, prior=prior)

    def test_ties_are_broken_by_order(self):
        network = nn.Linear(3, 1, dtype=torch.float64)
        same = DiagonalNormal(parameters_of(network), torch.ones(4, dtype=torch.float64), bae.Subset.of(network))
        assert largest_variance(same, 2).masks["weight"].tolist() == [[True, True, False]]


def p_of(model):
    return parameters_of(model.network)


class TestOtherRules:
    def test_predictive_share_is_that_of_squared_jacobians(self, narrow, rows):
        posterior = fit(narrow, rows, "diagonal")
        scores = (dense_jacobian(narrow.network, rows) ** 2).sum((0, 1)) * flat(posterior.variances())
        chosen = flat_mask(largest_predictive_share(posterior, narrow.network, rows, 12), posterior.mean)
        assert set(chosen.nonzero()[:, 0].tolist()) == set(scores.topk(12).indices.tolist())
        # so that it is the variance that a diagonal posterior over these weights has
        kept = fit(narrow, rows, "diagonal", subset=largest_predictive_share(posterior, narrow.network, rows, 12))
        variance = kept.output_variance(narrow.network, rows)[1].sum()
        assert_close(variance, scores.topk(12).values.sum(), rtol=1e-10, atol=0)

    def test_magnitude(self, narrow):
        chosen = flat_mask(largest_magnitude(narrow.network, 9), p_of(narrow))
        sizes = flat(p_of(narrow)).abs()
        assert set(chosen.nonzero()[:, 0].tolist()) == set(sizes.topk(9).indices.tolist())

    def test_numbers_of_numpy(self, narrow):
        for n in (np.int64(5), torch.tensor(5)):
            got, expected = (random_weights(narrow.network, count, seed=1) for count in (n, 5))
            assert torch.equal(flat_mask(got, p_of(narrow)), flat_mask(expected, p_of(narrow)))
        for bad in (5.0, np.float64(5), np.int64(10**6), "5"):
            with pytest.raises(bae.errors.DataError, match="n_weights, a whole number of 0 to"):
                random_weights(narrow.network, bad, seed=1)

    def test_random_weights_are_a_function_of_the_seed_and_nested(self, narrow):
        before = torch.get_rng_state()
        masks = [
            flat_mask(random_weights(narrow.network, n, seed=s), p_of(narrow)) for n, s in ((9, 0), (30, 0), (9, 1))
        ]
        assert torch.equal(before, torch.get_rng_state())
        assert bool((masks[0] <= masks[1]).all())
        assert not torch.equal(masks[0], masks[2])
        counts = sum(flat_mask(random_weights(narrow.network, 23, seed=s), p_of(narrow)).double() for s in range(200))
        assert float((counts / 200 - 1 / 3).abs().max()) < 5 * 0.5 / math.sqrt(200)

    def test_last_layer(self, narrow):
        assert [*last_layer(narrow.network).masks] == ["decoder.3.weight", "decoder.3.bias"]
        assert len(last_layer(narrow.network)) == 7 * 3 + 7
        narrow.decoder[3].bias.requires_grad_(False)
        assert [*last_layer(narrow.network).masks] == ["decoder.3.weight"]
        narrow.requires_grad_(False)
        with pytest.raises(ParameterError):
            last_layer(narrow.network)
        assert [*last_layer(nn.Linear(2, 2)).masks] == ["weight", "bias"]


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    def test_counts_and_candidates(self, narrow, rows, rule):
        params = p_of(narrow)
        assert len(choose(rule, narrow, rows, 0)) == 0
        assert bool(flat_mask(choose(rule, narrow, rows, 69), params).all())
        decoder = bae.Subset.of(narrow.network, ["decoder.**"])
        part = choose(rule, narrow, rows, 5, within=decoder)
        assert len(part) == 5
        assert bool((flat_mask(part, params) <= flat_mask(decoder, params)).all())
        whole = flat_mask(choose(rule, narrow, rows, len(decoder), within=decoder), params)
        assert torch.equal(whole, flat_mask(decoder, params))
        for wrong in (-1, 70, 0.5):
            with pytest.raises(DataError, match="0 to 69"):
                choose(rule, narrow, rows, wrong)
        with pytest.raises(ParameterError, match="unknown"):
            choose(rule, narrow, rows, 1, within=bae.Subset({"nobody": torch.ones(1, dtype=torch.bool)}))

    def test_choices_are_nested(self, narrow, rows, rule):
        masks = [flat_mask(choose(rule, narrow, rows, n), p_of(narrow)) for n in (0, 4, 20, 69)]
        assert all(bool((a <= b).all()) for a, b in itertools.pairwise(masks))


def test_scores_that_are_no_numbers_are_said(narrow):
    with torch.no_grad():
        narrow.decoder[1].bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="scores"):
        largest_magnitude(narrow.network, 3)


class TestEnds:
    """k = P is the dense posterior, k = 0 the network itself."""

    @pytest.mark.parametrize("rule", RULES)
    def test_all_weights(self, narrow, rows, rule):
        full, sub = fit(narrow, rows), fit(narrow, rows, subset=choose(rule, narrow, rows, 69))
        assert_close(sub.precision, full.precision, rtol=1e-10, atol=1e-10)
        assert_close(sub.covariance().matrix, full.covariance().matrix, rtol=1e-10, atol=1e-10)
        assert_close(sub.mean, full.mean, rtol=0, atol=0)
        assert sub.info["log_evidence"] == pytest.approx(full.info["log_evidence"], rel=1e-10)
        got, expected = (bae.Predictive(narrow, p).moments(rows) for p in (sub, full))
        assert_close(got.mean, expected.mean, rtol=1e-10, atol=1e-10)
        assert_close(got.weights, expected.weights, rtol=1e-10, atol=1e-10)
        kept = share_of_variance_kept(sub, full, narrow.network, rows)
        assert kept.is_exact and kept.n_weights == 69
        assert kept.share == pytest.approx(1, abs=1e-10)

    @pytest.mark.parametrize("structure", ["diagonal", "kronecker", "eigencorrected", "low_rank", "dense"])
    @pytest.mark.parametrize("tunes_prior", [True, False])
    @pytest.mark.parametrize("has_masks", [True, False])
    def test_no_weight(self, narrow, rows, structure, tunes_prior, has_masks):
        none = {name: torch.zeros(leaf.shape, dtype=torch.bool) for name, leaf in p_of(narrow).items()}
        subset = bae.Subset(none if has_masks else {})
        sub = bae.fit_weights(Laplace(structure, subset=subset, tunes_prior=tunes_prior), narrow, rows, batch_size=4)
        point = bae.fit_weights(bae.weights.MAP(), narrow, rows)
        got, expected = (bae.Predictive(narrow, p).moments(rows) for p in (sub, point))
        assert_close(got.mean, expected.mean, rtol=1e-12, atol=1e-12)
        assert_close(got.total, expected.total, rtol=1e-12, atol=0)
        assert float(got.weights.abs().max()) == 0
        log_likelihood = float(narrow.likelihood.log_prob(narrow(rows).detach(), rows).sum())
        assert sub.info["log_evidence"] == pytest.approx(log_likelihood, rel=1e-12)
        assert sub.info["n_effective"] == 0
        for name, leaf in sub.sample(3).items():
            assert torch.equal(leaf, p_of(narrow)[name].expand(3, *leaf.shape[1:]))
        draws = bae.Predictive(narrow, sub)(rows, n_weight_draws=2, seed=0, keep_outputs=True)
        assert_close(draws.outputs[0, 1], narrow(rows).detach(), rtol=1e-12, atol=1e-12)
        kept = share_of_variance_kept(sub, fit(narrow, rows), narrow.network, rows)
        assert (kept.share, kept.n_weights) == (0, 0)


class TestShareOfVarianceKept:
    def test_against_jacobians(self, narrow, rows):
        jacobian = dense_jacobian(narrow.network, rows)
        full = fit(narrow, rows)
        covariance = torch.linalg.inv(
            torch.einsum("bop,boq->pq", jacobian, jacobian) / 0.09 + 2 * torch.eye(69).double()
        )
        sub = fit(narrow, rows, subset=random_weights(narrow.network, 13, seed=0))
        chosen = flat_mask(sub.subset, full.mean)
        own = torch.linalg.inv(torch.linalg.inv(covariance)[chosen][:, chosen])
        part = jacobian[..., chosen]
        expected = float((part @ own * part).sum() / (jacobian @ covariance * jacobian).sum())
        kept = share_of_variance_kept(sub, full, narrow.network, rows)
        assert kept.share == pytest.approx(expected, rel=1e-9)
        assert (kept.is_exact, kept.n_weights) == (True, 13)

    @pytest.mark.parametrize("rule", RULES)
    def test_grows_with_the_choice(self, narrow, rows, rule):
        full = fit(narrow, rows)
        subs = [fit(narrow, rows, subset=choose(rule, narrow, rows, n)) for n in (0, 1, 23, 46, 69)]
        shares = [share_of_variance_kept(sub, full, narrow.network, rows).share for sub in subs]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(shares))
        variances = [sub.output_variance(narrow.network, rows)[1] for sub in subs]  # and that of every output does
        assert all(bool((a <= b + 1e-12).all()) for a, b in itertools.pairwise(variances))

    def test_of_a_float32_network(self, rows):
        wide, narrow = (small_model(hidden=(3,), dtype=dtype) for dtype in (torch.float64, torch.float32))
        wide.load_state_dict(narrow.state_dict())
        shares = []
        for model in (wide, narrow):
            x = rows.to(model.reference)
            sub = fit(model, x, subset=random_weights(model.network, 20, seed=0))
            shares.append(share_of_variance_kept(sub, fit(model, x), model.network, x).share)
        assert shares[1] == pytest.approx(shares[0], rel=1e-4)

    @pytest.mark.parametrize("structure", ["diagonal", "kronecker", "low_rank"])
    def test_another_structure_is_labelled(self, narrow, rows, structure):
        sub, full = fit(narrow, rows, subset=("decoder.**",)), fit(narrow, rows, structure)
        kept = share_of_variance_kept(sub, full, narrow.network, rows)
        expected = (
            sub.output_variance(narrow.network, rows)[1].sum() / full.output_variance(narrow.network, rows)[1].sum()
        )
        assert not kept.is_exact
        assert kept.share == pytest.approx(float(expected), rel=1e-9)

    def test_posteriors_that_do_not_compare(self, narrow, rows):
        full = fit(narrow, rows)
        share = lambda sub, full: share_of_variance_kept(sub, full, narrow.network, rows)  # noqa: E731
        other_prior = fit(narrow, rows, subset=("decoder.**",), prior=bae.IsotropicNormal(2.1))
        with pytest.raises(ParameterError, match="one precision"):
            share(other_prior, full)
        with pytest.raises(ParameterError, match="uncertain in the sub-network alone"):
            share(full, fit(narrow, rows, subset=("decoder.**",)))
        with pytest.raises(ParameterError, match="two modes"):
            share(fit(small_model(hidden=(3,), seed=1), rows), full)
        with pytest.raises(DataError, match="no variance"):
            share(fit(narrow, rows, subset=bae.Subset({})), fit(narrow, rows, subset=bae.Subset({})))


def test_a_dense_posterior_of_weights_without_curvature_has_their_prior(narrow, rows):
    rows = rows.clone()
    rows[:, 2:5] = 0
    subset = largest_variance(fit(narrow, rows, "diagonal"), 15)  # 9 of them are dead
    posterior = fit(narrow, rows, subset=subset)
    jacobian = dense_jacobian(narrow.network, rows)[..., flat_mask(subset, posterior.mean)]
    ggn = torch.einsum("bop,boq->pq", jacobian, jacobian) / 0.09
    assert int((ggn.diagonal() == 0).sum()) == 9
    expected = torch.linalg.inv(ggn + 2 * torch.eye(15, dtype=torch.float64))
    assert_close(posterior.covariance().matrix, expected, rtol=1e-10, atol=1e-12)


def test_particles_have_no_variances(narrow, rows):
    point = bae.fit_weights(bae.weights.MAP(), narrow, rows)
    with pytest.raises(bae.errors.UnsupportedError, match="Normal posterior"):
        largest_variance(point, 3)


def test_reference_laplace(narrow, rows):
    assert reference_laplace(narrow.network) == Laplace("dense")
    assert reference_laplace(narrow.network, max_dense=68, tunes_prior=False) == Laplace("kronecker", tunes_prior=False)
    assert len(bae.fit_weights(reference_laplace(narrow.network), narrow, rows).subset) == 69


def test_take():
    subset = bae.Subset({"a": torch.tensor([True, False, True]), "b": torch.tensor([[True], [True]])})
    some = subset.take(torch.tensor([3, 1]))
    assert {name: mask.flatten().tolist() for name, mask in some.masks.items()} == {
        "a": [False, False, True],
        "b": [False, True],
    }
    assert [*subset.take(torch.tensor([0])).masks] == ["a"]
    assert len(subset.take(torch.zeros(0, dtype=torch.long))) == 0
    for wrong in (4, -1):
        with pytest.raises(ParameterError, match="0 to 3"):
            subset.take(torch.tensor([wrong]))
