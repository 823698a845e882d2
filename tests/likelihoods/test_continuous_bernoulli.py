from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.likelihoods import ContinuousBernoulli
from tests.likelihoods.cases import F64

SIZES = torch.cat([torch.tensor([0.0]), torch.logspace(-12, 4, 161), torch.tensor([0.9999, 1.0, 1.0001])])
LOGITS = torch.cat([SIZES, -SIZES[1:]]).double()
HEAD = ContinuousBernoulli()


def exact(f: float) -> tuple[float, float, float]:
    """Log-normaliser, mean and variance to 50 digits."""
    with mpmath.workdps(60):
        f = mpmath.mpf(f)
        if f == 0:
            return 0.0, 0.5, 1 / 12
        normaliser = mpmath.log(mpmath.expm1(f) / f)
        mean = 1 / (1 - mpmath.exp(-f)) - 1 / f
        return float(normaliser), float(mean), float(1 / f**2 - 1 / (4 * mpmath.sinh(f / 2) ** 2))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 3e-14), (torch.float32, 2e-6)])
def test_precise_at_every_logit(dtype, rtol):
    logits = LOGITS.to(dtype)
    normaliser, mean, variance = (torch.tensor(v, **F64) for v in zip(*map(exact, logits.tolist()), strict=True))
    assert_close(HEAD.mean(logits).double(), mean, rtol=rtol, atol=0)
    assert_close(HEAD.variance(logits).double(), variance, rtol=4 * rtol, atol=0)
    at_zero = -HEAD.log_density(logits, torch.zeros_like(logits)).double()
    # the normaliser runs from f / 2 - ... near 0 to -log(-f) below: relative to the size of its terms
    error = (at_zero - normaliser).abs() / (1 + logits.double().abs())
    assert float(error.max()) < rtol


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_pass_through_zero(dtype):
    logits = LOGITS.to(dtype).requires_grad_()
    target = torch.full_like(LOGITS, 0.3, dtype=dtype)
    (slope,) = torch.autograd.grad(HEAD.log_density(logits, target).sum(), logits, create_graph=True)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}[dtype]
    assert_close(slope, target - HEAD.mean(logits), rtol=0, atol=tolerance)
    (curve,) = torch.autograd.grad(slope.sum(), logits)
    assert_close(curve, -HEAD.variance(logits), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("var", [1e-8, 1e-2, 1.0, 15.9, 16.1, 1e2, 1e4, 1e6])
def test_moments_under_a_normal_logit_of_any_width(var):
    """Against the trapezoidal rule on a grid that resolves the mean's step, up to where the rules meet and beyond."""
    mean = torch.tensor([-900.0, -90.0, -30.0, -9.0, -1.0, 0.0, 0.3, 6.0, 25.0, 31.9, 32.1, 33.0, 400.0], **F64)
    scale = math.sqrt(var)
    grid = torch.linspace(-12, 12, 4001 + int(50 * scale), **F64)
    weight = torch.exp(-(grid**2) / 2)
    weight = weight / weight.sum()
    got = HEAD.normal_moments(mean, torch.full_like(mean, var))
    for i, centre in enumerate(mean):
        at = centre + scale * grid
        m = HEAD.mean(at)
        first = m @ weight
        expected = first, HEAD.variance(at) @ weight, (m - first) ** 2 @ weight
        for mine, brute in zip(got, expected, strict=True):
            assert_close(mine[i], brute, rtol=1e-10 if var == 1e-8 else 1e-9, atol=2e-11 if var > 1 else 1e-16)


def test_moments_in_single_precision():
    mean, var = torch.linspace(-20, 20, 81), torch.logspace(-6, 4, 41)
    mean, var = torch.cartesian_prod(mean, var).unbind(-1)
    narrow, wide = HEAD.normal_moments(mean, var), HEAD.normal_moments(mean.double(), var.double())
    for mine, exact_part in zip(narrow, wide, strict=True):
        assert_close(mine.double(), exact_part, rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logit_of_a_mean(dtype):
    eps = torch.finfo(dtype).eps
    tail = torch.cat([torch.logspace(math.log10(2 * eps), math.log10(0.5), 200, dtype=dtype)])
    assert_close(HEAD.mean(HEAD.logit_of(tail)), tail, rtol=8 * eps, atol=0)
    assert_close(HEAD.logit_of(1 - tail), -HEAD.logit_of(1 - (1 - tail)), rtol=0, atol=0)
    assert bool(HEAD.logit_of(torch.tensor([0.0, 1.0], dtype=dtype)).isfinite().all())


def test_range():
    with pytest.raises(bae.errors.DataError, match="ContinuousBernoulli data in .0, 1.; got values from -1 to 255"):
        HEAD.check(torch.tensor([[-1.0, 255.0]]))
