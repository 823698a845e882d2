"""Draws, randomness, functional helpers, subsets, joints, models, codes, objectives, errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import functional, random
from bayesae.draws import concatenate_rows
from bayesae.forward_mode import jvp
from tests.conftest import small_model


class TestErrors:
    @pytest.mark.parametrize("name", bae.errors.__all__)
    def test_say_three_things_and_pickle(self, name):
        error = getattr(bae.errors, name)("a duck", "a goose", "Call the farmer.")
        assert str(error) == "expected a duck; got a goose. Call the farmer."
        assert str(pickle.loads(pickle.dumps(error))) == str(error)

    def test_are_also_pythons_own(self):
        assert issubclass(bae.errors.ShapeError, ValueError)
        assert issubclass(bae.errors.UnsupportedError, RuntimeError)


class TestRandom:
    def test_scope_restores(self):
        state = torch.get_rng_state()
        with random.scope(1):
            first = torch.rand(3)
        with random.scope(1):
            assert torch.equal(first, torch.rand(3))
        with random.scope(2):
            assert not torch.equal(first, torch.rand(3))
        torch.manual_seed(1)
        assert torch.equal(first, torch.rand(3))
        torch.set_rng_state(state)
        with random.scope(1):
            torch.rand(3)
        assert torch.equal(state, torch.get_rng_state())

    def test_no_seed_advances(self):
        state = torch.get_rng_state()
        with random.scope(None):
            torch.rand(1)
        assert not torch.equal(state, torch.get_rng_state())

    def test_other_devices_are_not_seeded(self, monkeypatch):
        def forbidden(seed):
            raise AssertionError("a CPU run seeded every GPU")

        monkeypatch.setattr("torch.cuda.manual_seed_all", forbidden)
        monkeypatch.setattr("torch.cuda.manual_seed", forbidden)
        with random.scope(3):
            torch.rand(1)

    def test_row_noise_is_keyed_on_the_seed_and_the_row(self):
        like = torch.zeros(1)
        with random.scope(1):
            whole = random.row_normal(torch.arange(6), (2, 3), 4, like)
            parts = [random.row_normal(i, (2, 3), 4, like) for i in torch.arange(6).split(2)]
        with random.scope(2):
            other = random.row_normal(torch.arange(6), (2, 3), 4, like)
        assert whole.shape == (2, 3, 6, 4)
        assert torch.equal(torch.cat(parts, 2), whole)
        assert float((whole - other).abs().min()) > 0
        assert len(torch.unique(whole)) == whole.numel()

    def test_row_noise_is_standard_normal(self):
        noise = random.row_normal(torch.arange(500), (4,), 5, torch.zeros(1, dtype=torch.float64))
        assert abs(float(noise.mean())) < 4.5 / 100
        assert abs(float(noise.var()) - 1) < 4.5 * (2 / 10_000) ** 0.5

    def test_restores_after_an_error(self):
        state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), random.scope(1):
            raise ZeroDivisionError
        assert torch.equal(state, torch.get_rng_state())


def draws_of_pca(n_latent=5, n_weights=3, n_rows=4):
    """Probabilistic PCA with one code, q the exact posterior: the log-ratio is the evidence."""
    w, noise = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), 0.7
    x = torch.randn(n_rows, 3, dtype=torch.float64)
    precision = 1 + float(w @ w) / noise**2
    q = torch.distributions.Normal(x @ w / noise**2 / precision, precision**-0.5)
    z = q.sample((n_latent, n_weights))
    log_likelihood = torch.distributions.Normal(z[..., None] * w, noise).log_prob(x).sum(-1)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    likelihood = bae.likelihoods.Gaussian(noise)
    draws = bae.Draws(z[..., None], log_likelihood, log_prior, q.log_prob(z), likelihood)
    marginal = torch.outer(w, w) + noise**2 * torch.eye(3, dtype=torch.float64)
    return draws, torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), marginal).log_prob(x)


class TestDraws:
    def test_exact_q_gives_the_evidence_whatever_k(self):
        draws, evidence = draws_of_pca()
        assert_close(draws.log_ratio, evidence.expand(5, 3, 4), rtol=1e-10, atol=1e-10)
        assert_close(draws.log_evidence(), evidence.expand(3, 4), rtol=1e-10, atol=1e-10)
        assert_close(draws.log_density(), draws.log_evidence())
        assert_close(draws.ess(), torch.full((3, 4), 5.0, dtype=torch.float64), rtol=1e-9, atol=0)

    def test_log_evidence_equals_a_python_loop_on_a_poor_q(self):
        draws, _ = draws_of_pca()
        draws = bae.Draws(draws.latents, draws.log_likelihood, draws.log_prior * 3, draws.log_q, draws.likelihood)
        got = draws.log_evidence()
        for s in range(3):
            for b in range(4):
                terms = [draws.log_ratio[k, s, b].exp() for k in range(5)]
                assert float(got[s, b].exp()) == pytest.approx(float(sum(terms) / 5), rel=1e-10)

    def test_a_point_has_no_density(self, model, rows):
        draws = bae.codes.encode(model.live(), bae.Batch(rows))
        with pytest.raises(bae.errors.UnsupportedError, match="deterministic encoder"):
            draws.log_evidence()

    def test_concatenated_chunks_are_the_whole(self):
        draws, _ = draws_of_pca()
        halves = [
            bae.Draws(
                draws.latents[:, :, i], draws.log_likelihood[..., i], draws.log_prior[..., i], None, draws.likelihood
            )
            for i in (slice(0, 1), slice(1, 4))
        ]
        joined = concatenate_rows(halves)
        assert torch.equal(joined.latents, draws.latents) and torch.equal(joined.log_prior, draws.log_prior)
        assert joined.log_q is None


class TestForwardMode:
    def test_in_every_mode_and_leaves_it(self):
        net = nn.Linear(3, 2, dtype=torch.float64)
        point, along = torch.randn(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                columns = torch.func.vmap(lambda t: jvp(net, (point.clone(),), (t,))[1])(along)
                value, _ = jvp(net, (point.clone(),), (along[0],))
                assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
            assert_close(columns, net.weight.T, rtol=0, atol=0)
            assert value.requires_grad is (mode is torch.enable_grad)


class TestSubset:
    def test_ravel_and_scatter_are_inverse(self, model):
        params = functional.parameters_of(model.network)
        for patterns in (("**",), ("decoder.**",), ("*.bias", "encoder.1.*")):
            subset = bae.Subset.of(model.network, patterns)
            draws = torch.randn(2, 3, len(subset), dtype=torch.float64)
            full = subset.scatter(draws, params)
            assert_close(subset.ravel(full), draws, rtol=0, atol=0)
            for name, leaf in full.items():
                assert leaf.shape == (2, 3, *params[name].shape)
                if name not in subset.masks:
                    assert leaf.untyped_storage().data_ptr() == params[name].untyped_storage().data_ptr()

    def test_masks_within_a_tensor(self, model):
        params = functional.parameters_of(model.network)
        mask = torch.zeros_like(params["encoder.1.weight"], dtype=torch.bool)
        mask[2, 3] = mask[0, 1] = True
        subset = bae.Subset({"encoder.1.weight": mask})
        assert len(subset) == 2
        full = subset.scatter(torch.tensor([5.0, 6.0], dtype=torch.float64), params)
        assert float(full["encoder.1.weight"][0, 1]) == 5 and float(full["encoder.1.weight"][2, 3]) == 6
        assert int((full["encoder.1.weight"] != params["encoder.1.weight"]).sum()) == 2

    def test_frozen_parameters_are_not_chosen(self, model):
        model.encoder.requires_grad_(False)
        assert all(name.startswith("decoder") for name in bae.Subset.of(model.network).masks)

    def test_errors(self, model):
        params = functional.parameters_of(model.network)
        with pytest.raises(bae.errors.ParameterError, match=r"'head.\*\*'"):
            bae.Subset.of(model.network, ("head.**",))
        with pytest.raises(bae.errors.ParameterError, match=r"unknown names \['head'\]"):
            bae.Subset({"head": torch.ones(1, dtype=torch.bool)}).check(params)
        with pytest.raises(bae.errors.ShapeError, match="boolean mask of shape"):
            bae.Subset({"encoder.1.bias": torch.ones(2, dtype=torch.bool)}).check(params)
        subset = bae.Subset.of(model.network)
        with pytest.raises(bae.errors.ShapeError, match="values"):
            subset.scatter(torch.zeros(3), params)


class TestJoint:
    def test_estimate_is_scaled_to_n_and_divided_by_temperature(self, model, rows):
        params = {name: leaf[None] for name, leaf in functional.parameters_of(model.network).items()}
        joint = bae.log_joint(model, n_data=90, temperature=2.0, weight_prior=bae.IsotropicNormal(3.0))
        flat = torch.cat([leaf.flatten() for leaf in params.values()])
        scale = torch.tensor(3.0**-0.5, dtype=torch.float64)
        log_prior = torch.distributions.Normal(0 * scale, scale).log_prob(flat).sum()
        log_likelihood = torch.distributions.Normal(model(rows).detach(), 0.3).log_prob(rows).sum()
        expected = ((10 * log_likelihood + log_prior) / 2)[None].detach()
        assert_close(joint.estimate(params, bae.Batch(rows)), expected, rtol=1e-10, atol=0)
        assert joint.is_deterministic

    def test_initialise_is_fresh_and_leaves_the_network(self, model):
        before = functional.parameters_of(model.network)
        first, second = (bae.log_joint(model, 1).initialise() for _ in range(2))
        assert not torch.equal(first["encoder.1.weight"], second["encoder.1.weight"])
        assert all(torch.equal(before[k], v) for k, v in functional.parameters_of(model.network).items())
        assert first["encoder.1.weight"].dtype == torch.float64

    def test_precision_must_be_positive(self):
        with pytest.raises(bae.errors.DataError, match="prior precision"):
            bae.IsotropicNormal(0.0)


class TestModel:
    def test_at_own_weights_is_the_plain_network(self, model, rows):
        params = {name: leaf[None] for name, leaf in functional.parameters_of(model.network).items()}
        for bound in (model.at(params), model.live()):
            codes = bound.encode(rows)
            assert_close(codes[0], model.encoder(rows))
            assert_close(bound.decode(codes)[0], model(rows))

    def test_axes_follow_their_draws(self, rows):
        """A Python loop over code draws, weight draws and rows."""
        model = small_model()
        params = bae.fit_weights(bae.weights.Ensemble(3, epochs=1), model, rows).sample(3)
        z = torch.randn(2, 3, 4, 2, dtype=torch.float64)
        got = model.at(params).decode(z)
        assert got.shape == (2, 3, 4, 7)
        for s in range(3):
            own = {k.removeprefix("decoder."): v[s] for k, v in params.items() if k.startswith("decoder.")}
            for k in range(2):
                for b in range(4):
                    one = torch.func.functional_call(model.decoder, own, (z[k, s, b][None],))[0]
                    assert_close(got[k, s, b], one, rtol=1e-12, atol=1e-12)

    def test_wrap_copies_and_evaluates(self, rows):
        encoder = nn.Sequential(nn.Linear(7, 2), nn.Dropout(0.5)).double()
        model = bae.wrap(encoder, nn.Linear(2, 7).double(), bae.likelihoods.Gaussian())
        scale = bae.estimate_noise(model, rows)
        assert scale == pytest.approx(float((model(rows) - rows).detach().pow(2).mean().sqrt()))
        assert encoder.training and not model.training
        assert model.encoder[0].weight is not encoder[0].weight
        weights = bae.fit_weights(bae.weights.Laplace(), model, rows)
        assert bae.Predictive(model, weights).moments(rows).is_exact

    def test_dropout_that_is_on_is_refused(self):
        model = small_model()
        model.encoder.append(nn.Dropout(0.5))
        model.train()
        with pytest.raises(bae.errors.UnsupportedError, match="dropout in training mode"):
            bae.log_joint(model, 3)

    def test_tied_networks_are_refused(self):
        layer = nn.Linear(3, 3)
        with pytest.raises(bae.errors.UnsupportedError, match="tied"):
            bae.Autoencoder(layer, layer, bae.likelihoods.Bernoulli())

    def test_no_weights_and_two_dtypes(self):
        with pytest.raises(bae.errors.ParameterError, match="without any"):
            bae.Autoencoder(nn.Flatten(), nn.Flatten(), bae.likelihoods.Bernoulli())
        with pytest.raises(bae.errors.ShapeError, match="one dtype"):
            bae.Autoencoder(nn.Linear(2, 1), nn.Linear(1, 2).double(), bae.likelihoods.Bernoulli())

    def test_a_code_that_is_no_vector(self):
        model = bae.Autoencoder(nn.Conv1d(1, 2, 1), nn.Linear(2, 2), bae.likelihoods.Bernoulli())
        with pytest.raises(bae.errors.ShapeError, match=r"codes of shape \(B, Z\)"):
            model.live().encode(torch.rand(3, 1, 4))

    def test_leaves_of_the_wrong_shape(self, model):
        params = functional.parameters_of(model.network)
        with pytest.raises(bae.errors.ShapeError, match="axis of weight draws"):
            model.at(params)


def test_encode_has_one_draw(model, rows):
    with pytest.raises(bae.errors.UnsupportedError, match="n_latent_draws=1"):
        bae.codes.encode(model.live(), bae.Batch(rows), n_latent_draws=2)


def test_target_in_place_of_x(model, rows):
    other = torch.rand_like(rows)
    draws = bae.codes.encode(model.live(), bae.Batch(rows, target=other))
    expected = torch.distributions.Normal(model(rows), 0.3).log_prob(other).sum(1)
    assert_close(bae.objectives.reconstruction(draws)[0], expected)


def test_mlp_is_linear_without_hidden_layers():
    net = bae.nets.mlp(6, (), 3)
    assert [type(layer) for layer in net] == [nn.Flatten, nn.Linear]
    assert net(torch.rand(2, 1, 2, 3)).shape == (2, 3)
    assert [layer.out_features for layer in bae.nets.mlp(6, (5, 4), 3) if isinstance(layer, nn.Linear)] == [5, 4, 3]


class TestFamilies:
    def test_diagonal_normal_draws_have_its_moments(self, model):
        params = functional.parameters_of(model.network)
        subset = bae.Subset.of(model.network, ("decoder.5.*",))
        var = torch.rand(len(subset), dtype=torch.float64) + 0.1
        family = bae.families.DiagonalNormal(params, var, subset)
        n = 20000
        draws = subset.ravel(family.sample(n))
        standard = (draws.mean(0) - subset.ravel(params)) / (var / n).sqrt()
        assert float(standard.abs().max()) < 4.5
        assert float((draws.var(0) / var - 1).abs().max()) < 4.5 * (2 / n) ** 0.5

    def test_diagonal_normal_refuses(self, model):
        params = functional.parameters_of(model.network)
        subset = bae.Subset.of(model.network)
        with pytest.raises(bae.errors.ShapeError, match="var of shape"):
            bae.families.DiagonalNormal(params, torch.ones(3), subset)
        with pytest.raises(bae.errors.NonFiniteError, match="means and variances"):
            bae.families.DiagonalNormal(params, torch.full((len(subset),), torch.nan), subset)

    def test_particles_are_sampled_evenly(self):
        family = bae.families.Particles({"w": torch.arange(3.0)[:, None]})
        assert family.sample(3)["w"].flatten().tolist() == [0, 1, 2]
        counts = torch.bincount(family.sample(8)["w"].flatten().long(), minlength=3)
        assert counts.sum() == 8 and counts.min() == 2
        assert len(set(family.sample(2)["w"].flatten().tolist())) == 2

    def test_one_particle_is_expanded_and_not_copied(self):
        atom = torch.ones(1, 1000)
        drawn = bae.families.Particles({"w": atom}).sample(50)["w"]
        assert drawn.shape == (50, 1000) and drawn.untyped_storage().data_ptr() == atom.untyped_storage().data_ptr()

    def test_particles_refuse(self):
        with pytest.raises(bae.errors.ShapeError, match="one M >= 1"):
            bae.families.Particles({"a": torch.ones(2, 1), "b": torch.ones(3, 1)})
        with pytest.raises(bae.errors.NonFiniteError, match="'a'"):
            bae.families.Particles({"a": torch.full((1, 1), torch.inf)})
