from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("likelihood", [bae.likelihoods.Gaussian(0.4), bae.likelihoods.Bernoulli()], ids=repr)
class TestNormalOutputs:
    @pytest.mark.parametrize("var", [1e-8, 1e-4, 0.25, 2.0, 5.9, 6.1, 30.0])
    def test_moments_under_a_normal_output(self, likelihood, var):
        """Against the trapezoidal rule on a fine grid, narrow and wide, to relative precision."""
        mean = torch.tensor([-9.0, -4.0, -1.0, 0.0, 0.3, 6.0], **F64)
        grid = torch.linspace(-14, 14, 56_001, **F64)
        weight = torch.exp(-(grid**2) / 2)
        weight = weight / weight.sum()
        at = mean[:, None] + math.sqrt(var) * grid
        first = likelihood.mean(at) @ weight
        spread = (likelihood.mean(at) - first[:, None]) ** 2 @ weight
        noise = likelihood.variance(at) @ weight
        got = likelihood.normal_moments(mean, torch.full_like(mean, var))
        assert_close(got[0], first, rtol=2e-6, atol=1e-15)
        assert_close(got[1], noise, rtol=2e-5, atol=0)
        assert_close(got[2], spread, rtol=2e-5 if var > 1 else 1e-10, atol=0)


def test_logistic_is_this_sum_of_normal_distribution_functions():
    from bayesae.likelihoods.bernoulli import _PROBIT_RATES, _PROBIT_WEIGHTS

    x = torch.linspace(-40, 40, 20001, **F64)
    total = sum(w * torch.special.ndtr(r * x) for w, r in zip(_PROBIT_WEIGHTS, _PROBIT_RATES, strict=True))
    assert float((total - x.sigmoid()).abs().max()) < 3e-9


def test_a_very_wide_logit_is_a_coin():
    mean, noise, weights = bae.likelihoods.Bernoulli().normal_moments(
        torch.zeros(1, **F64), torch.full((1,), 1e8, **F64)
    )
    assert_close(mean, torch.tensor([0.5], **F64))
    assert_close(noise + weights, torch.tensor([0.25], **F64))
    assert float(weights) > 0.2499


@pytest.mark.parametrize("likelihood", [bae.likelihoods.Gaussian(0.003), bae.likelihoods.Bernoulli()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_scored_in_float32(likelihood, dtype):
    outputs = torch.randn(3, 784).to(dtype)
    target = outputs.float().sigmoid()
    got = likelihood.log_prob(outputs, target)
    assert got.dtype == torch.float32
    assert_close(got, likelihood.log_prob(outputs.double(), target.double()).float(), rtol=1e-5, atol=1e-3)


def test_noise_is_the_same_number_in_any_dtype():
    model = bae.Autoencoder(torch.nn.Linear(2, 1), torch.nn.Linear(1, 2), bae.likelihoods.Gaussian(0.3)).double()
    assert model.likelihood.noise_var == 0.3**2


def test_learned_scale_is_saved_restored_and_floored():
    likelihood = bae.likelihoods.Gaussian()
    assert not likelihood.is_estimated
    with pytest.raises(bae.errors.NotFittedError, match="never estimated"):
        likelihood.log_prob(torch.zeros(1, 2), torch.zeros(1, 2))
    other = bae.likelihoods.Gaussian()
    other.load_state_dict(likelihood.state_dict())
    assert not other.is_estimated
    likelihood.set_noise_var(0.25)
    other.load_state_dict(likelihood.state_dict())
    assert other.noise_var == 0.25
    likelihood.set_noise_var(0.0)
    assert likelihood.noise_var == 1e-6


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_scale_must_be_positive(bad):
    with pytest.raises(bae.errors.DataError, match="positive, finite scale"):
        bae.likelihoods.Gaussian(bad)


def test_bernoulli_range():
    with pytest.raises(bae.errors.DataError, match="values from -1 to 255"):
        bae.likelihoods.Bernoulli().check(torch.tensor([[-1.0, 255.0]]))


@pytest.mark.parametrize("head", [bae.likelihoods.Bernoulli(), bae.likelihoods.ContinuousBernoulli()])
def test_no_rows_have_no_range(head):
    head.check(torch.zeros(0, 3))


def test_a_scale_whose_square_overflows_is_refused():
    with pytest.raises(bae.errors.DataError, match="a scale whose square is finite"):
        bae.likelihoods.Gaussian(1e200)
