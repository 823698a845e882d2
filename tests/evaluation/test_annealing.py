"""Annealed importance sampling on probabilistic PCA, and its Hamiltonian moves by themselves."""

from __future__ import annotations

import math

import pytest
import torch

import bayesae as bae
from bayesae.codes import Amortised, Laplace, amortised
from bayesae.evaluation import annealed_importance, log_evidence
from bayesae.evaluation.annealing import Annealing, _Slopes, _standard_law
from bayesae.testing import LinearGaussian

N_CHAINS = 24


@pytest.fixture
def world():
    return LinearGaussian.make(n_data=6, n_outputs=5, n_latents=2, noise_var=0.5)


def slopes_of(world):
    bound = world.model("diagonal").live()
    with torch.no_grad():
        return _Slopes(bound, world.batch, _standard_law(bound, world.batch))


class TestMoves:
    def test_ratio_and_slope_in_closed_form(self, world):
        z = torch.randn(3, 1, 6, 2, dtype=torch.float64)
        at, value, slope = slopes_of(world)(z)
        residual = world.x - z @ world.weight.mT - world.bias
        likelihood = -0.5 * (residual**2 / world.noise_var + math.log(2 * math.pi * world.noise_var)).sum(-1)
        torch.testing.assert_close(value, likelihood, rtol=0, atol=1e-10)
        torch.testing.assert_close(slope, residual @ world.weight / world.noise_var, rtol=0, atol=1e-10)
        assert torch.equal(at, z)

    def test_energy_is_kept_by_small_steps_to_second_order(self, world):
        slopes, annealing = slopes_of(world), Annealing(2, 8)
        state = slopes(torch.randn(50, 1, 6, 2, dtype=torch.float64))
        noise = torch.randn(50, 1, 6, 4, dtype=torch.float64)
        lost = []
        for length in (0.02, 0.01):
            _, accepted = annealing._move(slopes, state, 0.7, torch.full((1, 6), length, dtype=torch.float64), noise)
            lost.append(float((1 - accepted).mean()))
        assert 0 < lost[1] < lost[0] / 3

    @pytest.mark.parametrize("beta", [0.4, 1.0])
    def test_the_annealed_law_is_left_as_it_is(self, world, beta):
        """Steps long enough to refuse many: without the Metropolis rule the variance would move."""
        slopes, annealing, n = slopes_of(world), Annealing(2, 3), 4000
        precision = beta * world.weight.mT @ world.weight / world.noise_var + torch.eye(2, dtype=torch.float64)
        cov = torch.linalg.inv(precision)
        mean = beta * (world.x - world.bias) @ world.weight @ cov / world.noise_var
        factor = torch.linalg.cholesky(cov)
        z = mean + torch.randn(n, 1, 6, 2, dtype=torch.float64) @ factor.mT
        state, step = slopes(z), torch.full((1, 6), 0.55, dtype=torch.float64)
        for _ in range(5):
            state, accepted = annealing._move(slopes, state, beta, step, torch.randn(n, 1, 6, 4, dtype=torch.float64))
        assert 0.2 < float(accepted.mean()) < 0.95
        white = torch.linalg.solve_triangular(factor, (state[0] - mean)[..., None], upper=False)[..., 0]
        for moment, expected, spread in ((1, 0, 1), (2, 1, 2**0.5)):
            z_scores = ((white**moment).mean(0) - expected) * n**0.5 / spread
            assert float(z_scores.abs().max()) < 4
        torch.testing.assert_close(state[1], slopes(state[0])[1], rtol=0, atol=1e-12)

    def test_moves_that_leave_the_finite_numbers_are_refused(self, world):
        slopes = slopes_of(world)
        state = slopes(torch.randn(4, 1, 6, 2, dtype=torch.float64))
        step = torch.full((1, 6), 1e200, dtype=torch.float64)
        after, accepted = Annealing(2, 3)._move(slopes, state, 1.0, step, torch.randn(4, 1, 6, 4, dtype=torch.float64))
        assert torch.equal(after[0], state[0]) and float(accepted.max()) == 0


class TestEstimates:
    def test_from_the_posterior_every_weight_is_the_evidence(self, world):
        for codes in (Amortised("full"), Laplace()):
            found = annealed_importance(
                world.model(), world.x, start=codes, n_steps=5, n_chains=3, n_leapfrog=2, seed=0
            )
            torch.testing.assert_close(found.log_evidence[0], world.log_evidence(), rtol=0, atol=1e-9)
            torch.testing.assert_close(found.elbo[0], world.log_evidence(), rtol=0, atol=1e-9)

    def test_one_step_is_importance_sampling(self, world):
        model = world.model("diagonal")
        found = annealed_importance(model, world.x, start=amortised, n_steps=1, n_chains=400, seed=0)
        with bae.random.scope(0), bae.random.scope(bae.random.derived_seed(1)), torch.no_grad():
            draws = amortised(model.live(), world.batch, n_latent_draws=400)
        torch.testing.assert_close(found.log_evidence, draws.log_evidence(), rtol=0, atol=1e-10)
        assert bool(found.annealed.acceptance.isnan().all())

    @pytest.mark.parametrize("start", [None, amortised], ids=["prior", "amortised"])
    def test_is_the_evidence_within_its_error(self, world, start):
        options = {"n_steps": 30, "n_leapfrog": 4, "n_chains": N_CHAINS, "seed": 1}
        found = annealed_importance(world.model("diagonal"), world.x, start=start, **options)
        z = (found.log_evidence[0] - world.log_evidence()) / found.standard_error[0]
        assert float(z.abs().max()) < 4
        assert float(found.ess.min()) > N_CHAINS / 4
        assert 0.45 < float(found.annealed.acceptance.mean()) < 0.95

    def test_few_steps_are_unbiased(self, world):
        """Far from equilibrium, where only the mean weight is right and the mean log weight is not."""
        n = 20_000
        found = annealed_importance(world.model("diagonal"), world.x[:3], n_steps=4, n_leapfrog=2, n_chains=n, seed=0)
        truth = world.log_evidence(world.x[:3])
        assert float(((found.log_evidence[0] - truth) / found.standard_error[0]).abs().max()) < 4
        assert float(found.standard_error.max()) < 0.05
        assert bool((found.elbo[0] < truth - 0.3).all())

    def test_more_steps_are_better_than_as_many_draws(self, world):
        found = annealed_importance(
            world.model("diagonal"), world.x, n_steps=30, n_chains=N_CHAINS, n_leapfrog=3, seed=0
        )
        plain = annealed_importance(world.model("diagonal"), world.x, n_steps=1, n_chains=30 * N_CHAINS, seed=0)
        assert float(found.ess.mean()) / N_CHAINS > 3 * float(plain.ess.mean()) / plain.n_draws

    def test_masked_rows_and_chunks_and_weight_draws(self, world):
        observed = torch.tensor([True, False, True, True, True])
        x = torch.where(observed, world.x, torch.nan)
        model = world.model("diagonal")
        params = {k: torch.stack([v, v, 1.05 * v]) for k, v in bae.functional.parameters_of(model.network).items()}
        predictive = bae.Predictive(model, bae.families.Particles(params))
        options = {"n_steps": 12, "n_leapfrog": 3, "n_chains": N_CHAINS, "seed": 2}
        one, other = (
            annealed_importance(predictive, x, observed.expand_as(x), chunk_size=size, **options) for size in (None, 50)
        )
        torch.testing.assert_close(one.log_evidence, other.log_evidence, rtol=0, atol=1e-9)
        torch.testing.assert_close(one.annealed.step_size, other.annealed.step_size, rtol=0, atol=1e-9)
        torch.testing.assert_close(one.log_evidence[0], one.log_evidence[1], rtol=0, atol=1e-9)
        assert float((one.log_evidence[0] - one.log_evidence[2]).abs().min()) > 1e-6
        part = LinearGaussian(world.weight[observed], world.bias[observed], world.noise_var, world.x[:, observed])
        z = (one.log_evidence[0] - part.log_evidence()) / one.standard_error[0]
        assert float(z.abs().max()) < 4

    def test_step_sizes_do_not_depend_on_the_chains_that_count(self, world, monkeypatch):
        seen = []
        run = Annealing._run

        def spy(self, slopes, n_chains, steps):
            result = run(self, slopes, n_chains, steps)
            seen.append((steps, result))
            return result

        monkeypatch.setattr(Annealing, "_run", spy)
        annealed_importance(world.model("diagonal"), world.x, n_steps=6, n_chains=12, n_leapfrog=3, seed=0)
        (none, first), (steps, second) = seen
        assert none is None and all(torch.equal(a, b) for a, b in zip(steps, first[1], strict=True))
        assert len({float(step[0, 0]) for step in steps}) == 5
        assert not torch.equal(first[0], second[0])

    def test_single_precision_and_purity(self, world):
        model, state = world.model("diagonal").float(), torch.get_rng_state()
        before = bae.functional.parameters_of(model)
        options = {"n_steps": 10, "n_leapfrog": 2, "n_chains": N_CHAINS, "seed": 0}
        found = annealed_importance(model, world.x.float(), **options)
        again = annealed_importance(model, world.x.float(), **options)
        assert found.log_evidence.dtype == torch.float32 and torch.equal(found.log_evidence, again.log_evidence)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(before[name], leaf) and leaf.grad is None for name, leaf in model.named_parameters())


class TestErrors:
    def test_starts_without_a_law(self, world):
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
            annealed_importance(world.model("diagonal"), world.x, start=bae.codes.encode)

    def test_linearised_predictives(self, world):
        model = world.model("diagonal")
        params = {k: v[None] for k, v in bae.functional.parameters_of(model.network).items()}
        weights = bae.families.Particles(params, is_linearised=True)
        with pytest.raises(bae.errors.UnsupportedError, match="linearised=False"):
            annealed_importance(bae.Predictive(model, weights), world.x)

    @pytest.mark.parametrize("name", ["n_steps", "n_leapfrog", "n_chains"])
    def test_counts(self, world, name):
        with pytest.raises(bae.errors.DataError, match=name):
            annealed_importance(world.model(), world.x, **{name: 0})


def test_agrees_with_importance_sampling_on_a_curved_decoder():
    torch.manual_seed(0)
    decoder, encoder = bae.nets.mlp(2, [6], 5), bae.nets.mlp(5, [6], 2)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Bernoulli()).double().eval()
    x = (torch.rand(4, 5, dtype=torch.float64) < 0.5).double()
    plain = log_evidence(model, x, codes=Laplace(), n_latent_draws=2000, seed=0)
    found = annealed_importance(model, x, n_steps=20, n_leapfrog=3, n_chains=64, seed=0)
    error = (plain.standard_error**2 + found.standard_error**2).sqrt()
    assert float(((plain.log_evidence - found.log_evidence) / error).abs().max()) < 4
