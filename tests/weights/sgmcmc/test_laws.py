"""Stationary moments of the discretised chains, in closed form, and their limit as the step shrinks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from bayesae import metrics, random
from bayesae.testing import run_inference
from bayesae.weights import SGHMC, SGLD, SGNHT, RMSProp, ScaleAdaptation
from tests.weights.sgmcmc import laws

pytestmark = pytest.mark.filterwarnings("ignore:.*(step is long|friction is too small).*:RuntimeWarning")
LONG = {"n_chains": 64, "burn_in": 0.2, "thinning": 1}


def precision_of(world):
    return torch.linalg.inv(world.covariance)


class TestLaws:
    """The closed forms themselves, without a draw."""

    def test_langevin_is_the_general_solution(self):
        precision = precision_of(laws.regression())
        closed = laws.sgld_law(precision, 8e-3)
        push = torch.eye(4).double() - 4e-3 * precision
        assert_close(closed, torch.from_numpy(laws.lyapunov(push.numpy(), 8e-3 * torch.eye(4).double().numpy())))
        assert_close(closed, torch.linalg.inv(precision - 2e-3 * precision @ precision))  # as the docstring has it

    @pytest.mark.parametrize("friction", [0.05, 0.5, 1.0])
    def test_hamiltonian_is_what_the_docstring_says(self, friction):
        precision, step = precision_of(laws.regression()), 2e-3
        expected = torch.linalg.inv(precision - step / (2 * (2 - friction)) * precision @ precision)
        assert_close(laws.sghmc_law(precision, step, friction)[:4, :4], expected)

    def test_friction_of_one_is_langevin_of_twice_the_step(self):
        precision = precision_of(laws.regression())
        assert_close(laws.sghmc_law(precision, 4e-3, 1.0)[:4, :4], laws.sgld_law(precision, 8e-3))

    def test_gradient_noise_inflates_as_the_docstring_says(self):
        precision, step, a, noise = precision_of(laws.regression()), 1e-3, 0.1, torch.full((4,), 50.0).double()
        plain, noisy = (laws.sghmc_law(precision, step, a, gradient_noise=own) for own in (None, noise))
        assert_close(noisy, plain * (1 + step * 50 / (2 * a)))
        assert_close(laws.sghmc_law(precision, step, a, gradient_noise=noise, taken=noise), plain)

    def test_limit_as_the_step_shrinks(self):
        world = laws.regression()
        precision, scales = precision_of(world), torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
        for law, order in (
            (lambda step: laws.sgld_law(precision, step), 1),
            (lambda step: laws.sghmc_law(precision, step, 0.1)[:4, :4], 1),
            (lambda step: laws.sghmc_law(precision, step, 0.1, scales)[:4, :4], 1),
        ):
            errors = [float((law(1e-3 / 4**k) - world.covariance).abs().max()) for k in range(3)]
            for longer, shorter in zip(errors, errors[1:], strict=False):
                assert longer / shorter == pytest.approx(4**order, rel=0.1)

    def test_momenta_and_weights_are_independent_in_the_limit(self):
        law = laws.sghmc_law(precision_of(laws.regression()), 1e-8, 1e-4)
        assert_close(law[4:, 4:], 1e-8 * torch.eye(4).double(), rtol=1e-3, atol=1e-12)
        # their covariance is half the variance of v: the correlation goes with the root of the step
        assert_close(law[:4, 4:], 0.5e-8 * torch.eye(4).double(), rtol=1e-3, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("step", [2e-3, 1e-2])
def test_langevin(step, temperature):
    world = laws.regression(temperature)
    step *= temperature
    posterior = run_inference(SGLD(step, epochs=500, **LONG), world)
    expected = laws.sgld_law(precision_of(world), step)
    assert laws.off(posterior, world, expected) < 4
    assert laws.off(posterior, world, world.covariance) > 6 or step < 5e-3 * temperature
    # half or twice the variance, and a standard deviation in its place, would be seen
    assert min(laws.off(posterior, world, expected * wrong) for wrong in (0.5, 2.0)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_hamiltonian(temperature):
    world = laws.regression(temperature)
    step = 4e-3 * temperature
    posterior = run_inference(SGHMC(step, 0.4, epochs=500, **LONG), world)
    expected = laws.sghmc_law(precision_of(world), step, 0.4)[:4, :4]
    assert laws.off(posterior, world, expected) < 4
    assert laws.off(posterior, world, world.covariance) > 6
    assert min(laws.off(posterior, world, expected * wrong) for wrong in (0.5, 2.0)) > 10


def test_momenta_have_the_law_too():
    world, step = laws.regression(), 4e-3
    method = SGHMC(step, 0.4, epochs=300, n_chains=400, burn_in=0.5)
    with random.scope(0):
        state = method.init(dict(world.mean), world.joint)
        for _ in range(100):
            state, _info = method.update(state, world.batch, world.joint)
    pairs = torch.cat([state.theta - laws.centre(world), state.moving["momentum"]], 1)
    expected = laws.sghmc_law(precision_of(world), step, 0.4)
    scale = expected.diagonal().sqrt()
    found = torch.cov(pairs.mT, correction=0) / scale / scale[:, None]
    wanted = expected / scale / scale[:, None]
    error = torch.sqrt((1 + wanted**2) / 400)  # of a covariance of Normals, chains independent
    assert float(((found - wanted).abs() / error).max()) < 4


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_half_the_rows_in_a_batch_are_scaled_to_all(kind):
    """Rows that all come twice: batches of half of them have the gradient of the whole."""
    world = laws.twice(laws.regression())
    precision = precision_of(world)
    method = SGLD(1e-2, epochs=250, **LONG) if kind is SGLD else SGHMC(4e-3, 0.4, epochs=250, **LONG)
    law = laws.sgld_law(precision, 1e-2) if kind is SGLD else laws.sghmc_law(precision, 4e-3, 0.4)[:4, :4]
    posterior = run_inference(method, world, n_batches=2)
    assert posterior.info["n_steps"] == 500
    assert laws.off(posterior, world, law) < 4


class TestThermostat:
    @pytest.mark.slow
    def test_small_step_has_the_target_and_the_extended_law(self):
        world, step, a = laws.regression(), 1e-4, 0.02
        method = SGNHT(step, a, epochs=1500, n_chains=64, burn_in=0.3, thinning=5, scale=0.1)
        posterior, friction, momentum = self.run(method, world)
        # of the known biases a / 2 = 1 % is the largest, a third of the standard errors
        assert laws.off(posterior, world, world.covariance) < 4
        n = len(friction)
        assert abs(float(friction.mean()) - a) < 4 * math.sqrt(step / 4 / n) + a**2
        assert float(friction.var()) == pytest.approx(step / 4, rel=4 * math.sqrt(2 / n) + 0.05)
        assert float(momentum.square().mean()) == pytest.approx(step, rel=4 * math.sqrt(2 / (4 * n)) + 0.02)

    def test_of_many_equal_weights_is_what_the_docstring_says(self):
        step, a, size = 0.01, 0.2, 100
        world = laws.quadratic(torch.eye(size).double())
        method = SGNHT(step, a, epochs=1500, n_chains=16, burn_in=0.4, thinning=1)
        posterior, friction, _ = self.run(method, world)
        values = laws.flat(posterior).square().mean(-1)  # of all weights
        mean = 1 - float(friction.mean()) / 2
        error = float(values.std() / metrics.ess(values).sqrt())
        assert abs(float(values.mean()) - mean) < 4 * error
        assert abs(float(values.mean()) - 1) > 8 * error
        assert float(friction.mean()) == pytest.approx(self.friction_for(a, step), rel=0.02)

    def test_info_has_the_mean_friction(self):
        method = SGNHT(1e-4, 0.3, epochs=20, n_chains=3, thinning=1, scale=0.1)
        posterior, friction, _ = self.run(method, laws.regression())
        assert float(friction.std()) > 0
        assert posterior.info["friction"] == pytest.approx(float(friction.mean()), rel=1e-6)

    def test_absorbs_the_noise_of_gradients(self):
        """Noise of variance s^2 asks for eta s^2 / 2 more friction; the weights do not feel it."""
        step, a, size, noise = 4e-3, 0.1, 50, 60.0
        world = laws.quadratic(torch.eye(size).double())
        method = SGNHT(step, a, epochs=1, n_chains=32, burn_in=0.5)
        with random.scope(1):
            state = method.init(dict(world.mean), world.joint)
            state.theta.normal_()
            look = state.chosen.gradient
            frictions, squares = [], []
            for n in range(1000):
                _values, gradient = look(world.joint, state.theta, world.batch)
                gradient += math.sqrt(noise) * torch.randn_like(gradient)
                method._move(state, gradient, method._phase(0, 0.0), False, world.batch, world.joint)
                if n > 400:
                    frictions.append(float(state.moving["thermostat"].mean()))
                    squares.append(float(state.theta.square().mean()))
        expected = self.friction_for(a + step * noise / 2, step)
        assert sum(frictions) / len(frictions) == pytest.approx(expected, rel=0.06)
        assert sum(squares) / len(squares) == pytest.approx(1 - expected / 2, rel=0.03)

    @staticmethod
    def friction_for(injected, step):
        """Where E v^2 = eta; of Lambda = 1 it is eta (c / xi) (2 / (2 - xi)) / (1 - eta / (2 (2 - xi)))."""
        grid = torch.linspace(1e-3, 0.999, 999 * 4 - 3).double()
        square = injected / grid * 2 / (2 - grid) / (1 - step / (2 * (2 - grid)))
        return float(grid[(square - 1).abs().argmin()])

    @staticmethod
    def run(method, world):
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            for _ in range(method.epochs):
                state, _info = method.update(state, world.batch, world.joint)
            posterior = method.posterior(state, world.joint)
        return posterior, state.moving["thermostat"].flatten(), state.moving["momentum"]


class TestPreconditioners:
    def test_scales_are_those_of_a_plain_loop(self):
        gradients = torch.randn(6, 2, 3).double() * torch.tensor([1.0, 10.0, 0.1]).double()
        own, moving = RMSProp(0.9, 1e-3), RMSProp(0.9, 1e-3).start(gradients[0])
        square = torch.maximum((gradients[0] / 5) ** 2, ((gradients[0] / 5) ** 2).mean(1, keepdim=True))
        own.adapt(moving, gradients[0], 5)
        for gradient in gradients[1:]:
            own.adapt(moving, gradient, 5)
            square = 0.9 * square + 0.1 * (gradient / 5) ** 2
        assert_close(moving["scales"], 1 / (1e-3 + square.sqrt()))
        own, moving = ScaleAdaptation(), ScaleAdaptation().start(gradients[0])
        window = mean = square = torch.ones(2, 3).double()
        for gradient in gradients:
            own.adapt(moving, gradient, 5)
            share = 1 / (window + 1)
            window = window - window * mean**2 / (square + 1e-6) + 1
            mean = mean + (gradient - mean) * share
            square = square + (gradient**2 - square) * share
        assert_close(moving["scales"], (square + 1e-6) ** -0.5)
        assert_close(own.noise_taken_out(moving), square)
        assert ScaleAdaptation(takes_out_noise=False).noise_taken_out(moving) is None

    def test_the_window_opens_in_single_precision(self):
        moving = ScaleAdaptation().start(torch.zeros(2, 50))
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            ScaleAdaptation().adapt(moving, 1e4 * torch.randn(2, 50, generator=generator), 5)
        assert float(moving["window"].median()) > 20
        assert_close(moving["scales"].mean(), torch.tensor(1e-4), rtol=0.1, atol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["SGLD", "SGHMC", "SGHMC, noise taken out"])
    def test_law_under_frozen_scales(self, kind):
        world, n = laws.regression(), 64
        own = ScaleAdaptation(takes_out_noise="taken" in kind)
        method = (
            SGLD(0.1, preconditioner=own, **LONG) if kind == "SGLD" else SGHMC(0.02, 0.4, preconditioner=own, **LONG)
        )
        scales, seen = torch.tensor([0.02, 0.05, 0.1, 0.04]).double(), torch.tensor([5.0, 3.0, 1.0, 9.0]).double()
        precision = precision_of(world)
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            state.moving |= {"scales": scales.expand(n, -1).clone(), "V": seen.expand(n, -1).clone()}
            kept = []
            for step in range(500):
                _values, gradient = state.chosen.gradient(world.joint, state.theta, world.batch)
                method._move(state, gradient, method._phase(0, 1.0), False, world.batch, world.joint)
                kept += [state.theta.clone()] if step >= 100 else []
        deviations = torch.stack(kept, 1) - laws.centre(world)
        products = deviations[..., :, None] * deviations[..., None, :]
        if kind == "SGLD":
            root = scales.sqrt()  # in theta / root the step is plain
            expected = root * laws.sgld_law(root * precision * root[:, None], 0.1) * root[:, None]
        else:
            taken = seen if own.takes_out_noise else None
            expected = laws.sghmc_law(precision, 0.02, 0.4, scales, taken=taken)[:4, :4]
        assert laws._off(products, expected) < 4

    @pytest.mark.parametrize("preconditioner", [RMSProp(), ScaleAdaptation(takes_out_noise=False)])
    def test_learned_in_burn_in_and_then_held(self, preconditioner):
        world = laws.regression()
        step = {RMSProp: 2e-2, ScaleAdaptation: 2e-2}[type(preconditioner)]
        method = SGLD(step, preconditioner=preconditioner, epochs=20, n_chains=2, scale=0.1, thinning=1)
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            seen = []
            for _ in range(20):
                state, _info = method.update(state, world.batch, world.joint)
                seen.append(state.moving["scales"].clone())
        assert all(not torch.equal(a, b) for a, b in zip(seen[:9], seen[1:10], strict=True))
        assert all(torch.equal(seen[9], later) for later in seen[10:])

    def test_law_with_scales_of_its_own(self):
        """Every chain has learned scales of its own; each chain's law is then that of G Lambda."""
        world = laws.regression()
        method = SGLD(
            2e-3, preconditioner=RMSProp(0.9, 0.05), epochs=600, n_chains=48, scale=0.1, burn_in=0.3, thinning=1
        )
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            for _ in range(600):
                state, _info = method.update(state, world.batch, world.joint)
        posterior, precision = method.posterior(state, world.joint), precision_of(world)
        roots = state.moving["scales"].sqrt()
        assert float(roots.std(0).max()) > 0
        expected = torch.stack([r * laws.sgld_law(r * precision * r[:, None], 2e-3) * r[:, None] for r in roots]).mean(
            0
        )
        assert laws.off(posterior, world, expected) < 4
