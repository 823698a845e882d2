"""Stochastic back-propagation: gradients of expectations under a Normal, by first and by second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.codes import normal_gradients
from bayesae.testing import LinearGaussian

S, B, Z, K = 2, 3, 4, 5


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic():
    """A symmetric matrix and a vector: f(z) = z^T A z / 2 + b^T z."""
    root = normal(Z, Z, seed=5)
    return root + root.T, normal(Z, seed=6)


def parameters():
    return normal(S, B, Z), normal(S, B, Z, Z, seed=1)


class TestQuadratic:
    """E f = m^T A m / 2 + b^T m + tr(A C) / 2, of which gradients are A m + b, A R and A / 2."""

    def test_second_order_is_exact_in_covariance_and_factor(self):
        (matrix, vector), (loc, factor) = quadratic(), parameters()

        def f(z):
            return 0.5 * torch.einsum("...i,ij,...j->...", z, matrix, z) + z @ vector

        got = normal_gradients(f, loc, factor, normal(K, S, B, Z, seed=2), order="second")
        assert_close(got.covariance, 0.5 * matrix.expand(S, B, Z, Z), rtol=0, atol=1e-12)
        assert_close(got.factor, matrix @ factor, rtol=0, atol=1e-12)
        even = normal(K, S, B, Z, seed=2)
        got = normal_gradients(f, loc, factor, torch.cat([even, -even]), order="second")
        assert_close(got.loc, loc @ matrix + vector, rtol=0, atol=1e-12)

    def test_first_order_is_exact_where_the_noise_has_the_moments_of_a_normal(self):
        (matrix, vector), (loc, factor) = quadratic(), parameters()
        noise = Z**0.5 * torch.cat([torch.eye(Z), -torch.eye(Z)]).double()  # mean 0, covariance I
        got = normal_gradients(
            lambda z: 0.5 * torch.einsum("...i,ij,...j->...", z, matrix, z) + z @ vector,
            loc,
            factor,
            noise[:, None, None].expand(-1, S, B, -1),
        )
        assert_close(got.loc, loc @ matrix + vector, rtol=0, atol=1e-12)
        assert_close(got.factor, matrix @ factor, rtol=0, atol=1e-12)
        assert got.covariance is None


def cubic_and_quartic(z):
    """Sum of z_j^4 / 4, of z_j^3 and of one product of three."""
    return 0.25 * (z**4).sum(-1) + (z**3).sum(-1) + z[..., 0] * z[..., 1] * z[..., 2]


def closed_form(loc, covariance):
    """Gradients in m and C of the expectation, from E z^3 = m^3 + 3 m C and E z^4 = m^4 + 6 m^2 C + 3 C^2."""

    def expectation(m, c):
        var = c.diagonal()
        quartic = 0.25 * (m**4 + 6 * m**2 * var + 3 * var**2).sum()
        cubic = (m**3 + 3 * m * var).sum()
        product = m[0] * m[1] * m[2] + m[0] * c[1, 2] + m[1] * c[0, 2] + m[2] * c[0, 1]
        return quartic + cubic + product

    of_loc, of_covariance = torch.func.grad(expectation, (0, 1))(loc, covariance)
    return of_loc, 0.5 * (of_covariance + of_covariance.T)


@pytest.mark.parametrize("order", ["first", "second"])
def test_unbiased_of_a_cubic_and_a_quartic(order):
    loc, factor = normal(Z), 0.7 * normal(Z, Z, seed=1)
    of_loc, of_covariance = closed_form(loc, factor @ factor.T)
    n = 4000
    noise = normal(n, 1, Z, seed=2)
    # each draw as a row of its own gives the spread of one
    single = normal_gradients(
        cubic_and_quartic, loc.expand(n, Z), factor.expand(n, Z, Z), noise.transpose(0, 1), order=order
    )
    pooled = normal_gradients(cubic_and_quartic, loc, factor, noise[:, 0], order=order)
    expected = {"loc": of_loc, "factor": 2 * of_covariance @ factor, "covariance": of_covariance}
    for name, value in expected.items():
        if (one := getattr(single, name)) is None:
            assert order == "first" and name == "covariance"
            continue
        assert_close(one.mean(0), getattr(pooled, name), rtol=0, atol=1e-10)
        error = one.std(0) / n**0.5
        assert bool(((one.mean(0) - value).abs() <= 4 * error + 1e-12).all()), name
        assert bool((error < 0.2 * value.abs().max()).all())


def test_first_order_is_what_automatic_differentiation_gives():
    loc, factor = (part.requires_grad_() for part in parameters())
    noise = normal(K, S, B, Z, seed=2)
    latents = loc + torch.einsum("sbij,ksbj->ksbi", factor, noise)
    expected = torch.autograd.grad(cubic_and_quartic(latents).mean(0).sum(), (loc, factor))
    got = normal_gradients(cubic_and_quartic, loc.detach(), factor.detach(), noise)
    assert_close(got.loc, expected[0], rtol=0, atol=1e-12)
    assert_close(got.factor, expected[1], rtol=0, atol=1e-12)


def test_the_elbo_of_a_linear_decoder_is_stationary_at_its_posterior():
    """With R of the exact posterior, E grad^2 log p(x, z) = -C^-1, which the entropy's gradient takes away."""
    world = LinearGaussian.make(n_data=B)
    model = world.model("full")
    bound, batch = model.live(), world.batch
    law = bae.codes.Amortised("full").law(bound, batch)
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    bound = model.at(params)

    def log_joint(z):
        return bound.likelihood.log_prob(bound.decode(z), batch.x) + bound.log_prior(z)

    factor = law.factor.detach()
    noise = normal(K, 1, B, world.n_latents, seed=2)
    got = normal_gradients(log_joint, law.loc.detach(), factor, noise, order="second")
    assert_close(got.covariance, -0.5 * world.precision.expand_as(factor), rtol=0, atol=1e-9)


def test_an_unknown_order():
    with pytest.raises(bae.errors.UnsupportedError, match="'first' or 'second'"):
        normal_gradients(cubic_and_quartic, *parameters(), normal(K, S, B, Z), order="third")
