"""Regularisers around code posteriors: what they change while fitting, and that they change nothing afterwards."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae.codes import Amortised, Consistent, Perturbed, Refined, amortised, kl_between, law_of
from bayesae.codes.laws import without_gradient
from bayesae.testing import LinearGaussian
from bayesae.training.identity import describe

F64 = {"dtype": torch.float64}


def halve(x):
    return 0.5 * x


@pytest.fixture
def model():
    torch.manual_seed(2)
    encoder, decoder = bae.nets.mlp(5, [4], (3, 2)), bae.nets.mlp(3, [6], 5)
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.5)).double().eval()


@pytest.fixture
def batch():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), **F64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 2:4] = False
    return bae.Batch(torch.where(mask, x, 0), mask=mask, index=torch.tensor([7, 3, 0, 12]))


def bound(model, *, is_fitting, n=2):
    leaves = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    params = {k: v + 0.1 * torch.randn(n, *v.shape, generator=generator, **F64) for k, v in leaves.items()}
    return model.at(params, is_fitting=is_fitting)


def run(codes, bound, batch, n=3, seed=0):
    with bae.random.scope(seed):
        return codes(bound, batch, n_latent_draws=n)


@dataclass(frozen=True)
class Spy:
    """Keeps the batches that an amortised code was given."""

    seen: list

    def law(self, model, batch):
        self.seen.append(batch)
        return amortised.law(model, batch)

    def __call__(self, model, batch, *, n_latent_draws=1):
        self.seen.append(batch)
        return amortised(model, batch, n_latent_draws=n_latent_draws)


@pytest.mark.parametrize("inner", [amortised, Amortised(gradient="path"), Refined(n_steps=2)], ids=str)
@pytest.mark.parametrize("wrap", [lambda c: Perturbed(c, 0.5), lambda c: Consistent(c, halve, 3.0)], ids=["p", "c"])
def test_where_nothing_is_fitted_it_is_the_inner_code(wrap, inner, model, batch):
    at = bound(model, is_fitting=False)
    draws, plain = (run(codes, at, batch) for codes in (wrap(inner), inner))
    assert draws.latents.shape == (3, 2, 4, 3) and draws.penalty is None
    for name in ("latents", "log_likelihood", "log_q", "kl", "is_path_gradient"):
        one, other = getattr(draws, name), getattr(plain, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    with bae.random.scope(0):
        assert torch.equal(law_of(wrap(inner), at, batch).loc, law_of(inner, at, batch).loc)


class TestPerturbed:
    def test_the_encoder_sees_noise_and_the_clean_row_is_scored(self, model, batch):
        spy = Spy([])
        many = bae.Batch(batch.x.repeat(3000, 1), batch.mask.repeat(3000, 1))
        draws = run(Perturbed(spy, 0.7), bound(model, is_fitting=True), many, n=1)
        (seen,) = spy.seen
        noise = (seen.x - many.x)[many.mask]
        assert abs(float(noise.mean())) < 4 * 0.7 / len(noise) ** 0.5
        assert abs(float(noise.std()) - 0.7) < 4 * 0.7 / (2 * len(noise)) ** 0.5
        assert bool((seen.x[~many.mask] == 0).all())
        assert seen.target is many.x and seen.mask is many.mask
        outputs = draws.outputs
        normal = torch.distributions.Normal(outputs, 0.5)
        expected = (normal.log_prob(many.x) * many.mask).sum(-1)
        torch.testing.assert_close(draws.log_likelihood, expected)

    def test_the_location_moves_as_the_encoder_moves_noise(self, batch):
        """Of a linear encoder its variance is that of W (s e)."""
        world = LinearGaussian.make()
        model = world.model("diagonal")
        many = bae.Batch(world.x[:1].expand(40_000, -1))
        with torch.no_grad():
            law = Perturbed(amortised, 0.7).law(model.train().live(), many)
        weight = model.encoder[0].weight.detach().reshape(3, 2, -1)[:, 0]
        expected = 0.49 * weight @ weight.mT
        torch.testing.assert_close(law.loc[0].mT.cov(), expected, rtol=0, atol=5 * float(expected.max()) * 2**0.5 / 200)

    def test_a_target_of_its_own_stays(self, model, batch):
        spy, target = Spy([]), torch.ones_like(batch.x)
        run(Perturbed(spy, 0.7), bound(model, is_fitting=True), batch._replace(target=target))
        assert spy.seen[0].target is target

    def test_training_draws_noise_anew_and_the_model_is_fitted(self, model):
        spy = Spy([])
        kwargs = {"objective": bae.objectives.elbo, "codes": Perturbed(spy, 0.3), "progress": False, "seed": 0}
        bae.fit_model(model, torch.randn(8, 5, **F64), epochs=2, batch_size=8, **kwargs)
        first, second = (batch.x.sort(0).values for batch in spy.seen[:2])
        assert not torch.allclose(first, second)


class TestConsistent:
    def test_the_penalty_is_the_weighted_divergence_of_the_two_laws(self, model, batch):
        at = bound(model, is_fitting=True)
        draws = run(Consistent(amortised, halve, 2.5), at, batch)
        p, q = amortised.law(at, batch._replace(x=0.5 * batch.x)), amortised.law(at, batch)
        twins = [torch.distributions.Normal(law.loc, law.log_scale.exp()) for law in (p, q)]
        expected = 2.5 * torch.distributions.kl_divergence(*twins).sum(-1)
        assert draws.penalty.shape == (2, 4)
        torch.testing.assert_close(draws.penalty, expected, rtol=0, atol=1e-10)
        assert torch.equal(draws.latents, run(amortised, at, batch).latents)

    def test_gradients_go_to_both_laws(self, model, batch):
        leaves = list(model.encoder.parameters())

        def gradient(hold_p=False, hold_q=False):
            p, q = (amortised.law(model.live(), b) for b in (batch._replace(x=0.5 * batch.x), batch))
            p, q = (without_gradient(law) if held else law for law, held in ((p, hold_p), (q, hold_q)))
            return torch.autograd.grad(kl_between(p, q).sum(), leaves)

        model.train()
        found = torch.autograd.grad(run(Consistent(amortised, halve), model.live(), batch).penalty.sum(), leaves)
        for whole, one, other in zip(found, gradient(hold_p=True), gradient(hold_q=True), strict=True):
            torch.testing.assert_close(whole, one + other, rtol=0, atol=1e-10)
            assert float(one.abs().max()) > 0 and float(other.abs().max()) > 0

    def test_masked_entries_stay_0_and_targets_stay(self, model, batch):
        spy = Spy([])
        run(Consistent(spy, lambda x: x + 1), bound(model, is_fitting=True), batch)
        moved = [seen for seen in spy.seen if seen is not batch]
        assert len(moved) == 1 and torch.equal(moved[0].x, torch.where(batch.mask, batch.x + 1, 0))
        assert moved[0].target is batch.x

    def test_training_makes_the_laws_agree(self, model):
        x = torch.randn(32, 5, **F64)
        state = {name: leaf.clone() for name, leaf in model.state_dict().items()}
        kwargs = {"objective": bae.objectives.elbo, "learning_rate": 0.02, "progress": False, "seed": 0}
        divergences = []
        for weight in (0.0, 30.0):
            model.load_state_dict(state)
            bae.fit_model(model, x, epochs=30, codes=Consistent(amortised, halve, weight), **kwargs)
            with torch.no_grad():
                laws = [amortised.law(model.live(), bae.Batch(rows)) for rows in (0.5 * x, x)]
            divergences.append(float(kl_between(*laws).mean()))
        assert divergences[1] < 0.1 * divergences[0]

    def test_penalties_add(self, model, batch):
        at = bound(model, is_fitting=True)
        one, other = (Consistent(amortised, t, w) for t, w in ((halve, 2.0), (torch.tanh, 3.0)))
        both = run(Consistent(one, torch.tanh, 3.0), at, batch).penalty
        torch.testing.assert_close(both, run(one, at, batch).penalty + run(other, at, batch).penalty)

    def test_a_full_normal_goes_by_the_general_formula(self, batch):
        torch.manual_seed(0)
        encoder = bae.nets.mlp(5, [4], (3, 4))
        model = bae.Autoencoder(encoder, bae.nets.mlp(3, [6], 5), bae.likelihoods.Gaussian(0.5)).double()
        full = Amortised("full")
        at = bound(model, is_fitting=True)
        laws = [full.law(at, rows) for rows in (batch._replace(x=0.5 * batch.x), batch)]
        twins = [torch.distributions.MultivariateNormal(law.loc, law.covariance()) for law in laws]
        penalty = run(Consistent(full, halve), at, batch).penalty
        torch.testing.assert_close(penalty, torch.distributions.kl_divergence(*twins), rtol=0, atol=1e-10)


@dataclass(frozen=True)
class WithNetwork:
    shift: nn.Module

    def law(self, model, batch):
        law = amortised.law(model, batch)
        return replace(law, loc=self.shift(law.loc))

    def __call__(self, model, batch, *, n_latent_draws=1):
        return amortised(model, batch, n_latent_draws=n_latent_draws)


def test_networks_inside_are_found():
    net = nn.Linear(3, 3)
    for codes in (Perturbed(WithNetwork(net), 0.1), Consistent(WithNetwork(net), halve), Refined(WithNetwork(net))):
        assert list(bae.codes.modules_of(codes)) == [net]
        assert list(bae.codes.modules_of(Perturbed(codes, 0.1))) == [net]


@pytest.mark.parametrize("is_linearised", [False, True])
def test_predictives_take_them(model, batch, is_linearised):
    mean = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
    var = torch.full((sum(leaf.numel() for leaf in mean.values()),), 1e-2, **F64)
    normal = bae.families.DiagonalNormal(mean, var, bae.Subset.of(model.network), is_linearised=is_linearised)
    particles = bae.families.Particles({k: torch.stack([v, 1.1 * v, 0.9 * v]) for k, v in mean.items()})
    codes = Consistent(Perturbed(amortised, 0.5), halve)
    for weights in (normal, particles):
        one, other = (
            bae.Predictive(model, weights, c)(batch.x, n_weight_draws=3, n_latent_draws=2, seed=0)
            for c in (codes, amortised)
        )
        assert one.latents.shape == (2, 3, 4, 3) and torch.equal(one.log_likelihood, other.log_likelihood)


def test_they_pickle_and_describe_themselves():
    several = [
        Perturbed(amortised, 0.1),
        Perturbed(amortised, 0.2),
        Perturbed(Amortised("full"), 0.1),
        Consistent(amortised, halve),
        Consistent(amortised, torch.tanh),
        Consistent(amortised, halve, 2.0),
        Consistent(Perturbed(amortised, 0.1), halve),
    ]
    assert [pickle.loads(pickle.dumps(codes)) for codes in several] == several
    assert len({describe(codes) for codes in several}) == len(several)


class TestErrors:
    def test_bad_arguments(self):
        with pytest.raises(bae.errors.UnsupportedError, match="inner"):
            Perturbed("amortised", 0.1)
        with pytest.raises(bae.errors.UnsupportedError, match="inner"):
            Consistent(None, halve)
        with pytest.raises(bae.errors.UnsupportedError, match="transform"):
            Consistent(amortised, 3.0)
        for bad in (-0.1, float("nan"), float("inf"), "1", True):
            with pytest.raises(bae.errors.DataError, match="scale"):
                Perturbed(amortised, bad)
            with pytest.raises(bae.errors.DataError, match="weight"):
                Consistent(amortised, halve, bad)

    def test_a_transform_of_another_shape(self, model, batch):
        with pytest.raises(bae.errors.ShapeError, match="transformed rows"):
            run(Consistent(amortised, lambda x: x[:, :3]), bound(model, is_fitting=True), batch)

    def test_a_code_without_a_law(self, model, batch):
        with pytest.raises(bae.errors.UnsupportedError, match="Normal code posterior"):
            run(Consistent(bae.codes.encode, halve), bound(model, is_fitting=True), batch, n=1)
        with pytest.raises(bae.errors.UnsupportedError, match="Normal code posterior"):
            Perturbed(bae.codes.encode, 0.1).law(bound(model, is_fitting=True), batch)
