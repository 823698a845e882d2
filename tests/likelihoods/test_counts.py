from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.likelihoods import NegativeBinomial, Poisson, size_factors
from tests.likelihoods.cases import F64

COUNTS = [0, 1, 5, 7, 8, 9, 100, 10_000, 1_000_000]


def exact_poisson(x, f):
    with mpmath.workdps(50):
        return float(x * mpmath.mpf(f) - mpmath.exp(mpmath.mpf(f)) - mpmath.loggamma(x + 1))


def exact_negative_binomial(x, f, r):
    with mpmath.workdps(50):
        r, m = mpmath.mpf(r), mpmath.exp(mpmath.mpf(f))
        rising = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
        return float(rising + r * mpmath.log(r / (r + m)) + x * mpmath.log(m / (r + m)))


@pytest.mark.parametrize("x", COUNTS)
@pytest.mark.parametrize("gap", [-1.0, -0.01, 0.0, 0.1, 1.0])
def test_poisson_in_both_precisions(x, gap):
    f = float(torch.tensor(max(x, 1.0)).log() + gap)
    target = torch.tensor([float(x)])
    expected = torch.tensor([exact_poisson(x, f)], **F64)
    got = Poisson().log_density(torch.tensor([f], **F64), target.double())
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # f itself is rounded: its error times the slope is what single precision can hold
    slack = abs(x - float(torch.tensor(f, **F64).exp())) * 6e-8 * max(1.0, abs(f)) + 1e-5
    single = torch.tensor([f])
    expected = torch.tensor([exact_poisson(x, float(single))], **F64)
    assert_close(Poisson().log_density(single, target).double(), expected, rtol=2e-6, atol=slack)


def test_poisson_gradients():
    f = torch.linspace(-3, 8, 45, **F64, requires_grad=True)
    for x in (0.0, 3.0, 8.0, 500.0):
        (slope,) = torch.autograd.grad(Poisson().log_density(f, torch.full_like(f, x)).sum(), f)
        assert_close(slope, x - f.exp(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x", [0, 1, 7, 100, 10_000])
@pytest.mark.parametrize("r", [0.01, 1.0, 7.99, 8.0, 50.0, 1e6, 1e12])
def test_negative_binomial(x, r):
    f = float(torch.tensor(max(x, 1.0)).log() + 0.3)
    got = NegativeBinomial(r).log_density(torch.tensor([f], **F64), torch.tensor([float(x)], **F64))
    assert_close(got, torch.tensor([exact_negative_binomial(x, f, r)], **F64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_output", [False, True])
def test_negative_binomial_of_large_means_in_single_precision(per_output):
    f = torch.linspace(11, 12, 20)
    x = (f.exp() * torch.linspace(0.5, 2, 20)).round()
    head = NegativeBinomial(torch.full((20,), 5.1, **F64) if per_output else 5.1, per_output=per_output)
    expected = [exact_negative_binomial(float(a), float(b), 5.1) for a, b in zip(x, f, strict=True)]
    got = head.log_density(f[None], x[None])
    assert got.dtype == torch.float32
    assert_close(got[0].double(), torch.tensor(expected, **F64), rtol=1e-6, atol=0)
    mean = f.exp()
    matched = head.log_predictive(mean, mean + mean**2 / 5.1, x)
    wide = mean.double()
    assert_close(matched.double(), head.log_predictive(wide, wide + wide**2 / 5.1, x.double()), rtol=1e-5, atol=0)


def test_large_dispersion_is_poisson():
    f, x = torch.linspace(-2, 5, 20, **F64), torch.arange(20.0, **F64)
    assert_close(NegativeBinomial(1e14).log_density(f, x), Poisson().log_density(f, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("r", [0.6, 3.0])
def test_its_hessian_depends_on_the_data(r):
    """The closed form that the docstring gives, whose expectation is the Fisher information."""
    f = torch.tensor(0.7, **F64)
    head, m = NegativeBinomial(r), f.exp()
    for x in torch.arange(6.0, **F64):
        exact = torch.func.hessian(lambda g, x=x: -head.log_density(g[None], x[None])[0])(f)
        assert_close(exact, (x + r) * r * m / (r + m) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", [Poisson(), NegativeBinomial(2.0)], ids=repr)
@pytest.mark.parametrize(("bad", "shown"), [(-1.0, "-1"), (0.5, "0.5"), (float("inf"), "inf")])
def test_what_is_no_count(head, bad, shown):
    with pytest.raises(bae.errors.DataError, match=f"counts 0, 1, 2, ... for {type(head).__name__}; got {shown}"):
        head.check(torch.tensor([[3.0, bad]]))


def test_predictive_without_excess_is_poisson():
    mean, x = torch.tensor([3.0, 0.2, 40.0], **F64), torch.tensor([2.0, 0.0, 50.0], **F64)
    got = Poisson().log_predictive(mean, mean, x)
    assert_close(got, Poisson().log_density(mean.log(), x), rtol=1e-10, atol=1e-10)
    single = Poisson().log_predictive(mean.float(), mean.float(), x.float())
    assert_close(single.double(), got, rtol=1e-5, atol=1e-5)


class TestSizeFactors:
    def test_are_totals_over_their_mean(self):
        counts = torch.tensor([[1, 2, 3], [0, 0, 2], [4, 4, 8]])
        got = size_factors(counts)
        assert_close(got, torch.tensor([[6.0], [2.0], [16.0]]) / 8)
        assert got.dtype == torch.float32

    def test_errors(self):
        with pytest.raises(bae.errors.DataError, match="a count in every row; got 2 rows of zeros"):
            size_factors(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        with pytest.raises(bae.errors.DataError, match="for size_factors; got 0.5"):
            size_factors(torch.tensor([[0.5, 1.0]]))
        with pytest.raises(bae.errors.ShapeError, match="counts"):
            size_factors(torch.tensor([1.0, 2.0]))

    @pytest.mark.parametrize("dtype", ["int64", "float32", "float64"])
    def test_arrays(self, dtype):
        counts = np.array([[1, 2], [4, 5]], dtype=dtype)
        assert torch.equal(size_factors(counts), size_factors(torch.from_numpy(counts)))
