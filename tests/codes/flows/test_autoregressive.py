"""Inverse autoregressive flows: what sees what, the inverse, and the Normal that a linear step makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae import codes
from bayesae.testing import LinearGaussian
from tests.codes.flows.cases import AUTOREGRESSIVE, draws_of, inputs, jacobians


def flow_of(z=5, *args, **kwargs):
    torch.manual_seed(2)
    return codes.AutoregressiveFlow(z, *args, **kwargs).double()


class TestWhatSeesWhat:
    @pytest.mark.parametrize("hidden", [(), (2,), (5, 3), (64,)], ids=str)
    @pytest.mark.parametrize("n_context", [0, 2])
    def test_every_dimension_sees_all_before_it_and_no_other(self, hidden, n_context):
        flow = flow_of(5, 1, hidden, n_context)
        latents, parameters = inputs(flow)
        jacobian = jacobians(lambda z: flow(z, parameters)[0], latents)
        later = torch.ones(5, 5).triu(1).bool()
        assert bool((jacobian[..., later] == 0).all()) and bool((jacobian[..., ~later] != 0).all())
        _, log_det = flow(latents, parameters)
        torch.testing.assert_close(jacobian.diagonal(dim1=-2, dim2=-1).log(), log_det, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("hidden", [(), (3,), (7, 4)], ids=str)
    def test_the_hidden_layers_alone_see_no_other(self, hidden):
        flow = flow_of(5, 1, hidden, 1)
        with torch.no_grad():
            flow.steps[0].direct.weight.zero_()
        latents, parameters = inputs(flow)
        jacobian = jacobians(lambda z: flow(z, parameters)[0], latents)
        assert bool((jacobian[..., torch.ones(5, 5).triu(1).bool()] == 0).all())
        assert bool((jacobian[..., 4, :4] != 0).any()) == bool(hidden)

    @pytest.mark.parametrize("hidden", [(), (2,), (9, 4)], ids=str)
    @pytest.mark.parametrize("is_volume_preserving", [False, True])
    def test_every_dimension_sees_all_of_the_context(self, hidden, is_volume_preserving):
        """Of the page's traps: a mask that hides the context leaves a flow that x does not enter."""
        flow = flow_of(4, 2, hidden, 3, is_volume_preserving=is_volume_preserving)
        latents, parameters = inputs(flow, (1, 1, 1, 4))
        slopes = torch.func.jacrev(lambda p: flow(latents, p)[0][0, 0, 0])(parameters)
        assert slopes.shape == (4, 1, 1, 4, 3) and bool((slopes != 0).all())

    def test_the_order_turns(self):
        flow = flow_of(3, 2, ())
        with torch.no_grad():
            flow.steps[0].direct.weight.zero_()
        latents, parameters = inputs(flow, (1, 1, 1, 3))
        (jacobian,) = jacobians(lambda z: flow(z, parameters)[0], latents)[0, 0]
        assert bool((jacobian.tril(-1) == 0).all()) and bool((jacobian.triu(1)[[0, 0, 1], [1, 2, 2]] != 0).all())


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_the_inverse_finds_the_noise(case):
    flow = case.flow()
    latents, parameters = inputs(flow)
    torch.testing.assert_close(flow.invert(flow(latents, parameters)[0], parameters), latents, rtol=0, atol=1e-10)


def test_the_density_is_that_of_the_paper():
    """Minus the sum over dimensions of half the squared noise, half log 2 pi, and all log gates, the law's included."""
    flow = flow_of(5, 3, (6,))
    latents, parameters = inputs(flow)
    log_scale = torch.randn(5, dtype=torch.float64)
    unit = latents
    moved, log_det = flow(log_scale.exp() * unit, parameters)
    found = flow.invert(moved, parameters) / log_scale.exp()
    expected = -(0.5 * found**2 + 0.5 * torch.log(torch.tensor(2 * torch.pi)) + log_scale + log_det).sum(-1)
    start = torch.distributions.Normal(torch.zeros(5, dtype=torch.float64), log_scale.exp())
    jacobian = jacobians(lambda z: flow(z, parameters)[0], log_scale.exp() * unit)
    actual = start.log_prob(log_scale.exp() * unit).sum(-1) - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def linear_world_model(world, flow):
    """A diagonal Normal that one linear step, its weights set by hand, turns into the exact posterior."""
    factor = torch.linalg.cholesky(world.covariance)
    scales = factor.diagonal()
    below = factor / scales - torch.eye(world.n_latents, dtype=factor.dtype)
    step, z = flow.steps[0], world.n_latents
    n_out = 1 if flow.is_volume_preserving else 2
    gate = torch.tensor(1.5, dtype=torch.float64).sigmoid() if n_out == 2 else torch.tensor(1.0)
    with torch.no_grad():
        step.direct.weight.zero_()
        step.direct.weight[:z, :z] = below if n_out == 1 else below * gate / (1 - gate)
    model, exact = world.model("diagonal"), world.model("full")
    unmix = torch.linalg.inv(torch.eye(z, dtype=factor.dtype) + below) / gate
    with torch.no_grad():
        for name, new in model.encoder[0].named_parameters():
            new.view(z, 2, -1)[:, 0] = unmix @ exact.encoder[0].get_parameter(name).view(z, 1 + z, -1)[:, 0]
        model.encoder[0].bias.view(z, 2)[:, 1] = (scales / gate).log()
    return model


@pytest.mark.parametrize("is_volume_preserving", [False, True])
def test_one_linear_step_is_any_normal(is_volume_preserving):
    world = LinearGaussian.make(correlation=0.8)
    assert world.mean_field_gap > 0.3
    flow = flow_of(world.n_latents, 1, (), 0, is_volume_preserving=is_volume_preserving)
    model = linear_world_model(world, flow)
    draws = draws_of(model, codes.Flowed(codes.amortised, flow), world.batch, 5)
    torch.testing.assert_close(draws.log_ratio, world.log_evidence().expand(5, 1, -1), rtol=0, atol=1e-10)


class TestSaturation:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("bias", [-1e4, -100.0, 100.0, 1e4])
    def test_gates_stay_finite(self, bias, dtype):
        flow = flow_of(4, 2, (5,)).to(dtype)
        with torch.no_grad():
            for step in flow.steps:
                step.direct.bias[4:] = bias
        latents, parameters = inputs(flow, (2, 3, 4, 4), dtype=dtype)
        moved, log_det = flow(latents, parameters)
        slopes = torch.autograd.grad(moved.sum() + log_det.sum(), list(flow.parameters()))
        assert all(bool(torch.isfinite(part).all()) for part in (moved, log_det, *slopes))
        assert float(log_det.detach().abs().max()) < 1e-6 or bias < 0
        assert bool((slopes[0] != 0).any()) or bias > 0  # a closed gate can open again

    def test_it_starts_near_the_identity(self):
        flow = flow_of(8, 1, (64,))
        latents, parameters = inputs(flow, (2, 3, 4, 8))
        moved, log_det = flow(latents, parameters)
        assert float((moved - latents).detach().abs().mean()) < 0.3
        assert -0.4 < float(log_det.detach().mean()) < -0.1


class TestRecipe:
    def test_it_can_be_built_again(self):
        flow = flow_of(3, 2, (4,), 2, is_volume_preserving=True, activation=nn.Tanh)
        again = bae.nets.build(flow.recipe).double()
        again.load_state_dict(flow.state_dict())
        for part, expected in zip(again(*inputs(flow, (2, 3, 4, 3))), flow(*inputs(flow, (2, 3, 4, 3))), strict=True):
            assert torch.equal(part, expected)

    def test_its_words_tell_it_from_others(self):
        words = [repr(flow_of(3, 1, ())), repr(flow_of(3, 1, (), 2)), repr(flow_of(3, 2, ())), repr(flow_of(4, 1, ()))]
        assert len({*words, repr(flow_of(3, 1, (), is_volume_preserving=True))}) == 5


class TestErrors:
    @pytest.mark.parametrize("sizes", [(0,), (3, 0), (3, 65), (3, 1, (0,)), (3, 1, (4,), -1), (2.5,)], ids=str)
    def test_sizes(self, sizes):
        with pytest.raises(bae.errors.DataError, match="n_latents|n_steps|hidden|n_context"):
            codes.AutoregressiveFlow(*sizes)

    def test_codes_and_contexts_of_another_size(self):
        flow = flow_of(5)
        with pytest.raises(bae.errors.ShapeError, match=r"codes of 5 dimensions and contexts \(5, 1\)"):
            flow(*inputs(flow, (2, 3, 4, 6)))
        with pytest.raises(bae.errors.ShapeError, match=r"contexts \(5, 2\)"):
            flow(*inputs(flow_of(5, n_context=2)))

    def test_one_dimension(self):
        for n_context in (0, 1):
            flow = flow_of(1, 2, (3,), n_context)
            moved, log_det = flow(*inputs(flow, (2, 3, 4, 1)))
            assert moved.shape == log_det.shape == (2, 3, 4, 1)
