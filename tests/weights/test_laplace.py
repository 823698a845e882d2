from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import testing
from bayesae.testing import ConjugateRegression
from bayesae.weights.evidence import Groups, MarginalLikelihood
from bayesae.weights.structures.base import Eigenvalues
from tests.conftest import small_model

FIXED = bae.weights.Laplace(tunes_prior=False)


def everything(values):
    return bae.Subset({"weight": torch.ones(values.shape, dtype=torch.bool)})


@pytest.mark.parametrize("n_batches", [3, 24])
def test_batches_do_not_matter(n_batches):
    world = ConjugateRegression.make()
    one = testing.run_inference(FIXED, world)
    many = testing.run_inference(FIXED, world, n_batches=n_batches)
    assert_close(many.var, one.var, rtol=1e-12, atol=0)
    assert many.info["log_evidence"] == pytest.approx(one.info["log_evidence"], rel=1e-12)


def test_log_evidence_is_exact_on_an_orthogonal_design():
    world = ConjugateRegression.make()
    assert testing.run_inference(FIXED, world).info["log_evidence"] == pytest.approx(world.log_evidence, rel=1e-10)


def test_a_correlated_design_is_where_the_diagonal_over_states_certainty():
    world = ConjugateRegression.make(is_orthogonal=False)
    posterior = testing.run_inference(FIXED, world)
    exact = world.covariance.diagonal()[:-1]
    assert bool((posterior.variances()["weight"] < exact).all())


@pytest.mark.parametrize("temperature", [0.1, 4.0])
def test_temperature_scales_the_covariance(temperature):
    world = ConjugateRegression.make().with_temperature(temperature)
    posterior = testing.run_inference(FIXED, world)
    assert_close(posterior.variances()["weight"][0], world.covariance.diagonal()[:-1], rtol=1e-10, atol=0)


def test_prior_precision_maximises_the_evidence():
    world = ConjugateRegression.make(precision=2.0)
    tuned = testing.run_inference(bae.weights.Laplace(), world).info

    def evidence(precision):
        joint = dataclasses.replace(world.joint, prior=bae.IsotropicNormal(precision))
        return testing.run_inference(FIXED, dataclasses.replace(world, joint=joint)).info["log_evidence"]

    best = tuned["prior_precision"]
    assert evidence(best) == pytest.approx(tuned["log_evidence"], rel=1e-12)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert evidence(best * factor) < tuned["log_evidence"]
    # MacKay's fixed point
    square = sum(float((leaf**2).sum()) for leaf in world.mean.values())
    assert tuned["n_effective"] == pytest.approx(best * square, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_root_is_found_for_weights_of_any_size(scale):
    h = torch.logspace(-12, 12, 101, dtype=torch.float64)
    calls = []

    class Counted(Eigenvalues):
        def effective(self, precision):
            calls.append(precision)
            return super().effective(precision)

    theta = torch.full_like(h, (scale / len(h)) ** 0.5)
    precision, _ = MarginalLikelihood(Counted(h), theta, 0.0).maximise(Groups.of("all", everything(h)), 1.0)
    assert len(calls) < 40  # the gap shrinks by 3 in every step
    assert float(Eigenvalues(h).effective(precision).sum()) == pytest.approx(precision * scale, rel=1e-9)


def test_pays_for_the_rows_it_has_not_seen(model, rows):
    whole = bae.fit_weights(FIXED, model, torch.cat([rows, rows]))
    joint = bae.log_joint(model, n_data=18)
    state = FIXED.init(bae.functional.parameters_of(model.network), joint)
    state, _ = FIXED.update(state, bae.Batch(rows), joint)
    assert_close(FIXED.posterior(state, joint).var, whole.var, rtol=1e-10, atol=0)


def test_only_the_chosen_weights_are_uncertain(model, rows):
    posterior = bae.fit_weights(bae.weights.Laplace(subset=("decoder.**",)), model, rows)
    draws = posterior.sample(4)
    assert float(draws["encoder.1.weight"].var(0).max()) == 0
    assert float(draws["decoder.1.weight"].var(0).min()) > 0
    assert len(posterior.var) == sum(p.numel() for p in model.decoder.parameters())


def test_masked_entries_carry_no_curvature(model, rows):
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[:, 3] = False
    joint = bae.log_joint(model, n_data=9)
    state = FIXED.init(bae.functional.parameters_of(model.network), joint)
    state, _ = FIXED.update(state, bae.Batch(rows, mask), joint)
    posterior = FIXED.posterior(state, joint)
    last = posterior.variances()["decoder.5.bias"]
    assert float(last[3]) == pytest.approx(1.0)  # the prior's
    assert bool((last[[0, 1, 2, 4, 5, 6]] < 0.1).all())


def test_a_layer_with_a_hook_is_named(model, rows):
    joint = bae.log_joint(model, n_data=9)
    handle = model.encoder[1].register_forward_hook(lambda *_: None)
    with pytest.raises(bae.errors.UnsupportedError, match="Linear 'encoder.1'"):
        FIXED.init(bae.functional.parameters_of(model.network), joint)
    handle.remove()


def test_another_prior_is_refused(model, rows):
    class Flat:
        def log_prob(self, params):
            return torch.zeros(1)

    with pytest.raises(bae.errors.UnsupportedError, match="IsotropicNormal"):
        bae.fit_weights(bae.weights.Laplace(), model, rows, weight_prior=Flat())


def test_no_rows_no_posterior():
    world = ConjugateRegression.make()
    with pytest.raises(bae.errors.NotFittedError, match="at least one batch"):
        FIXED.posterior(FIXED.init(world.mean, world.joint), world.joint)


def test_bernoulli_pixels():
    model = small_model(bae.likelihoods.Bernoulli())
    rows = (torch.rand(20, 7, dtype=torch.float64) > 0.5).double()
    posterior = bae.fit_weights(bae.weights.Laplace(), model, rows)
    assert math.isfinite(posterior.info["log_evidence"])
    assert bool((posterior.var > 0).all())


def test_a_stochastic_code_has_no_evidence_here(model, rows):
    def noisy(bound, batch, *, n_latent_draws=1):
        return bae.codes.encode(bound, batch)

    with pytest.raises(bae.errors.UnsupportedError, match="deterministic code"):
        bae.fit_weights(bae.weights.Laplace(), model, rows, codes=noisy)


def test_a_mask_within_a_tensor_and_no_weight_at_all(model, rows):
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2, 3] = True
    one = bae.fit_weights(bae.weights.Laplace(subset=bae.Subset({"encoder.1.weight": mask})), model, rows)
    assert one.var.shape == (1,)
    none = bae.fit_weights(bae.weights.Laplace(subset=bae.Subset({}), tunes_prior=False), model, rows)
    moments = bae.Predictive(model, none).moments(rows)
    assert float(moments.weights.abs().max()) == 0
    assert_close(moments.mean, model(rows).detach())


def test_nothing_to_tune_a_prior_on(model, rows):
    joint = bae.log_joint(model, n_data=9)
    state = bae.weights.Laplace().init(bae.functional.parameters_of(model.network), joint)
    state, _ = bae.weights.Laplace().update(state, bae.Batch(rows, torch.zeros(9, 7, dtype=torch.bool)), joint)
    with pytest.raises(bae.errors.UnsupportedError, match="was no entry observed"):
        bae.weights.Laplace().posterior(state, joint)


def test_temperature_must_be_positive(model, rows):
    for method in (bae.weights.Laplace(), bae.weights.Ensemble(2, epochs=1)):
        with pytest.raises(bae.errors.DataError, match="positive temperature"):
            bae.fit_weights(method, model, rows, temperature=0.0)


def test_the_evidence_is_that_of_no_temperature(model, rows):
    values = [bae.fit_weights(FIXED, model, rows, temperature=t, seed=0).info["log_evidence"] for t in (1.0, 0.1)]
    assert values[0] == values[1]
