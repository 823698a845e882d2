from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.functional import parameters_of
from bayesae.models import _RUN_IN_A_LOOP
from bayesae.random import row_normal
from tests import twins
from tests.conftest import small_model

LIKELIHOODS = {"Gaussian": lambda: bae.likelihoods.Gaussian(0.3), "Bernoulli": bae.likelihoods.Bernoulli}


def normal(model, var=0.01, patterns=("**",), is_linearised=False):
    subset = bae.Subset.of(model.network, patterns)
    mean = parameters_of(model.network)
    var = var * torch.rand(len(subset), dtype=model.reference.dtype, generator=torch.Generator().manual_seed(5))
    return bae.families.DiagonalNormal(mean, var, subset, is_linearised=is_linearised)


def particles(model, n):
    return bae.families.Particles(normal(model, 0.05).sample(n))


def all_parts(moments):
    return {name: getattr(moments, name) for name in ("mean", "noise", "code", "weights")}


class TestLinearAutoencoder:
    """Decoder weights of a linear autoencoder: outputs are linear in them, so everything is known."""

    @pytest.fixture
    def world(self, rows):
        model = small_model(bae.likelihoods.Gaussian(0.3), hidden=())
        weights = normal(model, patterns=("decoder.**",), is_linearised=True)
        codes = model.encoder(rows).detach()
        variances = weights.variances()
        expected_mean = codes @ model.decoder[1].weight.detach().mT + model.decoder[1].bias.detach()
        expected_var = codes**2 @ variances["decoder.1.weight"].mT + variances["decoder.1.bias"]
        return model, weights, expected_mean, expected_var

    def test_closed_form(self, world, rows):
        model, weights, mean, var = world
        moments = bae.Predictive(model, weights).moments(rows)
        assert moments.is_exact
        assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
        assert_close(moments.weights, var, rtol=1e-10, atol=1e-14)
        assert_close(moments.total, var + 0.09, rtol=1e-12, atol=0)
        density = torch.distributions.Normal(mean, (var + 0.09).sqrt()).log_prob(rows)
        assert_close(moments.log_prob(rows), density, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("linearised", [True, False])
    def test_draws_have_these_moments(self, world, rows, linearised):
        model, weights, mean, var = world
        n = 4000
        predictive = bae.Predictive(model, weights, linearised=linearised)
        moments = predictive.moments(rows, n_weight_draws=n, seed=0)
        assert not moments.is_exact
        assert float(((moments.mean - mean) / moments.standard_error).abs().max()) < 4.5
        # the variance of a Normal sample has relative standard error sqrt(2 / n)
        assert float((moments.weights / var - 1).abs().max()) < 4.5 * (2 / n) ** 0.5

    def test_linearised_draws_are_the_network_where_it_is_linear(self, world, rows):
        model, weights, *_ = world
        linear, plain = (
            bae.Predictive(model, weights, linearised=flag)(rows, seed=1, keep_outputs=True) for flag in (True, False)
        )
        assert_close(linear.outputs, plain.outputs, rtol=1e-12, atol=1e-12)
        assert_close(linear.log_likelihood, plain.log_likelihood, rtol=1e-10, atol=1e-10)


def test_one_particle_is_the_plain_network(model, rows):
    weights = bae.fit_weights(bae.weights.MAP(), model, rows)
    draws = bae.Predictive(model, weights)(rows, keep_outputs=True)
    plain = model(rows).detach()
    assert_close(draws.outputs[0, 0], plain, rtol=0, atol=0)
    expected = torch.distributions.Normal(plain, 0.3).log_prob(rows).sum(1)
    assert_close(draws.log_likelihood[0, 0], expected, rtol=1e-12, atol=1e-12)
    moments = bae.Predictive(model, weights).moments(rows)
    assert float(moments.weights.abs().max()) == 0 and float(moments.code.abs().max()) == 0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_linearised_draws_equal_the_dense_jacobian(likelihood, rows):
    model = small_model(LIKELIHOODS[likelihood]())
    weights = normal(model, is_linearised=True)
    draws = bae.Predictive(model, weights)(rows, seed=0, n_weight_draws=3, keep_outputs=True)
    with bae.random.scope(0):
        shift = weights.subset.ravel(weights.sample(3)) - weights.subset.ravel(weights.mean)
    expected = model(rows).detach() + torch.einsum("bop,sp->sbo", twins.dense_jacobian(model.network, rows), shift)
    assert_close(draws.outputs[0], expected, rtol=1e-9, atol=1e-11)
    codes = model.encoder(rows).detach() + torch.einsum(
        "bop,sp->sbo",
        twins.dense_jacobian(model.encoder, rows),
        shift[:, : twins.dense_jacobian(model.encoder, rows).shape[2]],
    )
    assert_close(draws.latents[0], codes, rtol=1e-9, atol=1e-11)


def test_bernoulli_closed_form_is_the_limit_of_linearised_draws(rows):
    model = small_model(bae.likelihoods.Bernoulli())
    predictive = bae.Predictive(model, normal(model, var=0.3, is_linearised=True))
    exact = predictive.moments(rows)
    n = 6000
    p = predictive(rows, n_weight_draws=n, seed=0, keep_outputs=True).outputs[0].sigmoid()
    assert float(((p.mean(0) - exact.mean) / (p.var(0) / n).sqrt()).abs().max()) < 4.5
    squares = (p - exact.mean) ** 2
    assert float(((squares.mean(0) - exact.weights) / (squares.var(0) / n).sqrt()).abs().max()) < 4.5
    assert_close(exact.total, exact.mean * (1 - exact.mean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_streamed_moments_are_those_of_kept_outputs_and_obey_total_variance(likelihood, rows):
    model = small_model(LIKELIHOODS[likelihood]())
    predictive = bae.Predictive(model, particles(model, 5))
    outputs = predictive(rows, keep_outputs=True).outputs
    moments = predictive.moments(rows, chunk_size=1)
    means = model.likelihood.mean(outputs)
    assert_close(moments.mean, means.mean((0, 1)), rtol=1e-12, atol=1e-12)
    assert_close(moments.weights, means[0].var(0, correction=0), rtol=1e-10, atol=1e-14)
    noise = model.likelihood.variance(outputs)
    # total variance of the mixture, from its first two raw moments
    total = (noise + means**2).mean((0, 1)) - means.mean((0, 1)) ** 2
    assert_close(moments.noise + moments.code + moments.weights, total, rtol=1e-10, atol=1e-14)
    assert_close(moments.total, total, rtol=1e-10, atol=1e-14)


def jittered(bound, batch, *, n_latent_draws=1):
    """A stochastic code of one's own, as a third party would write it."""
    centre = bound.encode(batch.x)
    noise = row_normal(batch.index, (n_latent_draws, len(centre)), centre.shape[-1], centre)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    return bae.codes.draws_of(bound, batch, centre + 0.3 * noise, log_q)


def test_total_variance_with_several_codes_under_every_weight_draw(rows):
    """Between and within weight draws, against the pooled mixture."""
    model = small_model()
    predictive = bae.Predictive(model, particles(model, 4), jittered)
    moments = predictive.moments(rows, n_latent_draws=3, seed=0)
    outputs = predictive(rows, n_latent_draws=3, keep_outputs=True, seed=0).outputs
    assert not moments.is_exact
    assert_close(moments.code, outputs.var(0, correction=0).mean(0), rtol=1e-10, atol=1e-14)
    assert_close(moments.weights, outputs.mean(0).var(0, correction=0), rtol=1e-10, atol=1e-14)
    assert_close(moments.total, outputs.flatten(0, 1).var(0, correction=0) + 0.09, rtol=1e-10, atol=1e-14)


def test_standard_error_is_the_spread_of_repeated_runs(rows):
    """Over weights and codes: 200 runs of 20 draws."""
    model = small_model()
    predictive = bae.Predictive(model, normal(model), jittered)
    runs = [predictive.moments(rows[:2], n_weight_draws=20, n_latent_draws=4, seed=seed) for seed in range(200)]
    found = torch.stack([run.mean for run in runs]).std(0)
    claimed = torch.stack([run.standard_error for run in runs]).mean(0)
    # the sd of 200 Normal values has relative error 1 / sqrt(400), the mean claim is biased by less than 1 / 40
    assert float((claimed / found - 1).abs().max()) < 4.5 / 20 + 1 / 40
    one = predictive.moments(rows[:2], n_weight_draws=1, seed=0).standard_error
    assert bool(one.isinf().all())


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_noise_of_codes_does_not_depend_on_the_chunks(rows, chunk_size):
    model = small_model()
    predictive = bae.Predictive(model, particles(model, 1), jittered)
    whole, chunked = (predictive(rows, n_latent_draws=3, seed=3, chunk_size=size) for size in (10**6, chunk_size))
    assert_close(chunked.log_likelihood, whole.log_likelihood, rtol=1e-10, atol=1e-10)


def test_what_is_not_sampled_is_exact(model, rows):
    assert bae.Predictive(model, particles(model, 5)).moments(rows).is_exact
    assert bae.Predictive(model, particles(model, 5)).moments(rows, n_weight_draws=10).is_exact
    assert not bae.Predictive(model, particles(model, 5)).moments(rows, n_weight_draws=3).is_exact
    with pytest.raises(bae.errors.UnsupportedError, match="n_latent_draws=1"):
        bae.Predictive(model, normal(model, is_linearised=True)).moments(rows, n_latent_draws=3)


def test_blocks_of_weight_draws_change_nothing(model, rows, monkeypatch):
    predictive = bae.Predictive(model, normal(model))
    whole = predictive(rows, seed=2, n_weight_draws=7)
    monkeypatch.setattr("bayesae.predictive.predictive._NUMBERS_OF_WEIGHTS", 1)  # one draw at a time
    assert_close(
        predictive(rows, seed=2, n_weight_draws=7).log_likelihood, whole.log_likelihood, rtol=1e-10, atol=1e-10
    )


class TestMasks:
    def test_what_was_not_observed_does_not_matter_to_the_bit(self, model, rows):
        mask = torch.rand(9, 7) > 0.4
        for weights in (particles(model, 2), normal(model, is_linearised=True)):
            predictive = bae.Predictive(model, weights)
            a, b = (torch.where(mask, rows, fill) for fill in (torch.nan, 7.0))
            assert torch.equal(predictive(a, mask, seed=0).log_likelihood, predictive(b, mask, seed=0).log_likelihood)
            assert torch.equal(predictive.moments(a, mask).weights, predictive.moments(b, mask).weights)

    def test_gradients_are_finite(self, model, rows):
        mask = torch.rand(9, 7) > 0.4
        loader = [bae.Batch(torch.where(mask, rows, torch.nan), mask)]
        loader = torch.utils.data.DataLoader(loader, batch_size=None)
        bae.fit_model(model, loader, n_data=9, epochs=1)
        assert all(bool(p.isfinite().all()) for p in model.parameters())

    def test_shape_and_dtype(self, model, rows):
        for mask in (torch.ones(3, 7, dtype=torch.bool), torch.ones(9, 7)):
            with pytest.raises(bae.errors.ShapeError, match="a mask of"):
                bae.Predictive(model, particles(model, 2))(rows, mask)


class TestLoaders:
    def test_in_order(self, model, rows):
        predictive = bae.Predictive(model, normal(model))
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        state = torch.get_rng_state()
        got = predictive(loader, seed=0).log_likelihood
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(got, predictive(rows, seed=0).log_likelihood)

    def test_masks_and_targets_of_batches_are_kept(self, model, rows):
        mask, target = torch.rand(9, 7) > 0.4, torch.rand_like(rows)
        holed = torch.where(mask, rows, torch.nan)
        loader = torch.utils.data.DataLoader(
            range(9), batch_size=4, collate_fn=lambda i: bae.Batch(holed[i], mask[i], target=target[i])
        )
        weights = particles(model, 2)
        draws = bae.Predictive(model, weights)(loader, keep_outputs=True)
        expected = torch.distributions.Normal(draws.outputs, 0.3).log_prob(target).mul(mask).sum(-1)
        assert_close(draws.log_likelihood, expected, rtol=1e-12, atol=1e-12)
        same = bae.Predictive(model, weights)(holed, mask, keep_outputs=True)
        assert_close(draws.outputs, same.outputs, rtol=1e-12, atol=1e-12)

    def test_a_stream_comes_in_its_own_order_and_a_batch_sampler_may_not(self, model, rows):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from rows

        predictive = bae.Predictive(model, particles(model, 2))
        got = predictive(torch.utils.data.DataLoader(Stream(), batch_size=4)).log_likelihood
        assert torch.equal(got, predictive(rows).log_likelihood)
        loader = torch.utils.data.DataLoader(rows, batch_sampler=[[3, 1], [0]])
        with pytest.raises(bae.errors.DataError, match="a loader with list"):
            predictive(loader)

    def test_shuffled_rows_are_refused(self, model, rows):
        loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
        with pytest.raises(bae.errors.DataError, match="shuffle=False"):
            bae.Predictive(model, normal(model))(loader)


def test_under_inference_mode(model, rows):
    predictive = bae.Predictive(model, normal(model, is_linearised=True))
    expected, draws = predictive.moments(rows).weights, predictive(rows, seed=0).log_likelihood
    with torch.inference_mode():
        assert torch.equal(predictive.moments(rows).weights, expected)
        assert torch.equal(predictive(rows, seed=0).log_likelihood, draws)
        fitted = bae.fit_weights(bae.weights.Laplace(), model, rows.clone())
    assert torch.isfinite(fitted.var).all()


def test_draws_of_a_family_in_another_order_of_names(model, rows):
    class Reordered(bae.families.DiagonalNormal):
        def sample(self, n):
            return dict(reversed(super().sample(n).items()))

    plain = normal(model, is_linearised=True)
    other = Reordered(plain.mean, plain.var, plain.subset, is_linearised=True)
    a, b = (bae.Predictive(model, weights)(rows, seed=0).log_likelihood for weights in (plain, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("is_linearised", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_any_chunk_gives_the_same_numbers(model, rows, is_linearised, chunk_size):
    predictive = bae.Predictive(model, normal(model, is_linearised=is_linearised))
    whole, chunked = (predictive(rows, seed=2, chunk_size=size) for size in (10**6, chunk_size))
    assert_close(chunked.log_likelihood, whole.log_likelihood, rtol=1e-10, atol=1e-10)
    for n in (None, 6):
        a, b = (predictive.moments(rows, n_weight_draws=n, seed=2, chunk_size=size) for size in (10**6, chunk_size))
        for name, value in all_parts(a).items():
            assert_close(all_parts(b)[name], value, rtol=1e-10, atol=1e-13)


def test_the_same_seed_the_same_bits_and_the_callers_generator_stays(model, rows):
    predictive = bae.Predictive(model, normal(model))
    state = torch.get_rng_state()
    first, second = (predictive(rows, seed=4).log_likelihood for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    third, fourth = (predictive(rows).log_likelihood for _ in range(2))
    assert not torch.equal(third, fourth)
    assert not torch.equal(state, torch.get_rng_state())


def test_what_draws_nothing_leaves_the_generator_even_without_a_seed(model, rows):
    state = torch.get_rng_state()
    bae.Predictive(model, normal(model, is_linearised=True)).moments(rows)
    assert torch.equal(state, torch.get_rng_state())


def test_more_draws_refine_and_do_not_replace(model, rows):
    predictive = bae.Predictive(model, normal(model))
    few, many = (predictive(rows, seed=4, n_weight_draws=n).log_likelihood for n in (3, 8))
    assert_close(many[:, :3], few, rtol=1e-12, atol=1e-12)


def test_vmap_equals_the_loop(rows):
    mapped, looped = small_model(), small_model()
    _RUN_IN_A_LOOP.update((looped.encoder, looped.decoder))
    weights = normal(mapped)
    a, b = (bae.Predictive(m, weights)(rows, seed=0, keep_outputs=True) for m in (mapped, looped))
    assert_close(a.outputs, b.outputs, rtol=1e-12, atol=1e-12)


def test_a_network_that_cannot_be_mapped_is_run_in_a_loop(rows):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if bool((self.weight > -1e9).all()) else x  # data-dependent control flow

    model = bae.Autoencoder(Branching(7, 2), nn.Linear(2, 7), bae.likelihoods.Gaussian(1.0)).double().eval()
    plain = bae.Autoencoder(nn.Linear(7, 2), nn.Linear(2, 7), bae.likelihoods.Gaussian(1.0)).double().eval()
    plain.load_state_dict(model.state_dict())
    weights = normal(model)
    for _ in range(2):
        got = bae.Predictive(model, weights)(rows, seed=0).log_likelihood
        assert_close(got, bae.Predictive(plain, weights)(rows, seed=0).log_likelihood, rtol=1e-12, atol=1e-12)
    assert model.encoder in _RUN_IN_A_LOOP and model.decoder not in _RUN_IN_A_LOOP


def test_moments_come_in_the_datas_own_shape():
    model = small_model()
    images = torch.rand(3, 1, 7, 1, dtype=torch.float64)
    for weights in (normal(model, is_linearised=True), particles(model, 3)):
        moments = bae.Predictive(model, weights).moments(images)
        assert {v.shape for v in all_parts(moments).values()} == {images.shape}


def test_nothing_of_the_callers_is_touched(model, rows):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = rows.clone()
    dtype = torch.get_default_dtype()
    predictive = bae.Predictive(model, normal(model, is_linearised=True))
    predictive.moments(rows), predictive(rows), predictive.decoder(2)(torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(kept, rows) and torch.get_default_dtype() == dtype
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("is_linearised", [True, False])
def test_decoder_is_the_mean_under_fixed_draws_and_differentiable(model, is_linearised):
    weights = normal(model, is_linearised=is_linearised)
    decode = bae.Predictive(model, weights).decoder(3, seed=0)
    z = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    out = decode(z)
    assert out.shape == (3, 5, 7)
    assert torch.equal(out, decode(z))
    (gradient,) = torch.autograd.grad(out.sum(), z)
    assert gradient.shape == z.shape
    with bae.random.scope(0):
        draws = weights.sample(3)
    for s in range(3):
        own = {name.removeprefix("decoder."): v[s] for name, v in draws.items() if name.startswith("decoder.")}
        if not is_linearised:
            assert_close(out[s], torch.func.functional_call(model.decoder, own, (z,)))


class TestErrors:
    def test_rows_of_another_shape(self, model):
        wrong = torch.rand(3, 5, dtype=torch.float64)
        with pytest.raises(bae.errors.ShapeError, match="rows that the encoder takes"):
            bae.Predictive(model, particles(model, 2))(wrong)
        linearised = bae.Predictive(model, normal(model, is_linearised=True))
        with pytest.raises(bae.errors.ShapeError, match="rows of 7 numbers for 'encoder.1'; got 5"):
            linearised.moments(wrong)
        with pytest.raises(bae.errors.ShapeError, match="rows that the encoder takes"):
            linearised(wrong)
        with pytest.raises(bae.errors.ShapeError, match="A single row needs a first axis of 1"):
            linearised.moments(torch.rand(7))

    def test_channels_that_do_not_fit(self):
        encoder = nn.Sequential(nn.Conv1d(2, 1, 1), nn.Flatten())
        model = bae.Autoencoder(encoder, nn.Linear(4, 12), bae.likelihoods.Gaussian(1.0))
        with pytest.raises(bae.errors.ShapeError, match="rows that the encoder takes"):
            bae.Predictive(model, particles(model, 2))(torch.rand(5, 3, 4))

    def test_counts(self, model, rows):
        for wrong in ({"chunk_size": 0}, {"n_weight_draws": 0}, {"n_latent_draws": 0}):
            with pytest.raises(bae.errors.DataError, match=f"{next(iter(wrong))} of at least 1"):
                bae.Predictive(model, normal(model))(rows, **wrong)

    def test_not_a_number(self, model, rows):
        rows[2, 3] = torch.nan
        with pytest.raises(bae.errors.NonFiniteError, match="1 NaN or infinite values"):
            bae.Predictive(model, particles(model, 2)).moments(rows)

    def test_out_of_range_for_bernoulli(self, rows):
        model = small_model(bae.likelihoods.Bernoulli())
        with pytest.raises(bae.errors.DataError, match=r"Bernoulli data in \[0, 1\].*Scale the data"):
            bae.Predictive(model, particles(model, 2)).moments(rows * 255)

    def test_missing_and_unknown_parameters(self, model):
        atoms = {name: leaf[None] for name, leaf in parameters_of(model.network).items()}
        atoms["decoder.9.weight"] = atoms.pop("decoder.5.weight")
        with pytest.raises(bae.errors.ParameterError, match=r"missing \['decoder.5.weight'\], unknown \['decoder.9"):
            bae.Predictive(model, bae.families.Particles(atoms))

    def test_no_rows(self, model):
        with pytest.raises(bae.errors.DataError, match="at least one row"):
            bae.Predictive(model, particles(model, 2))(torch.zeros(0, 7, dtype=torch.float64))

    def test_train_mode_running_statistics(self, rows):
        encoder = nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2)).double()
        model = bae.Autoencoder(encoder, nn.Linear(2, 7).double(), bae.likelihoods.Gaussian(1.0))
        with pytest.raises(bae.errors.UnsupportedError, match=r"BatchNorm1d 'encoder.1' with running statistics"):
            bae.Predictive(model, particles(model, 1))

    def test_a_scale_that_nobody_estimated(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        with pytest.raises(bae.errors.NotFittedError, match="estimate_noise"):
            bae.Predictive(model, particles(model, 1))(rows)

    def test_particles_are_not_linearised(self, model):
        with pytest.raises(bae.errors.UnsupportedError, match="continuous posterior"):
            bae.Predictive(model, particles(model, 2), linearised=True)

    def test_outputs_of_another_number(self, rows):
        model = bae.Autoencoder(nn.Linear(7, 2), nn.Linear(2, 6), bae.likelihoods.Gaussian(1.0)).double()
        for is_linearised in (True, False):
            with pytest.raises(bae.errors.ShapeError, match="as many outputs as a row has numbers"):
                bae.Predictive(model, normal(model, is_linearised=is_linearised)).moments(rows)


def test_observed_entries_only(model, rows):
    mask = torch.rand(9, 7) > 0.4
    draws = bae.Predictive(model, particles(model, 2))(rows, mask, keep_outputs=True)
    expected = torch.distributions.Normal(draws.outputs, 0.3).log_prob(rows).mul(mask).sum(-1)
    assert_close(draws.log_likelihood, expected, rtol=1e-12, atol=1e-12)
