from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import testing
from bayesae.errors import DataError, DivergedError, UnsupportedError
from bayesae.families import Particles
from bayesae.functional import parameters_of, select_draws
from bayesae.testing import ConjugateRegression
from bayesae.weights.ensemble import _perturbed
from tests.conftest import small_model


def test_members_are_what_single_trainings_are(model, rows):
    """The mapped training of M networks equals M trainings in a plain loop."""
    ensemble = bae.weights.Ensemble(2, epochs=1, learning_rate=1e-2)
    joint = bae.log_joint(model, n_data=9)
    torch.manual_seed(0)
    state = ensemble.init(parameters_of(model.network), joint)
    starts = [{k: v.detach().clone() for k, v in state.chosen.params(state.theta[m]).items()} for m in range(2)]
    for _ in range(5):
        state, _ = ensemble.update(state, bae.Batch(rows), joint)
    for m, start in enumerate(starts):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
        optimiser = torch.optim.Adam(leaves.values(), lr=1e-2)
        for _ in range(5):
            optimiser.zero_grad()
            outputs = torch.func.functional_call(model.network, leaves, (rows,))
            log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(torch.cat([v.flatten() for v in leaves.values()]))
            (-(model.likelihood.log_prob(outputs, rows).sum() + log_prior.sum()) / 9).backward()
            optimiser.step()
        member = select_draws(ensemble.posterior(state, joint).atoms, slice(m, m + 1))
        for name in leaves:
            assert_close(member[name][0], leaves[name].detach(), rtol=1e-9, atol=1e-11)


def test_members_differ(rows):
    model = small_model()
    posterior = bae.fit_weights(bae.weights.Ensemble(3, epochs=2), model, rows)
    assert posterior.n_atoms == 3
    assert float(posterior.sample(3)["encoder.1.weight"].var(0).min()) > 0


@pytest.mark.parametrize("is_randomised", [False, True])
def test_members_that_are_left_of_a_diverging_run_are_kept(is_randomised):
    """As they were before the step in which the second was lost."""
    world = ConjugateRegression.make()
    method = bae.weights.Ensemble(3, is_randomised=is_randomised)
    state = method.init(dict(world.mean), world.joint)
    state, _ = method.update(state, world.batch, world.joint)
    with torch.no_grad():
        state.theta[1] = 1e200  # its square is no number
    before = state.theta.detach().clone()
    with pytest.raises(DivergedError, match="others in 1 of 3 members.*the members that are left") as caught:
        method.update(state, world.batch, world.joint)
    left = pickle.loads(pickle.dumps(caught.value)).posterior
    assert isinstance(left, Particles) and left.info["n_data"] == world.joint.n_data
    assert torch.equal(state.chosen.subset.ravel(left.atoms), before[[0, 2]])


def test_a_member_is_lost_with_its_gradient(model, rows):
    """A log-joint that has no slope where it stands: the step would make weights of no number in silence."""

    class Rooted:
        def log_prob(self, params):
            return -torch.stack([leaf.flatten(1).abs().sqrt().sum(1) for leaf in params.values()]).sum(0)

    joint = bae.log_joint(model, len(rows), weight_prior=Rooted())
    method = bae.weights.Ensemble(2)
    state = method.init(parameters_of(model.network), joint)
    with torch.no_grad():
        state.theta[0, 0] = 0
    with pytest.raises(DivergedError, match="finite log-joint and gradient.*1 of 2 members") as caught:
        method.update(state, bae.Batch(rows), joint)
    assert caught.value.posterior.n_atoms == 1


def test_divergence_of_all_members_leaves_nothing(model, rows):
    for method in (
        bae.weights.Ensemble(2, epochs=5, learning_rate=1e200),
        bae.weights.MixtureOf(bae.weights.Ensemble(2, epochs=5, learning_rate=1e200), bae.weights.Laplace()),
    ):
        with pytest.raises(DivergedError, match="others in 2 of 2 members.*Lower learning_rate") as caught:
            bae.fit_weights(method, model, rows)
        assert caught.value.posterior is None


def test_a_layer_that_cannot_be_reset_is_named(rows):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))

        def forward(self, x):
            return x * self.weight

    encoder = torch.nn.Sequential(Scaled(), torch.nn.Linear(7, 2).double())
    model = bae.Autoencoder(encoder, torch.nn.Linear(2, 7).double(), bae.likelihoods.Gaussian(1.0)).eval()
    with pytest.raises(bae.errors.UnsupportedError, match=r"Scaled 'encoder\.0' without"):
        bae.fit_weights(bae.weights.Ensemble(2, epochs=1), model, rows)


def test_counts_are_checked():
    with pytest.raises(bae.errors.DataError, match="n_members >= 1"):
        bae.weights.Ensemble(0)


def test_running_statistics_are_refused(rows):
    encoder = torch.nn.Sequential(torch.nn.Linear(7, 2), torch.nn.BatchNorm1d(2)).double()
    model = bae.Autoencoder(encoder, torch.nn.Linear(2, 7).double(), bae.likelihoods.Gaussian(1.0)).eval()
    with pytest.raises(
        bae.errors.UnsupportedError, match=r"BatchNorm1d 'encoder\.1' with running statistics of another"
    ):
        bae.fit_weights(bae.weights.Ensemble(2, epochs=1), model, rows)


def test_a_member_does_not_depend_on_the_others(model, rows):
    three, five = (bae.fit_weights(bae.weights.Ensemble(n, epochs=2), model, rows, seed=1).atoms for n in (3, 5))
    for name in three:
        assert_close(three[name], five[name][:3], rtol=1e-10, atol=1e-12)


def test_part_of_the_weights(model, rows):
    posterior = bae.fit_weights(bae.weights.Ensemble(3, epochs=2, subset=["decoder.**"]), model, rows)
    trained = parameters_of(model.network)
    for name, leaf in posterior.atoms.items():
        if name.startswith("encoder"):
            assert_close(leaf, trained[name].expand_as(leaf), rtol=0, atol=0)
        elif name.endswith("weight"):
            assert float(leaf.var(0).min()) > 0


class TestRandomisedMAP:
    """Linear regression: a member is the posterior mean of its own data and prior."""

    @staticmethod
    def flat(world, params):
        """(..., weights, bias) of every output, (..., O, D + 1)."""
        return torch.cat([params["weight"], params["bias"][..., None]], -1)

    @classmethod
    def in_closed_form(cls, world, state):
        """Members from the perturbations that the method has drawn."""
        design = torch.cat([world.batch.x, torch.ones(len(world.batch.x), 1, dtype=torch.float64)], 1)
        var = world.joint.likelihood.noise_var
        precision = design.mT @ design / var + 2 * torch.eye(design.shape[1], dtype=torch.float64)
        members = []
        for seed, centre in zip(state.seeds, state.centres, strict=True):
            y = _perturbed(world.batch, world.joint, seed).target
            theta = cls.flat(world, state.chosen.params(centre))
            members.append(torch.linalg.solve(precision, design.mT @ y / var + 2 * theta.mT).mT)
        return torch.stack(members)

    @pytest.mark.parametrize("temperature", [1.0, 0.3])
    def test_members_are_those_of_their_own_data_and_prior(self, temperature):
        """What is climbed is quadratic, so that a member is where its gradient is 0."""
        world = ConjugateRegression.make(is_orthogonal=False).with_temperature(temperature)
        method = bae.weights.Ensemble(3, starts="trained", is_randomised=True)
        state = method.init(dict(world.mean), world.joint)
        gradients = []
        for theta in (self.in_closed_form(world, state), self.flat(world, world.mean).expand(3, 2, 4)):
            params = {"weight": theta[..., :-1], "bias": theta[..., -1]}
            with torch.no_grad():
                state.theta.copy_(state.chosen.subset.ravel(params))
            method.update(state, world.batch, world.joint)
            gradients.append(float(state.theta.grad.abs().max()))
        assert gradients[0] < 1e-12 and gradients[1] > 1e-2

    def test_training_finds_them(self):
        world = ConjugateRegression.make(is_orthogonal=False)
        method = bae.weights.Ensemble(2, epochs=250, learning_rate=3e-2, is_randomised=True)
        with bae.random.scope(0):
            expected = self.in_closed_form(world, method.init(dict(world.mean), world.joint))
        found = self.flat(world, testing.run_inference(method, world).atoms)
        assert float((found - expected).abs().max()) < 0.02
        assert float((expected - self.flat(world, world.mean)).abs().max()) > 0.1

    @pytest.mark.parametrize(("temperature", "by_tensor"), [(1.0, True), (0.3, False)])
    def test_their_law_is_the_posterior(self, temperature, by_tensor):
        """Mean and the full covariance over both outputs, within four standard errors."""
        n = 2000
        # few, noisy rows: the prior's part of the covariance is as large as the data's
        world = ConjugateRegression.make(is_orthogonal=False, n_data=5, noise=1.0).with_temperature(temperature)
        if by_tensor:
            prior = bae.IndependentNormal({"weight": 2.0, "bias": torch.full((2,), 2.0)})
            world = dataclasses.replace(world, joint=dataclasses.replace(world.joint, prior=prior))
        method = bae.weights.Ensemble(n, starts="trained", is_randomised=True)
        with bae.random.scope(3):
            state = method.init(dict(world.mean), world.joint)
        shift = (self.in_closed_form(world, state) - self.flat(world, world.mean)).flatten(1)
        expected = torch.block_diag(world.covariance, world.covariance)  # times T already
        squares = shift[:, :, None] * shift[:, None]
        assert float(((squares.mean(0) - expected) / squares.std(0) * math.sqrt(n)).abs().max()) < 4
        assert float((shift.mean(0) / shift.std(0) * math.sqrt(n)).abs().max()) < 4

    def test_the_log_joint_that_it_reports_is_that_of_its_own_data_and_prior(self):
        world = ConjugateRegression.make()
        method = bae.weights.Ensemble(2, starts="trained", is_randomised=True)
        state = method.init(dict(world.mean), world.joint)
        expected = []
        for seed, centre in zip(state.seeds, state.centres, strict=True):
            own = _perturbed(world.batch, world.joint, seed)
            params = {name: leaf[None] for name, leaf in world.mean.items()}
            rows = world.joint.per_example(params, own).sum()
            theta = torch.cat([world.mean[name].flatten() for name in ("weight", "bias")])
            expected.append(rows - (theta - centre).square().sum() + 4 * math.log(2 / (2 * math.pi)))
        _, info = method.update(state, world.batch, world.joint)
        assert_close(info.log_joint, float(sum(expected) / 2), rtol=1e-12, atol=0)

    def test_a_perturbation_belongs_to_its_row(self):
        world = ConjugateRegression.make()
        whole = _perturbed(world.batch, world.joint, 5).target
        parts = [_perturbed(batch, world.joint, 5).target for batch in world.batches(5)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, _perturbed(world.batch, world.joint, 6).target)

    def test_an_autoencoder_s_encoder_sees_the_data_as_they_are(self, model, rows):
        method = bae.weights.Ensemble(3, epochs=2, starts="trained", is_randomised=True)
        posterior = bae.fit_weights(method, model, rows, seed=0, batch_size=4)
        assert float(posterior.sample(3)["decoder.1.weight"].var(0).min()) > 0
        joint = bae.log_joint(model, len(rows))
        batch = _perturbed(bae.Batch(rows, index=torch.arange(9)), joint, 1)
        assert torch.equal(batch.x, rows)
        assert abs(float((batch.target - rows).std()) / 0.3 - 1) < 0.3

    def test_what_cannot_be_is_refused(self, rows):
        randomised = bae.weights.Ensemble(2, epochs=1, is_randomised=True)
        with pytest.raises(UnsupportedError, match="a Gaussian likelihood to perturb data of; got Bernoulli"):
            bae.fit_weights(randomised, small_model(bae.likelihoods.Bernoulli()), rows)

        class Flat:
            def log_prob(self, params):
                return torch.zeros(len(next(iter(params.values()))))

        with pytest.raises(UnsupportedError, match="prior; got Flat"):
            bae.fit_weights(randomised, small_model(), rows, weight_prior=Flat())
        loader = torch.utils.data.DataLoader(rows, batch_size=3)
        with pytest.raises(DataError, match="row numbers"):
            bae.fit_weights(randomised, small_model(), loader)


def test_settings_that_make_no_ensemble_are_refused():
    with pytest.raises(UnsupportedError, match="members that differ"):
        bae.weights.Ensemble(starts="trained")
    with pytest.raises(UnsupportedError, match="starts, one of"):
        bae.weights.Ensemble(starts="random")
    with pytest.raises(DataError, match="learning_rate"):
        bae.weights.Ensemble(learning_rate=0.0)
    assert bae.weights.Ensemble(1, starts="trained").n_members == 1
