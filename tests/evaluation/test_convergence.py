"""Chains judged by what their networks do."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import errors, evaluation, metrics
from bayesae.families import Chains
from bayesae.functional import parameters_of


def chains_of(model, shifts, n=40, scale=1e-3, log_joint=None):
    """Independent draws around the model, the biases of chain c shifted by ``shifts[c]``."""
    atoms = {}
    for name, leaf in parameters_of(model.network).items():
        draws = leaf + scale * torch.randn(len(shifts), n, *leaf.shape, dtype=leaf.dtype)
        if name.endswith("bias"):
            draws = draws + torch.tensor(shifts, dtype=leaf.dtype).reshape(-1, 1, *[1] * leaf.dim())
        atoms[name] = draws.flatten(0, 1)
    return Chains(atoms, n_chains=len(shifts), log_joint=log_joint)


def test_numbers_are_those_of_a_loop_over_draws(model, rows):
    trace = torch.randn(3, 40, dtype=torch.float64)
    posterior = chains_of(model, (0.0, 0.0, 0.0), log_joint=trace)
    found = evaluation.convergence(bae.Predictive(model, posterior), rows, chunk_size=50)
    outputs, densities = [], []
    for i in range(120):
        bound = model.at({name: leaf[i : i + 1] for name, leaf in posterior.atoms.items()})
        natural = bound.decode(bound.encode(rows))
        outputs.append(natural[0])
        densities.append(model.likelihood.log_prob(natural, rows)[0])
    outputs, densities = (torch.stack(v).unflatten(0, (3, 40)) for v in (outputs, densities))
    for name, values in (("output", outputs), ("log_likelihood", densities), ("log_joint", trace)):
        assert_close(getattr(found, f"{name}_rhat"), metrics.split_rhat(values))
        assert_close(getattr(found, f"{name}_ess"), metrics.ess(values))
    assert found.output_rhat.shape == (9, 7) and found.log_joint is trace
    assert (found.n_chains, found.n_draws) == (3, 40)
    text = str(found)
    assert "3 chains of 40 kept draws, 120 in all" in text and "log-joint" in text and "0.0%" in text


def test_chains_apart_are_told(model, rows):
    # a spread so small that even outputs which the shift hardly moves are apart
    posterior = chains_of(model, (0.0, 0.5), scale=1e-5)
    with pytest.warns(RuntimeWarning, match=r"not come together: .* 100% of the outputs, 100% of the log-densities"):
        found = evaluation.convergence(bae.Predictive(model, posterior), rows)
    assert found.shares_apart == {"outputs": 1, "log-densities of rows": 1}
    # of chains d standard deviations apart R-hat^2 goes to 1 + d^2 / 3
    means = [bae.Predictive(model, chains_of(model, [one], 1, 0.0)).moments(rows).mean for one in (0.0, 0.5)]
    outputs = bae.Predictive(model, posterior)(rows, keep_outputs=True).outputs[0].unflatten(0, (2, 40))
    distance = (means[1] - means[0]) / outputs.var(1).mean(0).sqrt()
    assert_close(found.output_rhat, (1 + distance**2 / 3).sqrt(), rtol=0.05, atol=0)
    assert float(found.log_likelihood_rhat.min()) > 1.1
    assert found.log_joint is None and found.log_joint_rhat.numel() == 0 and "none" in str(found)


def test_chains_that_stand_still_in_different_places_are_told(model, rows):
    posterior = chains_of(model, (0.0, 0.5), scale=0.0)
    with pytest.warns(RuntimeWarning, match=r"not come together: .*100% of the outputs, 100% of the log-densities"):
        found = evaluation.convergence(bae.Predictive(model, posterior), rows)
    assert float(found.output_rhat.min()) > 1e6 and "100.0%" in str(found)


def test_chains_that_stand_still_in_one_place_never_move(model, rows):
    found = evaluation.convergence(bae.Predictive(model, chains_of(model, (0.0, 0.0), scale=0.0)), rows)
    assert found.shares_apart == {} and "never moves" in str(found)


def test_an_energy_that_drifts_is_told(model, rows):
    trace = torch.linspace(0, 5, 40).expand(2, -1) + torch.randn(2, 40)
    posterior = chains_of(model, (0.0, 0.0), log_joint=trace)
    with pytest.warns(RuntimeWarning, match="few effective draws for log-joint"):
        evaluation.convergence(bae.Predictive(model, posterior), rows)


def test_hidden_units_in_another_order_are_the_same_network(model, rows):
    """R-hat of the weights would be huge; that of the function is 1."""
    posterior = chains_of(model, (0.0, 0.0))
    atoms = {name: leaf.clone() for name, leaf in posterior.atoms.items()}
    names = [name for name in atoms if name.startswith("decoder")]
    weight, bias, following = names[0], names[1], names[2]
    order = torch.arange(atoms[weight].shape[1]).flip(0)
    second = slice(40, None)
    atoms[weight][second] = atoms[weight][second][:, order]
    atoms[bias][second] = atoms[bias][second][:, order]
    atoms[following][second] = atoms[following][second][:, :, order]
    swapped = Chains(atoms, n_chains=2)
    assert float(metrics.split_rhat(swapped.by_chain(atoms[weight])).max()) > 10
    before, after = (evaluation.convergence(bae.Predictive(model, p), rows) for p in (posterior, swapped))
    assert_close(after.output_rhat, before.output_rhat)


def test_of_a_sampler_and_nothing_else(model, rows):
    method = bae.weights.SGHMC(1e-5, 0.5, epochs=40, n_chains=2, thinning=1)
    posterior = bae.fit_weights(method, model, rows, seed=0)
    with pytest.warns(RuntimeWarning, match="not come together"):  # forty short steps of an untrained network
        found = evaluation.convergence(bae.Predictive(model, posterior), rows)
    assert found.log_joint.shape == (2, 20)
    laplace = bae.fit_weights(bae.weights.Laplace(), model, rows, seed=0)
    with pytest.raises(errors.UnsupportedError, match="posterior of chains"):
        evaluation.convergence(bae.Predictive(model, laplace), rows)
