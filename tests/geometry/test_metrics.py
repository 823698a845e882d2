"""Metrics against closed forms and autograd; expansions against a dense Hessian."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import geometry
from bayesae.geometry import derivatives
from tests.geometry.surfaces import HYPERBOLIC, SPHERE, codes, linear, network, sphere, sphere_metric


def test_a_linear_decoder_has_its_gram_matrix():
    weights, decoder = linear()
    expected = torch.einsum("sdi,sdj->ij", weights, weights) / 3
    assert_close(geometry.Pullback(decoder)(codes(4)), expected.expand(4, 2, 2))


def test_random_weights_add_their_variance():
    generator = torch.Generator().manual_seed(0)
    n_draws, n_outputs, scale = 4000, 6, 0.3
    mean = torch.randn(n_outputs, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(n_draws, n_outputs, 2, generator=generator, dtype=torch.float64)
    weights = mean + scale * noise
    found = geometry.Pullback(lambda z: torch.einsum("sdz,bz->sbd", weights, z))(codes(1))[0]
    expected = mean.T @ mean + n_outputs * scale**2 * torch.eye(2, dtype=torch.float64)
    error = (weights.mT @ weights).std(0) / math.sqrt(n_draws)
    assert ((found - expected).abs() < 4 * error).all()


def test_a_network_has_the_metric_of_its_jacobian():
    decoder, z = network(), codes(5)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda c: decoder(c[None])[:, 0], c) for c in z])
    expected = torch.einsum("bsdi,bsdj->bij", jacobian, jacobian) / 3
    assert_close(geometry.Pullback(decoder)(z), expected)
    images = geometry.Pullback(lambda c: decoder(c).unflatten(-1, (1, 5)))
    assert_close(images(z), expected)


def test_jacobians_take_one_pass_of_z_columns():
    rows, decoder = [], network(n_outputs=300)

    def counting(z):
        rows.append(len(z))
        return decoder(z)

    geometry.Pullback(counting)(codes(5))
    assert rows == [5]


def test_the_sphere_has_its_metric():
    assert_close(SPHERE(codes(6)), sphere_metric(codes(6)))


def test_independent_draws_add_the_spread_at_both_ends():
    decoder, points = network(n_draws=4), codes(6).reshape(2, 3, 2)
    outputs = decoder(points.flatten(0, 1)).unflatten(1, (2, 3))
    twin = torch.zeros(2, 2, dtype=torch.float64)
    for one in range(4):
        for other in range(4):
            twin += (outputs[one, :, 1:] - outputs[other, :, :-1]).square().sum(-1) / 16
    assert_close(geometry.IndependentDraws(decoder).segments(points), twin)
    same = geometry.Pullback(decoder).segments(points)
    assert (twin > same).all()


@pytest.mark.parametrize("energy", [
    geometry.Pullback(network()), geometry.IndependentDraws(network()), HYPERBOLIC,
    geometry.FisherPullback(network(), geometry.bernoulli_fisher),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_expansions_are_the_derivatives_of_the_energy(energy):
    """The twin is autograd through the segments, dense."""
    points = codes(10, low=(0.5, 1.0)).reshape(2, 5, 2)

    def total(inner, curve):
        whole = torch.cat([curve[:1], inner, curve[-1:]])
        if isinstance(energy, geometry.Metric) and not isinstance(energy, geometry.Pullback):
            step, middle = whole[1:] - whole[:-1], (whole[1:] + whole[:-1]) / 2
            return torch.einsum("ni,nij,nj->", step, energy(middle), step)
        outputs = energy.decoder(whole)
        if isinstance(energy, geometry.Pullback):
            return (outputs[:, 1:] - outputs[:, :-1]).square().sum() / 3
        pairs = [(outputs[a, 1:] - outputs[b, :-1]).square().sum() for a in range(3) for b in range(3)]
        return torch.stack(pairs).sum() / 9

    found = energy.expansion(points, has_curvature=True)
    positive = energy.expansion(points, has_curvature=False)
    assert positive.curvature is None
    assert_close(positive.gradient, found.gradient)
    assert_close(positive.stiffness.diagonal, found.stiffness.diagonal)
    assert_close(positive.stiffness.upper, found.stiffness.upper)
    for number, curve in enumerate(points):
        inner = curve[1:-1].clone()
        gradient = torch.func.grad(total)(inner, curve)
        hessian = torch.func.hessian(total)(inner, curve).reshape(6, 6)
        assert_close(found.gradient[number], gradient)
        whole = found.stiffness + found.curvature
        dense = torch.zeros(6, 6, dtype=torch.float64)
        for i in range(3):
            dense[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = whole.diagonal[number, i]
            if i < 2:
                dense[2 * i : 2 * i + 2, 2 * i + 2 : 2 * i + 4] = whole.upper[number, i]
                dense[2 * i + 2 : 2 * i + 4, 2 * i : 2 * i + 2] = whole.upper[number, i].T
        assert_close(dense, hessian)
        assert (torch.linalg.eigvalsh(hessian - _dense_rest(found, number)) > -1e-9).all()


def _dense_rest(found, number):
    rest = torch.block_diag(*found.curvature.diagonal[number])
    for i in range(2):
        rest[2 * i : 2 * i + 2, 2 * i + 2 : 2 * i + 4] = found.curvature.upper[number, i]
        rest[2 * i + 2 : 2 * i + 4, 2 * i : 2 * i + 2] = found.curvature.upper[number, i].T
    return rest


@pytest.mark.parametrize("fisher", ["bernoulli", "categorical", "gaussian"])
def test_fisher_products_are_expected_squares_of_scores(fisher):
    logits = torch.tensor([0.3, -1.1], dtype=torch.float64)
    product = getattr(geometry, f"{fisher}_fisher")
    found = torch.stack([product(logits, unit) for unit in torch.eye(2, dtype=torch.float64)])
    if fisher == "gaussian":
        law = torch.distributions.Normal(logits[0], logits[1].exp())
        nodes, weights = (torch.tensor(part) for part in __import__("numpy").polynomial.hermite_e.hermegauss(20))
        x, weights = law.mean + law.stddev * nodes, weights / weights.sum()

        def density(parameters, value):
            return torch.distributions.Normal(parameters[0], parameters[1].exp(), validate_args=False).log_prob(value)

    elif fisher == "bernoulli":
        x, p = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.sigmoid(logits)
        expected = torch.diag(p * (1 - p))
        assert_close(found, expected)
        return
    else:
        x, weights = torch.tensor([0, 1]), torch.softmax(logits, 0)

        def density(parameters, value):
            return torch.log_softmax(parameters, 0)[value]

    scores = torch.stack([torch.func.grad(density)(logits, value) for value in x])
    assert_close(found, torch.einsum("k,ki,kj->ij", weights, scores, scores))


def test_bernoulli_lengths_are_those_of_the_arc():
    """With one pixel the Fisher length from p to q is 2 |asin sqrt p - asin sqrt q|."""
    metric = geometry.FisherPullback(lambda z: z[None], geometry.bernoulli_fisher)
    a, b = torch.tensor([[-2.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    found = geometry.length(metric, geometry.Polyline(torch.stack([a, b], 1)))
    arcs = [2 * torch.asin(torch.sigmoid(end).sqrt()) for end in (a, b)]
    assert_close(found, (arcs[1] - arcs[0])[0])


def test_an_ensemble_is_a_decoder():
    networks = [torch.nn.Linear(2, 3).double() for _ in range(2)]
    draws, z = geometry.DecoderDraws(networks), codes(4)
    assert_close(draws(z), torch.stack([network(z) for network in networks]))
    assert_close(torch.cat([single(z) for single in draws.singles]), draws(z))
    gram = sum(network.weight.T @ network.weight for network in networks) / 2
    assert_close(geometry.Pullback(draws)(z), gram.expand(4, 2, 2))
    with pytest.raises(bae.errors.DataError, match="one network or more"):
        geometry.DecoderDraws([])


@pytest.mark.parametrize("energy", [
    geometry.Pullback(network()), geometry.IndependentDraws(network()),
    geometry.FisherPullback(network(), geometry.bernoulli_fisher),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_blocks_do_not_matter(energy, monkeypatch):
    points = codes(20).reshape(4, 5, 2)
    whole, segments = energy.expansion(points, has_curvature=True), energy.segments(points)
    seen = []
    monkeypatch.setattr(derivatives, "_NUMBERS_ON_CPU", 15 * 40)  # 40 values of one code, a few curves
    counted = replace(energy, decoder=lambda z: seen.append(len(z)) or energy.decoder(z))
    parts = counted.expansion(points, has_curvature=True)
    assert max(seen) <= 40 and len(seen) > 4
    assert_close(counted.segments(points), segments)
    assert_close(parts.gradient, whole.gradient)
    for part, one in ((parts.stiffness, whole.stiffness), (parts.curvature, whole.curvature)):
        assert_close(part.diagonal, one.diagonal)
        assert_close(part.upper, one.upper)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts_and_parameters_do_not_matter(context):
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    frozen = deepcopy(net).requires_grad_(False)
    points, modes = codes(6).reshape(2, 3, 2), [module.training for module in net.modules()]
    for make in (geometry.Pullback, geometry.IndependentDraws, lambda d: geometry.FisherPullback(d, lambda f, t: t)):
        energy, other = make(geometry.DecoderDraws([net])), make(geometry.DecoderDraws([frozen]))
        with context():
            found, segments = energy.expansion(points, has_curvature=True), energy.segments(points)
        expected = other.expansion(points, has_curvature=True)
        assert_close(segments, other.segments(points))
        assert not segments.requires_grad
        for part in ("gradient", "stiffness.diagonal", "stiffness.upper", "curvature.diagonal", "curvature.upper"):
            one, two = attrgetter(part)(found), attrgetter(part)(expected)
            assert_close(one, two)
            assert not one.requires_grad
    assert [module.training for module in net.modules()] == modes


class Once(torch.autograd.Function):
    """A sine whose first derivative is known forwards only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        return ctx.saved_tensors[0].cos() * tangent


def test_decoders_that_are_differentiable_once():
    metric, z = geometry.Pullback(lambda z: Once.apply(z)[None]), codes(6)
    with pytest.raises(bae.errors.UnsupportedError, match="a function that torch.func differentiates"):
        metric.expansion(z.reshape(2, 3, 2), has_curvature=True)


def test_errors_of_a_decoder_come_as_they_are():
    net = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        geometry.Pullback(geometry.DecoderDraws([net]))(codes(3))
    assert not isinstance(caught.value, bae.errors.UnsupportedError)
    noisy = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5)).double()
    with pytest.raises(bae.errors.UnsupportedError, match="dropout"):
        geometry.Pullback(geometry.DecoderDraws([noisy]))(codes(3))


def test_what_is_refused():
    z = codes(3)
    with pytest.raises(bae.errors.ShapeError, match=r"outputs \(S, 3, \*D\)"):
        geometry.Pullback(lambda c: sphere(c)[0])(z)
    with pytest.raises(bae.errors.ShapeError, match=r"outputs \(S, 3, \*D\)"):
        geometry.FisherPullback(lambda c: sphere(c)[0], geometry.bernoulli_fisher)(z)
    with pytest.raises(bae.errors.ShapeError, match=r"a metric \(3, 2, 2\)"):
        geometry.MetricFunction(lambda c: c)(z)
    with pytest.raises(bae.errors.UnsupportedError, match="a function that torch.func differentiates"):
        geometry.Pullback(lambda c: torch.as_tensor(c.detach().numpy())[None])(z)
    with pytest.raises(bae.errors.ShapeError, match="mean and log-scale"):
        geometry.gaussian_fisher(z[:, :1], z[:, :1])


@pytest.mark.parametrize("kind", ["outputs", "Fisher"])
def test_many_codes_are_taken_in_parts(kind, monkeypatch):
    """No more at once than memory allows, and what comes is the same."""
    seen, inner = [], network()

    def decoder(z):
        seen.append(len(z))
        return inner(z)

    metric = (
        geometry.Pullback(decoder) if kind == "outputs" else geometry.FisherPullback(decoder, geometry.bernoulli_fisher)
    )
    z = codes(200)
    whole = metric(z)
    assert max(seen) == 200
    seen.clear()
    monkeypatch.setattr(derivatives, "_NUMBERS_ON_CPU", 3 * 15 * 70)  # values and two derivatives of 3 draws x 5
    assert_close(metric(z), whole, rtol=1e-12, atol=0)
    assert max(seen) == 70


@pytest.mark.parametrize("metric", [
    geometry.Euclidean(), geometry.Pullback(linear()[1]), geometry.IndependentDraws(linear()[1]),
    geometry.FisherPullback(linear()[1], lambda outputs, tangent: tangent),
], ids=lambda metric: type(metric).__name__)  # fmt: skip
def test_where_the_metric_is_constant_the_positive_part_is_all(metric):
    found = metric.expansion(codes(15).reshape(3, 5, 2), has_curvature=True)
    size = found.stiffness.diagonal.abs().max()
    for part in (found.curvature.diagonal, found.curvature.upper):
        assert part.abs().max() < 1e-12 * size
