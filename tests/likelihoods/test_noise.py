"""Noise that is learned, against direct maximisation of the likelihood, and how it travels."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import likelihoods as L
from tests.likelihoods.cases import F64


def maximum(build, outputs, target, mask, n_noise, low=-7.0, high=7.0):
    """Noise arguments (n_noise,) that maximise the log-likelihood, by golden section of their logarithms."""
    share = (math.sqrt(5) - 1) / 2

    def score(at):
        heads = [build(float(v)) for v in at.exp()]
        parts = [
            head.log_prob(outputs[:, [i]] if n_noise > 1 else outputs, target[:, [i]] if n_noise > 1 else target,
                          None if mask is None else mask[:, [i]] if n_noise > 1 else mask).sum()
            for i, head in enumerate(heads)
        ]  # fmt: skip
        return torch.stack(parts)

    a, b = torch.full((n_noise,), low, **F64), torch.full((n_noise,), high, **F64)
    for _ in range(45):
        first, second = b - share * (b - a), a + share * (b - a)
        is_left = score(first) > score(second)
        a, b = torch.where(is_left, a, first), torch.where(is_left, second, b)
    return (0.5 * (a + b)).exp()


def gamma(shape, *size):
    return torch.distributions.Gamma(torch.tensor(shape, **F64), torch.tensor(1.0, **F64)).sample(size)


def rows(name):
    torch.manual_seed(3)
    if name == "NegativeBinomial":
        outputs = 1 + 0.5 * torch.randn(300, 3, **F64)
        return outputs, torch.poisson(outputs.exp() * gamma(2.0, 300, 3) / 2)
    outputs = torch.randn(300, 3, **F64)
    noise = torch.randn(300, 3, **F64) * torch.tensor([0.2, 0.5, 1.0], **F64)
    return outputs, outputs + (noise if name == "Gaussian" else noise / gamma(2.0, 300, 3).sqrt())


HEADS = {"Gaussian": ("scale", L.Gaussian), "StudentT": ("scale", L.StudentT)}
HEADS["NegativeBinomial"] = ("dispersion", L.NegativeBinomial)


def learn(head, outputs, target, mask, n_batches=3):
    """What `estimate_noise` does: passes over batches until nothing moves."""
    head.start_noise()
    for n_passes in range(1, 101):
        parts = zip(
            outputs.chunk(n_batches, -2), target.chunk(n_batches),
            [None] * n_batches if mask is None else mask.chunk(n_batches), strict=True,
        )  # fmt: skip
        if not head.update_noise(sum(head.noise_statistics(*part) for part in parts)):
            return n_passes
    raise AssertionError("never settled")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_learned_noise_is_of_maximum_likelihood(name, per_output, is_masked):
    argument, build = HEADS[name]
    outputs, target = rows(name)
    mask = torch.rand(300, 3) > 0.3 if is_masked else None
    spoilt = target if mask is None else torch.where(mask, target, torch.nan)
    head = build(per_output=per_output)
    assert head.is_learned and not head.is_estimated
    n_passes = learn(head, outputs, spoilt, mask)
    assert head.is_estimated and n_passes <= (1 if name == "Gaussian" else 30)
    best = maximum(lambda v: build(**{argument: v}), outputs, target, mask, 3 if per_output else 1)
    got = torch.as_tensor(getattr(head, argument), **F64).reshape(-1)
    assert_close(got, best, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_code_and_weight_draws_count_as_rows(name):
    outputs, target = rows(name)
    one, many = HEADS[name][1](per_output=True), HEADS[name][1](per_output=True)
    learn(one, outputs, target, None)
    learn(many, outputs.expand(2, 4, -1, -1), target, None)
    for a, b in zip(one._noise, many._noise, strict=True):
        assert_close(a, b, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_a_number_that_no_row_observed_takes_the_noise_of_the_others(name):
    outputs, target = rows(name)
    mask = torch.ones(300, 3, dtype=torch.bool)
    mask[:, 1] = False
    head = HEADS[name][1](per_output=True)
    learn(head, outputs, target, mask)
    noise = head._noise
    assert bool(noise.isfinite().all())
    assert float(noise[[0, 2]].min()) * 0.99 <= float(noise[1]) <= 1.01 * float(noise[[0, 2]].max())


@pytest.mark.parametrize("name", HEADS)
def test_nothing_observed(name):
    head = HEADS[name][1]()
    head.start_noise()
    nothing = head.noise_statistics(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(bae.errors.DataError, match="observed entry"):
        head.update_noise(nothing)


def test_counts_that_vary_less_than_poisson_reach_the_bound():
    head = L.NegativeBinomial()
    learn(head, torch.full((50, 2), 3.0, **F64).log(), torch.full((50, 2), 3.0, **F64), None)
    assert head.dispersion == pytest.approx(1e6)


@pytest.mark.parametrize("name", ["Gaussian", "StudentT"])
def test_floor(name):
    head = HEADS[name][1](per_output=True, floor=0.01)
    outputs, target = rows(name)
    target[:, 2] = outputs[:, 2]
    learn(head, outputs, target, None)
    assert float(head.scale[2]) == pytest.approx(0.01)
    assert float(head.scale[:2].min()) > 0.1


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle"])
def test_learned_noise_travels(name, per_output, way):
    head = HEADS[name][1](per_output=per_output)
    outputs, target = rows(name)
    blank = L.build(name, head.arguments)
    blank.load_state_dict(head.state_dict())
    assert not blank.is_estimated
    with pytest.raises(bae.errors.NotFittedError, match=rf"{name}\(\) whose {HEADS[name][0]} was never estimated"):
        blank.log_prob(outputs, target)
    learn(head, outputs, target, None)
    if way == "state":
        other = L.build(name, head.arguments)
        other.load_state_dict(head.state_dict())
    else:
        other = copy.deepcopy(head) if way == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert_close(other.log_prob(outputs, target), head.log_prob(outputs, target), rtol=0, atol=0)
    assert other.is_learned and head.arguments[HEADS[name][0]] is None
    state = head.state_dict()["_extra_state"]
    assert state.dtype == torch.float64 and state.shape == ((3,) if per_output else ())


@pytest.mark.parametrize("name", ["Gaussian", "StudentT"])
def test_scales_of_every_number(name):
    """An image's scales, in its own shape or flat, on outputs in either."""
    scale = torch.rand(1, 2, 3, **F64) + 0.1
    outputs, target = torch.randn(4, 5, 1, 2, 3, **F64), torch.randn(5, 1, 2, 3, **F64)
    head = HEADS[name][1](scale=scale, per_output=True)
    law = type(head.distribution(outputs))
    law = law(outputs, scale) if name == "Gaussian" else law(4.0, outputs, scale)
    expected = law.log_prob(target).sum((-3, -2, -1))
    assert_close(head.log_prob(outputs, target), expected, rtol=1e-12, atol=1e-12)
    flat = HEADS[name][1](scale=scale.flatten().tolist(), per_output=True)
    assert_close(flat.log_prob(outputs.flatten(2), target.flatten(1)), expected, rtol=1e-12, atol=1e-12)
    assert_close(head.variance(outputs), law.variance, rtol=1e-12, atol=0)
    assert head.output_hessian(outputs[0]).shape == outputs[0].shape
    assert HEADS[name][1](scale=0.3).output_hessian(outputs[0]).shape == ()


def test_errors():
    with pytest.raises(bae.errors.DataError, match=r"one scale for all outputs; got 2 of them.*per_output=True"):
        L.Gaussian([0.1, 0.2])
    with pytest.raises(bae.errors.DataError, match="positive, finite scales"):
        L.Gaussian([0.1, 0.0], per_output=True)
    with pytest.raises(bae.errors.DataError, match="positive, finite floor"):
        L.StudentT(floor=0.0)
    with pytest.raises(bae.errors.DataError, match="positive, finite dispersion"):
        L.NegativeBinomial(-1.0)
    with pytest.raises(bae.errors.DataError, match="degrees of freedom df above 2"):
        L.StudentT(2.0)
    three = L.Gaussian([0.1, 0.2, 0.3], per_output=True)
    with pytest.raises(bae.errors.ShapeError, match="a scale for each of the 4 numbers of a row; got 3 of them"):
        three.log_prob(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(bae.errors.ShapeError, match="a scale for each of the 1 numbers of a row; got 3 of them"):
        three.log_prob(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(bae.errors.ShapeError, match="a scale for each of the numbers of a row; got 3 of them"):
        three.variance(torch.zeros(3, 4))
    with pytest.raises(bae.errors.ShapeError, match="one noise number; got 2 in the state"):
        L.Gaussian().load_state_dict(L.Gaussian([0.1, 0.2], per_output=True).state_dict())


@pytest.mark.parametrize("given", [np.float32(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor([0.25]), [0.25]])
def test_one_number_in_any_form(given):
    assert L.Gaussian(given).noise_var == 0.0625 and L.Gaussian(given).arguments["scale"] == 0.25
    assert float(L.Gaussian(given, per_output=True).noise_var) == 0.0625


@pytest.mark.parametrize("given", ["a", {}, [[0.1], [0.2, 0.3]], torch.tensor(-0.1), np.float32("nan"), []])
@pytest.mark.parametrize("per_output", [False, True])
def test_what_is_no_noise_is_refused(given, per_output):
    with pytest.raises(bae.errors.DataError):
        L.Gaussian(given, per_output=per_output)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("state", [0.0, -1.0, math.inf, [0.1, -0.1], [0.1, math.nan]])
def test_a_state_that_is_no_noise_is_refused(name, state):
    head = HEADS[name][1](per_output=isinstance(state, list))
    with pytest.raises(bae.errors.DataError, match="in the state"):
        head.load_state_dict({"_extra_state": torch.tensor(state, **F64)})
    assert not head.is_estimated
