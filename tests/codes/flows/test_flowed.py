"""A law pushed through a flow, as a code posterior: in `Draws`, in predictives, and while it trains."""

from __future__ import annotations

import pickle

import pytest
import torch

import bayesae as bae
from bayesae import codes
from bayesae.testing import LinearGaussian
from tests.codes.flows.cases import AUTOREGRESSIVE, ELEMENTARY, FLOWS, draws_of, params_of, widened
from tests.conftest import small_model

every = pytest.mark.parametrize("case", FLOWS, ids=str)
OURS = [*ELEMENTARY, *AUTOREGRESSIVE]


@pytest.fixture
def world():
    return LinearGaussian.make(correlation=0.5)


def model_for(flow, z=2, dtype=torch.float64):
    torch.manual_seed(5)
    plain = small_model(z=z)
    encoder = bae.nets.mlp(7, [6], (z, 2 + flow.n_parameters)).double()
    return bae.Autoencoder(encoder, plain.decoder, plain.likelihood).to(dtype).eval()


@every
class TestDraws:
    def test_the_density_is_that_of_the_start_less_the_stretch(self, world, case):
        """By a loop over the codes of every draw and row: noise, law, flow, Jacobian."""
        flow = case.flow(3)
        model = widened(world.model("diagonal"), flow.n_parameters)
        draws = draws_of(model, codes.Flowed(codes.amortised, flow), world.batch, 4)
        with bae.random.scope(0):
            unit = codes.base.noise(model.at(params_of(model)), world.batch, 4, 3, world.x[None])
        numbers = model.encoder(world.x).detach()
        for k in range(4):
            for b in range(0, len(world.x), 7):
                mean, log_scale = numbers[b, :, 0], numbers[b, :, 1]
                start = mean + log_scale.exp() * unit[k, 0, b]

                def move(z, b=b):
                    return flow(z[None, None, None], numbers[None, b : b + 1, :, 2:])[0][0, 0, 0]

                stretch = torch.linalg.slogdet(torch.func.jacrev(move)(start))[1]
                log_q = torch.distributions.Normal(mean, log_scale.exp()).log_prob(start).sum() - stretch
                torch.testing.assert_close(draws.latents[k, 0, b], move(start).detach(), rtol=0, atol=1e-12)
                torch.testing.assert_close(draws.log_q[k, 0, b], log_q.detach(), rtol=0, atol=1e-10)

    def test_the_kl_of_each_dimension_adds_up(self, world, case):
        flow = case.flow(3)
        model = widened(world.model("diagonal"), flow.n_parameters)
        draws = draws_of(model, codes.Flowed(codes.amortised, flow), world.batch, 4)
        assert (draws.kl is not None) == case.splits
        torch.testing.assert_close(bae.objectives.elbo(draws), draws.log_ratio.mean(0), rtol=0, atol=1e-10)
        if case.splits:
            assert draws.kl.shape == (1, len(world.x), 3)
            torch.testing.assert_close(draws.kl.sum(-1), (draws.log_q - draws.log_prior).mean(0), rtol=0, atol=1e-10)

    def test_no_bound_is_above_the_evidence(self, world, case):
        flow = case.flow(3)
        model = widened(world.model("diagonal"), flow.n_parameters, scale=0.2)
        draws = draws_of(model, codes.Flowed(codes.amortised, flow), world.batch, 300)
        error = draws.log_ratio.std(0)[0] / 300**0.5
        assert bool((bae.objectives.elbo(draws)[0] - world.log_evidence() < 4 * error).all())

    def test_weight_draws_are_one_axis(self, case):
        flow = case.flow(2)
        model, batch = model_for(flow), bae.Batch(torch.rand(4, 7).double())
        params, posterior = params_of(model, 3, 0.3), codes.Flowed(codes.amortised, flow)
        draws = draws_of(model, posterior, batch, 5, params=params)
        assert draws.latents.shape == (5, 3, 4, 2) and draws.log_ratio.shape == (5, 3, 4)
        assert draws.kl is None or draws.kl.shape == (3, 4, 2)
        for s in range(3):
            one = {name: leaf[s : s + 1] for name, leaf in params.items()}
            alone = draws_of(model, posterior, batch, 5, params=one)
            torch.testing.assert_close(alone.log_ratio, draws.log_ratio[:, s : s + 1], rtol=0, atol=1e-10)

    def test_gradients_reach_all_weights(self, case):
        flow = case.flow(2)
        model = model_for(flow).train()
        posterior = codes.Flowed(codes.amortised, flow)
        draws = posterior(model.live(), bae.Batch(torch.rand(9, 7).double()), n_latent_draws=2)
        bae.objectives.elbo(draws).sum().backward()
        networks = codes.modules_of(posterior)
        assert len(networks) == (0 if case in ELEMENTARY else 1)
        for leaf in [*model.parameters(), *networks.parameters()]:
            assert leaf.grad is not None and bool((leaf.grad != 0).any())

    def test_float32_seeds_and_pickles(self, case):
        flow = case.flow(2, torch.float32)
        model, batch = model_for(flow, dtype=torch.float32), bae.Batch(torch.rand(4, 7))
        posterior = codes.Flowed(codes.amortised, flow)
        draws = draws_of(model, posterior, batch, 5)
        assert draws.log_q.dtype == draws.latents.dtype == torch.float32
        again = draws_of(model, pickle.loads(pickle.dumps(posterior)), batch, 5)
        other = draws_of(model, posterior, batch, 5, seed=1)
        assert torch.equal(draws.log_q, again.log_q) and not torch.equal(draws.log_q, other.log_q)


class TestParts:
    def test_a_law_that_does_not_split_has_no_kl(self, world):
        flow = codes.AutoregressiveFlow(3, n_context=0).double()
        draws = draws_of(world.model("full"), codes.Flowed(codes.Amortised("full"), flow), world.batch, 2)
        assert draws.kl is None

    def test_the_identity_has_the_laws_own_kl_in_the_mean(self, world):
        """Of each dimension, to within four standard errors."""
        model, n = world.model("diagonal"), 4000
        flow = codes.AutoregressiveFlow(3, 1, (), 0, is_volume_preserving=True).double()
        with torch.no_grad():
            flow.steps[0].direct.weight.zero_()
        draws = draws_of(model, codes.Flowed(codes.amortised, flow), world.batch, n)
        law = codes.amortised.law(model.at(params_of(model)), world.batch)
        normal = torch.distributions.Normal
        parts = normal(law.loc, law.log_scale.exp()).log_prob(draws.latents) - normal(0, 1).log_prob(draws.latents)
        torch.testing.assert_close(draws.kl, parts.mean(0), rtol=0, atol=1e-10)
        assert bool(((draws.kl - law.kl()).abs() < 4.5 * parts.std(0) / n**0.5).all())

    @pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
    def test_free_bits_are_of_each_dimension(self, world, case):
        flow = case.flow(3)
        model = widened(world.model("diagonal"), flow.n_parameters)
        draws = draws_of(model, codes.Flowed(codes.amortised, flow), world.batch, 4)
        means = draws.kl.mean(1)[0].sort().values
        free = float(means[:2].mean())  # one dimension is below, two are above
        value = bae.objectives.ELBO(free_bits=free)(draws).mean()
        expected = draws.log_likelihood.mean() - free - means[1:].sum()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


class TestPredictive:
    @pytest.mark.parametrize("case", OURS, ids=str)
    def test_particles(self, rows, case):
        flow = case.flow(2)
        model, posterior = model_for(flow), codes.Flowed(codes.amortised, flow)
        predictive = bae.Predictive(model, bae.families.Particles(params_of(model, 2, 0.1)), codes=posterior)
        draws = predictive(rows, n_latent_draws=3, seed=0)
        assert draws.log_ratio.shape == (3, 2, 9)
        in_chunks = predictive(rows, n_latent_draws=3, seed=0, chunk_size=12)
        torch.testing.assert_close(in_chunks.log_ratio, draws.log_ratio, rtol=0, atol=1e-10)
        assert (in_chunks.kl is None) == (draws.kl is None) == (not case.splits)
        moments = predictive.moments(rows, n_latent_draws=3, seed=0)
        assert bool((moments.code > 0).all()) and bool((moments.weights > 0).all())

    @pytest.mark.parametrize("case", OURS, ids=str)
    def test_a_linearised_normal(self, rows, case):
        flow = case.flow(2)
        self.check_linearised(rows, model_for(flow), codes.Flowed(codes.amortised, flow))

    def test_linearised_hamiltonian_codes(self, rows):
        plain = codes.AutoregressiveFlow(2, n_context=0)
        posterior = codes.Hamiltonian(codes.amortised, codes.Leapfrog(2, 2, step_size=0.05).double())
        self.check_linearised(rows, model_for(plain), posterior)

    @staticmethod
    def check_linearised(rows, model, posterior):
        """Small spreads of the weights: the first order is all there is, draw by draw."""
        subset = bae.Subset.of(model.network)
        mean = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
        results = {}
        for is_linearised in (True, False):
            var = torch.full((len(subset),), 1e-8, dtype=torch.float64)
            weights = bae.families.DiagonalNormal(mean, var, subset, is_linearised=is_linearised)
            predictive = bae.Predictive(model, weights, codes=posterior)
            results[is_linearised] = predictive(rows, n_weight_draws=4, n_latent_draws=3, seed=0)
        at_mean = draws_of(model, posterior, bae.Batch(rows), 3)
        shift = (results[False].latents - at_mean.latents).abs().max()
        for name in ("latents", "log_q"):
            first, full = (getattr(results[key], name) for key in (True, False))
            assert float((first - full).abs().max()) < 1e-5
            assert float((full - getattr(at_mean, name)).abs().max()) > 1e-4
        assert float((results[True].latents - results[False].latents).abs().max()) < 0.01 * float(shift)


class Killed(BaseException):
    pass


class TestTraining:
    def test_a_killed_run_goes_on_to_the_same_bits(self, rows, tmp_path):
        def run(path=None, kill_at=None):
            torch.manual_seed(1)
            flow = codes.AutoregressiveFlow(2, 2, (4,)).double()
            model, n_steps = model_for(flow), 0
            before = flow.steps[0].direct.weight.detach().clone()

            def objective(draws):
                nonlocal n_steps
                n_steps += 1
                if n_steps == kill_at:
                    raise Killed
                return bae.objectives.elbo(draws)

            objective.__qualname__ = "objective"  # a name of its own: what it counts is no argument
            settings = {"epochs": 3, "batch_size": 4, "seed": 0, "objective": objective, "n_latent_draws": 2}
            settings["checkpoint_every"] = None if path is None else 1
            bae.fit_model(model, rows, codes=codes.Flowed(codes.amortised, flow), checkpoint=path, **settings)
            assert not torch.equal(before, flow.steps[0].direct.weight)
            return {**model.state_dict(), **flow.state_dict()}

        plain = run()
        with pytest.raises(Killed):
            run(tmp_path / "a", 6)
        again = run(tmp_path / "a")
        assert all(torch.equal(plain[name], again[name]) for name in plain if "extra" not in name)

    def test_another_flow_is_another_run(self, rows, tmp_path):
        for first, second in (
            (codes.Planar(1), codes.Radial(1)),
            *((codes.AutoregressiveFlow(2, n, ()).double() for n in (1, 2)),),
        ):
            path = tmp_path / type(second).__name__
            settings = {"objective": bae.objectives.elbo, "epochs": 1, "seed": 0, "checkpoint": path}
            bae.fit_model(model_for(first), rows, codes=codes.Flowed(codes.amortised, first), **settings)
            with pytest.raises(bae.errors.FileError, match="codes"):
                bae.fit_model(model_for(second), rows, codes=codes.Flowed(codes.amortised, second), **settings)

    def test_one_linear_step_closes_the_mean_field_gap(self):
        check_gap(LinearGaussian.make(correlation=0.9, n_data=60, noise_var=2.0), epochs=120, rate=0.1, gap=1.1)

    @pytest.mark.slow
    def test_one_linear_step_closes_a_wide_gap(self):
        sizes = {"n_latents": 8, "n_outputs": 40, "n_data": 100}
        check_gap(LinearGaussian.make(correlation=0.85, noise_var=15.0, **sizes), epochs=800, rate=0.02, gap=2.3)


def check_gap(world, *, epochs, rate, gap):
    """Of a decoder that stays as it is, evidence less bound: that of a diagonal Normal, and with a step after it."""
    assert world.mean_field_gap > gap
    for is_flowed in (False, True):
        torch.manual_seed(0)
        flow = codes.AutoregressiveFlow(world.n_latents, 1, (), 0, is_volume_preserving=True).double()
        posterior = codes.Flowed(codes.amortised, flow) if is_flowed else codes.amortised
        model = world.model("diagonal")
        with torch.no_grad():  # not from the answer
            model.encoder[0].bias.zero_()
        model.decoder.requires_grad_(False)
        settings = {"objective": bae.objectives.elbo, "n_latent_draws": 4, "schedule": "cosine", "batch_size": 1000}
        settings |= {"weight_prior": bae.joint.IsotropicNormal(1e-12), "learning_rate": rate, "epochs": epochs}
        bae.fit_model(model, world.x, codes=posterior, seed=0, **settings)
        draws = draws_of(model, posterior, world.batch, 500)
        lost = float((world.log_evidence() - draws.log_ratio.mean(0)[0]).mean())
        assert lost < 0.05 if is_flowed else lost > world.mean_field_gap - 0.03


class TestErrors:
    @pytest.mark.parametrize("case", OURS, ids=str)
    def test_gradients_of_paths(self, case):
        with pytest.raises(bae.errors.UnsupportedError, match="inverse"):
            codes.Flowed(codes.Amortised(gradient="path"), case.flow())

    def test_encoders_with_other_numbers(self, world):
        with pytest.raises(bae.errors.ShapeError, match=r"8 numbers for each of 3 code dimensions, the flow's 6 last"):
            draws_of(world.model("diagonal"), codes.Flowed(codes.amortised, codes.Planar(2)), world.batch, 1)
        assert codes.Flowed(codes.amortised, codes.Planar(2)).n_parameters(3) == 8

    def test_flows_in_another_dtype(self, world):
        flow = codes.AutoregressiveFlow(3, n_context=0)
        with pytest.raises(bae.errors.ShapeError, match=r"float64.*float32"):
            draws_of(world.model("diagonal"), codes.Flowed(codes.amortised, flow), world.batch, 1)

    def test_there_is_no_normal_to_ask_for(self, world):
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
            codes.law_of(codes.Flowed(codes.amortised, codes.Planar()), world.model().live(), world.batch)
