"""Hamiltonian Monte Carlo and MALA: the trajectory, then the moments."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import errors, random
from bayesae.testing import ConjugateRegression, run_inference
from bayesae.weights import HMC, MALA
from bayesae.weights.flat import Chosen
from bayesae.weights.sgmcmc.hmc import leapfrog
from tests.conftest import small_model
from tests.weights.sgmcmc import laws


class TestLeapfrog:
    @pytest.fixture
    def start(self):
        """A small autoencoder's exact log-joint: not quadratic."""
        rows = torch.rand(9, 7, dtype=torch.float64)
        joint = bae.training.log_joint(small_model(), 9, temperature=2.0)
        chosen = Chosen.of(dict(joint.network.named_parameters()), joint, ("**",))
        theta = chosen.start.expand(3, -1) + 0.1 * torch.randn(3, len(chosen.start)).double()
        batch = bae.Batch(rows, index=torch.arange(9))
        value, gradient = chosen.gradient(joint, theta, batch)
        return chosen, joint, batch, theta, torch.randn_like(theta), gradient, value

    def follow(self, start, h, n):
        chosen, joint, batch, theta, momentum, gradient, value = start
        end = leapfrog(chosen, joint, batch, theta, momentum, gradient, torch.full((3, 1), h).double(), n)
        before = value - 0.5 * momentum.square().sum(1)
        return end, end[2] - 0.5 * end[1].square().sum(1) - before

    def test_log_density_is_that_of_a_plain_sum(self, start):
        chosen, joint, batch, theta, *_rest, value = start
        model = small_model()
        for row, found in zip(theta, value, strict=True):
            own = {name: leaf[None] for name, leaf in chosen.params(row).items()}
            bound = model.at(own)
            outputs = bound.decode(bound.encode(batch.x))[0]
            likelihood = torch.distributions.Normal(outputs, 0.3).log_prob(batch.x).sum()
            prior = sum(torch.distributions.Normal(0.0, 1.0).log_prob(leaf).sum() for leaf in own.values())
            assert_close(found, (likelihood + prior) / 2)

    def test_energy_is_kept_to_second_order(self, start):
        errors_at = [self.follow(start, 2e-3 / 2**k, 20 * 2**k)[1].abs() for k in range(3)]
        for longer, shorter in zip(errors_at, errors_at[1:], strict=False):
            assert_close(longer / shorter, torch.full((3,), 4.0).double(), rtol=0.1, atol=0)

    def test_it_runs_back(self, start):
        chosen, joint, batch, theta, momentum, gradient, _value = start
        h = torch.tensor([[1e-3], [2e-3], [5e-4]]).double()
        forth = leapfrog(chosen, joint, batch, theta, momentum, gradient, h, 15)
        back = leapfrog(chosen, joint, batch, forth[0], -forth[1], forth[3], h, 15)
        assert float((forth[0] - theta).abs().max()) > 1e-2
        assert_close(back[0], theta, rtol=0, atol=1e-12)
        assert_close(-back[1], momentum, rtol=0, atol=1e-11)

    def test_volume_is_kept(self):
        """The map of a quadratic U is linear: its determinant is 1."""
        precision = torch.diag(torch.tensor([1.0, 5.0]).double())
        world = laws.quadratic(precision)
        chosen = Chosen.of(dict(world.mean), world.joint, ("**",))
        phase = torch.eye(4).double()
        theta, momentum = phase[:, :2], phase[:, 2:]
        _value, gradient = chosen.gradient(world.joint, theta, world.batch)
        h = torch.full((4, 1), 0.3).double()
        end = leapfrog(chosen, world.joint, world.batch, theta, momentum, gradient, h, 5)
        matrix = torch.cat(end[:2], 1)
        assert float(torch.linalg.det(matrix)) == pytest.approx(1, abs=1e-10)
        assert float((matrix - phase).abs().max()) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", [HMC, MALA])
def test_moments_are_exact_at_a_long_step(kind, temperature):
    """Steps where a tenth to a half of the proposals is refused: without Metropolis the variance would be off."""
    world = laws.regression(temperature)
    common = {"n_chains": 64, "thinning": 1, "burn_in": 0.3, "adapts": False}
    method = HMC(0.12 * math.sqrt(temperature), 2, epochs=200, **common)
    if kind is MALA:
        method = MALA(1.5e-2 * temperature, epochs=500, **common)
    posterior = run_inference(method, world)
    assert 0.4 < posterior.info["acceptance"] < 0.95
    assert laws.off(posterior, world, world.covariance) < 4
    assert min(laws.off(posterior, world, world.covariance * wrong) for wrong in (0.5, 2.0)) > 10


@pytest.mark.parametrize(("method", "wanted"), [(HMC(1e-4, 4), 0.8), (MALA(1e-4), 0.574), (HMC(10.0, 4), 0.8)])
def test_steps_are_found_in_burn_in_and_then_held(method, wanted):
    world = ConjugateRegression.make(is_orthogonal=False)
    method = dataclasses.replace(method, epochs=200, burn_in=0.6, n_chains=8, thinning=1)
    with random.scope(0):
        state = method.init(dict(world.mean), world.joint)
        steps = []
        for _ in range(200):
            state, _info = method.update(state, world.batch, world.joint)
            steps.append(state.moving["log_h"].exp().flatten())
        posterior = method.posterior(state, world.joint)
    assert all(torch.equal(steps[121], later) for later in steps[122:])
    assert posterior.info["acceptance"] == pytest.approx(wanted, abs=0.12)
    power = 2 if isinstance(method, MALA) else 1
    assert posterior.info["step_size"] == pytest.approx(float((steps[-1]).mean()) ** power)


def test_the_held_step_is_that_of_every_proposal_after_burn_in(monkeypatch):
    world, used = ConjugateRegression.make(is_orthogonal=False), []

    def noted(*arguments):
        used.append(arguments[-2].flatten())
        return leapfrog(*arguments)

    monkeypatch.setattr("bayesae.weights.sgmcmc.hmc.leapfrog", noted)
    run_inference(HMC(1e-2, 4, epochs=40, n_chains=3, thinning=1), world)
    assert all(torch.equal(used[20], later) for later in used[21:]) and not torch.equal(used[19], used[20])


def test_the_step_of_the_proposal_is_that_of_langevin():
    """One leapfrog step of sqrt(eps) from theta with p is theta - eps / 2 grad U + sqrt(eps) p."""
    world = laws.regression()
    chosen = Chosen.of(dict(world.mean), world.joint, ("**",))
    theta = chosen.start.expand(2, -1) + 0.1
    _value, gradient = chosen.gradient(world.joint, theta, world.batch)
    noise, eps = torch.randn_like(theta), 3e-3
    h = torch.full((2, 1), MALA(eps)._h).double()
    end = leapfrog(chosen, world.joint, world.batch, theta, noise, gradient, h, 1)
    assert_close(end[0], theta + eps / 2 * gradient + math.sqrt(eps) * noise)


def test_needs_a_log_joint_that_repeats_and_all_rows(model, rows):
    with pytest.raises(errors.UnsupportedError, match="batches of all 9 rows; got 4"):
        bae.fit_weights(HMC(epochs=20), model, rows, batch_size=4, seed=0)
    encoder = bae.nets.mlp(7, [6], (2, 2))
    stochastic = bae.Autoencoder(encoder, bae.nets.mlp(2, [6], 7), bae.likelihoods.Gaussian(0.3)).double().eval()
    with pytest.raises(errors.UnsupportedError, match="gives the same value twice"):
        bae.fit_weights(HMC(epochs=20), stochastic, rows, codes=bae.codes.amortised, objective=bae.objectives.elbo)


def test_chains_that_stand_still_are_told(model, rows):
    with pytest.warns(RuntimeWarning, match="took 0% of its proposals"):
        bae.fit_weights(HMC(10.0, adapts=False, epochs=4, n_leapfrog=2, thinning=1), model, rows, seed=0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"step_size": 0.0}, "positive, finite step_size"),
        ({"n_leapfrog": 0}, "n_leapfrog >= 1"),
        ({"acceptance": 1.0}, "0 < acceptance < 1"),
        ({"burn_in": 0.0}, "burn-in in which the step adapts"),
    ],
)
def test_bad_numbers_are_refused(wrong, match):
    with pytest.raises(errors.DataError, match=match):
        HMC(**wrong)
