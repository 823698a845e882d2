"""Inference gaps on probabilistic PCA, where every part is known."""

from __future__ import annotations

import pytest
import torch

import bayesae as bae
from bayesae.codes import Amortised, DiagonalLaw, Importance, Laplace, RankOneLaw, TriangularLaw, amortised
from bayesae.evaluation import inference_gaps, optimise
from bayesae.evaluation.gaps import SOURCES
from bayesae.evaluation.optimise import best_law
from bayesae.testing import LinearGaussian

N_DRAWS = 600
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("covariance", "rank_one")]


@pytest.fixture
def world():
    return LinearGaussian.make(n_data=12, correlation=0.3)


def poor(world, family="diagonal", shift=0.06):
    """A model whose encoder is off, in locations that depend on x, and in scales."""
    model = world.model(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for leaf in model.encoder.parameters():
            leaf += shift * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    return model


def kl_to_posterior(world, model, codes, x):
    law = codes.law(model.live(), bae.Batch(x))
    posterior = torch.distributions.MultivariateNormal(world.posterior_mean(x), world.covariance)
    own = torch.distributions.MultivariateNormal(law.loc[0], law.covariance()[0])
    return torch.distributions.kl_divergence(own, posterior).detach()


class TestLinearGaussian:
    def test_the_best_encoder_has_the_mean_field_gap_alone(self, world):
        options = {"codes": amortised, "proposal": Laplace(), "n_latent_draws": N_DRAWS, "seed": 0}
        gaps = inference_gaps(world.model("diagonal"), world.x, **options)
        torch.testing.assert_close(gaps.log_evidence[0], world.log_evidence(), rtol=0, atol=1e-9)
        assert bool((gaps.source == SOURCES.index("proposal")).all())
        assert float(((gaps.approximation - world.mean_field_gap) / gaps.approximation_error).abs().max()) < 4
        assert float(gaps.amortisation.abs().max()) < 2e-3

    def test_a_poor_encoder_adds_its_own_gap(self, world):
        model = poor(world)
        gaps = inference_gaps(model, world.x, codes=amortised, proposal=Laplace(), n_latent_draws=N_DRAWS, seed=0)
        expected = kl_to_posterior(world, model, amortised, world.x) - world.mean_field_gap
        error = (gaps.amortisation_error[0] ** 2 + 0.005**2).sqrt()  # rounds stop at gains of 1e-3
        assert float(expected.mean()) > 0.5
        assert float(((gaps.amortisation[0] - expected) / error).abs().max()) < 4
        assert float((gaps.amortisation >= 0).double().mean()) >= 0.95
        shift = (gaps.approximation - world.mean_field_gap) / (gaps.approximation_error**2 + 0.005**2).sqrt()
        assert float(shift.abs().max()) < 4

    def test_a_full_family_has_no_approximation_gap(self, world):
        codes = Amortised("full")
        model = poor(world, "full")
        gaps = inference_gaps(model, world.x, codes=codes, n_latent_draws=N_DRAWS, seed=0)
        assert float(gaps.approximation.abs().max()) < 5e-3
        expected = kl_to_posterior(world, model, codes, world.x)
        assert float((gaps.amortisation[0] - expected).abs().max()) < 0.01 + 4 * float(gaps.amortisation_error.max())
        assert bool((gaps.source == SOURCES.index("optimised")).all())

    @pytest.mark.slow
    def test_generalisation_is_the_difference_of_amortisation(self, world):
        model, other = poor(world), 2 * world.x[:7]
        options = {"codes": amortised, "proposal": Laplace(), "n_latent_draws": 200, "seed": 0}
        gaps = inference_gaps(model, other, train_x=world.x, **options)
        gap, error = gaps.generalisation()
        means = [kl_to_posterior(world, model, amortised, x).mean() for x in (other, world.x)]
        assert gap.shape == (1,) and float(gap) == pytest.approx(float(means[0] - means[1]), abs=0.05 * float(means[0]))
        amortisation = [gaps.amortisation[0], gaps.train.amortisation[0]]
        spread = sum(float(values.var()) / len(values) for values in amortisation)
        assert float(error) == pytest.approx(spread**0.5)
        alone = inference_gaps(model, world.x, **options)
        assert torch.equal(alone.amortised, gaps.train.amortised)
        assert "generalisation" in str(gaps) and "generalisation" not in str(alone)
        with pytest.raises(bae.errors.UnsupportedError, match="train_x"):
            alone.generalisation()

    def test_annealing_is_a_source(self, world, monkeypatch):
        monkeypatch.setattr(optimise, "_MAX_ROUNDS", 1)
        gaps = inference_gaps(
            world.model("diagonal"), world.x[:3], codes=amortised, n_annealing_steps=12, n_latent_draws=20, seed=0
        )
        z = (gaps.log_evidence[0] - world.log_evidence(world.x[:3])) / gaps.approximation_error[0]
        assert float(z.abs().max()) < 4
        assert bool((gaps.ess <= 20).all())

    def test_weight_draws_chunks_and_purity(self, world, monkeypatch):
        monkeypatch.setattr(optimise, "_MAX_ROUNDS", 2)
        model = poor(world)
        params = {k: torch.stack([v, v, 1.1 * v]) for k, v in bae.functional.parameters_of(model.network).items()}
        predictive = bae.Predictive(model, bae.families.Particles(params), amortised)
        state = torch.get_rng_state()
        one, other = (
            inference_gaps(predictive, world.x[:5], n_latent_draws=150, seed=1, chunk_size=size) for size in (None, 800)
        )
        assert torch.equal(state, torch.get_rng_state())
        assert one.log_evidence.shape == (3, 5)
        for name in ("log_evidence", "optimised", "amortised"):
            values, again = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(values, again, rtol=0, atol=1e-6)
            torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
            assert float((values[0] - values[2]).abs().min()) > 1e-4


class TestBestLaw:
    @pytest.mark.parametrize("kind", ["diagonal", "precision", *SLOW])
    def test_finds_the_closed_form_from_the_prior(self, kind):
        world = LinearGaussian.make(n_data=4, n_latents=2, noise_var=1.0)
        zeros = torch.zeros(1, 4, 2, dtype=torch.float64)
        eye = torch.eye(2, dtype=torch.float64).expand(1, 4, 2, 2)
        start = {
            "diagonal": DiagonalLaw(zeros, zeros),
            "covariance": TriangularLaw(zeros, eye),
            "precision": TriangularLaw(zeros, eye, is_precision=True),
            "rank_one": RankOneLaw(zeros, zeros, zeros + 0.1),
        }[kind]
        with bae.random.scope(0), torch.no_grad():
            law = best_law(world.model("diagonal").live(), world.batch, start)
        expected = torch.diag(1 / world.precision.diagonal()) if kind == "diagonal" else world.covariance
        kl = torch.distributions.kl_divergence(
            torch.distributions.MultivariateNormal(law.loc[0], law.covariance()[0]),
            torch.distributions.MultivariateNormal(world.posterior_mean(), expected),
        )
        assert float(kl.max()) < 3e-3
        assert type(law) is type(start) and not law.loc.requires_grad


class TestErrors:
    def test_codes_without_a_law(self, world):
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
            inference_gaps(world.model("diagonal"), world.x, codes=Importance(amortised, 2))
        with pytest.raises(bae.errors.UnsupportedError, match="deterministic"):
            inference_gaps(world.model("location"), world.x)

    def test_linearised_predictives(self, world):
        model = world.model("diagonal")
        params = {k: v[None] for k, v in bae.functional.parameters_of(model.network).items()}
        predictive = bae.Predictive(model, bae.families.Particles(params, is_linearised=True), amortised)
        with pytest.raises(bae.errors.UnsupportedError, match="linearised=False"):
            inference_gaps(predictive, world.x)
