"""25 Normals of variance 0.03 on a lattice: cycles visit them all, steps of one length stay where they began."""

from __future__ import annotations

import math

import pytest
import torch

import bayesae as bae
from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.types import Batch
from bayesae.weights import SGHMC, SGLD, Cyclical
from tests.weights.sgmcmc.laws import F64, Normals

VAR = 0.03
CENTRES = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, 2.0, **F64)] * 2)


def mixture() -> LogJoint:
    def per_example(params, batch):
        squares = (params["theta"][:, None] - CENTRES).square().sum(-1)
        return torch.logsumexp(-squares / (2 * VAR), 1, keepdim=True) - math.log(25 * 2 * math.pi * VAR)

    likelihood = bae.likelihoods.Gaussian(1.0)
    return LogJoint(Normals(2), likelihood, per_example, IsotropicNormal(1e-12), n_data=1)


def visited(method, start=(0.0, 0.0)):
    """Modes with a draw within three standard deviations, and the share of draws that are near one."""
    joint, batch = mixture(), Batch(torch.zeros(1, 1, **F64), index=torch.arange(1))
    with bae.random.scope(0):
        state = method.init({"theta": torch.tensor(start, **F64)}, joint)
        for _ in range(method.epochs):
            state, _info = method.update(state, batch, joint)
        draws = method.posterior(state, joint).atoms["theta"]
    distance, mode = torch.cdist(draws, CENTRES).min(1)
    near = distance < 3 * math.sqrt(VAR)
    return len(mode[near].unique()), float(near.double().mean())


def test_the_gradient_is_that_of_the_mixture():
    joint, theta = mixture(), torch.tensor([[0.3, -1.1], [3.0, 2.2]], **F64).requires_grad_()
    weights = torch.distributions.Categorical(torch.ones(25, **F64))
    parts = torch.distributions.Independent(torch.distributions.Normal(CENTRES, math.sqrt(VAR)), 1)
    expected = torch.distributions.MixtureSameFamily(weights, parts).log_prob(theta)
    found = joint.per_example({"theta": theta}, None)[:, 0]
    torch.testing.assert_close(found, expected)


# exploration steps of 0.25 / 2 at a curvature of 1 / 0.03 overshoot: from r beside a centre they land 3.2 r beyond it,
# so that the chain leaves one mode for another until the steps shorten. Modes at the corners are found an eighth
# as often as inner ones; eight seeds of a simulation of these sizes found 24 or 25. The same budget for all: 16 x 1200
COMMON = {"epochs": 1200, "n_chains": 16, "thinning": 1, "burn_in": 0.0, "scale": 0.01}
CYCLES = Cyclical(30, 0.75)


@pytest.mark.filterwarnings("ignore:.*step is long.*:RuntimeWarning")
class TestModes:
    def test_cycles_cover_them(self):
        n_modes, near = visited(SGLD(0.25, schedule=CYCLES, **COMMON))
        assert n_modes >= 23 and near > 0.9

    @pytest.mark.slow
    @pytest.mark.parametrize("step", [0.01, 0.05])
    def test_one_length_of_steps_does_not(self, step):
        n_modes, near = visited(SGLD(step, **COMMON))
        assert n_modes <= 2 and near > 0.8

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*friction is too small.*:RuntimeWarning")
    def test_so_it_is_with_momenta(self):
        cycled, _near = visited(SGHMC(0.1, 0.5, schedule=CYCLES, **COMMON))
        plain, _near = visited(SGHMC(0.005, 0.5, **COMMON))
        assert cycled >= 20 > 3 >= plain
