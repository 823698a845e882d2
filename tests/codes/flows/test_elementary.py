"""Planar and radial flows: the constraints, and that they leave nothing out."""

from __future__ import annotations

import pytest
import torch

import bayesae as bae
from bayesae import codes
from tests.codes.flows.cases import ELEMENTARY, inputs, jacobians


def slope_inverse(value):
    """The raw number whose slope is ``value``, by bisection."""
    low, high = torch.full_like(value, -1e4), torch.full_like(value, 1e4)
    for _ in range(200):
        middle = (low + high) / 2
        softplus = torch.nn.functional.softplus
        is_low = (1 + softplus(middle)) / (1 + softplus(-middle)) < value
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (low + high) / 2


@pytest.mark.parametrize("case", ELEMENTARY, ids=str)
class TestConstraints:
    def test_no_numbers_at_all_are_the_identity(self, case):
        flow = case.flow()
        latents, parameters = inputs(flow)
        moved, log_det = flow(latents, 0 * parameters)
        torch.testing.assert_close(moved, latents, rtol=0, atol=1e-15)
        assert float(log_det.abs().max()) < 1e-15

    def test_small_numbers_are_near_it(self, case):
        flow = case.flow()
        latents, parameters = inputs(flow, scale=0.1)
        moved, log_det = flow(latents, parameters)
        assert float((moved - latents).abs().max()) < 0.5 and float(log_det.abs().max()) < 0.5

    @pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
    def test_every_step_can_be_undone(self, case, size):
        """The determinant of the map is positive, also where maps without bounds are singular."""
        flow = type(case.flow())(1)
        for seed in range(20):
            latents, parameters = inputs(flow, (7, 1, 3, 2), scale=size, seed=seed)
            if case.name == "planar":  # on the hyperplane, u against w
                parameters[..., 0] = -parameters[..., 1]
                parameters[..., 2] = 0
                latents = latents * 1e-3
            else:  # at the centre, drawn together
                parameters[..., 2] = -parameters[..., 2].abs()
                latents = parameters[..., 0] + 1e-3 * latents
            moved, log_det = flow(latents, parameters)
            assert bool(torch.isfinite(log_det).all())
            jacobian = jacobians(lambda z, p=parameters: flow(z, p)[0], latents)
            assert bool((torch.linalg.det(jacobian) > 0).all())


def test_any_planar_map_that_can_be_undone_is_one_of_them():
    """Those of u and w with w u > -1, which is what the paper's own constraint leaves."""
    w, u, b = torch.tensor([0.7, -1.2, 0.4]), torch.tensor([-0.3, 0.5, 0.1]), torch.tensor(0.6)
    w, u, b = w.double(), u.double(), b.double()
    for size in (0.5, 1.0, 1.2, -1.0, -7.0):  # w u from -0.92 to 5.4
        hat = size * u
        along = (w * hat).sum()
        assert along > -1
        raw = hat * slope_inverse(1 + along) / along
        parameters = torch.stack([raw, w, b.expand(3)], -1)[None, None]
        latents = torch.randn(4, 1, 1, 3, dtype=torch.float64)
        moved, log_det = codes.Planar()(latents, parameters)
        height = torch.tanh(latents @ w + b)
        torch.testing.assert_close(moved, latents + height[..., None] * hat, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det[..., 0], torch.log1p((1 - height**2) * along), rtol=0, atol=1e-10)


def test_any_radial_map_that_can_be_undone_is_one_of_them():
    """Those of alpha > 0 and beta > -alpha, in the paper's letters and by its formula of the determinant."""
    centre = torch.tensor([0.3, -1.0, 0.2], dtype=torch.float64)
    for alpha, beta in ((0.3, -0.29), (2.0, 5.0), (1.0, -0.5), (0.1, 0.0)):
        raw = slope_inverse(torch.tensor([alpha, 1 + beta / alpha], dtype=torch.float64))
        parameters = torch.stack([centre, raw[0].expand(3), raw[1].expand(3)], -1)[None, None]
        latents = torch.randn(4, 1, 1, 3, dtype=torch.float64)
        moved, log_det = codes.Radial()(latents, parameters)
        shift = latents - centre
        r = shift.norm(dim=-1)
        h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
        torch.testing.assert_close(moved, latents + (beta * h)[..., None] * shift, rtol=0, atol=1e-10)
        expected = 2 * torch.log(1 + beta * h) + torch.log(1 + beta * h + beta * slope * r)
        torch.testing.assert_close(log_det[..., 0], expected, rtol=0, atol=1e-9)


def test_a_code_at_the_centre_has_gradients():
    latents, parameters = inputs(codes.Radial(), (1, 1, 2, 3))
    parameters = parameters.requires_grad_()
    moved, log_det = codes.Radial()(parameters[None, ..., 0], parameters)
    (slope,) = torch.autograd.grad(moved.sum() + log_det.sum(), parameters)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("n_steps", [0, -1, 1.5])
def test_numbers_of_steps(n_steps):
    with pytest.raises(bae.errors.DataError, match="n_steps"):
        codes.Planar(n_steps)
