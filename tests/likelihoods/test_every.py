"""What holds for every likelihood, against integrals over data and outputs by brute force."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import likelihoods as L
from bayesae.types import BlockHessian, Likelihood
from tests.likelihoods.cases import CASES, F64, IDS, under_normal


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    return request.param


@pytest.fixture
def head(case):
    head = case.build()
    # at one number of data there is one scale
    return L.Gaussian([0.4], per_output=True) if case.name == "GaussianPerOutput" else head


def one_output(case):
    """Outputs (g,) or () of one number."""
    return case.outputs(1)[0]


def test_is_a_likelihood_without_parameters(head):
    assert isinstance(head, Likelihood)
    assert not list(head.parameters())
    assert not head.is_learned and head.is_estimated


def test_probabilities_add_up_to_the_moments(case, head):
    outputs = one_output(case)
    x, weight = case.points()
    p = head.log_prob(outputs.expand(len(x), *outputs.shape), x).exp() * weight
    assert_close(p.sum(), torch.tensor(1.0, **F64), rtol=1e-10, atol=0)
    if case.name == "Categorical":  # of indicators
        assert_close(head.mean(outputs[None])[0], p, rtol=1e-12, atol=0)
        assert_close(head.variance(outputs[None])[0], p * (1 - p), rtol=1e-12, atol=0)
        return
    mean = p @ x
    # Student-t of 5 degrees of freedom: what lies beyond the grid is below rounding
    assert_close(head.mean(outputs[None])[0], mean, rtol=1e-9, atol=1e-12)
    assert_close(head.variance(outputs[None])[0], p @ (x - mean) ** 2, rtol=1e-8, atol=0)


def test_log_prob_is_that_of_the_distribution(case):
    head = case.build()
    outputs, target = case.outputs(2, 3, 5, 4), case.data(torch.rand(5, 4, **F64))
    law = head.distribution(outputs)
    assert law.batch_shape == (2, 3, 5, 4)
    loose = {"rtol": 1e-5, "atol": 1e-5} if case.name == "ContinuousBernoulli" else {"rtol": 1e-11, "atol": 1e-11}
    assert_close(head.log_prob(outputs, target), law.log_prob(target).sum(-1), **loose)
    if case.name != "Categorical":
        assert_close(head.mean(outputs), law.mean, **loose)
        assert_close(head.variance(outputs), law.variance, **loose)
    assert law.sample().shape == (2, 3, 5, 4)


def test_hessian_is_that_of_the_log_prob(case, head):
    """Itself at every point of data, or its expectation where the likelihood says that it is a Fisher information."""
    outputs = one_output(case)
    x, weight = case.points()
    keep = x.abs() < 1e6  # beyond, residuals overflow their squares' derivatives and the density is nothing
    x, weight = x[keep], weight[keep]

    def negative(f, at):
        return -head.log_density(f[None], at[None])[0]

    exact = torch.func.vmap(torch.func.hessian(negative), (None, 0))(outputs, x)  # (n, g, g)
    given = head.output_hessian(outputs[None])
    if isinstance(given, BlockHessian):
        assert given.axis == 1
        given = given.values[0]
    elif given.dim():
        given = torch.diag(given[0]) if outputs.dim() else given[0]
    if head.is_fisher:
        p = head.log_prob(outputs.expand(len(x), *outputs.shape), x).exp() * weight
        exact = torch.einsum("n,n...->...", p, exact)
        assert_close(given.expand(exact.shape), exact, rtol=1e-8, atol=1e-8)
    else:
        assert_close(given.expand(exact.shape), exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("var", [1e-8, 1e-3, 0.3, 1.0])
def test_moments_under_normal_outputs(case, head, var):
    mean = one_output(case)
    var = torch.full_like(mean, var) * torch.linspace(0.5, 1, mean.numel(), **F64).reshape(mean.shape)
    got = head.normal_moments(mean[None], var[None])
    if case.name.startswith("Categorical"):
        assert got is None
        return
    expected = under_normal(head, mean, var)
    for mine, brute in zip(got, expected, strict=True):
        assert_close(mine[0], brute, rtol=1e-8, atol=1e-13)


def test_predictive_adds_up_to_its_moments(case, head):
    mean, noise = head.mean(case.outputs(1)), head.variance(case.outputs(1))
    x, weight = case.points()
    if case.name == "Categorical":
        got = head.log_predictive(mean.expand(len(x), -1), noise, x).exp()
        assert_close(got, mean[0], rtol=1e-12, atol=0)
        return
    if case.name in {"Poisson", "NegativeBinomial"}:
        noise = mean + 0.3 * mean**2
    total = noise + 0.05
    p = head.log_predictive(mean.expand(len(x)), total.expand(len(x)), x).exp() * weight
    assert_close(p.sum(), torch.tensor(1.0, **F64), rtol=1e-10, atol=0)
    if case.name != "CategoricalValues":
        assert_close(p @ x, mean[0], rtol=1e-9, atol=1e-12)
    if case.name not in {"Bernoulli", "ContinuousBernoulli", "CategoricalValues"}:
        assert_close(p @ (x - mean[0]) ** 2, total[0], rtol=1e-8, atol=0)


def test_masked_numbers_count_nothing(case):
    head, outputs = case.build(), case.outputs(2, 5, 4)
    target, mask = case.data(torch.rand(5, 4, **F64)), torch.rand(5, 4) > 0.4
    expected = torch.where(mask, head.log_density(outputs, target), 0).sum(-1)
    spoilt = torch.where(mask, target, torch.nan)
    bad = outputs.clone()
    bad[:, ~head.output_mask(mask)] = 1e6
    bad.requires_grad_()
    got = head.log_prob(bad, spoilt, mask)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), bad)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[:, ~head.output_mask(mask)] == 0).all())
    assert bool((gradient[:, head.output_mask(mask)] != 0).any())


def test_zero_passes_the_check_as_masked_entries_do(case):
    case.build().check(torch.zeros(2, 4, **F64))


def test_shape_of_the_data(case):
    head = case.build()
    extra = () if case.n_parameters == 1 else (case.n_parameters,)
    assert head.data_shape(torch.Size((3, 2, *extra))) == (3, 2)
    assert head.output_mask(torch.ones(5, 3, 2, dtype=torch.bool)).shape == (5, 3, 2, *extra)
    if extra:
        with pytest.raises(bae.errors.ShapeError, match="Unflatten"):
            head.data_shape(torch.Size((3,)))


@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle", "build"])
def test_travels(case, way):
    head = case.build()
    if way == "deepcopy":
        other = copy.deepcopy(head)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(head))
    else:
        arguments = json.loads(json.dumps(head.arguments))
        other = L.build(type(head).__name__, arguments)
        assert other.arguments == head.arguments
        if way == "state":
            other.load_state_dict(head.state_dict())
    outputs, target = case.outputs(5, 4), case.data(torch.rand(5, 4, **F64))
    assert_close(other.log_prob(outputs, target), head.log_prob(outputs, target), rtol=0, atol=0)
    assert type(other) is type(head) and type(head).__name__ in L.NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_float32_or_wider(case, dtype):
    head, outputs = case.build(), case.outputs(3, 4).to(dtype)
    target = case.data(torch.rand(3, 4, **F64))
    got = head.log_prob(outputs, target.float())
    assert got.dtype == torch.float32
    assert_close(got.double(), head.log_prob(outputs.double(), target.float().double()), rtol=2e-6, atol=2e-6)


def test_names_and_arguments_are_checked():
    with pytest.raises(bae.errors.ParameterError, match="likelihood among Gaussian, .*Mixed.*'Normal'"):
        L.build("Normal")
    with pytest.raises(bae.errors.ParameterError, match="arguments of Gaussian.*sigma"):
        L.build("Gaussian", {"sigma": 1.0})
    assert set(L.NAMES) == {case.name for case in CASES} - {"GaussianPerOutput", "CategoricalValues"} | {"Mixed"}


def test_runs_on_the_device_of_its_outputs(case):
    """On torch's meta device, where any tensor that was left on the CPU raises."""
    head, outputs, target = case.build(), case.outputs(5, 4), case.data(torch.rand(5, 4, **F64))
    mask = torch.ones(5, 4, dtype=torch.bool)
    mean, var = head.mean(outputs), head.variance(outputs)
    away = {"device": "meta"}
    assert head.log_prob(outputs.to(**away), target.to(**away), mask.to(**away)).shape == (5,)
    assert head.log_predictive(mean.to(**away), var.to(**away), target.to(**away)).shape == (5, 4)
    assert head.mean(outputs.to(**away)).shape == head.variance(outputs.to(**away)).shape == mean.shape
    head.output_hessian(outputs.to(**away))
    if case.name != "ContinuousBernoulli":  # reads whether any logit is wide
        head.normal_moments(outputs.to(**away), outputs.to(**away))
    if hasattr(head, "noise_statistics"):
        assert head.noise_statistics(outputs.to(**away), target.to(**away), mask.to(**away)).is_meta


BAD = [
    ("Mixed", {"columns": 3}), ("Mixed", {"columns": None}), ("Mixed", {"columns": "Gaussian"}),
    ("Mixed", {"columns": [["Gaussian", {}, 1]]}), ("Mixed", {"columns": [3]}), ("Mixed", {"columns": [[["a"], {}]]}),
    ([1], {}), (None, None), ("Gaussian", [1]), ("Gaussian", "scale"), ("Gaussian", {"scale": {}}),
    ("Gaussian", {"scale": "abc"}), ("Categorical", {"n_classes": 2, "values": [[1, 2], [3]]}),
    ("Categorical", {"n_classes": "a"}), ("StudentT", {"df": None}), ("Gaussian", {"floor": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), BAD, ids=str)
def test_what_cannot_be_built_is_named(name, arguments):
    with pytest.raises((bae.errors.ParameterError, bae.errors.DataError)):
        L.build(name, arguments)
