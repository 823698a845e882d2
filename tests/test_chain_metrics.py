"""Split R-hat and effective sample size against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from bayesae import errors, metrics

F64 = {"dtype": torch.float64}


def autoregressive(rho, n_chains, n, size):
    """Stationary AR(1) chains of unit variance, (C, n, size)."""
    noise = torch.randn(n, n_chains, size, **F64) * math.sqrt(1 - rho**2)
    values = [torch.randn(n_chains, size, **F64)]
    for step in noise[1:]:
        values.append(rho * values[-1] + step)
    return torch.stack(values, 1)


def slow_ess(chains):
    """BDA3, 11.5, one number at a time: variogram, then the sum by hand."""
    n = len(chains[0]) // 2
    halves = [half for chain in chains for half in (chain[:n], chain[-n:])]
    means = torch.stack([half.mean() for half in halves])
    within = torch.stack([half.var() for half in halves]).mean()
    spread = (n - 1) / n * within + means.var()

    def correlation(lag):
        products = [((h - h.mean())[: n - lag] * (h - h.mean())[lag:]).sum() / n for h in halves]
        return float(1 - (within - torch.stack(products).mean()) / spread)

    total, last, k = 0.0, math.inf, 0
    while 2 * k + 1 < n:
        pair = (1.0 if k == 0 else correlation(2 * k)) + correlation(2 * k + 1)
        if pair <= 0:
            break
        last = min(last, pair)
        total, k = total + last, k + 1
    draws = len(halves) * n
    return draws / max(2 * total - 1, 1 / math.log10(draws))


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_ess_of_an_autoregression(rho):
    chains, n = autoregressive(rho, 4, 2000, 32), 8000
    expected = n * (1 - rho) / (1 + rho)
    found = metrics.ess(chains)
    assert float(found.mean()) == pytest.approx(expected, rel=0.05)
    assert float((found / expected - 1).abs().max()) < 0.5


@pytest.mark.parametrize("rho", [-0.3, 0.5, 0.95])
def test_ess_equals_its_slow_twin(rho):
    chains = autoregressive(rho, 3, 41, 6)
    expected = torch.tensor([slow_ess(list(chains[..., i])) for i in range(6)], **F64)
    assert_close(metrics.ess(chains), expected, rtol=1e-10, atol=0)


def test_ess_of_alternating_draws_is_bounded():
    alternating = torch.tensor([1.0, -1.0]).repeat(100)[None, :, None] + 1e-3 * torch.randn(2, 200, 1)
    assert float(metrics.ess(alternating)) == pytest.approx(400 * math.log10(400), rel=1e-6)


def test_rhat_of_independent_draws_goes_to_one():
    # E[B / n] = 1 / n and so R-hat = 1 + O(1 / n): its mean excess over many numbers is about (1 - 1) / n = 0
    found = metrics.split_rhat(torch.randn(4, 1000, 500, **F64))
    assert abs(float(found.mean()) - 1) < 2e-4 and float(found.max()) < 1.02
    assert float(metrics.split_rhat(torch.randn(4, 100, 500, **F64)).max()) > float(found.max())


def test_rhat_of_shifted_chains_is_known():
    # chains of unit variance around -d and d: halves are two and two, Var of their means is 4 d^2 / 3
    d, n = 1.5, 20_000
    values = torch.randn(2, n, **F64) + torch.tensor([[-d], [d]], **F64)
    assert float(metrics.split_rhat(values)) == pytest.approx(math.sqrt(1 + 4 * d**2 / 3), rel=0.01)
    assert float(metrics.ess(values)) < 8


def test_rhat_sees_a_single_chain_that_drifts():
    drift = torch.linspace(-2, 2, 1000, **F64) + 0.5 * torch.randn(1, 1000, **F64)
    assert float(metrics.split_rhat(drift)) > 1.5 > 1.05 > float(metrics.split_rhat(torch.randn(1, 1000)))


def test_rhat_by_hand():
    values = torch.tensor([[1.0, 3.0, 99.0, 2.0, 6.0]])  # halves (1, 3) and (2, 6): W = 5, means 2 and 4: Var 2
    assert float(metrics.split_rhat(values)) == pytest.approx(math.sqrt(0.5 + 2 / 5))


def test_what_never_moves_has_no_number():
    values = torch.randn(2, 8, 3)
    values[..., 1] = 4.0
    for found in (metrics.split_rhat(values), metrics.ess(values)):
        assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("measure", [metrics.ess, metrics.split_rhat])
def test_bad_chains_are_refused(measure):
    with pytest.raises(errors.ShapeError, match="M >= 4"):
        measure(torch.randn(4, 3))
    with pytest.raises(errors.NonFiniteError, match="chain"):
        measure(torch.full((2, 5), torch.nan))
    with pytest.raises(errors.ShapeError, match="M >= 4"):
        measure(torch.zeros(2, 5, 0))
    values = torch.randn(2, 9, 3)
    assert torch.equal(measure(values.numpy()), measure(values.requires_grad_()))
