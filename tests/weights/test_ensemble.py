from __future__ import annotations

import pytest
import torch

import bayesae as bae
from bayesae.functional import parameters_of, select_draws
from tests.conftest import small_model


def test_members_are_what_single_trainings_are(model, rows):
    """The mapped training of M networks equals M trainings in a plain loop."""
    ensemble = bae.weights.Ensemble(2, epochs=1, learning_rate=1e-2)
    joint = bae.log_joint(model, n_data=9)
    torch.manual_seed(0)
    state = ensemble.init(parameters_of(model.network), joint)
    starts = [{k: v.detach().clone()[m] for k, v in state.members.items()} for m in range(2)]
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
            torch.testing.assert_close(member[name][0], leaves[name].detach(), rtol=1e-9, atol=1e-11)


def test_members_differ(rows):
    model = small_model()
    posterior = bae.fit_weights(bae.weights.Ensemble(3, epochs=2), model, rows)
    assert posterior.n_atoms == 3
    assert float(posterior.sample(3)["encoder.1.weight"].var(0).min()) > 0


def test_divergence_is_said(model, rows):
    with pytest.raises(bae.errors.NonFiniteError, match="Lower learning_rate"):
        bae.fit_weights(bae.weights.Ensemble(2, epochs=5, learning_rate=1e200), model, rows)


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
