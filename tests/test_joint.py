"""`LogJoint.gradient` of flat weights, chains as a family, and errors that keep what a run has collected."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import distributed
from bayesae.families import Chains
from bayesae.functional import parameters_of
from bayesae.weights.flat import Chosen, Members, progress


@pytest.mark.parametrize("divides_rows", [False, True])
@pytest.mark.parametrize("is_whole", [True, False])
def test_gradient_is_that_of_the_estimate(model, rows, is_whole, divides_rows):
    subset = bae.Subset.of(model.network)
    if not is_whole:
        subset = subset.take(torch.arange(0, len(subset), 3))
    joint = bae.log_joint(model, n_data=40, temperature=0.7)
    base = parameters_of(model.network)
    theta = (subset.ravel(base) + 0.1 * torch.randn(3, len(subset), dtype=torch.float64)).requires_grad_()
    values, gradients = joint.gradient(theta, subset, base, bae.Batch(rows), divides_rows=divides_rows)
    expected = joint.estimate(subset.scatter(theta, base), bae.Batch(rows))
    assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients, torch.autograd.grad(expected.sum(), theta)[0], rtol=1e-10, atol=1e-10)
    assert not gradients.requires_grad and not values.requires_grad


def test_chosen_weights_are_copies(model):
    params = parameters_of(model.network)
    chosen = Chosen.of(params, bae.log_joint(model, 9), ("encoder.**",))
    chosen.start.zero_()
    for leaf in params.values():
        leaf.zero_()
    assert float(chosen.start.abs().max()) > 0
    fresh = chosen.fresh(bae.log_joint(model, 9))
    assert fresh.shape == chosen.start.shape and not torch.equal(fresh, chosen.start)


def test_a_members_numbers_depend_on_its_place_alone():
    like, device = torch.zeros(1, dtype=torch.float64), torch.device("cpu")
    drawn = []
    for n in (2, 5):
        with bae.random.scope(3):
            members = Members(n, device)
            drawn.append([members.normal(4, like) for _ in range(2)])
    for few, many in zip(*drawn, strict=True):
        assert_close(few, many[:2], rtol=0, atol=0)
    states = members.pack()
    again = members.normal(4, like)
    members.unpack(states)
    assert_close(members.normal(4, like), again, rtol=0, atol=0)


def test_progress_is_a_share_of_the_rows_of_a_pass(model):
    joint = bae.log_joint(model, n_data=10)
    assert [progress(n, 2, joint) for n in (0, 5, 20, 25)] == [0, 0.25, 1, 1]
    assert [progress(n, 2, replace(joint, n_pass=5)) for n in (0, 5, 20)] == [0, 0.5, 1]


def test_chains_are_judged_by_chain():
    atoms = {"w": torch.arange(6.0)[:, None]}
    chains = Chains(atoms, n_chains=2, log_joint=torch.zeros(2, 3))
    assert chains.by_chain(atoms["w"]).tolist() == [[[0], [1], [2]], [[3], [4], [5]]]
    with pytest.raises(bae.errors.ShapeError, match="draws of 4 chains, the same number each; got 6"):
        Chains(atoms, n_chains=4)
    with pytest.raises(bae.errors.ShapeError, match=r"a trace \(2, 3\); got \(3, 2\)"):
        Chains(atoms, n_chains=2, log_joint=torch.zeros(3, 2))


def test_a_divergence_pickles_with_what_was_collected():
    error = bae.errors.DivergedError("a", "b", "c", Chains({"w": torch.ones(2, 1)}))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and torch.equal(again.posterior.atoms["w"], torch.ones(2, 1))


def test_one_rank_is_the_identity(rows):
    assert (distributed.rank(), distributed.n_ranks(), distributed.own_members(5)) == (0, 1, slice(0, 5))
    assert distributed.own_rows(bae.Batch(rows)).x is rows
    assert distributed.add_over_ranks([rows])[0] is rows and distributed.gather_members(rows, 9) is rows
    assert distributed.same_seed(None) is None and distributed.same_seed(4) == 4 and distributed.are_the_same(1.0)


def test_a_posterior_with_noise_of_its_own_predicts_under_it(model, rows):
    subset = bae.Subset.of(model.network)
    learned = bae.likelihoods.Gaussian()
    model.likelihood = learned
    learned.set_extra_state(torch.tensor(0.04))
    noise = {"_extra_state": torch.tensor(0.25, dtype=torch.float64)}
    posterior = bae.families.DiagonalNormal(
        parameters_of(model.network), torch.full((len(subset),), 1e-4, dtype=torch.float64), subset, noise=noise
    )
    predictive = bae.Predictive(model, posterior)
    moments = predictive.moments(rows, n_weight_draws=2, seed=0)
    assert_close(moments.noise, torch.full_like(moments.noise, 0.25), rtol=1e-12, atol=0)
    assert predictive.model.encoder is model.encoder and model.likelihood is learned
    assert float(learned.scale) == pytest.approx(0.2)
