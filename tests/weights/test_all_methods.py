"""Every weight method, one row each in ``tests/cases.py``."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import testing
from tests.cases import WEIGHT_CASES, posterior_moments


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
class TestWeightInference:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_conforms(self, case, dtype):
        testing.check_weight_inference(case.quick(), dtype=dtype, n_batches=1 if case.needs_all_rows else 3)

    def test_fits_an_autoencoder_and_leaves_it_alone(self, case, model, rows):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        flags = model.training, [p.requires_grad for p in model.parameters()]
        state = torch.get_rng_state()
        posterior = bae.fit_weights(case.quick(), model, rows, seed=0, batch_size=9 if case.needs_all_rows else 4)
        assert torch.equal(state, torch.get_rng_state())
        assert flags == (model.training, [p.requires_grad for p in model.parameters()])
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert posterior.sample(2).keys() == dict(model.network.named_parameters()).keys()

    def test_the_same_seed_gives_the_same_bits(self, case, model, rows):
        first, second = (bae.fit_weights(case.quick(), model, rows, seed=3) for _ in range(2))
        assert all(torch.equal(first.mean[name], second.mean[name]) for name in first.mean)

    def test_draws_differ_and_so_do_scores(self, case, model, rows):
        posterior = bae.fit_weights(case.quick(), model, rows, seed=0, batch_size=9 if case.needs_all_rows else 3)
        draws = posterior.sample(posterior.n_atoms or 8)
        scores = bae.Predictive(model, posterior, linearised=False)(rows, seed=1).log_likelihood
        for name, leaf in draws.items():
            moves = case.moves and not name.endswith(case.fixed)
            assert bool((leaf.var(0, correction=0) > 0).any()) == moves, name
        assert bool((scores.var(1, correction=0) > 0).all()) == case.moves

    def test_frozen_weights_stay(self, case, model, rows):
        for parameter in model.encoder.parameters():
            parameter.requires_grad_(False)
        draws = bae.fit_weights(case.quick(), model, rows, seed=0).sample(3)
        for name, parameter in model.network.named_parameters():
            if name.startswith("encoder"):
                assert_close(draws[name], parameter.detach().expand(3, *parameter.shape), rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in WEIGHT_CASES if case.exact_world], ids=str)
def test_is_exact_when_it_says_so(case):
    world = case.exact_world()
    mean, variance = posterior_moments(testing.run_inference(case.build(), world))
    expected = case.exact_variance(world)
    for name in world.mean:
        assert_close(mean[name], world.mean[name], **case.tolerance)
        assert_close(variance[name], expected[name], **case.tolerance)


def test_conformance_suite_sees_a_broken_method():
    class Forgetful(bae.weights.MAP):
        def posterior(self, state, joint):
            return bae.families.Particles({"weight": state["weight"][None]})

    with pytest.raises(bae.errors.BayesAEError, match="expected draws"):
        testing.check_weight_inference(Forgetful())


def test_conformance_suite_sees_a_method_that_writes_on_the_weights_it_was_given():
    class Greedy(bae.weights.MAP):
        def init(self, params, joint):
            return {name: leaf.add_(1) for name, leaf in params.items()}

    with pytest.raises(bae.errors.BayesAEError, match="untouched starting weights"):
        testing.check_weight_inference(Greedy())
