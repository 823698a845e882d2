"""Prior and noise by the evidence, after training and during it, and by held-out rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.functional import parameters_of
from bayesae.weights import Laplace
from tests.conftest import small_model

N, D_IN, D_OUT = 40, 3, 16


def linear_model(likelihood, *, bias=True):
    """An encoder that is the identity and not trained, and a linear decoder to 16 outputs."""
    encoder = nn.Linear(D_IN, D_IN, bias=False, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(D_IN))
    decoder = nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.float64)
    return bae.Autoencoder(encoder, decoder, likelihood).eval()


def precisions(model, prior):
    """Of the decoder's weight (16, 3) and bias (16,)."""
    whole = prior.precisions_of(parameters_of(model.network))
    return whole["decoder.weight"], whole["decoder.bias"]


def regression(seed=0, noise=0.5, per_output=False):
    """y = W x + e with O = 16 outputs, as an autoencoder whose decoder is the linear layer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D_IN, generator=generator, dtype=torch.float64)
    scales = noise * torch.linspace(0.5, 2, D_OUT).double() if per_output else noise
    weight = 0.3 * torch.randn(D_IN, D_OUT, generator=generator, dtype=torch.float64)
    y = x @ weight + scales * torch.randn(N, D_OUT, generator=generator, dtype=torch.float64)
    model = linear_model(bae.likelihoods.Gaussian(per_output=per_output))
    return model, bae.Batch(x, target=y)


def empirical_bayes(batch, per_output=False, groups=None):
    """Precision(s) and noise variance(s) that maximise the closed-form marginal likelihood, and the MAP under them."""
    design = torch.cat([batch.x, torch.ones(N, 1).double()], 1)
    groups = torch.zeros(D_IN + 1, dtype=torch.int64) if groups is None else groups
    logs = torch.zeros(int(groups.max()) + 1 + (D_OUT if per_output else 1), dtype=torch.float64, requires_grad=True)

    def parts():
        n_noise = D_OUT if per_output else 1
        return logs[:-n_noise].exp()[groups], logs[-n_noise:].exp().expand(D_OUT)

    def loss():
        precision, var = parts()
        marginal = (design / precision) @ design.mT + var[:, None, None] * torch.eye(N).double()
        zero = torch.zeros(N, dtype=torch.float64)
        return -torch.distributions.MultivariateNormal(zero, marginal).log_prob(batch.target.mT).sum()

    optimiser = torch.optim.LBFGS(
        [logs], max_iter=300, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    optimiser.step(closure)
    precision, var = (part.detach() for part in parts())
    gram = design.mT @ design
    mode = torch.stack([
        torch.linalg.solve(gram / v + torch.diag(precision), design.mT @ y / v)
        for v, y in zip(var, batch.target.mT, strict=True)
    ])
    return precision, var, mode, -float(loss().detach())


def solve(model, batch, prior):
    """The mode under the prior and the noise of the moment, in closed form, onto the model."""
    design = torch.cat([batch.x, torch.ones(N, 1).double()], 1)
    precision = torch.cat([precisions(model, prior)[0], precisions(model, prior)[1][:, None]], 1)
    var = torch.as_tensor(model.likelihood.noise_var, dtype=torch.float64).expand(D_OUT)[:, None]
    lhs = design.mT @ design / var[:, None] + torch.diag_embed(precision)
    theta = torch.linalg.solve(lhs, batch.target.mT @ design / var)
    with torch.no_grad():
        model.decoder.weight.copy_(theta[:, :-1])
        model.decoder.bias.copy_(theta[:, -1])


class TestEmpiricalBayes:
    @pytest.mark.parametrize("structure", ["dense", "kronecker", "eigencorrected"])
    def test_alternating_reaches_the_closed_form_optimum(self, structure):
        """Sixteen outputs: a prior that counted them once too often would be sixteen times too strong."""
        model, batch = regression()
        precision, var, mode, log_evidence = empirical_bayes(batch)
        prior, evidence = bae.IsotropicNormal(), bae.Evidence(Laplace(structure))
        bae.estimate_noise(model, batch)
        for _ in range(25):
            solve(model, batch, prior)
            prior, value = evidence.update(model, batch, prior, n_data=N, batch_size=13)
        assert float(precisions(model, prior)[1][0]) == pytest.approx(float(precision[0]), rel=1e-8)
        assert model.likelihood.noise_var == pytest.approx(float(var[0]), rel=1e-8)
        assert value == pytest.approx(log_evidence, rel=1e-10)
        solve(model, batch, prior)
        assert_close(model.decoder.weight.detach(), mode[:, :-1], rtol=1e-7, atol=1e-9)
        posterior = bae.fit_weights(Laplace(structure, tunes_prior=False), model, batch, weight_prior=prior)
        assert posterior.info["log_evidence"] == pytest.approx(log_evidence, rel=1e-9)
        solve(model, batch, bae.IsotropicNormal(D_OUT * float(precision[0])))
        assert float((model.decoder.weight.detach() - mode[:, :-1]).abs().max()) > 0.05  # that would be seen

    def test_fit_model_reaches_it(self):
        model, batch = regression()
        precision, var, mode, log_evidence = empirical_bayes(batch)
        evidence = bae.Evidence(Laplace("dense"), burn_in=20, every=10)
        history = bae.fit_model(
            model, batch, epochs=150, batch_size=N, learning_rate=5e-2, schedule="cosine", evidence=evidence, seed=0
        )
        got = float(precisions(model, history.weight_prior)[1][0])
        assert got == pytest.approx(float(precision[0]), rel=1e-3)
        assert model.likelihood.noise_var == pytest.approx(float(var[0]), rel=1e-4)
        assert_close(model.decoder.weight.detach(), mode[:, :-1], rtol=0, atol=1e-3)
        assert history.log_evidence[-1] == pytest.approx(log_evidence, abs=1e-3)

    def test_precisions_by_input(self):
        """Groups that are neither layers nor weights: the columns of the weight, and the bias."""
        model, batch = regression()
        groups = torch.tensor([0, 1, 2, 3])
        precision, var, mode, log_evidence = empirical_bayes(batch, groups=groups)

        columns = torch.cat([torch.arange(D_IN).repeat(D_OUT), torch.full((D_OUT,), D_IN)])
        method, noise_var = Laplace("dense"), 0.25
        prior = bae.IsotropicNormal()
        for _ in range(30):
            model.likelihood.set_noise_var(noise_var)
            solve(model, batch, prior)
            joint = bae.log_joint(model, N, weight_prior=prior)
            state = method.init(parameters_of(model.network), joint)
            state, _ = method.update(state, batch, joint)
            marginal = method.marginal(state, joint)
            square, count = model.likelihood.noise_statistics(model(batch.x), batch.target).tolist()
            by_input = bae.weights.evidence.Groups("layer", columns, D_IN + 1, ("0", "1", "2", "bias"))
            found, ratio = marginal.maximise(by_input, 1.0, bae.weights.evidence.Noise(1 / noise_var, square, count))
            noise_var /= ratio
            prior = bae.weights.evidence.prior_of(found, state.subset, state.params, prior)
        assert noise_var == pytest.approx(float(var[0]), rel=1e-6)
        assert_close(precisions(model, prior)[0][0], precision[:-1], rtol=1e-5, atol=0)
        assert marginal.log_evidence(found) == pytest.approx(log_evidence, rel=1e-8)

    @pytest.mark.slow
    def test_a_scale_for_every_output(self):
        model, batch = regression(per_output=True)
        precision, var, mode, log_evidence = empirical_bayes(batch, per_output=True)
        prior = bae.IsotropicNormal()
        bae.estimate_noise(model, batch)
        for _ in range(14):
            solve(model, batch, prior)
            result = bae.maximise_evidence(model, batch, laplace=Laplace("dense"), weight_prior=prior)
            prior = result.prior
        assert float(precisions(model, prior)[1][0]) == pytest.approx(float(precision[0]), rel=1e-5)
        assert_close(result.noise_scale**2, var, rtol=1e-5, atol=0)
        assert result.log_evidence == pytest.approx(log_evidence, rel=1e-8)
        assert torch.equal(model.likelihood.noise_var.sqrt(), result.noise_scale)


class TestMaximiseEvidence:
    def test_prior_and_noise_are_the_best_at_these_weights(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) > 0.3
        data = bae.Batch(torch.where(mask, rows, torch.nan), mask)
        result = bae.maximise_evidence(model, data, laplace=Laplace("dense", prior_groups="layer"), batch_size=4)

        def evidence(prior, scale):
            model.likelihood.set_noise_var(scale**2)
            fixed = Laplace("dense", tunes_prior=False)
            return bae.fit_weights(fixed, model, data, weight_prior=prior).info["log_evidence"]

        best = result.prior, result.noise_scale
        assert evidence(*best) == pytest.approx(result.log_evidence, rel=1e-10)
        assert result.posterior.info["log_evidence"] == result.log_evidence
        assert result.posterior.info["noise_scale"] == pytest.approx(result.noise_scale, rel=1e-12)
        for factor in (0.9, 0.99, 1.01, 1.1):
            assert evidence(result.prior, result.noise_scale * factor) < result.log_evidence
            for layer in ("encoder.1", "decoder.5"):
                moved = {n: v * factor if n.startswith(layer) else v for n, v in result.prior.precisions.items()}
                assert evidence(bae.IndependentNormal(moved), result.noise_scale) < result.log_evidence
        # MacKay: rows times outputs, less the masked, less the effective weights
        residual = float(((model(torch.where(mask, rows, 0)) - rows) ** 2 * mask).sum().detach())
        left = int(mask.sum()) - result.posterior.info["n_effective"]
        assert result.noise_scale**2 == pytest.approx(residual / left, rel=1e-8)

    @pytest.mark.parametrize("structure", ["diagonal", "kronecker", "low_rank", "dense"])
    def test_the_posterior_is_that_of_a_fit_under_it(self, structure, rows):
        model = small_model(bae.likelihoods.Gaussian())
        result = bae.maximise_evidence(model, rows, laplace=Laplace(structure))
        again = bae.fit_weights(Laplace(structure, tunes_prior=False), model, rows, weight_prior=result.prior)
        assert result.posterior.info == pytest.approx(again.info, rel=1e-8)
        for name, value in again.variances().items():
            assert_close(result.posterior.variances()[name], value, rtol=1e-6, atol=0)

    def test_it_writes_on_the_noise_only(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        model.train()
        before = parameters_of(model)
        state = torch.get_rng_state()
        result = bae.maximise_evidence(model, rows)
        assert model.training
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())
        assert model.likelihood.scale == result.noise_scale

    def test_noise_that_was_given_stays(self, rows):
        for likelihood, kwargs in (
            (bae.likelihoods.Gaussian(0.3), {}),
            (bae.likelihoods.Gaussian(), {"tunes_noise": False}),
        ):
            model = small_model(likelihood)
            if likelihood.is_learned:
                bae.estimate_noise(model, rows)
            scale = likelihood.scale
            result = bae.maximise_evidence(model, rows, **kwargs)
            assert result.noise_scale == likelihood.scale == scale
            tuned = bae.fit_weights(Laplace("kronecker"), model, rows)
            assert result.prior.precision == pytest.approx(tuned.info["prior_precision"], rel=1e-12)
            assert result.log_evidence == pytest.approx(tuned.info["log_evidence"], rel=1e-12)

    def test_a_prior_that_is_given_stays(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        result = bae.maximise_evidence(
            model, rows, laplace=Laplace(tunes_prior=False), weight_prior=bae.IsotropicNormal(50.0)
        )
        assert result.prior == bae.IsotropicNormal(50.0)
        assert result.noise_scale > float((model(rows) - rows).pow(2).mean().sqrt().detach())

    def test_another_likelihood_has_its_prior_tuned(self, rows):
        model = small_model(bae.likelihoods.Bernoulli())
        result = bae.maximise_evidence(model, rows.round())
        assert result.noise_scale is None
        expected = bae.fit_weights(Laplace("kronecker"), model, rows.round()).info["prior_precision"]
        assert result.prior.precision == pytest.approx(expected, rel=1e-12)

    def test_weights_outside_the_subset_keep_their_prior(self, rows):
        model = small_model()
        result = bae.maximise_evidence(
            model, rows, laplace=Laplace(subset=("decoder.5.*",)), weight_prior=bae.IsotropicNormal(7.0)
        )
        values = result.prior.precisions
        assert {v for n, v in values.items() if not n.startswith("decoder.5")} == {7.0}
        assert values["decoder.5.weight"] == values["decoder.5.bias"] == result.posterior.info["prior_precision"]

    @pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
    def test_few_rows_with_a_scale_for_every_output(self, structure):
        """Weights outnumber the rows of an output, and MacKay's steps alone take hundreds of passes."""
        torch.manual_seed(0)
        x = torch.randn(30, 2).double() @ torch.randn(2, 6).double() + 0.3 * torch.randn(30, 6).double()
        nets = bae.nets.mlp(6, [16], 2).double(), bae.nets.mlp(2, [16], 6).double()
        model = bae.Autoencoder(*nets, bae.likelihoods.Gaussian(per_output=True))
        bae.fit_model(model, x, epochs=60, batch_size=30, learning_rate=2e-2, seed=1)
        result = bae.maximise_evidence(model, x, laplace=Laplace(structure))
        variance = result.posterior.output_variance(model.network, x)[1].detach().sum(0)
        residual = ((model(x) - x) ** 2).detach().sum(0)
        assert_close(result.noise_scale**2 * 30 - variance, residual, rtol=1e-6, atol=0)

    def test_one_column_keeps_its_scale_in_a_tensor(self):
        x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)).double()
        nets = bae.nets.mlp(1, [2], 1).double(), bae.nets.mlp(1, [2], 1).double()
        results = []
        for per_output in (False, True):
            model = bae.Autoencoder(*nets, bae.likelihoods.Gaussian(per_output=per_output))
            results.append(bae.maximise_evidence(model, x, laplace=Laplace("dense")))
            bae.Evidence(Laplace("dense")).update(model, x, results[-1].prior, n_data=20, batch_size=7)
            assert torch.as_tensor(model.likelihood.scale).shape == ((1,) if per_output else ())
        assert results[1].noise_scale.shape == (1,)
        assert float(results[1].noise_scale) == pytest.approx(results[0].noise_scale, rel=1e-6)

    def test_noise_that_it_does_not_tune_was_estimated(self, rows):
        for likelihood, kwargs in (
            (bae.likelihoods.StudentT(), {}),
            (bae.likelihoods.Gaussian(), {"tunes_noise": False}),
        ):
            model = small_model(likelihood)
            with pytest.raises(bae.errors.NotFittedError, match="estimate_noise"):
                bae.maximise_evidence(model, rows, **kwargs)
            bae.estimate_noise(model, rows)
            result = bae.maximise_evidence(model, rows, **kwargs)
            bae.Predictive(model, result.posterior).moments(rows)


@pytest.mark.parametrize("per_output", [False, True])
def test_an_update_tells_the_evidence_of_the_noise_it_leaves(per_output, rows):
    model = small_model(bae.likelihoods.Gaussian(per_output=per_output))
    bae.estimate_noise(model, rows)
    prior, value = bae.Evidence().update(model, rows, bae.IsotropicNormal(), n_data=9, batch_size=4)
    again = bae.fit_weights(Laplace("kronecker", tunes_prior=False), model, rows, weight_prior=prior)
    assert value == pytest.approx(again.info["log_evidence"], rel=1e-9)


def test_updates_are_due():
    evidence = bae.Evidence(burn_in=3, every=2)
    assert [epoch for epoch in range(9) if evidence.is_due(epoch)] == [2, 4, 6, 8]
    assert [epoch for epoch in range(3) if bae.Evidence(burn_in=0, every=1).is_due(epoch)] == [0, 1, 2]
    for wrong in ({"burn_in": -1}, {"every": 0}, {"n_steps": 0}):
        with pytest.raises(bae.errors.DataError):
            bae.Evidence(**wrong)


@pytest.mark.filterwarnings("ignore:The best prior precision")
class TestHeldOut:
    def test_scores_are_those_of_fits_one_by_one(self, rows):
        model, train, validation = small_model(), rows[:6], rows[6:]
        candidates = (0.1, 1.0, 10.0, 100.0)
        method = Laplace("eigencorrected", tunes_prior=False)
        got = bae.held_out_precision(method, model, train, validation, candidates=candidates, batch_size=4)
        for precision in candidates:
            prior = bae.IsotropicNormal(precision)
            posterior = bae.fit_weights(method, model, train, weight_prior=prior)
            moments = bae.Predictive(model, posterior).moments(validation)
            expected = -float(bae.ood.negative_log_density(moments, validation).mean())
            assert got.log_density[precision] == pytest.approx(expected, rel=1e-9)
            if precision == got.precision:
                assert got.posterior.info["log_evidence"] == pytest.approx(posterior.info["log_evidence"], rel=1e-12)
        assert got.precision == max(got.log_density, key=got.log_density.get)
        assert got.posterior.info["prior_precision"] == got.precision
        assert got.posterior.info["held_out_log_density"] == got.log_density[got.precision]

    def test_it_finds_the_precision_of_the_world(self):
        """Least squares as the mode: with the world's own prior new rows are least surprising on average."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4000, D_IN, generator=generator, dtype=torch.float64)
        weight = torch.randn(D_IN, D_OUT, generator=generator, dtype=torch.float64)
        y = x @ weight + 0.5 * torch.randn(4000, D_OUT, generator=generator, dtype=torch.float64)
        model = linear_model(bae.likelihoods.Gaussian(0.5), bias=False)
        with torch.no_grad():  # six rows, so that the mode is far off and its variance counts
            model.decoder.weight.copy_(
                torch.linalg.solve(x[:6].mT @ x[:6] / 0.25 + torch.eye(D_IN), x[:6].mT @ y[:6] / 0.25).mT
            )
        sets = bae.Batch(x[:6], target=y[:6]), bae.Batch(x[6:], target=y[6:])
        got = bae.held_out_precision(Laplace("dense"), model, *sets, candidates=torch.logspace(-3, 3, 13).tolist())
        assert not got.is_at_edge
        assert 0.1 < got.precision < 10
        values = list(got.log_density.values())
        assert values.index(max(values)) not in (0, len(values) - 1)

    def test_an_edge_is_said(self, rows):
        model = small_model()
        with pytest.warns(UserWarning, match="at the edge of the candidates"):
            got = bae.held_out_precision(Laplace(), model, rows[:6], rows[6:], candidates=(1e6, 2e6, 3e6))
        assert got.is_at_edge

    def test_masked_entries_are_not_scored(self, rows):
        model, mask = small_model(), torch.ones(3, 7, dtype=torch.bool)
        mask[:, 2] = False
        holed = bae.Batch(torch.where(mask, rows[6:], torch.nan), mask)
        whole = bae.Batch(torch.where(mask, rows[6:], 0.0))
        got, other = (bae.held_out_precision(Laplace(), model, rows[:6], data) for data in (holed, whole))
        assert max(got.log_density.values()) > max(other.log_density.values())

    def test_it_changes_nothing(self, rows):
        model = small_model().train()
        state = torch.get_rng_state()
        bae.held_out_precision(Laplace(), model, rows[:6], rows[6:])
        assert model.training
        assert torch.equal(state, torch.get_rng_state())

    def test_candidates(self, rows):
        for wrong in ((1.0, 2.0), (0.0, 1.0, 2.0), (1.0, 2.0, float("inf"))):
            with pytest.raises(bae.errors.DataError, match="three or more positive"):
                bae.held_out_precision(Laplace(), small_model(), rows[:6], rows[6:], candidates=wrong)
