"""Hamiltonian codes: the map keeps volume, can be run back, and weighs its draws rightly."""

from __future__ import annotations

import pickle

import pytest
import torch

import bayesae as bae
from bayesae import codes
from bayesae.testing import LinearGaussian
from tests.codes.flows.cases import draws_of, params_of
from tests.conftest import small_model


@pytest.fixture
def world():
    return LinearGaussian.make(correlation=0.8)


def leapfrog(z=3, n_steps=3, step_size=0.1, temperature=2.0):
    made = codes.Leapfrog(z, n_steps, step_size=step_size, temperature=temperature).double()
    with torch.no_grad():
        made.log_step_size += torch.linspace(-0.3, 0.3, z)
    return made


def force_of(z):
    return torch.func.grad(lambda code: (-0.5 * code**2 + torch.sin(code.roll(1, -1) * code)).sum())(z)


class TestLeapfrog:
    @pytest.mark.parametrize("temperature", [1.0, 3.0, 0.4])
    def test_its_determinant_is_one(self, temperature):
        dynamics, state = leapfrog(temperature=temperature), torch.randn(6, dtype=torch.float64)

        def move(both):
            return torch.cat(dynamics(*both.chunk(2), force_of))

        jacobian = torch.func.jacrev(move)(state)
        assert not torch.allclose(jacobian, torch.eye(6, dtype=torch.float64), atol=0.1)
        torch.testing.assert_close(torch.linalg.det(jacobian).detach(), torch.tensor(1.0).double(), rtol=0, atol=1e-10)

    def test_it_can_be_run_back(self):
        dynamics, (z, momentum) = leapfrog(temperature=1.0), torch.randn(2, 4, 3, dtype=torch.float64)
        later, fast = dynamics(z, momentum, force_of)
        again, back = dynamics(later, -fast, force_of)
        torch.testing.assert_close(again, z, rtol=0, atol=1e-12)
        torch.testing.assert_close(back, -momentum, rtol=0, atol=1e-12)
        assert not torch.allclose(later, z, atol=0.05)

    def test_energy_is_kept_in_the_limit_of_small_steps(self):
        z, momentum = torch.randn(2, 1, 3, dtype=torch.float64)

        def energy(code, fast):
            return float(0.5 * fast.pow(2).sum() + 0.5 * code.pow(2).sum() - torch.sin(code.roll(1, -1) * code).sum())

        errors = []
        for n_steps in (10, 20):  # over one and the same time
            dynamics = codes.Leapfrog(3, n_steps, step_size=1 / n_steps).double()
            later = dynamics(z, momentum, force_of)
            errors.append(abs(energy(*(part.detach() for part in later)) - energy(z, momentum)))
        assert errors[0] > 1e-5 and 3 < errors[0] / errors[1] < 5

    def test_tempering_ends_at_one(self):
        """The momentum's factors undo the first one: without a force it ends as it was drawn."""
        dynamics, momentum = leapfrog(temperature=5.0), torch.randn(4, 3, dtype=torch.float64)
        _, later = dynamics(torch.zeros(4, 3).double(), momentum, torch.zeros_like)
        torch.testing.assert_close(later.detach(), momentum, rtol=0, atol=1e-12)

    def test_its_numbers(self):
        with pytest.raises(bae.errors.DataError, match="step_size"):
            codes.Leapfrog(3, step_size=0.0)
        with pytest.raises(bae.errors.DataError, match="temperature"):
            codes.Leapfrog(3, temperature=-1.0)
        with pytest.raises(bae.errors.DataError, match="n_steps"):
            codes.Leapfrog(3, 0)
        assert repr(codes.Leapfrog(3, 2)) != repr(codes.Leapfrog(3, 4))


class TestHamiltonian:
    def test_its_weights_have_the_evidence_as_their_mean(self):
        world, n = LinearGaussian.make(correlation=0.2, noise_var=2.0), 4000
        model = world.model("diagonal")
        with torch.no_grad():  # a start that is wide enough for its weights to have a variance
            model.encoder[0].bias.view(3, 2)[:, 1] += 0.5
        dynamics = leapfrog(n_steps=4, step_size=0.15, temperature=1.5)
        draws = draws_of(model, codes.Hamiltonian(codes.amortised, dynamics), world.batch, n)
        weights = torch.exp(draws.log_ratio[:, 0] - world.log_evidence())
        error = weights.std(0) / n**0.5
        assert 0.002 < float(error.min()) and float(error.max()) < 0.05
        assert bool(((weights.mean(0) - 1).abs() < 4 * error).all())

    def test_dynamics_beat_the_law_that_they_start_from(self, world):
        """With a start far too wide, the bound rises by nats and stays below the evidence."""
        model = world.model("diagonal")
        with torch.no_grad():
            model.encoder[0].bias.view(3, 2)[:, 1] += 1.0
        plain = draws_of(model, codes.amortised, world.batch, 400).log_ratio.mean(0)
        dynamics = leapfrog(n_steps=8, temperature=4.0)
        moved = draws_of(model, codes.Hamiltonian(codes.amortised, dynamics), world.batch, 400).log_ratio.mean(0)
        assert float((moved - plain).mean()) > 1
        assert float((moved[0] - world.log_evidence()).mean()) < 0

    def test_no_time_leaves_the_law(self, world):
        """Steps of no length: the start's codes, and its density."""
        model = world.model("full")
        dynamics = leapfrog(step_size=1e-12)
        draws = draws_of(model, codes.Hamiltonian(codes.Amortised("full"), dynamics), world.batch, 3)
        torch.testing.assert_close(draws.log_ratio, world.log_evidence().expand(3, 1, -1), rtol=0, atol=1e-9)

    def test_the_force_is_the_gradient_of_the_joint(self, world):
        """A loop over codes, by the world's own formulas."""
        model, posterior = world.model("diagonal"), codes.Hamiltonian(codes.amortised, leapfrog(n_steps=1))
        draws = draws_of(model, posterior, world.batch, 2, seed=3)
        still = codes.Hamiltonian(codes.amortised, leapfrog(n_steps=1, step_size=1e-13))
        start = draws_of(model, still, world.batch, 2, seed=3)
        step, hot = posterior.leapfrog.log_step_size.exp().detach(), 2.0**0.5
        with bae.random.scope(3):
            unit = codes.base.noise(model.at(params_of(model)), world.batch, 2, 6, start.latents[0])[..., 3:]
        mean = world.posterior_mean()
        for k in range(2):
            for b in range(0, len(world.x), 7):
                z = start.latents[k, 0, b]
                pull = -world.precision @ (z - mean[b])
                half = hot * unit[k, 0, b] + 0.5 * step * pull
                torch.testing.assert_close(draws.latents[k, 0, b], z + step * half, rtol=0, atol=1e-9)

    def test_gradients_flow(self, world):
        model = world.model("diagonal").train()
        dynamics = leapfrog()
        draws = codes.Hamiltonian(codes.amortised, dynamics)(model.live(), world.batch, n_latent_draws=2)
        draws.log_ratio.mean().backward()
        for leaf in [*dynamics.parameters(), *model.parameters()]:
            assert leaf.grad is not None and bool((leaf.grad != 0).all())

    def test_the_gradient_through_the_dynamics_is_that_of_differences(self, world):
        model, dynamics = world.model("diagonal"), leapfrog()
        posterior = codes.Hamiltonian(codes.amortised, dynamics)

        def value():
            with bae.random.scope(1):
                return posterior(model.live(), world.batch, n_latent_draws=2).log_ratio.mean()

        (slope,) = torch.autograd.grad(value(), dynamics.log_temperature)
        values = []
        for shift in (1e-4, -2e-4):
            with torch.no_grad():
                dynamics.log_temperature += shift
                values.append(float(value()))
        assert abs((values[0] - values[1]) / 2e-4 - float(slope)) < 1e-6

    def test_weight_draws_are_one_axis(self):
        model = small_model(z=2)
        wide = bae.Autoencoder(bae.nets.mlp(7, [5], (2, 2)).double(), model.decoder, model.likelihood).eval()
        params, batch = params_of(wide, 3, 0.3), bae.Batch(torch.rand(4, 7).double())
        posterior = codes.Hamiltonian(codes.amortised, leapfrog(2))
        draws = draws_of(wide, posterior, batch, 5, params=params)
        assert draws.latents.shape == (5, 3, 4, 2) and draws.log_ratio.shape == (5, 3, 4)
        for s in range(3):
            alone = draws_of(wide, posterior, batch, 5, params={name: leaf[s : s + 1] for name, leaf in params.items()})
            torch.testing.assert_close(alone.log_ratio, draws.log_ratio[:, s : s + 1], rtol=0, atol=1e-9)

    def test_it_trains(self, world):
        model = world.model("diagonal")
        model.decoder.requires_grad_(False)
        dynamics = codes.Leapfrog(3, 3, step_size=0.01).double()
        before = dynamics.log_step_size.detach().clone()
        settings = {"objective": bae.objectives.elbo, "epochs": 3, "batch_size": 10, "learning_rate": 0.05, "seed": 0}
        bae.fit_model(model, world.x, codes=codes.Hamiltonian(codes.amortised, dynamics), **settings)
        assert bool((dynamics.log_step_size > before + 0.05).all())

    def test_what_it_refuses(self, world):
        with pytest.raises(bae.errors.UnsupportedError, match="path"):
            codes.Hamiltonian(codes.Amortised(gradient="path"), leapfrog())
        with pytest.raises(bae.errors.ShapeError, match="step sizes of 3 code dimensions"):
            draws_of(world.model("diagonal"), codes.Hamiltonian(codes.amortised, leapfrog(2)), world.batch, 1)
        with pytest.raises(bae.errors.ShapeError, match=r"float64.*float32"):
            draws_of(world.model("diagonal"), codes.Hamiltonian(codes.amortised, codes.Leapfrog(3)), world.batch, 1)

    def test_it_pickles(self, world):
        posterior = codes.Hamiltonian(codes.amortised, leapfrog())
        results = [
            draws_of(world.model("diagonal"), one, world.batch, 2).latents
            for one in (posterior, pickle.loads(pickle.dumps(posterior)))
        ]
        assert torch.equal(*results)
