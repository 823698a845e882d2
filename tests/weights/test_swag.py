"""SWAG: moments of given iterates, the law of stochastic gradient descent on a quadratic, a person's own loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import random, testing
from bayesae.errors import DataError, DivergedError, NotFittedError, ParameterError
from bayesae.functional import parameters_of
from bayesae.testing import ConjugateRegression
from bayesae.weights import SWAG
from tests.conftest import small_model

F64 = {"dtype": torch.float64}


def iterates(n, size=8, loc=0.0, dtype=torch.float64):
    """Correlated ones."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(size, size, generator=generator, **F64)
    return (loc + torch.randn(n, size, generator=generator, **F64) @ mix).to(dtype)


def observed(method, thetas, world):
    state = method.init(dict(world.mean), world.joint)
    for theta in thetas:
        state = method.observe(state, state.chosen.params(theta))
    return method.posterior(state, world.joint)


def dense(posterior):
    factor = getattr(posterior, "factor", None)
    return posterior.var.diag() + (0 if factor is None else factor.mT @ factor)


@pytest.mark.parametrize("rank", [0, 2, 5, 9])
def test_given_iterates_leave_their_sample_moments(rank):
    world, thetas = ConjugateRegression.make(), iterates(9)
    posterior = observed(SWAG(rank=rank), thetas, world)
    sample = thetas.mT.cov()
    assert_close(posterior.subset.ravel(posterior.mean), thetas.mean(0), rtol=1e-12, atol=1e-12)
    if rank == 0:
        assert type(posterior) is bae.families.DiagonalNormal
        assert_close(posterior.var, sample.diagonal(), rtol=1e-12, atol=1e-12)
        return
    shifts = thetas[-rank:] - thetas.mean(0)
    expected = sample.diagonal().diag() / 2 + shifts.mT @ shifts / (2 * (rank - 1))
    assert_close(dense(posterior), expected, rtol=1e-12, atol=1e-12)
    if rank == 9:  # all of them: the marginal variances are the sample's
        assert_close(expected.diagonal(), sample.diagonal(), rtol=1e-12, atol=0)
        assert_close(
            expected - expected.diagonal().diag(), (sample - sample.diagonal().diag()) / 2, rtol=1e-9, atol=1e-9
        )
    assert posterior.info["n_collected"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 5])
def test_draws_have_the_covariance_that_it_says(rank):
    """The full matrix, within four standard errors."""
    world, n = ConjugateRegression.make(), 20_000
    posterior = observed(SWAG(rank=rank), iterates(9), world)
    with random.scope(0):
        draws = posterior.subset.ravel(posterior.sample(n)) - posterior.subset.ravel(posterior.mean)
    expected = dense(posterior)
    squares = draws[:, :, None] * draws[:, None]
    error = squares.std(0) / math.sqrt(n)
    assert float(((squares.mean(0) - expected) / error).abs().max()) < 4
    assert float((draws.mean(0) / draws.std(0) * math.sqrt(n)).abs().max()) < 4
    assert_close(posterior.subset.ravel(posterior.variances()), expected.diagonal(), rtol=1e-12, atol=0)


def test_iterates_of_float32_far_from_zero_do_not_cancel():
    world = ConjugateRegression.make(dtype=torch.float32)
    thetas = iterates(30, loc=1e4, dtype=torch.float32)
    naive = (thetas**2).mean(0) - thetas.mean(0) ** 2
    expected = thetas.double().mT.cov()
    assert float((naive / expected.diagonal() - 1).abs().max()) > 0.1
    assert_close(observed(SWAG(rank=0), thetas, world).var, expected.diagonal(), rtol=1e-9, atol=0)
    half = expected.diagonal().diag() / 2 + expected / 2
    assert_close(dense(observed(SWAG(rank=30), thetas, world)), half, rtol=1e-9, atol=1e-9)


def loop_by_hand(world, method, n_batches, n_epochs):
    """torch.optim.SGD on a module of its own, before every step."""
    net = nn.Linear(3, 2).double()
    net.load_state_dict(world.mean)
    optimiser = torch.optim.SGD(net.parameters(), lr=method.learning_rate, momentum=method.momentum)
    for epoch in range(n_epochs):
        for k, batch in enumerate(world.batches(n_batches)):
            optimiser.zero_grad()
            rows = torch.distributions.Normal(net(batch.x), 0.5).log_prob(batch.target).sum() * n_batches
            prior = -sum(leaf.square().sum() for leaf in net.parameters())  # of precision 2
            (-(rows + prior) / 24).backward()
            yield (epoch + k / n_batches) / n_epochs, optimiser, net


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_observing_a_loop_of_one_s_own_equals_the_built_in_one(momentum):
    world = ConjugateRegression.make(is_orthogonal=False)
    method = SWAG(rank=3, epochs=8, learning_rate=3e-3, momentum=momentum, schedule="cosine", burn_in=0.25)
    built_in = testing.run_inference(method, world, n_batches=4)
    state, n_steps = method.init(dict(world.mean), world.joint), 0
    for share, optimiser, net in loop_by_hand(world, method, 4, 8):
        optimiser.param_groups[0]["lr"] = method.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        optimiser.step()
        n_steps += 1
        if n_steps > 8 and n_steps % 4 == 0:  # a quarter of 8 passes of 4 steps, then after every pass
            state = method.observe(state, dict(net.named_parameters()))
    own = method.posterior(state, world.joint)
    assert built_in.info["n_collected"] == own.info["n_collected"] == 6
    for name in world.mean:
        assert_close(built_in.mean[name], own.mean[name], rtol=1e-10, atol=1e-12)
        assert float((own.mean[name] - world.mean[name]).abs().min()) > 0
    assert_close(dense(built_in), dense(own), rtol=1e-8, atol=1e-16)
    assert float(own.var.min()) > 0


def test_cycles_end_with_a_collection():
    world = ConjugateRegression.make(is_orthogonal=False)
    method = SWAG(
        rank=0, epochs=6, learning_rate=3e-3, schedule="cosine", is_cyclical=True, burn_in=1 / 3, collect_every=2
    )
    built_in = testing.run_inference(method, world, n_batches=4)
    state, n_steps, rates = method.init(dict(world.mean), world.joint), 0, []
    for _, optimiser, net in loop_by_hand(world, method, 4, 6):
        rates.append(method.learning_rate * 0.5 * (1 + math.cos(math.pi * (n_steps % 8) / 8)))
        optimiser.param_groups[0]["lr"] = rates[-1]
        optimiser.step()
        n_steps += 1
        if n_steps in (16, 24):
            state = method.observe(state, dict(net.named_parameters()))
    assert_close(built_in.var, method.posterior(state, world.joint).var, rtol=1e-8, atol=1e-16)
    assert rates[8] == method.learning_rate and rates[7] < 0.05 * method.learning_rate


def lyapunov(world, n_batches, rate, momentum):
    """Mean and covariance (P, P) of (theta, v) under steps on a batch that is drawn anew each time, in closed form.

    A step is affine, s' = A_b s + c_b, so that the stationary covariance solves
    C = mean_b (A_b C A_b^T + d_b d_b^T) with d_b = A_b m + c_b - m.
    """
    steps = []
    for batch in world.batches(n_batches):
        design = torch.cat([batch.x, torch.ones(len(batch.x), 1, **F64)], 1)
        weight = n_batches / 0.5**2 / 24
        hessian = weight * design.mT @ design + torch.eye(4, **F64) * 2.0 / 24
        slope = weight * design.mT @ batch.target[:, 0]
        eye, keep = torch.eye(4, **F64), momentum * torch.eye(4, **F64)
        matrix = torch.cat([torch.cat([eye - rate * hessian, rate * keep], 1), torch.cat([-hessian, keep], 1)])
        steps.append((matrix, torch.cat([rate * slope, slope])))
    mean_matrix, mean_shift = (sum(parts) / n_batches for parts in zip(*steps, strict=True))
    mean = torch.linalg.solve(torch.eye(8, **F64) - mean_matrix, mean_shift)
    noise = sum(torch.outer(d, d) for d in (a @ mean + c - mean for a, c in steps)) / n_batches
    operator = sum(torch.kron(a, a) for a, _ in steps) / n_batches
    assert float(torch.linalg.eigvals(operator).abs().max()) < 1
    covariance = torch.linalg.solve(torch.eye(64, **F64) - operator, noise.flatten()).reshape(8, 8)
    return mean[:4], covariance[:4, :4]


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "rate"), [(0.0, 0.02), (0.7, 0.008)])
def test_on_a_quadratic_the_moments_are_those_of_the_lyapunov_equation(momentum, rate):
    world = ConjugateRegression.make(n_out=1, is_orthogonal=False)
    expected_mean, expected = lyapunov(world, 4, rate, momentum)
    batches, n = list(world.batches(4)), 2000
    method = SWAG(rank=0, epochs=n // 4, learning_rate=rate, momentum=momentum, burn_in=0.02, collect_every=0.25)
    state, visited = method.init(dict(world.mean), world.joint), []
    order = torch.randint(4, (n,), generator=torch.Generator().manual_seed(7)).tolist()
    for place in order:
        state, _ = method.update(state, batches[place], world.joint)
        if state.n_collected:
            visited.append(state.theta)
    chain = torch.stack(visited)
    posterior = method.posterior(state, world.joint)
    assert posterior.info["n_collected"] == len(chain) == n - 0.02 * n
    assert_close(posterior.var, chain.var(0), rtol=1e-10, atol=0)

    def check(values, wanted):
        """Within four standard errors by the means of 30 stretches, each far longer than the chain's memory."""
        stretches = values[: len(values) // 30 * 30].unflatten(0, (30, -1)).mean(1)
        error = stretches.std(0) / math.sqrt(30)
        assert float(((values.mean(0) - wanted) / error).abs().max()) < 4
        assert float((error / wanted.abs().max()).max()) < 0.15

    shift = chain - expected_mean
    check(shift[:, :, None] * shift[:, None], expected)
    assert_close(posterior.subset.ravel(posterior.mean), chain.mean(0), rtol=1e-10, atol=0)


def test_full_batches_have_no_spread_and_small_ones_more():
    world = ConjugateRegression.make()
    variances = []
    for n_batches in (1, 4, 12):
        posterior = testing.run_inference(SWAG(rank=0, epochs=60, learning_rate=1e-3), world, n_batches=n_batches)
        variances.append(float(posterior.var.sum()))
    assert variances[0] < 1e-20 < variances[1]


def test_what_cannot_be_is_refused():
    for wrong in (
        {"rank": 1}, {"rank": -1}, {"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": math.inf},
        {"momentum": 1.0}, {"burn_in": 1.0}, {"burn_in": -0.1}, {"collect_every": 0}, {"collect_every": 41},
    ):  # fmt: skip
        with pytest.raises(DataError):
            SWAG(**wrong)
    world = ConjugateRegression.make()
    with pytest.raises(DataError, match="at least 20 collected weights"):
        testing.run_inference(SWAG(epochs=20), world)
    method = SWAG(rank=4)
    few = SWAG(rank=4, epochs=2, collect_every=0.1)  # ten are due in the second pass, of two steps
    with pytest.raises(DataError, match="at least 4 collected weights for rank=4; got 2 in 2 epochs"):
        few.update(few.init(dict(world.mean), world.joint), next(iter(world.batches(2))), world.joint)
    with pytest.raises(NotFittedError, match="at least 4 collected weights for rank=4; got 0"):
        method.posterior(method.init(dict(world.mean), world.joint), world.joint)
    with pytest.raises(NotFittedError, match="got 3"):
        observed(method, iterates(3), world)
    with pytest.raises(ParameterError):
        method.observe(method.init(dict(world.mean), world.joint), {"weight": world.mean["weight"]})


def test_a_run_that_diverges_keeps_what_it_has_collected():
    world = ConjugateRegression.make(is_orthogonal=False)
    rate = SWAG(
        rank=10, epochs=400, learning_rate=1.0, burn_in=0.0, schedule=lambda share: 1e-3 if share < 0.012 else 1e300
    )
    with pytest.raises(DivergedError, match="Lower learning_rate") as caught:
        testing.run_inference(rate, world, n_batches=4)
    kept = caught.value.posterior
    assert type(kept) is bae.families.FactorNormal
    assert kept.info["n_collected"] >= 4 and len(kept.factor) == min(10, kept.info["n_collected"])


def test_part_of_the_weights(rows):
    model = small_model()
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[::2, 0] = True
    subset = bae.Subset({"decoder.3.weight": mask})
    for choice, size in ((["decoder.*.bias"], 4 + 6 + 7), (subset, 3)):
        method = SWAG(rank=2, epochs=6, subset=choice)
        posterior = bae.fit_weights(method, model, rows, seed=0, batch_size=4)
        assert len(posterior.subset) == size
        moved = posterior.subset.ravel(posterior.mean) - posterior.subset.ravel(parameters_of(model.network))
        assert float(moved.abs().min()) > 0
        assert_close(posterior.mean["encoder.1.weight"], model.encoder[1].weight.detach(), rtol=0, atol=0)
