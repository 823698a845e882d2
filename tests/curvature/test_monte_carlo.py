"""Random probes are unbiased and know their error; the paper's approximation is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.curvature import Linearisation, approximate_diagonal, ggn_diagonal, monte_carlo_diagonal
from tests.curvature import zoo

NAMES = [
    "mlp",
    "norms and PReLU",
    "skip",
    "tied",
    "unreadable",
    "positions",
    "conv",
    "one axis",
    "dilated, grouped, same",
]


@pytest.mark.parametrize("hessian", zoo.HESSIANS)
@pytest.mark.parametrize("name", NAMES)
def test_layer_sums_are_unbiased(name, hessian):
    network, x, _, _ = zoo.build(name)
    lin = Linearisation(network)
    exact = ggn_diagonal(lin, x, zoo.HESSIANS[hessian])
    generator = torch.Generator().manual_seed(0)
    sums = {k: [] for k in exact}
    for _ in range(60):
        probe = monte_carlo_diagonal(lin, x, zoo.HESSIANS[hessian], n_probes=2, generator=generator)
        for k, leaf in probe.mean.items():
            sums[k].append(leaf.sum())
    for k, values in sums.items():
        values = torch.stack(values)
        error = float(values.std()) / 60**0.5
        # 1e-20: sums that are 0 but for rounding
        assert abs(float(values.mean() - exact[k].sum())) < 4 * error + 1e-9 * float(exact[k].sum()) + 1e-20


def test_the_standard_error_is_that_of_normal_projections():
    """Hundreds of outputs: the spread over repeats is what one repeat says."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 300)).double()
    lin, x = Linearisation(network), torch.rand(20, 3).double()
    generator = torch.Generator().manual_seed(0)
    repeats = [monte_carlo_diagonal(lin, x, zoo.diagonal, generator=generator) for _ in range(800)]
    spread = torch.stack([r.mean["0.weight"] for r in repeats]).var(0)
    claimed = torch.stack([r.standard_error["0.weight"] for r in repeats]).square().mean(0)
    assert_close(claimed / spread, torch.ones_like(spread), rtol=0.25, atol=0)


def test_an_output_layer_is_exact_with_one_probe_and_more_probes_err_less():
    network, x, _, _ = zoo.build("mlp")
    lin = Linearisation(network)
    got, exact = monte_carlo_diagonal(lin, x, zoo.scalar), ggn_diagonal(lin, x, zoo.scalar)
    assert_close(got.mean["5.weight"], exact["5.weight"])  # signs square to one
    more = monte_carlo_diagonal(lin, x, zoo.scalar, n_probes=100)
    assert float(more.standard_error["0.weight"].mean()) < 0.5 * float(got.standard_error["0.weight"].mean())


def test_the_generator_decides_and_the_callers_is_left_alone():
    network, x, _, _ = zoo.build("mlp")
    lin, state = Linearisation(network), torch.get_rng_state()
    one, two = (monte_carlo_diagonal(lin, x, zoo.scalar, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert_close(one.mean, two.mean, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_papers_approximation_by_hand():
    network, x, _, _ = zoo.build("mlp")
    got = approximate_diagonal(Linearisation(network), x, zoo.scalar)
    h, inputs, slopes = x, [], []
    for layer in network:
        if isinstance(layer, nn.Linear):
            inputs.append(h)
            slopes.append(torch.ones(()))
        h = layer(h)
        if isinstance(layer, nn.Tanh):
            slopes[-1] = 1 - h**2
    m = 2.5 * torch.ones_like(h)
    for i, layer in reversed(list(enumerate(one for one in network if isinstance(one, nn.Linear)))):
        m = m * slopes[i] ** 2
        name = [k for k, one in network.named_modules() if one is layer][0]
        assert_close(got[f"{name}.weight"], m.mT @ inputs[i] ** 2)
        assert_close(got[f"{name}.bias"], m.sum(0))
        m = m @ layer.weight**2


@pytest.mark.parametrize("hessian", zoo.HESSIANS)
def test_the_papers_approximation_is_exact_for_one_layer(hessian):
    for network, x in (
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), torch.rand(5, 4).double()),
        (
            nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 3, 4)), nn.ConvTranspose2d(1, 2, 2, 2)).double(),
            torch.rand(5, 12).double(),
        ),
    ):
        if hessian == "low rank" and x.shape[1] == 12:
            continue  # a tap feeds many outputs, which curve together here
        lin = Linearisation(network)
        got, exact = (f(lin, x, zoo.HESSIANS[hessian]) for f in (approximate_diagonal, ggn_diagonal))
        weights = {k: v for k, v in got.items() if k.endswith("weight") or x.shape[1] == 4}
        assert_close(weights, {k: exact[k] for k in weights}, rtol=1e-7, atol=1e-8)


def test_the_papers_approximation_is_one():
    network, x, _, _ = zoo.build("mlp")
    lin = Linearisation(network)
    got, exact = approximate_diagonal(lin, x, zoo.scalar), ggn_diagonal(lin, x, zoo.scalar)
    assert_close(got["5.weight"], exact["5.weight"])
    assert float((got["0.weight"] / exact["0.weight"] - 1).abs().max()) > 0.1


def test_the_papers_approximation_names_what_it_does_not_know():
    for name, what in (("norms and PReLU", "LayerNorm '5'"), ("up-sampling", "Upsample '7'"), ("tied", "a.weight")):
        network, x, _, _ = zoo.build(name)
        with pytest.raises(bae.errors.UnsupportedError, match=what):
            approximate_diagonal(Linearisation(network), x, zoo.scalar)
