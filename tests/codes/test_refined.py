"""Gradient ascent on each row's own bound: on probabilistic PCA to the best diagonal Normal, else beside a loop."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import bayesae as bae
from bayesae.codes import Amortised, DiagonalLaw, Refined, amortised
from bayesae.random import row_normal
from bayesae.testing import LinearGaussian
from bayesae.training.identity import describe

F64 = {"dtype": torch.float64}


def params_of(model, n=1):
    leaves = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    noise = {k: 0.1 * torch.randn(n - 1, *v.shape, generator=generator, **F64) for k, v in leaves.items()}
    return {k: torch.cat([v[None], v + noise[k]]) for k, v in leaves.items()}


@pytest.fixture
def world():
    return LinearGaussian.make(correlation=0.8, n_data=12)


@pytest.fixture
def bad(world):
    """The world's decoder behind an encoder that is wrong in all it says."""
    model = world.model("diagonal")
    with torch.no_grad():
        model.encoder[0].weight.mul_(0.3)
        model.encoder[0].bias.add_(0.5 * torch.randn(model.encoder[0].bias.shape, **F64))
    return model


@pytest.fixture
def curved():
    torch.manual_seed(2)
    encoder, decoder = bae.nets.mlp(5, [4], (3, 2)), bae.nets.mlp(3, [6], 5)
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.5)).double().eval()


@pytest.fixture
def batch():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), **F64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 2:4] = False
    return bae.Batch(torch.where(mask, x, 0), mask=mask, index=torch.tensor([7, 3, 0, 12]))


def law_at(codes, model, batch, n=1):
    with torch.no_grad(), bae.random.scope(0):
        return codes.law(model.at(params_of(model, n)), batch)


def exact_elbo(world, law):
    mean, var = law.loc[0], (2 * law.log_scale[0]).exp()
    residual = world.x - mean @ world.weight.mT - world.bias
    trace = (var * (world.weight**2).sum(0)).sum(-1)
    value = -0.5 * ((residual**2).sum(1) + trace) / world.noise_var - law.kl()[0].sum(-1)
    return value - 0.5 * len(world.bias) * math.log(2 * math.pi * world.noise_var)


class TestLinearGaussian:
    def test_many_steps_reach_the_best_diagonal_normal(self, world, bad):
        law = law_at(Refined(amortised, 200, 0.015, 0.7), bad, world.batch)
        torch.testing.assert_close(law.loc[0], world.posterior_mean(), rtol=0, atol=1e-6)
        expected = -0.5 * world.precision.diagonal().log()
        torch.testing.assert_close(law.log_scale[0], expected.expand_as(law.loc[0]), rtol=0, atol=1e-6)
        best = world.log_evidence() - world.mean_field_gap
        torch.testing.assert_close(exact_elbo(world, law), best, rtol=0, atol=1e-9)
        assert float((best - exact_elbo(world, law_at(amortised, bad, world.batch))).mean()) > 10

    def test_a_direction_a_step_does_nearly_as_well(self, world, bad):
        law = law_at(Refined(amortised, 200, 0.01, n_directions=1), bad, world.batch)
        loss = world.log_evidence() - world.mean_field_gap - exact_elbo(world, law)
        assert 0 < float(loss.max()) < 2e-3

    def test_no_step_goes_down(self, world, bad):
        values = [exact_elbo(world, law_at(amortised, bad, world.batch))]
        for n in range(1, 12):
            values.append(exact_elbo(world, law_at(Refined(amortised, n, 0.005, momentum=0.0), bad, world.batch)))
        assert bool((torch.stack(values).diff(dim=0) > 0).all())

    def test_the_bound_of_the_draws_is_the_law_s(self, world, bad):
        """Draws that repeated the noise that the law was fitted to would be off."""
        codes, n = Refined(amortised, 100, 0.015, 0.7), 2000
        with torch.no_grad(), bae.random.scope(0):
            draws = codes(bad.at(params_of(bad)), world.batch, n_latent_draws=n)
        values = draws.log_likelihood - draws.kl.sum(-1)
        error = values.std(0)[0] / n**0.5
        gap = world.log_evidence() - bae.objectives.elbo(draws)[0]
        assert bool(((gap - world.mean_field_gap).abs() < 4.5 * error).all())

    def test_a_start_that_is_better_is_kept(self, world):
        best = world.model("diagonal")
        law, start = (law_at(codes, best, world.batch) for codes in (Refined(amortised, 3, 1e3), amortised))
        assert torch.equal(law.loc, start.loc) and torch.equal(law.log_scale, start.log_scale)

    def test_each_row_keeps_its_own_start(self, world, bad):
        """A step that is too long for rows that are nearly right is good for others."""
        law, start = (law_at(codes, bad, world.batch) for codes in (Refined(amortised, 1, 0.3), amortised))
        is_kept = (law.loc == start.loc).all(-1)[0]
        assert 0 < int(is_kept.sum()) < len(world.x)
        assert bool(((exact_elbo(world, law) > exact_elbo(world, start)) | is_kept).all())


def twin(codes, model, params, batch, s, b):
    """One row under one weight draw, by autograd and no axis but those of directions and codes."""
    own = {name: leaf[s] for name, leaf in params.items()}
    decoder = {name.removeprefix("decoder."): leaf for name, leaf in own.items() if name.startswith("decoder")}
    encoder = {name.removeprefix("encoder."): leaf for name, leaf in own.items() if name.startswith("encoder")}
    row = batch.x[b : b + 1]
    start = torch.func.functional_call(model.encoder, encoder, (row,))[0].mT  # (2, Z)
    n_latents = start.shape[1]
    normal = row_normal(-1 - batch.index[b : b + 1], (n_latents, 1), n_latents, row)[:, 0, 0]
    axes = torch.linalg.qr(normal.mT).Q.mT * n_latents**0.5

    def bound(loc, log_scale, directions):
        total = 0.0
        for direction in directions:
            for sign in (1, -1):
                z = loc + sign * log_scale.exp() * direction
                mean = torch.func.functional_call(model.decoder, decoder, (z[None],))[0]
                normal = torch.distributions.Normal(mean, model.likelihood.scale)
                total = total + (normal.log_prob(row[0]) * batch.mask[b]).sum() / (2 * len(directions))
        prior = torch.distributions.Normal(torch.zeros_like(loc), 1.0)
        return total - torch.distributions.kl_divergence(torch.distributions.Normal(loc, log_scale.exp()), prior).sum()

    loc, log_scale = start.detach().requires_grad_()
    first, velocity = (loc, log_scale), [0.0, 0.0]
    for t in range(codes.n_steps):
        some = [axes[(t * codes.n_directions + i) % n_latents] for i in range(codes.n_directions)]
        gradient = torch.autograd.grad(bound(loc, log_scale, some), (loc, log_scale))
        norm = math.sqrt(sum(float((part**2).sum()) for part in gradient))
        factor = min(1.0, codes.clip_norm / norm)
        velocity = [codes.momentum * v + factor * g for v, g in zip(velocity, gradient, strict=True)]
        loc, log_scale = loc + codes.learning_rate * velocity[0], log_scale + codes.learning_rate * velocity[1]
    is_better = bound(loc, log_scale, axes) > bound(*first, axes)
    return (loc, log_scale) if is_better else first


def test_it_is_the_loop_over_rows_and_weight_draws(curved, batch):
    codes, n = Refined(amortised, 5, 0.05, 0.7, n_directions=2, clip_norm=4.5), 2
    law, params = law_at(codes, curved, batch, n), params_of(curved, n)
    assert law.loc.shape == (2, 4, 3)
    for s in range(n):
        for b in range(4):
            with bae.random.scope(0):
                loc, log_scale = twin(codes, curved, params, batch, s, b)
            torch.testing.assert_close(law.loc[s, b], loc.detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(law.log_scale[s, b], log_scale.detach(), rtol=0, atol=1e-10)


def test_a_row_depends_on_no_other_and_its_law_on_no_number_of_draws(curved, batch):
    codes = Refined(amortised, 4, 0.05)
    law = law_at(codes, curved, batch, 2)
    part = bae.Batch(batch.x[[2, 1]], batch.mask[[2, 1]], index=batch.index[[2, 1]])
    torch.testing.assert_close(law_at(codes, curved, part, 2).loc, law.loc[:, [2, 1]], rtol=0, atol=1e-12)
    for n in (1, 3, 6):
        with torch.no_grad(), bae.random.scope(0):
            draws = codes(curved.at(params_of(curved, 2)), batch, n_latent_draws=n)
        assert draws.latents.shape == (n, 2, 4, 3) and draws.kl.shape == (2, 4, 3)
        torch.testing.assert_close(law.log_prob(draws.latents), draws.log_q, rtol=0, atol=1e-12)
        torch.testing.assert_close(law.kl(), draws.kl, rtol=0, atol=1e-12)


def test_the_norm_of_a_row_s_gradient_is_clipped(curved, batch):
    start = law_at(amortised, curved, batch)
    for clip in (0.3, 1e6):
        law = law_at(Refined(amortised, 1, 1e-3, clip_norm=clip), curved, batch)
        moved = ((law.loc - start.loc) ** 2 + (law.log_scale - start.log_scale) ** 2).sum(-1).sqrt() / 1e-3
        assert bool((moved < 0.3 * (1 + 1e-9)).all()) == (clip == 0.3)


class TestGradients:
    # norms of the rows' gradients are from 2 to 5: some rows are clipped and some are not
    CODES = Refined(amortised, 3, 0.03, 0.6, clip_norm=4.5)

    @staticmethod
    def value(codes, model, batch):
        with bae.random.scope(0):
            return bae.objectives.elbo(codes(model.live(), batch, n_latent_draws=2)).sum()

    def test_second_order_gradients_are_those_of_finite_differences(self, curved, batch):
        leaves = list(curved.parameters())
        gradients = torch.autograd.grad(self.value(self.CODES, curved, batch), leaves)
        generator = torch.Generator().manual_seed(0)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            direction = torch.randn(leaf.shape, generator=generator, **F64)
            values = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    leaf.add_(step * direction)
                    values.append(self.value(self.CODES, curved, batch))
            with torch.no_grad():
                leaf.add_(1e-5 * direction)
            slope = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-7)

    def test_first_order_gradients_pass_straight_to_the_start(self, curved, batch):
        codes = Refined(amortised, 3, 0.03, 0.6, second_order=False, clip_norm=4.5)
        values = [self.value(one, curved, batch) for one in (codes, self.CODES)]
        torch.testing.assert_close(*values, rtol=0, atol=1e-12)
        leaves = list(curved.parameters())
        gradients = torch.autograd.grad(self.value(codes, curved, batch), leaves)
        with torch.no_grad(), bae.random.scope(0):
            end, start = (one.law(curved.live(), batch) for one in (codes, amortised))

        class Shifted:
            def law(self, model, batch):
                law = amortised.law(model, batch)
                return DiagonalLaw(law.loc + end.loc - start.loc, law.log_scale + end.log_scale - start.log_scale)

            def __call__(self, model, batch, *, n_latent_draws=1):
                law = self.law(model, batch)
                latents = law.push(bae.codes.base.noise(model, batch, n_latent_draws, 3, law.loc))
                return bae.codes.draws_of(model, batch, latents, law.log_prob(latents), law.kl())

        expected = torch.autograd.grad(self.value(Shifted(), curved, batch), leaves)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
        whole = torch.autograd.grad(self.value(self.CODES, curved, batch), leaves)
        assert any(not torch.allclose(one, other, rtol=1e-2) for one, other in zip(gradients, whole, strict=True))

    @pytest.mark.parametrize("second_order", [True, False])
    def test_training_through_the_steps_climbs(self, second_order):
        world = LinearGaussian.make(n_data=64)
        torch.manual_seed(0)
        encoder, decoder = bae.nets.mlp(7, [], (3, 2)), bae.nets.mlp(3, [], 7)
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.5)).double()
        codes = Refined(amortised, 5, 0.02, second_order=second_order)
        before = [leaf.detach().clone() for leaf in model.parameters()]
        kwargs = {"objective": bae.objectives.elbo, "codes": codes, "learning_rate": 0.02, "progress": False, "seed": 0}
        history = bae.fit_model(model, world.x, epochs=6, batch_size=16, **kwargs)
        assert history.train[-1] > history.train[0] + 1
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_two_weight_posteriors_predict_through_it(curved, batch):
    rows = bae.Batch(batch.x, batch.mask)
    codes = Refined(amortised, 2, 0.03)
    particles = bae.families.Particles(params_of(curved, 3))
    draws = bae.Predictive(curved, particles, codes)(rows, n_latent_draws=2, seed=0)
    assert draws.latents.shape == (2, 3, 4, 3)
    mean = {name: leaf[0] for name, leaf in params_of(curved).items()}
    var = torch.full((sum(leaf.numel() for leaf in mean.values()),), 1e-2, **F64)
    normal = bae.families.DiagonalNormal(mean, var, bae.Subset.of(curved.network), is_linearised=True)
    drawn = bae.Predictive(curved, normal, codes)(rows, n_weight_draws=2, n_latent_draws=2, seed=0)
    with bae.random.scope(0):
        params = normal.sample(2)

        def latents_at(step):
            moved = {k: v + step * (params[k] - v) for k, v in mean.items()}
            with torch.no_grad():
                return codes(curved.at(moved), rows._replace(index=torch.arange(4)), n_latent_draws=2).latents

        slope = (latents_at(1e-5) - latents_at(-1e-5)) / 2e-5
        expected = latents_at(0.0) + slope
    torch.testing.assert_close(drawn.latents, expected, rtol=0, atol=1e-8)


def test_it_pickles_and_describes_itself(curved, batch):
    codes = Refined(Amortised(), 4, 0.05, second_order=False)
    again = pickle.loads(pickle.dumps(codes))
    assert again == codes and describe(again) == describe(codes)
    assert torch.equal(law_at(again, curved, batch).loc, law_at(codes, curved, batch).loc)
    assert len({describe(Refined(n_steps=n, second_order=s)) for n in (1, 2) for s in (True, False)}) == 4


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"n_steps": 0}, "n_steps"),
            ({"n_directions": 0}, "n_directions"),
            ({"learning_rate": 0.0}, "learning_rate"),
            ({"learning_rate": math.nan}, "learning_rate"),
            ({"momentum": 1.0}, "momentum"),
            ({"momentum": -0.1}, "momentum"),
            ({"clip_norm": True}, "clip_norm"),
        ],
    )
    def test_numbers_out_of_range(self, kwargs, match):
        with pytest.raises(bae.errors.DataError, match=match):
            Refined(**kwargs)

    def test_starts_that_cannot_be_refined(self, world, curved, batch):
        with pytest.raises(bae.errors.UnsupportedError, match="got encode"):
            Refined(bae.codes.encode)
        with pytest.raises(bae.errors.UnsupportedError, match="TriangularLaw"):
            law_at(Refined(Amortised("full")), world.model("full"), world.batch)
        with pytest.raises(bae.errors.UnsupportedError, match="at most 3 directions"):
            law_at(Refined(n_directions=4), curved, batch)

    def test_a_decoder_that_writes_to_itself(self, curved, batch):
        curved.decoder.append(torch.nn.BatchNorm1d(5).double())
        with pytest.raises(bae.errors.UnsupportedError, match="batch normalisation"):
            Refined(n_steps=1)(curved.train().live(), batch)
        assert Refined(n_steps=1)(curved.eval().live(), batch).penalty is None
