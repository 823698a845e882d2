"""What holds of every flow: its determinant is that of its Jacobian, and it is a bijection for any numbers."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.codes.flows.cases import AUTOREGRESSIVE, ELEMENTARY, FLOWS, inputs, jacobians

every = pytest.mark.parametrize("case", FLOWS, ids=str)


@every
class TestFlow:
    def test_the_determinant_is_that_of_the_jacobian(self, case):
        flow = case.flow()
        latents, parameters = inputs(flow)
        moved, log_det = flow(latents, parameters)
        assert moved.shape == latents.shape and log_det.shape == (2, 3, 4, 5 if case.splits else 1)
        jacobian = jacobians(lambda z: flow(z, parameters)[0], latents)
        sign, expected = torch.linalg.slogdet(jacobian)
        assert bool((sign > 0).all())
        torch.testing.assert_close(log_det.sum(-1), expected, rtol=0, atol=1e-10)

    def test_every_code_is_moved_alone(self, case):
        flow = case.flow()
        latents, parameters = inputs(flow)
        moved, log_det = flow(latents, parameters)
        for k in range(2):
            for s in range(3):
                for b in range(4):
                    one = flow(latents[k, s, b][None, None, None], parameters[s, b][None, None])
                    torch.testing.assert_close(one[0][0, 0, 0], moved[k, s, b], rtol=0, atol=1e-12)
                    torch.testing.assert_close(one[1][0, 0, 0], log_det[k, s, b], rtol=0, atol=1e-12)

    def test_all_of_the_encoders_numbers_count(self, case):
        flow = case.flow()
        if flow.n_parameters == 0:
            return
        latents, parameters = inputs(flow)
        slope = torch.func.grad(lambda p: flow(latents, p)[0].pow(2).sum())(parameters)
        assert bool((slope != 0).all())

    def test_the_density_adds_up_to_one(self, case):
        """Mean of p / q over draws of q, for a Normal p that is narrower than q."""
        flow, n = case.flow(2), 40_000
        torch.manual_seed(0)
        unit = torch.randn(n, 1, 3, 2, dtype=torch.float64)
        parameters = torch.randn(1, 3, 2, flow.n_parameters, dtype=torch.float64)
        with torch.no_grad():
            latents, log_det = flow(1.5 * unit, parameters)
        start = torch.distributions.Normal(0.0, 1.5)
        log_q = start.log_prob(1.5 * unit).sum(-1) - log_det.sum(-1)
        # around where q has its codes
        target = torch.distributions.Normal(latents.median(0).values, 0.4)
        ratio = torch.exp(target.log_prob(latents).sum(-1) - log_q)
        error = ratio.std(0) / n**0.5
        assert bool((error < 0.05).all())
        assert bool(((ratio.mean(0) - 1).abs() < 4 * error).all())

    def test_forward_differentiation_over_weight_draws(self, case):
        """As a linearised predictive does it: jvp in vmap."""
        flow = case.flow()
        latents, parameters = inputs(flow)
        shifts = torch.randn(4, *latents.shape, dtype=torch.float64)

        def one(shift):
            return torch.func.jvp(lambda z: flow(z, parameters), (latents,), (shift,))[1]

        slopes = torch.func.vmap(one)(shifts)
        jacobian = jacobians(lambda z: flow(z, parameters)[0], latents)
        expected = (jacobian @ shifts[..., None])[..., 0]
        torch.testing.assert_close(slopes[0], expected, rtol=0, atol=1e-10)

    def test_float32_stays_so(self, case):
        flow, wide = case.flow(dtype=torch.float32), case.flow()
        latents, parameters = inputs(flow, dtype=torch.float32)
        result = flow(latents, parameters)
        assert all(part.dtype == torch.float32 for part in result)
        for part, expected in zip(result, wide(latents.double(), parameters.double()), strict=True):
            torch.testing.assert_close(part.double(), expected, rtol=0, atol=1e-4)

    def test_it_pickles(self, case):
        flow = case.flow()
        again = pickle.loads(pickle.dumps(flow))
        for part, expected in zip(again(*inputs(flow)), flow(*inputs(flow)), strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("case", [*ELEMENTARY, *AUTOREGRESSIVE], ids=str)
def test_huge_numbers_from_the_encoder_stay_finite(case, size, dtype):
    flow = case.flow(dtype=dtype)
    for seed in range(5):
        latents, parameters = inputs(flow, dtype=dtype, scale=size, seed=seed)
        parameters.requires_grad_()
        moved, log_det = flow(latents, parameters)
        (slope,) = torch.autograd.grad(log_det.sum() + moved.sum(), parameters, materialize_grads=True)
        assert all(bool(torch.isfinite(part).all()) for part in (moved, log_det, slope))
