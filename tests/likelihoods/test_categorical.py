from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.curvature.hessian import cholesky
from bayesae.likelihoods import Categorical
from tests.likelihoods.cases import F64

BYTES = [k / 255 for k in range(256)]


def test_classes_are_those_of_cross_entropy():
    outputs, classes = torch.randn(5, 4, 3, **F64), torch.randint(3, (5, 4))
    expected = -torch.nn.functional.cross_entropy(outputs.movedim(-1, 1), classes, reduction="none").sum(1)
    assert_close(Categorical(3).log_prob(outputs, classes.double()), expected)
    assert_close(Categorical(3).log_prob(outputs, classes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grey_levels_are_found_in_either_precision(dtype):
    levels = torch.randint(256, (6, 10))
    x = (levels.float() / 255).to(dtype)  # rounded to single precision as a loader does
    head = Categorical(256, values=BYTES)
    head.check(x)
    outputs = torch.randn(6, 10, 256, dtype=dtype)
    expected = outputs.log_softmax(-1).gather(-1, levels[..., None])[..., 0].sum(-1)
    assert_close(head.log_prob(outputs, x), expected, rtol=0, atol=0)


def test_what_is_no_class():
    with pytest.raises(bae.errors.DataError, match=r"class numbers 0 \.\.\. 2 for Categorical; got 3"):
        Categorical(3).check(torch.tensor([[0.0, 3.0]]))
    with pytest.raises(bae.errors.DataError, match=r"class numbers 0 \.\.\. 2 for Categorical; got 0\.5"):
        Categorical(3).check(torch.tensor([[0.5, 1.0]]))
    with pytest.raises(bae.errors.DataError, match="one of 256 values for Categorical; got 7"):
        Categorical(256, BYTES).check(torch.tensor([[7.0, 1.0]]))


def test_zero_that_is_no_value_passes_the_check_and_has_no_probability():
    head = Categorical(2, [3.0, 5.0])
    target = torch.tensor([[0.0, 5.0]])
    head.check(target)
    outputs = torch.zeros(1, 2, 2)
    assert float(head.log_prob(outputs, target)) == -torch.inf
    masked = head.log_prob(outputs, target, torch.tensor([[False, True]]))
    assert_close(masked, torch.tensor([0.5]).log())


def test_arguments():
    with pytest.raises(bae.errors.DataError, match="n_classes of at least 2"):
        Categorical(1)
    with pytest.raises(bae.errors.DataError, match="3 increasing values"):
        Categorical(3, [0.0, 2.0, 1.0])
    with pytest.raises(bae.errors.DataError, match="3 increasing values; got values of shape .2,"):
        Categorical(3, [0.0, 2.0])
    assert repr(Categorical(4)) == "Categorical(n_classes=4)"


def test_law_of_values_draws_them():
    head = Categorical(3, [1.0, 2.5, 4.0])
    outputs = torch.randn(2, 3, **F64)
    draws = head.distribution(outputs).sample((20_000,))
    assert set(draws.unique().tolist()) == {1.0, 2.5, 4.0}
    error = (head.variance(outputs) / 20_000).sqrt()
    assert float(((draws.mean(0) - head.mean(outputs)) / error).abs().max()) < 4.5


def test_predictive_of_values_is_a_rounded_normal():
    """Its moments are the given ones where the Normal is wide beside the gaps, the variance up to a gap's own."""
    head, gap = Categorical(256, BYTES), 1 / 255
    mean, var = torch.tensor(0.5, **F64).expand(256), torch.tensor(0.05**2, **F64).expand(256)
    values = torch.tensor(BYTES, **F64)
    p = head.log_predictive(mean, var, values).exp()
    assert_close(p.sum(), torch.tensor(1.0, **F64), rtol=1e-12, atol=0)
    assert_close(p @ values, mean[0], rtol=1e-10, atol=0)
    assert_close(p @ (values - mean[0]) ** 2, var[0] + gap**2 / 12, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictive_of_values_in_the_tails(dtype):
    head = Categorical(256, BYTES)
    values = torch.tensor(BYTES, dtype=dtype)
    for mean, var in ((0.0, 1e-4), (1.0, 1e-4), (0.3, 0.0), (0.3, 1e-10)):
        got = head.log_predictive(torch.full_like(values, mean), torch.full_like(values, var), values)
        assert not bool(got.isnan().any())
        assert float(got.exp().sum()) == pytest.approx(1, abs=1e-5)
        assert int(got.argmax()) == round(mean * 255)
    # twenty scales out on either side, against the density times the gap
    got = head.log_predictive(torch.zeros(1, dtype=dtype), torch.full((1,), 0.04**2, dtype=dtype), values[204:205])
    mirror = head.log_predictive(torch.ones(1, dtype=dtype), torch.full((1,), 0.04**2, dtype=dtype), values[51:52])
    assert_close(mirror, got, rtol=1e-4, atol=0)
    density = torch.distributions.Normal(0.0, 0.04).log_prob(values[204:205].double()) - torch.tensor(255.0).log()
    assert_close(got.double(), density, rtol=1e-3, atol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0, 60.0])
def test_the_hessian_of_a_sure_class_keeps_its_sign(dtype, scale):
    """Diag(p) - p p^T as written cancels: the engine then saw a negative direction."""
    outputs = scale * torch.randn(200, 5, dtype=dtype)
    block = Categorical(5).output_hessian(outputs).values
    cholesky(block, "Hessian block")
    p = outputs.double().softmax(-1)
    exact = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    assert_close(block.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("bad", [2.5, 3.0, "a", None])
def test_number_of_classes_must_be_whole(bad):
    with pytest.raises(bae.errors.DataError, match="a whole number of n_classes"):
        Categorical(bad)


def test_arguments_from_arrays_can_be_written_as_json():
    head = Categorical(np.int64(2), np.array([1, 4]))
    assert json.loads(json.dumps(head.arguments)) == {"n_classes": 2, "values": [1.0, 4.0]}


@pytest.mark.parametrize("bad", [[[1, 2], [3]], "ab", [1, "b"], {}])
def test_values_must_be_numbers(bad):
    with pytest.raises(bae.errors.DataError, match="increasing values"):
        Categorical(2, bad)
