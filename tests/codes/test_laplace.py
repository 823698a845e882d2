"""The Laplace code posterior: exact for linear decoders, expansions against brute force, gradients through steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bayesae as bae
from bayesae.codes.local import Local
from bayesae.testing import LinearGaussian
from bayesae.types import BlockHessian, LowRankHessian
from tests.conftest import small_model
from tests.likelihoods.cases import CASES

STEPS = ("line_search", "newton", "decaying")


def params_of(model, n=1):
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    noise = {k: 0.1 * torch.randn(n, *v.shape[1:], generator=generator, dtype=v.dtype) for k, v in params.items()}
    return params if n == 1 else {k: v + noise[k] for k, v in params.items()}


def draws_of(model, codes, batch, n=1, seed=0):
    with bae.random.scope(seed), torch.no_grad():
        return codes(model.at(params_of(model)), batch, n_latent_draws=n)


@pytest.fixture
def world():
    return LinearGaussian.make(correlation=0.8)


@pytest.fixture
def shifted(world):
    """The world's decoder behind an encoder that knows nothing."""
    model = world.model("location")
    with torch.no_grad():
        model.encoder[0].weight.zero_()
        model.encoder[0].bias.fill_(2.0)
    return model


class TestLinearDecoder:
    @pytest.mark.parametrize("step", ["newton", "line_search"])
    def test_one_step_from_anywhere_is_the_exact_posterior(self, world, shifted, step):
        draws = draws_of(shifted, bae.codes.Laplace(1, step), world.batch, 4)
        torch.testing.assert_close(draws.log_ratio, world.log_evidence().expand(4, 1, -1), rtol=0, atol=1e-10)
        torch.testing.assert_close(bae.objectives.elbo(draws)[0], world.log_evidence(), rtol=0, atol=1e-10)

    @pytest.mark.parametrize(("n_steps", "left"), [(1, 0.5), (2, 0.375), (4, 0.2734375), (8, 0.196380615234375)])
    def test_the_papers_steps_leave_a_share_of_the_way(self, world, shifted, n_steps, left):
        law = bae.codes.Laplace(n_steps, "decaying").law(shifted.at(params_of(shifted)), world.batch)
        way = (law.loc[0] - world.posterior_mean()) / (2.0 - world.posterior_mean())
        torch.testing.assert_close(way, torch.full_like(way, left), rtol=1e-9, atol=1e-9)

    def test_after_the_fact_on_a_variational_encoder(self, world):
        draws = draws_of(world.model("diagonal"), bae.codes.Laplace(0), world.batch, 3)
        torch.testing.assert_close(draws.log_ratio, world.log_evidence().expand(3, 1, -1), rtol=0, atol=1e-10)


def brute_force(model, batch, z):
    """Gradient and J^T H J, one row, one weight draw and one code dimension after another."""
    decoder, params = model.decoder_module()
    gradient, curvature = torch.zeros_like(z), z.new_zeros(*z.shape, z.shape[-1])
    for s in range(z.shape[0]):
        own = {name: leaf[s] for name, leaf in params.items()}
        for b in range(z.shape[1]):
            row = bae.Batch(*(None if part is None else part[b : b + 1] for part in batch))
            shared = () if batch.context is None else (row.context,)

            def decode(at, own=own, shared=shared):
                return torch.func.functional_call(decoder, own, (at[None], *shared))

            def density(at, decode=decode, row=row):
                outputs = decode(at)[None, None]
                return bae.codes.base.score_outputs(model.likelihood, outputs, row).sum()

            gradient[s, b] = torch.func.grad(density)(z[s, b])
            jacobian = torch.func.jacrev(decode)(z[s, b])[0]
            hessian = dense(model.likelihood, decode(z[s, b]), row.mask)
            flat = jacobian.reshape(-1, z.shape[-1])
            curvature[s, b] = flat.mT @ hessian @ flat
    return gradient, curvature


def dense(likelihood, outputs, mask):
    given, n = likelihood.output_hessian(outputs), outputs[0].numel()
    if isinstance(given, LowRankHessian):
        factor = given.factor.reshape(-1, n)
        result = factor.mT @ factor + torch.diag(torch.zeros(n) if given.diagonal is None else given.diagonal.flatten())
    elif isinstance(given, BlockHessian):
        grid = torch.arange(n).reshape(outputs.shape).movedim(given.axis, -1).reshape(-1, given.values.shape[-1])
        result = outputs.new_zeros(n, n)
        for at, block in zip(grid, given.values.reshape(-1, *given.values.shape[-2:]), strict=True):
            result[at[:, None], at] = block
    else:
        result = torch.diag(torch.ones_like(outputs).flatten() * (given.flatten() if given.dim() else given))
    if mask is not None:
        keep = likelihood.output_mask(mask.reshape(1, *likelihood.data_shape(outputs.shape[1:]))).reshape(-1)
        result = result * keep[:, None] * keep
    return result


class Skip(nn.Module):
    """A decoder that is no chain."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.first, self.last = nn.Linear(n_in, n_out), nn.Linear(n_out, n_out)

    def forward(self, z):
        h = torch.tanh(self.first(z))
        return h + self.last(h)


DECODERS = {
    "relu": lambda z, o: bae.nets.mlp(z, [5, 4], o, activation=nn.ReLU),
    "tanh, wide": lambda z, o: bae.nets.mlp(z, [9], o),
    "silu": lambda z, o: bae.nets.mlp(z, [3, 4], o, activation=nn.SiLU),
    "linear": lambda z, o: nn.Sequential(nn.Linear(z, o, bias=False)),
    "no chain": Skip,
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("likelihood", ["Gaussian", "Bernoulli"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_expansions_are_those_of_brute_force(decoder, likelihood, is_masked):
    likelihood = bae.likelihoods.Gaussian(0.4) if likelihood == "Gaussian" else bae.likelihoods.Bernoulli()
    model = bae.Autoencoder(bae.nets.mlp(6, [], 3), DECODERS[decoder](3, 6), likelihood).double().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 6, generator=generator) > 0.4 if is_masked else None
    bound, batch = model.at(params_of(model, 2)), bae.Batch(x, mask)
    z = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    found = Local(bound, batch)(z)
    gradient, curvature = brute_force(bound, batch, z)
    torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.curvature, curvature, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expansions_of_every_likelihood(case):
    likelihood, x = case.build(), case.data(torch.rand(5, 4, dtype=torch.float64))
    n_outputs = 4 * case.n_parameters
    shape = (4,) if case.n_parameters == 1 else (4, case.n_parameters)
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, n_outputs), nn.Unflatten(1, shape))
    model = bae.Autoencoder(bae.nets.mlp(4, [], 2), decoder, likelihood).double().eval()
    bound, batch = model.at(params_of(model, 2)), bae.Batch(x)
    local = Local(bound, batch)
    for _ in range(2):
        z = torch.randn(2, len(x), 2, dtype=torch.float64)
        found, (gradient, curvature) = local(z), brute_force(bound, batch, z)
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.curvature, curvature, rtol=1e-9, atol=1e-9)


def test_a_decoder_with_a_context(rows):
    decoder = bae.nets.Conditional(bae.nets.mlp(2 + 3, [4], 7), n_classes=3)
    model = bae.Autoencoder(bae.nets.mlp(7, [], 2), decoder, bae.likelihoods.Gaussian(0.3), data_shape=(7,)).double()
    batch = bae.Batch(rows, context=(torch.arange(9) % 3)[:, None])
    bound, z = model.eval().at(params_of(model, 2)), torch.randn(2, 9, 2, dtype=torch.float64)
    found, (gradient, curvature) = Local(bound, batch)(z), brute_force(bound, batch, z)
    torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.curvature, curvature, rtol=0, atol=1e-10)


def test_the_precision_of_a_relu_decoder_is_the_hessian(rows):
    model = small_model(activation=nn.ReLU)
    bound = model.at(params_of(model))
    law = bae.codes.Laplace(2).law(bound, bae.Batch(rows))
    for b in range(len(rows)):

        def negative_log_joint(z, b=b):
            outputs = bound.decode(z[None, None])
            return -(model.likelihood.log_prob(outputs, rows[b : b + 1]) + model.log_prior(z)).sum()

        hessian = torch.func.hessian(negative_log_joint)(law.loc[0, b])
        torch.testing.assert_close(law.factor[0, b] @ law.factor[0, b].mT, hessian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("likelihood", [bae.likelihoods.Gaussian(0.2), bae.likelihoods.Bernoulli()], ids=repr)
def test_the_mode_is_a_fixed_point(likelihood, rows):
    """W^T (x - p) = z for a linear decoder of Bernoulli pixels; its Gaussian twin; and smooth nets."""
    model = small_model(likelihood)
    bound, batch = model.at(params_of(model)), bae.Batch(rows)
    z = bae.codes.Laplace(60).law(bound, batch).loc
    # log p(x, z) is flat to rounding within the root of the rounding
    torch.testing.assert_close(Local(bound, batch)(z).gradient, z, rtol=0, atol=1e-6)


def test_a_line_search_never_goes_down(rows):
    model = small_model(bae.likelihoods.Gaussian(0.01), activation=nn.ReLU)
    bound, batch = model.at(params_of(model)), bae.Batch(rows)

    def joint(n_steps):
        z = bae.codes.Laplace(n_steps).law(bound, batch).loc
        outputs = bound.decode(z[None])
        return (bae.codes.base.score_outputs(model.likelihood, outputs, batch) + model.log_prior(z[None]))[0]

    values = torch.stack([joint(n) for n in range(8)])
    assert bool((values.diff(dim=0) >= -1e-12).all())
    assert bool((values[-1] > values[0]).any())


class TestGradients:
    @pytest.mark.parametrize("step", STEPS)
    def test_pass_through_all_steps(self, step, rows):
        model = small_model(hidden=(4,))
        params = params_of(model)
        batch, name = bae.Batch(rows), "decoder.1.weight"

        def value(shift):
            moved = {k: v + shift if k == name else v for k, v in params.items()}
            with bae.random.scope(3):
                draws = bae.codes.Laplace(3, step)(model.at(moved), batch, n_latent_draws=2)
            return bae.objectives.elbo(draws).sum()

        shift = torch.zeros_like(params[name]).requires_grad_()
        (gradient,) = torch.autograd.grad(value(shift), shift)
        size = 1e-5
        for at in [(0, 0, 0), (0, 3, 1)]:
            step_ = torch.zeros_like(shift.detach())
            step_[at] = size
            slope = (value(step_) - value(-step_)) / (2 * size)
            assert float(gradient[at]) == pytest.approx(float(slope), rel=1e-6)

    def test_reach_the_encoder(self, model, rows):
        draws = bae.codes.Laplace(1, "decaying")(model.train().live(), bae.Batch(rows))
        bae.objectives.elbo(draws).sum().backward()
        assert all(bool((leaf.grad != 0).any()) for leaf in model.encoder.parameters())


def test_weight_draws_do_not_meet(rows):
    model, codes = small_model(), bae.codes.Laplace(2)
    params, batch = params_of(model, 3), bae.Batch(rows)
    with bae.random.scope(0):
        whole = codes(model.at(params), batch, n_latent_draws=2)
        parts = [codes(model.at({k: v[s : s + 1] for k, v in params.items()}), batch, n_latent_draws=2) for s in (0, 1)]
    for s, part in enumerate(parts):
        torch.testing.assert_close(whole.log_ratio[:, s], part.log_ratio[:, 0])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_jacobian_of_the_outputs_is_formed():
    n_rows, n_outputs, n_latents = 64, 500, 6
    model = small_model(n_in=n_outputs, hidden=(10,), z=n_latents)
    x = torch.rand(n_rows, n_outputs, dtype=torch.float64)
    with Largest() as largest, torch.no_grad():
        bae.codes.Laplace(2, "newton")(model.at(params_of(model)), bae.Batch(x))
    assert largest.numel <= n_rows * n_outputs


@pytest.mark.parametrize(("is_fitting", "step"), [(True, "decaying"), (False, "line_search")])
def test_fitting_damps_and_evaluation_searches(is_fitting, step, model, rows):
    bound = model.at(params_of(model), is_fitting=is_fitting)
    found, wanted = (bae.codes.Laplace(3, rule).law(bound, bae.Batch(rows)).loc for rule in (None, step))
    assert torch.equal(found, wanted)


class TestPredictive:
    def test_linearised_and_sampled(self, model, rows):
        weights = bae.fit_weights(bae.weights.Laplace("dense"), model, rows)
        predictive = bae.Predictive(model, weights, codes=bae.codes.Laplace(1))
        moments = predictive.moments(rows, n_weight_draws=5, n_latent_draws=4, seed=0)
        assert bool((moments.code > 0).all()) and bool((moments.weights > 0).all())
        draws = bae.Predictive(model, weights, codes=bae.codes.Laplace(1), linearised=False)(rows, seed=0)
        assert draws.log_ratio.shape == (1, 32, 9) and bool(draws.log_ratio.isfinite().all())


class TestErrors:
    @pytest.mark.parametrize("kind", ["Laplace", "Hamiltonian"])
    def test_batch_normalisation_in_training(self, kind, rows):
        decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 7))
        encoder = bae.nets.mlp(7, [], 2 if kind == "Laplace" else (2, 2))
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3)).double()
        codes = bae.codes.Laplace(1)
        if kind == "Hamiltonian":
            codes = bae.codes.Hamiltonian(bae.codes.amortised, bae.codes.Leapfrog(2, 1).double())
        with pytest.raises(bae.errors.UnsupportedError, match="does not write to itself"):
            bae.fit_model(model, rows, epochs=1, objective=bae.objectives.elbo, codes=codes)

    def test_unknown_choices(self):
        with pytest.raises(bae.errors.UnsupportedError, match="step, one of"):
            bae.codes.Laplace(step="long")
        with pytest.raises(bae.errors.DataError, match="n_steps"):
            bae.codes.Laplace(-1)
        with pytest.raises(bae.errors.DataError, match="n_steps"):
            bae.codes.Laplace(1.5)

    def test_a_decoder_that_overflows(self, rows):
        model = small_model()
        with torch.no_grad():
            model.decoder[1].weight.fill_(float("inf"))
        with pytest.raises(bae.errors.NonFiniteError, match="precision of the code"):
            draws_of(model, bae.codes.Laplace(1), bae.Batch(rows))
