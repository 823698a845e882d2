"""Scores of log-densities over weight draws: closed forms, a loop, laws, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import ood
from tests.ood.test_scores import F64, draws


def test_equal_draws_say_nothing_of_the_weights():
    d = draws([[-3.0, -700.0]] * 4)
    special = {"typicality": [0.0, 697.0], "largest_weight": [0.25, 0.25]}
    for name, score in ood.all_scores(d, torch.tensor([3.0], **F64)).items():
        expected = special.get(name, [3.0, 700.0] if "negative" in name or name == "waic" else [0, 0])
        assert_close(score, torch.tensor(expected, **F64), rtol=0, atol=1e-12, check_dtype=False, msg=name)


def test_against_a_python_loop():
    torch.manual_seed(0)
    values = torch.randn(6, 5, **F64) * 3
    found = ood.all_scores(draws(values), temperature=2.0)
    for b in range(5):
        column = [float(v) for v in values[:, b]]
        powers = [math.exp(v / 2) for v in column]
        w = [p / sum(powers) for p in powers]
        mean = sum(column) / 6
        assert float(found["negative_expected_log_density"][b]) == pytest.approx(-mean)
        assert float(found["log_density_deviation"][b]) == pytest.approx(
            math.sqrt(sum((v - mean) ** 2 for v in column) / 6)
        )
        assert float(found["weight_entropy"][b]) == pytest.approx(math.log(6) + sum(p * math.log(p) for p in w))
        assert float(found["disagreement"][b]) == pytest.approx(math.log(6 * sum(p**2 for p in w)))


def test_scores_of_a_stochastic_code_read_importance_weighted_densities():
    """Against a loop over codes: each weight draw's density is the mean of p(x, z) / q(z), not of p(x | z)."""
    log_p, log_prior, log_q = (torch.randn(3, 4, 2, **F64) for _ in range(3))
    stochastic = bae.Draws(torch.randn(3, 4, 2, 2, **F64), log_p, log_prior, log_q, bae.likelihoods.Gaussian(1.0))
    density = [
        [
            math.log(sum(math.exp(float(log_p[k, s, b] + log_prior[k, s, b] - log_q[k, s, b])) for k in range(3)) / 3)
            for b in range(2)
        ]
        for s in range(4)
    ]
    expected = ood.all_scores(draws(density))
    found = ood.all_scores(stochastic)
    for name, score in expected.items():
        if not name.startswith("code"):
            assert_close(found[name], score, msg=name)


def test_the_published_orientations():
    """The entropy and effective sample size of the papers are low for strange rows: these fall as they do."""
    torch.manual_seed(1)
    values = torch.randn(8, 50, **F64) * torch.linspace(0.01, 3, 50, **F64)
    d, w = draws(values), values.softmax(0)
    assert_close(ood.weight_entropy(d), math.log(8) - torch.distributions.Categorical(w.T).entropy())
    assert_close(ood.disagreement(d), math.log(8) - (1 / (w**2).sum(0)).log())


def test_orders_one_two_and_infinity_rise_to_log_s():
    torch.manual_seed(2)
    d = draws(torch.randn(8, 200, **F64) * 5)
    entropy, disagreement, last = ood.weight_entropy(d), ood.disagreement(d), (8 * ood.largest_weight(d)).log()
    assert float((entropy - disagreement).max()) < 1e-12
    assert float(entropy.min()) > 0
    assert float((disagreement - last).max()) < 1e-12
    assert float(last.max()) < math.log(8) + 1e-12


def test_one_draw_that_is_impossible_is_no_nan():
    d = draws([[-1.0], [-math.inf]])
    assert_close(ood.weight_entropy(d), torch.tensor([math.log(2)], **F64))
    assert_close(ood.disagreement(d), torch.tensor([math.log(2)], **F64))


def test_saturation_is_counted_and_a_temperature_undoes_it():
    d = draws([[-500.0, -3.0], [-700.0, -3.1]])
    assert ood.share_saturated(d) == 0.5
    assert ood.share_saturated(d, temperature=784) == 0
    shares = ood.all_scores(d)["largest_weight"]
    assert shares[0] == 1 and float(shares[1]) == pytest.approx(1 / (1 + math.exp(-0.1)))
    assert float((shares >= 0.99).double().mean()) == 0.5
    with pytest.raises(bae.errors.DataError, match="a positive temperature"):
        ood.share_saturated(d, temperature=0)


def test_jensen():
    torch.manual_seed(3)
    d = draws(torch.randn(7, 20, **F64))
    assert bool((ood.negative_expected_log_density(d) > ood.negative_log_predictive(d)).all())


class TestTypicality:
    def test_is_the_distance_from_the_familiar_mean(self):
        scores, familiar = torch.tensor([1.0, 3.0, 10.0, 12.0]), torch.tensor([2.0, 4.0])
        assert_close(ood.typicality(scores, familiar), torch.tensor([2.0, 0.0, 7.0, 9.0]))

    def test_is_the_statistic_of_batches_of_one(self):
        scores, familiar = torch.randn(6, **F64), torch.randn(50, **F64)
        alone = ood.batch_typicality(familiar, scores[:, None], n_resamples=1).statistics
        assert_close(ood.typicality(scores, familiar), alone, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("scores", "familiar", "match"),
        [
            (torch.ones(4), torch.ones(0), "familiar scores; got none"),
            (torch.ones(4, 1), torch.ones(3), "One score a row"),
            (torch.tensor([1.0, math.nan]), torch.ones(3), "finite scores"),
        ],
    )
    def test_bad_input(self, scores, familiar, match):
        with pytest.raises(bae.errors.BayesAEError, match=match):
            ood.typicality(scores, familiar)


@pytest.mark.parametrize(
    "score",
    [ood.disagreement, ood.weight_entropy, ood.log_density_deviation, ood.largest_weight, ood.share_saturated],
)
def test_one_network_cannot_disagree_with_itself(score):
    with pytest.raises(bae.errors.UnsupportedError, match="two weight draws"):
        score(draws([[-1.0, -2.0]]))


def test_one_network_has_the_scores_of_one():
    found = ood.all_scores(draws([[-1.0, -2.0]]), torch.tensor([1.0], **F64))
    assert list(found) == ["negative_log_predictive", "negative_expected_log_density", "waic", "typicality"]
    assert_close(found["waic"], torch.tensor([1.0, 2.0], **F64))
    outputs = torch.zeros(1, 1, 2, 3, **F64)
    assert ood.all_scores(replace(draws([[-1.0, -2.0]]), outputs=outputs)).keys() == found.keys() - {"typicality"}


def test_weights_draws_share_the_codes_noise():
    """With equal weights nothing differs between draws, however few the codes."""
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(6, [5], (2, 2)), bae.nets.mlp(2, [5], 6)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.5)).eval()
    same = {name: leaf.detach().expand(3, *leaf.shape) for name, leaf in model.network.named_parameters()}
    predictive = bae.Predictive(model, bae.families.Particles(same), bae.codes.amortised)
    d = predictive(torch.randn(10, 6), n_latent_draws=2, seed=0)
    assert float(ood.log_density_deviation(d).max()) < 1e-5
    assert float(ood.weight_entropy(d).max()) < 1e-5
